# SPDX-License-Identifier: Apache-2.0
# pyarrow.compute makes its functions at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false
"""What can be wrong with a row, found on whole columns: texts, markers, lists, image paths.

Columns are looked at as Arrow arrays and image folders are listed once each instead of asking for
every file; no image is decoded. `verify.py` goes through data sets with this.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm2vec_jax.data import manifest
from vlm2vec_jax.data.embedded import place
from vlm2vec_jax.data.folders import EVAL_COLUMNS, NEGATIVE_COLUMNS, TRAIN_COLUMNS
from vlm2vec_jax.data.mmeb import list_lengths
from vlm2vec_jax.data.paths import SEPARATOR, leaves_by_link, unsafe_path
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import image_size
from vlm2vec_jax.inputs import MultimodalInput

EMPTY = "neither text nor image"
MARKERS = "image markers disagree with images"
MISSING = "missing image file"
UNSAFE = "image path refused"
UNREADABLE = "unreadable image file"
UNEQUAL = "lists of unequal length"
NO_CANDIDATES = "empty candidate list"

_AT_ONCE = 64
_MARKER_PATTERN = r"<\|image_\d+\|>"


class Finding(NamedTuple):
    """Something wrong with a row: its number in the subset, where in it, what kind, in words."""

    index: int
    column: str
    kind: str
    message: str


class ImageFolder:
    """Which image paths are good, remembered; each folder is listed once."""

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        follow_symlinks: bool = False,
        kept: str | os.PathLike | None = None,
    ):
        """Nothing is read before the first question.

        Args:
          root: image root.
          follow_symlinks: allow links that lead out of it.
          kept: where images are that lay in the table (`embedded.py`).
        """
        self.root, self.kept = Path(root), kept
        self.follow_symlinks = follow_symlinks
        self._folders: dict[Path, tuple[dict[str, bool], str | None]] = {}
        self._known: dict[str, tuple[str, str] | None] = {}

    def fault(self, path: str) -> tuple[str, str] | None:
        """What is wrong with the image path(s) of one side, as (kind, message), if anything is."""
        if path not in self._known:
            parts = path.split(SEPARATOR)
            if len(parts) == 1:
                self._known[path] = self._check(path)
            else:
                return next(filter(None, map(self.fault, parts)), None)
        return self._known[path]

    def place(self, path: str) -> tuple[Path, str]:
        """The folder that an image path is relative to, and the path below it."""
        return place(path, self.root, self.kept)

    def words(self, path: str) -> str:
        """An image in messages: the name of its file."""
        root, below = self.place(path)
        return str(root / below)

    def _check(self, path: str) -> tuple[str, str] | None:
        root, below = self.place(path)
        reason = unsafe_path(below)
        if reason:
            return UNSAFE, f"{path!r}: {reason}"
        folder, name = os.path.split(os.path.normpath(below))
        if root / folder not in self._folders:
            self._folders[root / folder] = self._list(root, folder)
        files, outside = self._folders[root / folder]
        if outside:
            return UNSAFE, f"{path!r}: {outside}"
        if name not in files:
            return MISSING, f"no image file {self.words(path)}"
        if files[name] and not self.follow_symlinks:
            reason = leaves_by_link(root, below)
            if reason:
                return UNSAFE, f"{path!r}: {reason}"
        return None

    def _list(self, root: Path, folder: str) -> tuple[dict[str, bool], str | None]:
        """Files of a folder with whether each is a link, and why the folder may not be read."""
        outside = None if self.follow_symlinks else leaves_by_link(root, folder)
        if outside:
            return {}, outside
        try:
            with os.scandir(root / folder) as entries:
                return {e.name: e.is_symlink() for e in entries if e.is_file()}, None
        except OSError:
            return {}, None

    def mark(self, path: str, kind: str, message: str) -> None:
        """Remember that an image is bad."""
        self._known[path] = (kind, message)

    def check_headers(self, paths: Sequence[str], workers: int) -> None:
        """Open the files that are there, without decoding them, and remember the broken ones."""
        there = [path for path in paths if self.fault(path) is None]
        # Some at a time: handing a file to a thread takes as long as reading its header.
        parts = [there[k : k + _AT_ONCE] for k in range(0, len(there), _AT_ONCE)]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for part, reasons in zip(parts, pool.map(self._headers, parts), strict=True):
                for path, reason in zip(part, reasons, strict=True):
                    if reason:
                        self.mark(path, UNREADABLE, reason)

    def examine(
        self, paths: Sequence[str], *, decode: bool, workers: int
    ) -> Iterator[manifest.ImageFacts]:
        """Open files that are there (`manifest.examine_all`), those of each folder in order."""
        parts: dict[Path, dict[str, str]] = {}
        for path in paths:
            root, below = self.place(path)
            parts.setdefault(root, {})[below] = path
        for root, named in parts.items():
            for facts in manifest.examine_all(root, list(named), decode=decode, workers=workers):
                yield facts._replace(path=named[facts.path])

    def _headers(self, paths: Sequence[str]) -> list[str | None]:
        return [self._header(path) for path in paths]

    def _header(self, path: str) -> str | None:
        try:
            root, below = self.place(path)
            image_size(root / below)
        except UserError as error:
            return str(error)
        return None


def flat(column: pa.Array) -> pa.Array:
    """The values of a column, lists laid end to end."""
    return column.flatten() if pa.types.is_list(column.type) else column


def train_findings(
    rows: np.ndarray, batch: pa.RecordBatch, images: ImageFolder
) -> Iterator[Finding]:
    """What is wrong with training rows; `rows` are the row numbers of the batch."""
    names = batch.schema.names
    for text, path in (TRAIN_COLUMNS[:2], TRAIN_COLUMNS[2:]):
        yield from _pair_findings(rows, batch.column(text), batch.column(path), images, text, path)
    if not set(NEGATIVE_COLUMNS) & set(names):
        return
    # One is enough to have negatives, and either may be a list: bring both to the same shape.
    texts, paths = (_as_lists(batch.column(n)) if n in names else None for n in NEGATIVE_COLUMNS)
    lengths = [np.zeros(len(rows), np.int64) if c is None else list_lengths(c)
               for c in (texts, paths)]  # fmt: skip
    unequal = (lengths[0] != lengths[1]) & (lengths[0] > 0) & (lengths[1] > 0)
    for i in np.flatnonzero(unequal):
        message = f"{lengths[0][i]} negative texts but {lengths[1][i]} negative images"
        yield Finding(int(rows[i]), NEGATIVE_COLUMNS[0], UNEQUAL, message)
    count = np.where(unequal, 0, np.maximum(*lengths))
    yield from _pair_findings(
        np.repeat(rows, count),
        _padded(texts, lengths[0], count),
        _padded(paths, lengths[1], count),
        images,
        NEGATIVE_COLUMNS[0],
        NEGATIVE_COLUMNS[1],
        may_be_empty=True,
    )


def _as_lists(column: pa.Array) -> pa.Array:
    """A string column as lists of one string, absent strings as empty lists."""
    if pa.types.is_list(column.type):
        return column
    column = pc.fill_null(column, "")
    there = pc.not_equal(column, "").to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(there)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, column.filter(pa.array(there)))


def _padded(lists: pa.Array | None, lengths: np.ndarray, count: np.ndarray) -> pa.Array:
    """Flatten lists to `count` values a row: a row whose list is absent gets nulls."""
    take = np.full(int(count.sum()), -1, np.int64)
    values = pa.nulls(0, pa.string()) if lists is None else lists.flatten()
    there = np.repeat((lengths == count) & (count > 0), count)
    use = np.repeat(lengths == count, lengths)  # values of rows that are left out are not used
    take[there] = np.flatnonzero(use)
    return values.take(pa.array(take, mask=take < 0))


def eval_findings(
    rows: np.ndarray, batch: pa.RecordBatch, images: ImageFolder
) -> Iterator[Finding]:
    """What is wrong with evaluation rows; `rows` are the row numbers of the batch."""
    query_text, query_path, text, path = EVAL_COLUMNS
    yield from _pair_findings(
        rows, batch.column(query_text), batch.column(query_path), images, query_text, query_path
    )
    lengths = [list_lengths(batch.column(name)) for name in (text, path)]
    unequal = lengths[0] != lengths[1]
    for i in np.flatnonzero(unequal):
        message = f"{lengths[0][i]} candidate texts but {lengths[1][i]} candidate images"
        yield Finding(int(rows[i]), text, UNEQUAL, message)
    for i in np.flatnonzero(~unequal & (lengths[0] == 0)):
        yield Finding(int(rows[i]), text, NO_CANDIDATES, "the candidate list is empty")
    flat = [
        batch.column(name).flatten().filter(pa.array(np.repeat(~unequal, n)))
        for name, n in zip((text, path), lengths, strict=True)
    ]
    count = np.where(unequal, 0, lengths[0])
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    place = np.arange(count.sum()) - np.repeat(starts, count)
    yield from _pair_findings(
        np.repeat(rows, count), flat[0], flat[1], images, text, path, place=place
    )


def _pair_findings(
    rows: np.ndarray,
    texts: pa.Array,
    paths: pa.Array,
    images: ImageFolder,
    text_column: str,
    path_column: str,
    *,
    place: np.ndarray | None = None,
    may_be_empty: bool = False,
) -> Iterator[Finding]:
    """Check aligned texts and image paths; `place` is the position in a list, for messages."""
    texts, paths = pc.fill_null(texts, ""), pc.fill_null(paths, "")
    has_text = pc.not_equal(texts, "").to_numpy(zero_copy_only=False)
    has_image = pc.not_equal(paths, "").to_numpy(zero_copy_only=False)

    def found(i: int | np.integer, column: str, kind: str, message: str) -> Finding:
        where = column if place is None else f"{column}[{place[i]}]"
        return Finding(int(rows[i]), where, kind, message)

    if not may_be_empty:
        for i in np.flatnonzero(~has_text & ~has_image):
            yield found(i, text_column, EMPTY, EMPTY)
    any_marker = pc.count_substring_regex(texts, _MARKER_PATTERN).to_numpy()
    first_marker = pc.count_substring(texts, "<|image_1|>").to_numpy()
    count = has_image * (1 + pc.count_substring(paths, SEPARATOR).to_numpy())
    suspects = has_text & ((any_marker != count) | (first_marker != has_image))
    for i in np.flatnonzero(suspects):
        image = tuple(paths[int(i)].as_py().split(SEPARATOR)) if has_image[i] else ()
        message = MultimodalInput(texts[int(i)].as_py(), image).problem()
        if message:
            yield found(i, text_column, MARKERS, message)
    for i, kind, message in _bad_paths(paths, images):
        yield found(i, path_column, kind, message)


def _bad_paths(paths: pa.Array, images: ImageFolder) -> Iterable[tuple[int, str, str]]:
    coded = paths.dictionary_encode()
    faults = [images.fault(path) if path else None for path in coded.dictionary.to_pylist()]
    if not any(faults):
        return
    bad = np.array([fault is not None for fault in faults])
    codes = coded.indices.to_numpy()
    for i in np.flatnonzero(bad[codes]):
        kind, message = faults[codes[i]]  # type: ignore[misc]
        yield int(i), kind, message
