# SPDX-License-Identifier: Apache-2.0
"""Opens everything that a data folder holds, training and evaluation alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec_jax.data.arrow import read_schema
from vlm2vec_jax.data.folders import (
    EVAL_COLUMNS,
    OWN_SPLIT,
    TRAIN_COLUMNS,
    is_tfds,
    list_splits,
    pair_files,
    tfds_folders,
    tfds_splits,
)
from vlm2vec_jax.data.mmeb import EvalSource, TrainSource
from vlm2vec_jax.errors import UserError, raise_problems

AnySource = TrainSource | EvalSource


def open_all(
    data: Path,
    subsets: Sequence[str] = (),
    splits: Sequence[str] = (),
    *,
    image_root: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    follow_symlinks: bool = False,
) -> list[AnySource]:
    """Open every subset and split of a folder, whichever kind each is, converting them.

    Args:
      data: a data folder or file.
      subsets: only these; all if empty.
      splits: only these; all if empty.
      image_root: as for `TrainSource`.
      cache_dir: as for `TrainSource`.
      follow_symlinks: as for `TrainSource`.

    Raises:
      UserError: one message with everything that cannot be opened.
    """
    opened, problems = try_all(
        data,
        subsets,
        splits,
        image_root=image_root,
        cache_dir=cache_dir,
        follow_symlinks=follow_symlinks,
    )
    raise_problems(f"Cannot read {data}", problems)
    return opened


def try_all(
    data: Path,
    subsets: Sequence[str] = (),
    splits: Sequence[str] = (),
    *,
    image_root: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    follow_symlinks: bool = False,
) -> tuple[list[AnySource], list[str]]:
    """`open_all` that returns what can be opened, and what is wrong with the rest.

    Raises:
      UserError: if there is nothing to open, or a subset asked for is not there.
    """
    opened, problems = [], []
    options: dict[str, Any] = {"cache_dir": cache_dir, "follow_symlinks": follow_symlinks}
    found = _parts(data, subsets, splits)
    for subset, split, kind in found:
        try:
            if issubclass(kind, EvalSource):
                opened.append(kind(data, subset, image_root, split=split, **options))
            else:
                opened.append(kind(data, subset, split, image_root, **options))
        except UserError as error:
            problems.append(str(error))
    return opened, problems


def _parts(
    data: Path, subsets: Sequence[str], splits: Sequence[str]
) -> list[tuple[str, str, type[AnySource]]]:
    """Subset, split and kind of everything that is asked for."""
    own = pair_files(data)
    if not own and not data.is_dir():
        raise UserError(f"{data}: no such data folder or file")
    found: list[tuple[str, str, type[AnySource]]] = [(name, OWN_SPLIT, TrainSource) for name in own]
    if is_tfds(data):
        found += [part for part in _tfds_parts(data) if not splits or part[1] in splits]
    folders = [] if own else [p for p in sorted(data.iterdir()) if p.is_dir() and p.name[0] != "."]
    for folder in folders:
        for split, files in list_splits(folder).items():
            if splits and split not in splits:
                continue
            found.append((folder.name, split, _kind(files)))
    missing = sorted(set(subsets) - {subset for subset, *_ in found})
    if missing:
        there = ", ".join(sorted({subset for subset, *_ in found})) or "none"
        raise UserError(f"{data}: no subset {', '.join(missing)}; there are: {there}")
    if not found:
        raise UserError(
            f"{data}: no data in it (<Subset>/<split>-*.parquet, or files of own pairs)"
        )
    return [part for part in found if not subsets or part[0] in subsets]


def _tfds_parts(data: Path) -> list[tuple[str, str, type[AnySource]]]:
    from vlm2vec_jax.data import tfds, tfds_eval, tfds_train  # load TFDS, which few need

    return [
        (name, split, kind)
        for form, kind in (
            (tfds_train.FORM, tfds.TfdsSource), (tfds_eval.FORM, tfds.TfdsEvalSource)
        )
        for name, folder in tfds_folders(data, form.holds[0]).items()
        for split in tfds_splits(folder)
        if not (kind is tfds.TfdsEvalSource and split.endswith(tfds_eval.IMAGES))
    ]  # fmt: skip


def _kind(files: Sequence[Path]) -> type[AnySource]:
    """Training or evaluation, by the columns; training where it cannot be told."""
    with contextlib.suppress(UserError):  # told again, with all others, when it is opened
        names = set(read_schema(files[0]).names)
        if set(EVAL_COLUMNS) <= names and not set(TRAIN_COLUMNS) <= names:
            return EvalSource
    return TrainSource
