# SPDX-License-Identifier: Apache-2.0
"""The evaluation itself: embed each distinct input once, judge every row, write the results.

Subsets are done one after the other (small ones are embedded together) and each is on disk before
the next begins, so that an interrupted evaluation goes on where it stopped. An input that several
subsets share (by text and absolute image path) is embedded once for all of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vlm2vec_jax
from vlm2vec_jax.data import verify
from vlm2vec_jax.data.mmeb import list_subsets, open_eval
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.evaluation import mmeb, scoring, store, tables
from vlm2vec_jax.evaluation.embedding import (
    INPUTS_AT_ONCE,
    Embedding,
    Encoder,
    Plan,
    Source,
    plan_subset,
)
from vlm2vec_jax.evaluation.store import Key


def evaluate(
    encoder: Encoder,
    data: str | os.PathLike,
    subsets: Sequence[str] | None = None,
    *,
    output: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    similarity: scoring.Similarity = "cosine",
    encode_options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Evaluate an encoder on subsets of MMEB-eval's layout.

    Args:
      encoder: see `Encoder`.
      data: folder with one folder per subset.
      subsets: names; all that are there by default.
      output: receives `<subset>_embeddings.npz`, `<subset>_pred.jsonl`, `<subset>_score.json`,
        `scores.json`, `scores.md`. What an earlier run of the same model over the same data left
        there is used again.
      image_root: what image paths are relative to, `data` by default.
      similarity: "cosine", or "dot" for a model whose vectors are not normalised.
      encode_options: passed to `encoder.encode`, such as `progress=True`.
      say: receives one line of text for each thing that a user may want to know.

    Returns:
      The content of `scores.json`.

    Raises:
      UserError: unknown subsets, bad data (all of it in one message, before anything is
        embedded), or a file that cannot be written. Earlier results stay whole.
    """
    chosen, others = choose_subsets(data, subsets, output)
    sources = open_eval(data, chosen, image_root=image_root)
    verify.report(verify.verify_eval(sources, headers=True))
    store.check_folder(output)
    kept = []
    for name in others:
        try:
            kept += open_eval(data, [name], image_root=image_root)
        except UserError:
            say(f"{name}: its score of an earlier run is left out, its data cannot be read now")
    return evaluate_sources(
        encoder,
        sources,
        output=output,
        others=kept,
        similarity=similarity,
        encode_options=encode_options,
        say=say,
    )


def choose_subsets(
    data: str | os.PathLike, subsets: Sequence[str] | None, output: str | os.PathLike
) -> tuple[list[str], list[str]]:
    """The subsets to evaluate, and others of this data that the output folder has scores of.

    Raises:
      UserError: a subset that is not there, with the list of those that are.
    """
    there = list_subsets(data, "test")
    if not there:
        raise UserError(f"no subset of MMEB-eval's layout (<Subset>/test-*.parquet) in {data}")
    chosen, unknown = [], []
    for name in there if subsets is None else subsets:
        found = mmeb.find(name)
        spellings = [name, found.name, found.train_name] if found else [name]
        match = next((s for s in spellings if s in there), None)
        if match is None:
            unknown.append(f"no subset {name!r}")
        elif match not in chosen:
            chosen.append(match)
    raise_problems(
        f"unknown subsets in {data}",
        unknown,
        advice=f"subsets there: {', '.join(mmeb.in_order(there))}",
    )
    if not chosen:
        raise UserError("no subset was chosen")
    others = [n for n in there if n not in chosen and store.score_path(output, n).exists()]
    return mmeb.in_order(chosen), others


def evaluate_sources(
    encoder: Encoder,
    sources: Sequence[Source],
    *,
    output: str | os.PathLike,
    others: Sequence[Source] = (),
    similarity: scoring.Similarity = "cosine",
    encode_options: Mapping[str, Any] | None = None,
    inputs_at_once: int = INPUTS_AT_ONCE,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Evaluate subsets that were opened already; see `evaluate`.

    Args:
      others: subsets that are not to be evaluated now, but whose score in `output` joins
        `scores.json` if it is of this very encoder and data.
      inputs_at_once: subsets are gathered until they have as many new inputs; what is embedded
        at once is lost together in an interruption.
    """
    output = Path(output)
    made_with = {
        "format": store.FORMAT,
        "encoder": store.plain(dict(encoder.fingerprint())),
    }
    images: dict[Path, str] = {}
    plans = [plan_subset(source, images, made_with, similarity) for source in sources]
    scores: dict[str, dict[str, Any]] = {}
    pending = []
    for plan in plans:
        finished, why_not = _finished(output, plan)
        if finished is not None:
            scores[plan.subset] = finished
        else:
            if why_not:
                say(f"{plan.subset}: {why_not}; evaluated again")
            pending.append(plan)
    if scores:
        say(f"already evaluated, taken from {output}: {', '.join(scores)}")

    def embedded(plan: Plan, vectors: Mapping[Key, np.ndarray]) -> None:
        scores[plan.subset] = _score(plan, vectors, output, similarity, say)

    Embedding(encoder, pending, output, encode_options or {}, inputs_at_once, say).run(embedded)
    for source in others:
        plan = plan_subset(source, images, made_with, similarity)
        finished, why_not = _finished(output, plan)
        if finished is not None:
            scores[plan.subset] = finished
            say(f"{plan.subset}: scored by an earlier run of the same model, joins the table")
        else:
            say(f"{plan.subset}: not chosen and left out of the table, {why_not or 'not complete'}")

    result = {
        "benchmark": mmeb.BENCHMARK_VERSION,
        "version": vlm2vec_jax.__version__,
        "similarity": similarity,
        "subsets": {name: _summary(scores[name]) for name in mmeb.in_order(list(scores))},
        "averages": tables.averages(scores),
        "fingerprint": made_with,
    }
    for note in tables.notes(result):
        say(note)
    store.write_text(output / "scores.md", tables.markdown(result))
    store.write_json(output / "scores.json", result)
    return result


def _finished(output: Path, plan: Plan) -> tuple[dict[str, Any] | None, str]:
    """The stored score of a subset if it is of this model and data; otherwise None and why not."""
    path = store.score_path(output, plan.subset)
    score = store.read_json(path)
    if score is None:
        return None, f"{path.name} cannot be read" if path.exists() else ""
    different = store.differences(score.get("fingerprint"), plan.scored_from)
    if different:
        return None, f"{path.name} was made from something else ({'; '.join(different)})"
    if score.get("predictions_hash") != store.hash_file(
        store.predictions_path(output, plan.subset)
    ):
        return None, "its predictions are missing or were changed"
    return score, ""


# --------------------------------------------------------------------------------------- scoring


def _score(
    plan: Plan,
    vectors: Mapping[Key, np.ndarray],
    output: Path,
    similarity: scoring.Similarity,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Judge a subset and write its predictions and, last, its score."""
    matrix = np.stack([vectors[key] for key in plan.keys])
    verdicts = scoring.judge(
        matrix, matrix, plan.query_index, plan.candidates, similarity=similarity
    )
    rows = [_prediction(plan, verdicts, n) for n in range(len(plan.query_index))]
    path = store.predictions_path(output, plan.subset)
    store.write_jsonl(path, rows)
    meta_task, split = mmeb.group_of(plan.subset)
    score = {
        "acc": verdicts.accuracy,
        "num_correct": int(verdicts.correct.sum()),
        "num_pred": len(rows),
        "acc_reference": verdicts.reference_accuracy,
        "num_correct_reference": int((verdicts.reference_prediction == 0).sum()),
        "num_tied": int(verdicts.tied.sum()),
        "num_not_finite": int((~np.isfinite(verdicts.truth_score)).sum()),
        "mean_reciprocal_rank": float(np.mean(1.0 / verdicts.rank)),
        "meta_task": meta_task,
        "split": split,
        "predictions_hash": store.hash_file(path),
        "fingerprint": plan.scored_from,
    }
    store.write_json(store.score_path(output, plan.subset), score)
    say(
        f"{plan.subset}: {tables.percent(score['acc'])} % "
        f"({score['num_correct']} of {score['num_pred']})"
    )
    return score


def _prediction(plan: Plan, verdicts: scoring.Verdicts, n: int) -> dict[str, Any]:
    """A line of `<subset>_pred.jsonl`."""

    def named(position: int) -> dict[str, str] | None:
        return None if position < 0 else _named(plan.keys[plan.candidates[n][position]])

    top = zip(verdicts.top[n].tolist(), verdicts.top_scores[n].tolist(), strict=True)
    return {
        "row": n,
        "correct": bool(verdicts.correct[n]),
        "correct_reference": bool(verdicts.reference_prediction[n] == 0),
        "query": _named(plan.keys[plan.query_index[n]]),
        "truth": named(0),
        "predicted": named(int(verdicts.prediction[n])),
        "score": _finite(verdicts.prediction_score[n]),
        "truth_score": _finite(verdicts.truth_score[n]),
        "rank": int(verdicts.rank[n]),
        "candidates": len(plan.candidates[n]),
        "top": [
            {
                **_named(plan.keys[plan.candidates[n][position]]),
                "score": score,
                "truth": not position,
            }
            for position, score in top
            if position >= 0
        ],
    }


def _named(key: Key) -> dict[str, str]:
    return {"text": key[0], "image": key[1]}


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _summary(score: Mapping[str, Any]) -> dict[str, Any]:
    """What `scores.json` says of a subset."""
    names = ("acc", "meta_task", "split", "num_correct", "num_pred", "acc_reference")
    return {name: score[name] for name in names}
