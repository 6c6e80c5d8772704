# SPDX-License-Identifier: Apache-2.0
"""What readers of subsets share: what a key stands for, and an Arrow table with rows in use."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa

from vlm2vec_jax.data.arrow import ArrowTable, ParquetColumns, Reader, open_set
from vlm2vec_jax.data.embedded import FOLDER, PREFIX, place
from vlm2vec_jax.data.folders import check_subset
from vlm2vec_jax.data.pairs import Pairs
from vlm2vec_jax.data.paths import SEPARATOR, find_image_root, leaves_by_link, unsafe_path
from vlm2vec_jax.data.target_instruction import instructed
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import MultimodalInput

Key = tuple[str, str]
"""(text, image path as the data writes it): what an input is, for de-duplication.

Several images of one side (own pairs only) are joined by `paths.SEPARATOR`.
"""

_ROOT_SAMPLES = 16


def to_input(
    key: Key,
    image_root: str | os.PathLike,
    *,
    follow_symlinks: bool = False,
    kept: str | os.PathLike | None = None,
) -> MultimodalInput:
    """The input that a key stands for.

    Args:
      key: text and image path(s).
      image_root: what the paths are relative to.
      follow_symlinks: open files to which a symbolic link leads out of the image root.
      kept: where images are that lay in the table (`embedded.py`).

    Raises:
      UserError: if an image path leaves the image root.
    """
    text, path = key
    if not path:
        return MultimodalInput(text=text)
    files = []
    for one in path.split(SEPARATOR):
        root, below = place(one, image_root, kept)
        reason = unsafe_path(below)
        if reason is None and not follow_symlinks:
            reason = leaves_by_link(root, below)
        if reason:
            raise UserError(f"{one!r}: {reason}")
        files.append(Path(os.path.join(root, below)))
    return MultimodalInput(text=text, images=tuple(files))


def as_text(value: object) -> str:
    """A cell that should hold text; absent is empty."""
    return value if isinstance(value, str) else ""


def as_texts(value: object) -> list[str]:
    """A cell that holds a list of texts, or one text; absent is an empty list."""
    if isinstance(value, list):
        return [as_text(v) for v in value]
    return [as_text(value)] if value else []


class Source:
    """What both readers share: an Arrow table, and which of its rows are in use."""

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    pairs: Literal["train", "eval"]
    target_instruction: str = ""
    """What stands in front of targets that are text alone: a rule of `target_instruction.py`."""

    def __init__(
        self,
        data: str | os.PathLike,
        subset: str,
        split: str,
        image_root: str | os.PathLike | None,
        limit: int | None,
        cache_dir: str | os.PathLike | None,
        follow_symlinks: bool,
    ):
        if limit is not None and limit < 0:
            raise UserError(f"the cap on examples per subset must not be negative, not {limit}")
        self.data, self.subset, self.split = Path(data), subset, split
        self.limit = limit or None
        self.follow_symlinks = follow_symlinks
        files = self._files()
        folder = self.data.parent if self.data.is_file() else self.data
        self.table: ArrowTable = open_set(
            files, self._reader(files), f"{subset}/{split}", data=folder, cache_dir=cache_dir
        )
        self.image_root = Path(image_root) if image_root else self._find_root(folder)
        count = len(self.table) if self.limit is None else min(self.limit, len(self.table))
        self.rows: np.ndarray = np.arange(count, dtype=np.int64)

    def _files(self) -> list[Path]:
        """The files of the subset, all there."""
        return check_subset(self.data, self.subset, self.split, self.columns)

    @property
    def own(self) -> bool:
        """Whether the rows are own pairs, which have no splits."""
        return not (self.data / self.subset).is_dir()

    def _reader(self, files: Sequence[Path]) -> Reader:
        if not self.own:
            return ParquetColumns((*self.columns, *self.optional))
        return Pairs(self.pairs)

    def _find_root(self, folder: Path) -> Path:
        """Where the images of the first rows lie."""
        names = [name for name in self.table.columns if name.endswith(("image_path", "img_path"))]
        samples: list[str] = []
        for values in self.table.take(range(min(len(self.table), _ROOT_SAMPLES))):
            for name in names:
                for path in as_texts(values[name])[:2]:
                    samples += path.split(SEPARATOR)
        return find_image_root(folder, [s for s in samples if not s.startswith(PREFIX)])

    @functools.cached_property
    def kept(self) -> Path:
        """Where images are that lay in the files: beside the converted table."""
        return self.table.path.parents[1] / FOLDER

    def input(self, key: Key) -> MultimodalInput:
        """The input that a key of this subset stands for (`to_input`)."""
        return to_input(key, self.image_root, follow_symlinks=self.follow_symlinks, kept=self.kept)

    def as_target(self, key: Key) -> Key:
        """A target's key with this source's instruction in its text."""
        text, image = key
        return instructed(self.target_instruction, self.subset, text, image), image

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.subset!r}, {self.split!r}, {len(self)} rows)"

    def select(self, rows: np.ndarray) -> Self:
        """The same subset restricted to increasing rows of the file."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (np.any(np.diff(rows) <= 0) or rows[0] < 0 or rows[-1] >= len(self.table)):
            raise ValueError("rows must be increasing and within the table")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.rows = rows
        return other

    def where(self, row: int) -> tuple[str, int]:
        """The parquet file of a row of the subset, and its row in that file."""
        return self.table.locate(int(row))

    def at(self, row: int) -> str:
        """The same in words, for messages."""
        file, line = self.where(row)
        return f"{file} row {line}"

    def _check_types(self, strings: Sequence[str], lists: Sequence[str]) -> None:
        problems = []
        for names, want, expected in ((strings, pa.string(), "text"), (lists, None, "lists")):
            for name in names:
                kind = self.table.schema.field(name).type
                if want is not None and kind != want or want is None and not pa.types.is_list(kind):
                    problems.append(f"column {name} holds {kind}, not {expected}")
        raise_problems(f"{self.data / self.subset}: split {self.split!r}", problems)
