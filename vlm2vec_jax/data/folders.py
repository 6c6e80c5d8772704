# SPDX-License-Identifier: Apache-2.0
"""MMEB's folders: which subsets, splits and parquet files there are, and what is wrong with them.

`<data>/<Subset>/<split>-00000-of-0000N.parquet` (what `datasets` pushes to the hub) or one
`<data>/<Subset>/<split>.parquet`. Only names and parquet footers are read here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlm2vec_jax.data.arrow import read_schema
from vlm2vec_jax.errors import UserError, raise_problems

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
INSTRUCTION_COLUMNS = ("qry_inst", "tgt_inst")

_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.parquet")


def unsafe_path(path: str) -> str | None:
    """Why an image path of the data may not be opened: it must stay below the image root."""
    if "\0" in path:
        return "image path with a NUL character"
    if os.path.isabs(path) or re.match(r"[A-Za-z]:[\\/]|\\\\", path):
        return "absolute image path; paths are relative to the image root"
    normal = os.path.normpath(path)
    if normal == ".." or normal.startswith("../"):
        return "image path leaves the image root"
    return None


def list_subsets(data: str | os.PathLike, split: str) -> list[str]:
    """Names of the folders below `data` that hold a parquet set of this split, sorted.

    Raises:
      UserError: if `data` is not a folder.
    """
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder")
    folders = (p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith("."))
    return [folder.name for folder in folders if split in list_splits(folder)]


def list_splits(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """The parquet files of each split of one subset's folder, in order of their names."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(Path(folder).glob("*.parquet")):
        match = _SHARD.fullmatch(file.name)
        splits.setdefault(match["split"] if match else file.stem, []).append(file)
    return splits


def _shards_of(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """Check that the files of a split are one complete set."""
    matches = [_SHARD.fullmatch(file.name) for file in files]
    if len(files) == 1 and matches[0] is None:
        return files
    counts = sorted({int(match["count"]) for match in matches if match})
    if None in matches or len(counts) > 1:
        names = ", ".join(file.name for file in files[:6])
        raise UserError(f"{folder}: several parquet sets of split {split!r} ({names}); keep one")
    there = {int(match["index"]) for match in matches if match}
    missing = sorted(set(range(counts[0])) - there)
    if missing:
        names = ", ".join(f"{split}-{k:05d}-of-{counts[0]:05d}.parquet" for k in missing[:6])
        raise UserError(f"{folder}: {len(missing)} of {counts[0]} parquet files missing: {names}")
    return files


def check_subset(data: Path, subset: str, split: str, columns: Sequence[str]) -> list[Path]:
    """The shards of a subset after checking that they are all there with all columns."""
    folder = data / subset
    if not data.is_dir():
        raise UserError(f"{data}: no such data folder")
    if Path(subset).name != subset or not folder.is_dir():
        there = list_subsets(data, split)
        close = difflib.get_close_matches(subset.replace("-", "_"), there, 1) or (
            difflib.get_close_matches(subset, there, 1)
        )
        hint = f" (did you mean {close[0]}?)" if close else ""
        names = ", ".join(there) or f"none with split {split!r}"
        raise UserError(f"unknown subset {subset!r}{hint}; {data} has: {names}")
    splits = list_splits(folder)
    if split not in splits:
        raise UserError(
            f"{folder}: no parquet file of split {split!r}; splits there: "
            f"{', '.join(sorted(splits)) or 'none'}"
        )
    files = _shards_of(folder, split, splits[split])
    problems = []
    for file in files:
        names = read_schema(file).names
        missing = [name for name in columns if name not in names]
        if missing and set(INSTRUCTION_COLUMNS) & set(names):
            problems.append(
                f"{file}: this layout has the instruction in columns of its own "
                f"({', '.join(INSTRUCTION_COLUMNS)}), which is not supported; "
                f"use the data set with the instruction inside {', '.join(columns)}"
            )
        elif missing:
            problems.append(f"{file}: no column {', '.join(missing)} (it has {', '.join(names)})")
        elif set(INSTRUCTION_COLUMNS) & set(names):
            problems.append(
                f"{file}: this layout has the instruction in columns of its own "
                f"({', '.join(n for n in INSTRUCTION_COLUMNS if n in names)}), not supported"
            )
    if len(problems) == 1:
        raise UserError(problems[0])
    raise_problems(f"{folder}: columns", problems)
    return files


def checked_subsets(
    data: str | os.PathLike, subsets: Sequence[str], split: str, columns: Sequence[str]
) -> list[str]:
    """Resolve the subsets asked for and report everything wrong with any of them together."""
    names = list(subsets) or list_subsets(data, split)
    if not names:
        raise UserError(f"{data}: no subset with split {split!r} (<Subset>/{split}-*.parquet)")
    problems = [f"subset {n!r} is listed twice" for n in sorted(set(names)) if names.count(n) > 1]
    for name in names:
        try:
            check_subset(Path(data), name, split, columns)
        except UserError as error:
            problems.append(str(error))
    raise_problems(f"Cannot read split {split!r} of {data}", problems)
    return names
