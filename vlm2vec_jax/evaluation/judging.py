# SPDX-License-Identifier: Apache-2.0
"""From vectors to `<subset>_score.json` and `<subset>_pred.jsonl`: every row judged and written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.evaluation import compress, corpus, metrics, mmeb, scoring, store
from vlm2vec_jax.evaluation.rows import Rows, Settings
from vlm2vec_jax.evaluation.store import Key


@dataclasses.dataclass(frozen=True)
class Judged:
    """The verdict on N rows; candidates are indices into the subset's keys, -1 = none.

    Attributes:
      correct: bool [N], the truth strictly beats every other candidate.
      correct_reference: bool [N], right by the reference's argmax.
      predicted: int [N], the truth if correct, otherwise the best that it does not beat.
      score: f32 [N], of `predicted`.
      truth_score: f32 [N].
      rank: int [N], place of the truth, ties against it.
      tied: bool [N].
      candidates: int [N], how many distinct ones the row has.
      top: int [N, K], the best ones.
      top_scores: f32 [N, K].
    """

    correct: np.ndarray
    correct_reference: np.ndarray
    predicted: np.ndarray
    score: np.ndarray
    truth_score: np.ndarray
    rank: np.ndarray
    tied: np.ndarray
    candidates: np.ndarray
    top: np.ndarray
    top_scores: np.ndarray

    @property
    def metric_ranks(self) -> np.ndarray:
        """`rank`, with rows whose truth has no finite score never ranked."""
        ranks = self.rank.astype(np.int64)
        return np.where(np.isfinite(self.truth_score), ranks, metrics.NEVER)


def judge(rows: Rows, matrix: np.ndarray, settings: Settings, similarity=None) -> Judged:
    """Judge a subset's rows.

    Args:
      rows: the subset.
      matrix: float32 [len(rows.keys), D].
      settings: own lists or the whole corpus.
      similarity: in place of the settings' own.
    """
    similarity = similarity or settings.similarity
    if settings.candidates == "corpus":
        return _in_corpus(rows, matrix, similarity)
    found = scoring.judge(matrix, matrix, rows.query_index, rows.candidates, similarity=similarity)

    def keys_at(n: int, positions: np.ndarray) -> np.ndarray:
        return np.where(positions < 0, -1, rows.candidates[n][positions])

    number = range(len(rows.candidates))
    return Judged(
        correct=found.correct,
        correct_reference=found.reference_prediction == 0,
        predicted=np.array([keys_at(n, found.prediction[n]) for n in number], np.int64),
        score=found.prediction_score,
        truth_score=found.truth_score,
        rank=found.rank,
        tied=found.tied,
        candidates=np.array([len(row) for row in rows.candidates]),
        top=np.stack([keys_at(n, found.top[n]) for n in number]),
        top_scores=found.top_scores,
    )


def _in_corpus(rows: Rows, matrix: np.ndarray, similarity) -> Judged:
    pool = np.unique(np.concatenate(rows.candidates))
    truth = np.array([row[0] for row in rows.candidates])
    place = np.searchsorted(pool, truth)
    found = corpus.rank(
        matrix[rows.query_index],
        matrix[pool],
        list(place[:, None]),
        similarity=similarity,
        top=scoring.TOP,
    )
    finite = np.isfinite(found.scores[:, 0])
    rank = np.where(finite, found.ranks[:, 0], len(pool))
    correct = finite & (rank == 1)
    rival = np.where(found.rival < 0, -1, pool[found.rival])
    return Judged(
        correct=correct,
        correct_reference=found.ahead[:, 0] == 0,
        predicted=np.where(correct, truth, rival),
        score=np.where(correct, found.scores[:, 0], found.rival_score),
        truth_score=found.scores[:, 0],
        rank=rank,
        tied=found.tied,
        candidates=np.full(len(truth), len(pool)),
        top=np.where(found.top < 0, -1, pool[found.top]),
        top_scores=found.top_scores,
    )


def score(
    rows: Rows, vectors: Mapping[Key, np.ndarray], output: Path, settings: Settings
) -> dict[str, Any]:
    """Judge a subset and write its predictions and, last, its score.

    Args:
      rows: the subset.
      vectors: float32 [D] of every key.
      output: the folder.
      settings: how rows are scored.

    Returns:
      What `<subset>_score.json` holds.
    """
    matrix = np.stack([vectors[key] for key in rows.keys])
    judged = judge(rows, matrix, settings)
    lines = [_prediction(rows, judged, n) for n in range(len(rows.query_index))]
    path = store.predictions_path(output, rows.subset)
    store.write_jsonl(path, lines)
    meta_task, split = mmeb.group_of(rows.subset)
    finite = np.isfinite(judged.truth_score)
    result = {
        "benchmark": mmeb.BENCHMARK_VERSION,
        "acc": float(np.mean(judged.correct)),
        "num_correct": int(judged.correct.sum()),
        "num_pred": len(lines),
        "num_data": len(lines),
        "acc_reference": float(np.mean(judged.correct_reference)),
        "num_correct_reference": int(judged.correct_reference.sum()),
        "num_tied": int(judged.tied.sum()),
        "num_not_finite": int((~finite).sum()),
        "mean_reciprocal_rank": float(np.mean(np.where(finite, 1.0 / judged.rank, 0.0))),
        "metrics": metrics.mean(judged.metric_ranks),
        "dimension": matrix.shape[1],
        "candidates": int(max(map(len, rows.candidates))),
        "published_shape": _published_shape(rows, settings),
        "meta_task": meta_task,
        "split": split,
        "predictions_hash": store.hash_file(path),
        "fingerprint": rows.scored_from,
    }
    if settings.variants:
        result["variants"] = {
            v.name: _variant(rows, matrix, settings, v) for v in settings.variants
        }
    store.write_json(store.score_path(output, rows.subset), result)
    return result


def _variant(
    rows: Rows, matrix: np.ndarray, settings: Settings, variant: compress.Variant
) -> dict[str, Any]:
    """Score of smaller vectors: fractions, and the bytes of one of them."""
    targets = np.unique(np.concatenate(rows.candidates))
    small = compress.compress(matrix, targets, variant)
    # Signs have no length to divide by: their dot product counts the equal ones.
    similarity = "dot" if variant.precision == "binary" else None
    judged = judge(rows, small, settings, similarity)
    return {
        "acc": float(np.mean(judged.correct)),
        "acc_reference": float(np.mean(judged.correct_reference)),
        "num_tied": int(judged.tied.sum()),
        "metrics": metrics.mean(judged.metric_ranks),
        "bytes": variant.bytes_of(matrix.shape[1]),
    }


def _published_shape(rows: Rows, settings: Settings) -> bool:
    """Whether there are as many queries and candidates as published scores were made with."""
    known = mmeb.find(rows.subset)
    return (
        known is not None
        and settings.candidates == "own"
        and len(rows.query_index) == known.queries
        and max(map(len, rows.candidates)) == known.candidates
    )


def _prediction(rows: Rows, judged: Judged, n: int) -> dict[str, Any]:
    """A line of `<subset>_pred.jsonl`."""
    truth = int(rows.candidates[n][0])

    def named(key: int) -> dict[str, str] | None:
        return None if key < 0 else {"text": rows.keys[key][0], "image": rows.keys[key][1]}

    top = zip(judged.top[n].tolist(), judged.top_scores[n].tolist(), strict=True)
    return {
        "row": n,
        "correct": bool(judged.correct[n]),
        "correct_reference": bool(judged.correct_reference[n]),
        "query": named(int(rows.query_index[n])),
        "truth": named(truth),
        "predicted": named(int(judged.predicted[n])),
        "score": _finite(judged.score[n]),
        "truth_score": _finite(judged.truth_score[n]),
        "rank": int(judged.rank[n]),
        "candidates": int(judged.candidates[n]),
        "top": [
            {**(named(key) or {}), "score": score, "truth": key == truth}
            for key, score in top
            if key >= 0
        ],
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def finished(output: Path, rows: Rows) -> tuple[dict[str, Any] | None, str]:
    """The stored score of a subset if it is of this model and data; otherwise None and why not."""
    path = store.score_path(output, rows.subset)
    stored = store.read_json(path)
    if stored is None:
        return None, f"{path.name} cannot be read" if path.exists() else ""
    different = store.differences(stored.get("fingerprint"), store.plain(rows.scored_from))
    if different:
        return None, f"{path.name} was made from something else ({'; '.join(different)})"
    if not whole(output, rows.subset, stored):
        return None, "its predictions are missing or were changed"
    return stored, ""


def whole(output: Path, subset: str, stored: Mapping[str, Any]) -> bool:
    """Whether the predictions beside a score are those that it was made with."""
    found = store.hash_file(store.predictions_path(output, subset))
    return stored.get("predictions_hash") == found
