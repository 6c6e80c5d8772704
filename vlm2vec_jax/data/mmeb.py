# SPDX-License-Identifier: Apache-2.0
# pyarrow.compute makes its functions at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false
"""MMEB's rows: random access to training and evaluation examples of a data folder.

Texts are kept verbatim, trailing newlines and spaces included; an empty string or a null means
"absent". Rows are counted from 0 everywhere. `folders.py` says how a data folder is laid out;
other layouts (`instructions.py`, `pairs.py`) arrive here with MMEB's columns.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm2vec_jax.data.arrow import Reader, read_schema
from vlm2vec_jax.data.folders import (
    EVAL_COLUMNS,
    INSTRUCTION_COLUMNS,
    NEGATIVE_COLUMNS,
    OWN_SPLIT,
    TRAIN_COLUMNS,
    checked_subsets,
    is_tfds,
    list_subsets,
)
from vlm2vec_jax.data.hub import local_data
from vlm2vec_jax.data.instructions import InstructionColumns
from vlm2vec_jax.data.source import Key, Source, as_text, as_texts, to_input
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import MultimodalInput

__all__ = [
    "EvalIndex",
    "EvalRow",
    "EvalSource",
    "Key",
    "TrainRow",
    "TrainSource",
    "list_subsets",
    "open_eval",
    "open_train",
    "to_input",
]


class TrainRow(NamedTuple):
    """A training example as the user wrote it; image paths are joined to the image root.

    Attributes:
      query: what is embedded on one side.
      positive: what it should match.
      negatives: hard negatives; empty where the data has none.
      subset: name of the subset.
      index: row in the subset's file, whatever rows of it are in use.
      positive_key: the positive as (text, image path in the data).
      negative_keys: the same of each negative.
    """

    query: MultimodalInput
    positive: MultimodalInput
    negatives: tuple[MultimodalInput, ...]
    subset: str
    index: int
    positive_key: Key
    negative_keys: tuple[Key, ...] = ()


class EvalRow(NamedTuple):
    """An evaluation query and its candidates as keys; candidate 0 is the truth."""

    subset: str
    index: int
    query_key: Key
    target_keys: tuple[Key, ...]


class EvalIndex(NamedTuple):
    """All inputs of a subset, each once, in order of first appearance.

    Attributes:
      queries: unique query keys.
      query_of_row: int64 [rows], the query of each row.
      targets: unique candidate keys.
      target_of: int64 [candidates of all rows], the target of each candidate.
      offsets: int64 [rows + 1]; the candidates of row i are `target_of[offsets[i]:offsets[i+1]]`.
    """

    queries: list[Key]
    query_of_row: np.ndarray
    targets: list[Key]
    target_of: np.ndarray
    offsets: np.ndarray


class TrainSource(Source):
    """One subset of MMEB-train: `len`, `[i]` and `take`, safe in threads.

    Attributes:
      rows: int64, increasing; the rows of the file in use (`[i]` reads row `rows[i]`).
      table: the memory-mapped columns.
      split: its name; `folders.OWN_SPLIT` of own pairs.
      in_files: images are files, which several rows may name; not copies in the examples.
    """

    in_files = True
    columns = TRAIN_COLUMNS
    optional = NEGATIVE_COLUMNS
    pairs = "train"

    def __init__(
        self,
        data: str | os.PathLike,
        subset: str,
        split: str = "original",
        image_root: str | os.PathLike | None = None,
        limit: int | None = None,
        *,
        cache_dir: str | os.PathLike | None = None,
        follow_symlinks: bool = False,
    ):
        """Open a subset, converting its files to Arrow the first time.

        Args:
          data: folder with one folder per subset, or own pairs: a file or a folder of files.
          subset: name of the folder, or of the file without its ending.
          split: `original`, `diverse_instruction`, `train`, or any other that is there; own pairs
            have none and ignore it.
          image_root: what image paths are relative to; if empty or None the data folder, or the
            folder in it that holds the first rows' images (`paths.find_image_root`).
          limit: use the first `limit` rows (VLM2Vec's cap per subset); None or 0 for all.
          cache_dir: where to keep the converted file (`arrow.open_set`).
          follow_symlinks: open images to which a symbolic link leads out of the image root.

        Raises:
          UserError: anything missing, damaged or of an unexpected type, by name.
        """
        super().__init__(data, subset, split, image_root, limit, cache_dir, follow_symlinks)
        if self.own:
            self.split = OWN_SPLIT
        self._check_types(TRAIN_COLUMNS, ())

    def __getitem__(self, i: int) -> TrainRow:
        row = int(self.rows[i])
        return self._build(row, self.table.row(row))

    def take(self, indices: Sequence[int] | np.ndarray) -> list[TrainRow]:
        """Many examples at once, in the order given."""
        rows = self.rows[np.asarray(indices, np.int64)]
        values = self.table.take(rows)
        return [self._build(int(r), v) for r, v in zip(rows, values, strict=True)]

    def keys(self, row: int, values: dict) -> tuple[Key, Key, list[Key]]:
        """Query, positive and negatives of a stored row as keys.

        Raises:
          UserError: for negative lists of unequal lengths.
        """
        query = (as_text(values["qry"]), as_text(values["qry_image_path"]))
        positive = (as_text(values["pos_text"]), as_text(values["pos_image_path"]))
        texts, paths = (as_texts(values.get(name)) for name in NEGATIVE_COLUMNS)
        count = max(len(texts), len(paths))
        texts, paths = texts or [""] * count, paths or [""] * count
        if len(texts) != len(paths):
            raise UserError(
                f"{self.at(row)}: {len(texts)} negative texts but {len(paths)} negative images"
            )
        return query, positive, [key for key in zip(texts, paths, strict=True) if any(key)]

    def _build(self, row: int, values: dict) -> TrainRow:
        query, positive, negatives = self.keys(row, values)
        try:
            return TrainRow(
                query=self.input(query),
                positive=self.input(self.as_target(positive)),
                negatives=tuple(self.input(self.as_target(key)) for key in negatives),
                subset=self.subset,
                index=row,
                positive_key=positive,
                negative_keys=tuple(negatives),
            )
        except UserError as error:
            raise UserError(f"{self.at(row)}: {error}") from None


class EvalSource(Source):
    """One subset of MMEB-eval: queries and their candidate lists as keys.

    Both layouts read alike: where the instruction has columns of its own it is joined to the
    texts (`instructions.py`).
    """

    columns = EVAL_COLUMNS
    pairs = "eval"

    def __init__(
        self,
        data: str | os.PathLike,
        subset: str,
        image_root: str | os.PathLike | None = None,
        limit: int | None = None,
        *,
        split: str = "test",
        cache_dir: str | os.PathLike | None = None,
        follow_symlinks: bool = False,
    ):
        """Open a subset; see `TrainSource` for the arguments and errors."""
        super().__init__(data, subset, split, image_root, limit, cache_dir, follow_symlinks)
        self._check_types(EVAL_COLUMNS[:2], EVAL_COLUMNS[2:])

    def _reader(self, files: Sequence[Path]) -> Reader:
        if not self.own and any(
            set(INSTRUCTION_COLUMNS) & set(read_schema(f).names) for f in files
        ):
            return InstructionColumns(self.subset)
        return super()._reader(files)

    def __getitem__(self, i: int) -> EvalRow:
        row = int(self.rows[i])
        values = self.table.row(row)
        texts, paths = as_texts(values["tgt_text"]), as_texts(values["tgt_img_path"])
        if len(texts) != len(paths):
            raise UserError(
                f"{self.at(row)}: {len(texts)} candidate texts (tgt_text) but {len(paths)} "
                f"candidate images (tgt_img_path)"
            )
        if not texts:
            raise UserError(f"{self.at(row)}: empty candidate list (tgt_text)")
        query = (as_text(values["qry_text"]), as_text(values["qry_img_path"]))
        targets = tuple(self.as_target(key) for key in zip(texts, paths, strict=True))
        return EvalRow(self.subset, row, query, targets)

    def unique_keys(self) -> EvalIndex:
        """Every query and every candidate once, and which row uses which.

        Raises:
          UserError: for a candidate list that is empty or of unequal lengths.
        """
        queries: dict[Key, int] = {}
        targets: dict[Key, int] = {}
        query_of, target_of, counts = [], [], []
        for rows, batch in self.table.scan(self.rows):
            lengths = [list_lengths(batch.column(name)) for name in EVAL_COLUMNS[2:]]
            bad = np.flatnonzero((lengths[0] != lengths[1]) | (lengths[0] == 0))
            if bad.size:
                self[int(np.searchsorted(self.rows, rows[bad[0]]))]  # raises, in words
            query_text, query_path, text, path = (batch.column(name) for name in EVAL_COLUMNS)
            query_of.append(number_keys(query_text, query_path, queries))
            target_of.append(number_keys(text.flatten(), path.flatten(), targets))
            counts.append(lengths[0])
        none = [np.zeros(0, np.int64)]
        return EvalIndex(
            queries=list(queries),
            query_of_row=np.concatenate(none + query_of),
            targets=[self.as_target(key) for key in targets],
            target_of=np.concatenate(none + target_of),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate(none + counts))]),
        )


def list_lengths(lists: pa.Array) -> np.ndarray:
    """Lengths of a list column, int64 [rows]; an absent list has length 0."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)


def number_keys(texts: pa.Array, paths: pa.Array, known: dict[Key, int]) -> np.ndarray:
    """Number (text, path) pairs in order of first appearance, adding new ones to `known`."""
    coded = [pc.fill_null(column, "").dictionary_encode() for column in (texts, paths)]
    codes = [column.indices.to_numpy().astype(np.int64) for column in coded]
    words = [column.dictionary.to_pylist() for column in coded]
    width = max(1, len(words[1]))
    pairs, first, inverse = np.unique(
        codes[0] * width + codes[1], return_index=True, return_inverse=True
    )
    numbers = np.empty(len(pairs), np.int64)
    for k in np.argsort(first, kind="stable"):
        key = (words[0][pairs[k] // width], words[1][pairs[k] % width])
        numbers[k] = known.setdefault(key, len(known))
    return numbers[inverse.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Sources opened one after the other, their errors collected."""

    sources: list
    problems: list[str]

    def add(self, open_one) -> None:
        try:
            self.sources.append(open_one())
        except UserError as error:
            self.problems.append(str(error))


def open_train(
    data: str | os.PathLike,
    subsets: Sequence[str] = (),
    split: str = "original",
    *,
    image_root: str | os.PathLike | None = None,
    limit: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    follow_symlinks: bool = False,
) -> list[TrainSource]:
    """Open several subsets of MMEB-train (all that have the split if none are named).

    `data` may also be own pairs (`pairs.py`), a TFDS data set (`tfds.py`), or a hub id that
    `prepare` has fetched.

    Raises:
      UserError: one message with everything wrong with any of them.
    """
    data = local_data(data)
    if is_tfds(data):
        from vlm2vec_jax.data import tfds  # loads TFDS, which nobody else needs

        return tfds.open_tfds(data, subsets, split, limit=limit, cache_dir=cache_dir)
    names = checked_subsets(data, subsets, split, TRAIN_COLUMNS)
    opened = _Opened([], [])
    for name in names:
        opened.add(
            lambda name=name: TrainSource(
                data,
                name,
                split,
                image_root,
                limit,
                cache_dir=cache_dir,
                follow_symlinks=follow_symlinks,
            )  # fmt: skip
        )
    raise_problems(f"Cannot read split {split!r} of {data}", opened.problems)
    return opened.sources


def open_eval(
    data: str | os.PathLike,
    subsets: Sequence[str] = (),
    *,
    split: str = "test",
    image_root: str | os.PathLike | None = None,
    limit: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    follow_symlinks: bool = False,
) -> list[EvalSource]:
    """Open several subsets of MMEB-eval (all that have the split if none are named).

    `data` may also be own pairs, a TFDS data set, or a hub id, as for `open_train`.

    Raises:
      UserError: one message with everything wrong with any of them.
    """
    data = local_data(data)
    if is_tfds(data):
        from vlm2vec_jax.data import tfds

        return tfds.open_tfds_eval(
            data, subsets, split, image_root=image_root, limit=limit, cache_dir=cache_dir
        )
    names = checked_subsets(data, subsets, split, EVAL_COLUMNS)
    opened = _Opened([], [])
    for name in names:
        opened.add(
            lambda name=name: EvalSource(
                data,
                name,
                image_root,
                limit,
                split=split,
                cache_dir=cache_dir,
                follow_symlinks=follow_symlinks,
            )  # fmt: skip
        )
    raise_problems(f"Cannot read split {split!r} of {data}", opened.problems)
    return opened.sources
