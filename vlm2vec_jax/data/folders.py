# SPDX-License-Identifier: Apache-2.0
"""Data folders: which subsets, splits and files there are, and what is wrong with them.

MMEB: `<data>/<Subset>/<split>-00000-of-0000N.parquet` (what `datasets` pushes to the hub) or one
`<data>/<Subset>/<split>.parquet`. Own pairs (`pairs.py`): a file, or a folder of files, each a
subset of its name. Only names and parquet footers are read here.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlm2vec_jax.data.arrow import read_schema
from vlm2vec_jax.data.hub import local_data
from vlm2vec_jax.errors import UserError, raise_problems

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
INSTRUCTION_COLUMNS = ("qry_inst", "tgt_inst")

PAIR_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
"""Files of own pairs."""

OWN_SPLIT = "pairs"
"""What the one split of own pairs is called where a name is needed."""

_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.parquet")


def list_subsets(data: str | os.PathLike, split: str) -> list[str]:
    """Names of the subsets of `data` that have this split, sorted.

    Raises:
      UserError: if `data` is not a folder.
    """
    root = local_data(data)
    own = pair_files(root)
    if own:
        return list(own)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder")
    names = [folder.name for folder in _folders(root) if split in list_splits(folder)]
    if not names and is_tfds(root):
        return [n for n, folder in tfds_folders(root).items() if split in tfds_splits(folder)]
    return names


def _folders(root: Path) -> list[Path]:
    return [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def pair_files(data: str | os.PathLike) -> dict[str, Path]:
    """Files of own pairs by subset (their stem): `data` itself, or the files of that folder.

    A folder with subsets in MMEB's layout has none; whatever else lies in it is left alone.

    Raises:
      UserError: for a file of an unknown kind, or two files of one stem.
    """
    root = Path(data)
    if root.is_file():
        if root.suffix.lower() not in PAIR_SUFFIXES:
            raise UserError(f"{root}: a data file is one of {', '.join(PAIR_SUFFIXES)}")
        return {root.stem: root}
    if not root.is_dir() or any(list_splits(folder) for folder in _folders(root)):
        return {}
    files: dict[str, Path] = {}
    for file in sorted(root.iterdir()):
        if file.is_file() and file.suffix.lower() in PAIR_SUFFIXES and file.name[0] != ".":
            if file.stem in files:
                raise UserError(
                    f"{root}: {files[file.stem].name} and {file.name} would be one subset; "
                    f"rename one of them"
                )
            files[file.stem] = file
    return files


def list_splits(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """The parquet files of each split of one subset's folder, in order of their names."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(Path(folder).glob("*.parquet")):
        match = _SHARD.fullmatch(file.name)
        splits.setdefault(match["split"] if match else file.stem, []).append(file)
    return splits


def is_tfds(data: str | os.PathLike) -> bool:
    """Whether a folder is a TFDS data set and nothing else that can be read."""
    root = Path(data)
    if not root.is_dir() or pair_files(root):
        return False
    return not any(list_splits(folder) for folder in _folders(root)) and bool(tfds_folders(root))


def tfds_splits(folder: Path) -> list[str]:
    """The splits of one version of one config; none if its record cannot be read."""
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        return [split["name"] for split in info["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def tfds_folders(data: str | os.PathLike, holds: str = "") -> dict[str, Path]:
    """Subsets of a TFDS data set with their folders, by the name of the builder's config.

    Args:
      data: a TFDS `data_dir`, or a folder below it down to one version of one config. Of several
        versions the newest counts.
      holds: only those whose examples have this feature.
    """
    root, found = Path(data), {}
    for depth in range(4):
        for file in sorted(root.glob("/".join(["*"] * depth + ["features.json"]))):
            folder = file.parent
            try:
                info = json.loads((folder / "dataset_info.json").read_text())
                name = info.get("configName") or info["name"]
                version = tuple(int(n) for n in info["version"].split("."))
            except (OSError, ValueError, KeyError, AttributeError):
                continue
            if holds and holds not in _features(file, holds):
                continue
            if name not in found or version > found[name][0]:
                found[name] = (version, folder)
        if found:
            break
    return {name: folder for name, (_, folder) in sorted(found.items())}


def _features(file: Path, unknown: str) -> set[str]:
    """Features by a `features.json`; one that cannot be read is told when it is opened."""
    try:
        return set(json.loads(file.read_text())["featuresDict"]["features"])
    except (OSError, ValueError, KeyError, TypeError):
        return {unknown}


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
    """The shards of a subset after checking that they are all there with all columns.

    The columns of own pairs are looked at by whoever reads them.
    """
    folder = data / subset
    own = {} if folder.is_dir() else pair_files(data)
    if subset in own:
        return [own[subset]]
    if own:
        raise UserError(f"unknown subset {subset!r}; {data} has: {', '.join(own)}")
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
        if missing:
            problems.append(f"{file}: no column {', '.join(missing)} (it has {', '.join(names)})")
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
        raise UserError(
            f"{data}: no subset with split {split!r} (<Subset>/{split}-*.parquet), and no file of "
            f"pairs ({', '.join('*' + suffix for suffix in PAIR_SUFFIXES)})"
        )
    problems = [f"subset {n!r} is listed twice" for n in sorted(set(names)) if names.count(n) > 1]
    for name in names:
        try:
            check_subset(Path(data), name, split, columns)
        except UserError as error:
            problems.append(str(error))
    raise_problems(f"Cannot read split {split!r} of {data}", problems)
    return names
