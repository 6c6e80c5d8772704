# SPDX-License-Identifier: Apache-2.0
"""The evaluation itself: embed each distinct input once, judge every row, write the results.

Subsets are done one after the other (small ones are embedded together) and each is on disk before
the next begins, so that an interrupted evaluation goes on where it stopped. An input that several
subsets share (its text, and what is in its image files) is embedded once for all of them. Several
processes share the inputs and give the result of one; a shard embeds its part and leaves the
scoring to `merge`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.data import verify
from vlm2vec_jax.data.mmeb import list_subsets, open_eval
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.evaluation import judging, mmeb, results, rows, store, tables
from vlm2vec_jax.evaluation.embedding import (
    INPUTS_AT_ONCE,
    Embedding,
    Encoder,
    Plan,
    Source,
    plan_subset,
    tells_roles,
)
from vlm2vec_jax.evaluation.hosts import Hosts
from vlm2vec_jax.evaluation.rows import Settings
from vlm2vec_jax.evaluation.store import Key


def evaluate(
    encoder: Encoder,
    data: str | os.PathLike,
    subsets: Sequence[str] | None = None,
    *,
    output: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    follow_symlinks: bool = False,
    settings: Settings | None = None,
    target_instruction: str | None = None,
    encode_options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda message: None,
    hosts: Hosts | None = None,
    shard: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Evaluate an encoder on subsets of MMEB-eval's layout.

    Args:
      encoder: see `Encoder`.
      data: folder with one folder per subset.
      subsets: names; all that are there by default.
      output: receives `<subset>_embeddings.npz`, `<subset>_pred.jsonl`, `<subset>_score.json`,
        `scores.json`, `scores.md`. What an earlier run of the same model over the same data left
        there is used again.
      image_root: what image paths are relative to; found in or below `data` by default.
      follow_symlinks: open images to which a symbolic link leads out of the image root.
      settings: how rows are scored.
      target_instruction: in place of the encoder's own rule for targets that are text; "" for
        the data's texts as they are.
      encode_options: passed to `encoder.encode`, such as `progress=True`.
      say: receives one line of text for each thing that a user may want to know.
      hosts: the processes that share the work, each of which calls this with the same arguments.
      shard: (number from 0, how many): embed only this part and score nothing; the folders of all
        parts come together by `merge`.

    Returns:
      The content of `scores.json`; of a shard, what it is a part of.

    Raises:
      UserError: unknown subsets, bad data (all of it in one message, before anything is
        embedded), or a file that cannot be written. Earlier results stay whole.
    """
    hosts = hosts or Hosts()
    chosen, others = choose_subsets(data, subsets, output)
    others = hosts.agree(others)
    error: Exception | None = None
    where: dict[str, Any] = {"image_root": image_root, "follow_symlinks": follow_symlinks}
    sources = []
    try:
        sources = open_eval(data, chosen, **where)
        verify.report(verify.verify_eval(sources, headers=True))
        if hosts.writes:
            store.check_folder(output)
    except UserError as caught:
        error = caught
    hosts.settle(error)
    kept = []
    for name in others:
        try:
            kept += open_eval(data, [name], **where)
        except UserError:
            say(f"{name}: its score of an earlier run is left out, its data cannot be read now")
    own = getattr(encoder, "target_instruction", "")
    rule = own if target_instruction is None else target_instruction
    if rule:
        why = "as in this model's training" if rule == own else "as was asked for"
        say(f"targets that are text have an instruction in front, {why}")
    elif own:
        say("targets stay without the instruction that this model's training had in front of them")
    settings = dataclasses.replace(settings or Settings(), target_instruction=rule)
    for source in (*sources, *kept):
        source.target_instruction = rule
    return evaluate_sources(
        encoder,
        sources,
        output=output,
        others=kept,
        settings=settings,
        encode_options=encode_options,
        say=say,
        hosts=hosts,
        shard=shard,
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
    settings: Settings | None = None,
    encode_options: Mapping[str, Any] | None = None,
    inputs_at_once: int = INPUTS_AT_ONCE,
    say: Callable[[str], None] = lambda message: None,
    hosts: Hosts | None = None,
    shard: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Evaluate subsets that were opened already; see `evaluate`.

    Args:
      others: subsets that are not to be evaluated now, but whose score in `output` joins
        `scores.json` if it is of this very encoder and data.
      inputs_at_once: subsets are gathered until they have as many new inputs; what is embedded
        at once is lost together in an interruption.
    """
    output, settings, hosts = Path(output), settings or Settings(), hosts or Hosts()
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UserError(f"shard {shard[0]} of {shard[1]}: they are counted from 0")
    if shard is not None and hosts.count > 1:
        raise UserError("processes that talk to each other share the work without --shard")
    say = say if hosts.writes else (lambda message: None)
    made_with = {
        "format": store.FORMAT,
        "encoder": store.plain(dict(encoder.fingerprint())),
    }
    images: dict[str, str] = {}

    def plan(source: Source) -> Plan:
        return plan_subset(source, images, made_with, settings, tells_roles(encoder))

    plans = [plan(source) for source in sources]
    hosts.same("model, data or flags", store.hash_rows(one.scored_from for one in plans))
    scores: dict[str, dict[str, Any]] = {}
    pending = []
    for one in plans:
        # Only process 0 need see the folder.
        found, why_not = judging.finished(output, one) if hosts.writes else (None, "")
        if hosts.agree(found is not None):
            scores[one.subset] = found or {}
        else:
            if why_not:
                say(f"{one.subset}: {why_not}; evaluated again")
            pending.append(one)
    if scores:
        say(f"already evaluated, taken from {output}: {', '.join(scores)}")

    def embedded(plan: Plan, vectors: Mapping[Key, np.ndarray]) -> None:
        scores[plan.subset] = score = judging.score(plan, vectors, output, settings)
        say(
            f"{plan.subset}: {tables.percent(score['acc'])} % "
            f"({score['num_correct']} of {score['num_pred']})"
        )

    if shard is not None:
        for one in pending:
            rows.save(output, one, settings)
    work = Embedding(
        encoder, pending, output, encode_options or {}, inputs_at_once, say, hosts, shard
    )
    work.run(embedded)
    if shard is not None:
        say(
            f"shard {shard[0]} of {shard[1]} is embedded; bring the folders of all shards together "
            f"with python -m vlm2vec_jax.evaluation.merge"
        )
        return {"shard": list(shard), "subsets": [one.subset for one in plans], **made_with}
    result: list[dict[str, Any]] = []

    def together() -> None:
        for source in others:
            found, why_not = judging.finished(output, plan(source))
            if found is not None:
                scores[source.subset] = found
                say(f"{source.subset}: scored by an earlier run of the same model, joins the table")
            else:
                why_not = why_not or "not complete"
                say(f"{source.subset}: not chosen and left out of the table, {why_not}")
        result.append(results.write(output, scores, settings, made_with, say))

    error = None
    if hosts.writes:
        try:
            together()
        except Exception as caught:
            error = caught
    hosts.settle(error)
    return hosts.agree(result[0] if result else None)
