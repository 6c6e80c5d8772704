# SPDX-License-Identifier: Apache-2.0
"""Bring the results of several machines together, as if one had evaluated everything.

    python -m vlm2vec_jax.evaluation.merge DIR... --output DIR

Each DIR is an output folder of `evaluate`: of some of the subsets (`--subsets`), or of a part of
the inputs (`--shard i/n`). Complete subsets are taken over as they are; those that were embedded in
parts are put together and scored here, which needs neither the model nor the data. Folders of
different models, processor settings or data are refused, and so is a subset of which inputs are
missing. Nothing is written before all of it is known to be good.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.evaluation import judging, results, rows, store, tables
from vlm2vec_jax.evaluation.rows import Rows, Settings
from vlm2vec_jax.evaluation.store import Key
from vlm2vec_jax.flags import run, take_arguments


@dataclasses.dataclass
class Found:
    """What the folders hold of one subset.

    Attributes:
      scored: folders with its score, whole, and that score.
      rows: its rows and how to score them, from the first shard, and that folder.
      parts: folders with embeddings of some of its inputs.
    """

    scored: list[tuple[Path, dict[str, Any]]] = dataclasses.field(default_factory=list)
    rows: tuple[Path, Rows, Settings] | None = None
    parts: list[Path] = dataclasses.field(default_factory=list)


def merge(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Merge output folders of `evaluate`.

    Args:
      folders: what to merge; they stay as they are.
      output: receives what one evaluation of everything would have left there; may be one of them.
      say: receives lines of text.

    Returns:
      The content of `scores.json`.

    Raises:
      UserError: folders without results, of different models or data, subsets that are not
        complete; everything wrong in one message.
    """
    output = Path(output)
    subsets = _collect([Path(folder) for folder in folders])
    problems = []
    vectors: dict[str, dict[Key, np.ndarray]] = {}
    for name, found in subsets.items():
        if not found.scored and found.rows is not None:
            vectors[name], missing = _join(found)
            if missing:
                problems.append(
                    f"{name}: embeddings of {missing} of {len(found.rows[1].keys)} inputs are in "
                    f"none of the folders"
                )
    raise_problems(
        "these results are not complete",
        problems,
        advice="give the folders of all shards, each of them finished and of the same --subsets",
    )
    settings, made_with = _common(subsets)
    store.check_folder(output)
    scores: dict[str, dict[str, Any]] = {}
    for name, found in subsets.items():
        if found.scored:
            folder, scores[name] = found.scored[0]
            _take_over(folder, output, name)
            say(f"{name}: taken from {folder}")
        elif found.rows is not None:
            _, own, own_settings = found.rows
            there = vectors.pop(name)
            matrix = np.stack([there[key] for key in own.keys])
            path = store.embeddings_path(output, name)
            store.save_embeddings(path, own.keys, matrix, own.embedded_from)
            scores[name] = judging.score(own, there, output, own_settings)
            say(f"{name}: {tables.percent(scores[name]['acc'])} %, of {len(found.parts)} parts")
    return results.write(output, scores, settings, made_with, say)


def _collect(folders: Sequence[Path]) -> dict[str, Found]:
    """Everything in the folders, after checking that it belongs together."""
    subsets: dict[str, Found] = {}
    problems: list[str] = []
    encoder: tuple[Path, Any] | None = None
    made_from: dict[str, tuple[Path, dict]] = {}
    for folder in folders:
        if not folder.is_dir():
            problems.append(f"{folder} is not a folder")
            continue
        entries = _entries(folder, subsets, problems)
        if not entries:
            problems.append(f"{folder} holds no results of an evaluation")
        for name, fingerprint, what in entries:
            own = {"format": fingerprint.get("format"), "encoder": fingerprint.get("encoder")}
            encoder = encoder or (folder, own)
            different = store.differences(encoder[1], own)
            if different:
                problems.append(
                    f"{folder} is of another model than {encoder[0]} ({'; '.join(different)})"
                )
                break
            key = f"{name} {what}"
            first = made_from.setdefault(key, (folder, fingerprint))
            different = store.differences(first[1], fingerprint)
            if different:
                problems.append(
                    f"{name} in {folder} was made from something else than in {first[0]} "
                    f"({'; '.join(different)})"
                )
    raise_problems("these folders cannot be merged", problems)
    for name, found in subsets.items():
        if found.scored and found.rows is not None:
            _, score = found.scored[0]
            different = store.differences(
                score.get("fingerprint"), store.plain(found.rows[1].scored_from)
            )
            if different:
                problems.append(f"{name}: score and shards differ ({'; '.join(different)})")
    raise_problems("these folders cannot be merged", problems)
    return dict(sorted(subsets.items()))


def _entries(
    folder: Path, subsets: dict[str, Found], problems: list[str]
) -> list[tuple[str, dict, str]]:
    """What a folder holds, as (subset, fingerprint, kind); added to `subsets`."""
    entries = []
    for path in sorted(folder.glob("*_score.json")):
        name = path.name.removesuffix("_score.json")
        score = store.read_json(path)
        if score is None or not isinstance(score.get("fingerprint"), dict):
            problems.append(f"{path} cannot be read")
        elif not judging.whole(folder, name, score):
            problems.append(f"{path}: its predictions are missing or were changed; evaluate again")
        else:
            subsets.setdefault(name, Found()).scored.append((folder, score))
            entries.append((name, score["fingerprint"], "score"))
    for path in sorted(folder.glob("*_rows.npz")):
        name = path.name.removesuffix("_rows.npz")
        loaded = rows.load(path)
        if loaded is None:
            problems.append(f"{path} cannot be read")
            continue
        found = subsets.setdefault(name, Found())
        found.rows = found.rows or (folder, *loaded)
        found.parts.append(folder)
        entries.append((name, store.plain(loaded[0].scored_from), "rows"))
    return entries


def _join(found: Found) -> tuple[dict[Key, np.ndarray], int]:
    """All embeddings of a subset that the parts hold, and how many are missing."""
    assert found.rows is not None
    _, own, _ = found.rows
    together: dict[Key, np.ndarray] = {}
    for folder in found.parts:
        path = store.embeddings_path(folder, own.subset)
        part, _ = store.load_embeddings(path, own.embedded_from)
        together |= part or {}
    there = {key: together[key] for key in own.keys if key in together}
    return there, len(own.keys) - len(there)


def _common(subsets: dict[str, Found]) -> tuple[Settings, dict[str, Any]]:
    """How all subsets were scored, and the encoder's fingerprint.

    Raises:
      UserError: if some were scored otherwise than others.
    """
    named: dict[str, Any] = {}
    for name, found in subsets.items():
        if found.scored:
            made = found.scored[0][1]["fingerprint"]
        else:
            assert found.rows is not None
            made = store.plain(found.rows[1].scored_from)
        chosen = ("similarity", "candidates", "variants", "target_instruction")
        own = {k: made.get(k) for k in chosen}
        first = named.setdefault("settings", (name, own, made))
        different = store.differences(first[1], own)
        if different:
            raise UserError(
                f"{name} was scored otherwise than {first[0]} ({'; '.join(different)}); give all "
                f"evaluations the same flags"
            )
    _, own, made = named["settings"]
    dims, precisions = _of_names(own["variants"] or [])
    settings = Settings(
        own["similarity"],
        own["candidates"] or "own",
        dims,
        precisions,
        own["target_instruction"] or "",
    )
    return settings, {"format": made["format"], "encoder": made["encoder"]}


def _of_names(names: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Dimensions and precisions behind the names of `compress.variants`."""
    parts = [part for name in names for part in name.split("-")]
    dims = [int(part.removeprefix("dim")) for part in parts if part.startswith("dim")]
    precisions = [part for part in parts if not part.startswith("dim")]
    return tuple(dict.fromkeys(dims)), tuple(dict.fromkeys(precisions))


def _take_over(folder: Path, output: Path, subset: str) -> None:
    """Copy the files of a scored subset, the score last."""
    for path_of in (store.embeddings_path, store.predictions_path, store.score_path):
        source, target = path_of(folder, subset), path_of(output, subset)
        if source.exists() and source.resolve() != target.resolve():
            with source.open("rb") as file:
                store.write_atomically(target, lambda out, file=file: shutil.copyfileobj(file, out))


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    take_arguments(values)
    flags.DEFINE_string(
        "output", None, "folder for the merged results", required=True, flag_values=values
    )


def main(args: Any) -> None:
    """Merge and print the table."""
    from rich.console import Console

    if not args.arguments:
        raise UserError("give the folders to merge: merge DIR... --output DIR")
    console = Console()
    scores = merge(args.arguments, args.output, say=lambda line: console.print(line, markup=False))
    console.print(tables.console_table(scores))


if __name__ == "__main__":
    run(main, define)
