# SPDX-License-Identifier: Apache-2.0
# pyarrow.compute makes its functions at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false
"""The quick check of a data set before a run: every row, no image decoded.

Columns are scanned as Arrow arrays, image folders are listed once each instead of asking for
every file. What is found is a list with file and row, either raised together before the first
step or, with `on_bad_example = skip`, taken out and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm2vec_jax.data.folders import EVAL_COLUMNS, NEGATIVE_COLUMNS, TRAIN_COLUMNS, unsafe_path
from vlm2vec_jax.data.mmeb import EvalSource, TrainSource, list_lengths
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.images import image_size
from vlm2vec_jax.inputs import MultimodalInput

EMPTY = "neither text nor image"
MARKERS = "image markers disagree with images"
MISSING = "missing image file"
UNSAFE = "image path refused"
UNREADABLE = "unreadable image file"
UNEQUAL = "lists of unequal length"
NO_CANDIDATES = "empty candidate list"

_MARKER_PATTERN = r"<\|image_\d+\|>"


class Problem(NamedTuple):
    """Something wrong with one row.

    Attributes:
      file: the parquet file.
      row: row of that file, from 0.
      column: where in the row.
      message: what is wrong, in words.
      kind: one of this module's constants.
      subset: name of the subset.
      index: row of the subset, from 0 (differs from `row` after the first shard).
    """

    file: str
    row: int
    column: str
    message: str
    kind: str
    subset: str
    index: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}, {self.column}: {self.message}"


class _Finding(NamedTuple):
    index: int
    column: str
    kind: str
    message: str


class ImageFolder:
    """Which image paths are good, remembered; each folder is listed once."""

    def __init__(self, root: str | os.PathLike):
        """Nothing is read before the first question."""
        self.root = Path(root)
        self._folders: dict[str, frozenset[str]] = {}
        self._known: dict[str, tuple[str, str] | None] = {}

    def fault(self, path: str) -> tuple[str, str] | None:
        """What is wrong with an image path of the data, as (kind, message), if anything is."""
        if path not in self._known:
            self._known[path] = self._check(path)
        return self._known[path]

    def _check(self, path: str) -> tuple[str, str] | None:
        reason = unsafe_path(path)
        if reason:
            return UNSAFE, f"{path!r}: {reason}"
        folder, name = os.path.split(os.path.normpath(path))
        if folder not in self._folders:
            self._folders[folder] = self._list(self.root / folder)
        if name not in self._folders[folder]:
            return MISSING, f"no image file {self.root / path}"
        return None

    @staticmethod
    def _list(folder: Path) -> frozenset[str]:
        try:
            with os.scandir(folder) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except OSError:
            return frozenset()

    def check_headers(self, paths: Sequence[str], workers: int) -> None:
        """Open the files that are there, without decoding them, and remember the broken ones."""
        there = [path for path in paths if self.fault(path) is None]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for path, reason in zip(there, pool.map(self._header, there), strict=True):
                if reason:
                    self._known[path] = (UNREADABLE, reason)

    def _header(self, path: str) -> str | None:
        try:
            image_size(self.root / path)
        except UserError as error:
            return str(error)
        return None


def verify_train(
    sources: Sequence[TrainSource],
    image_root: str | os.PathLike | None = None,
    *,
    headers: bool | int = False,
    workers: int = 4,
) -> list[Problem]:
    """Check every row in use: texts, markers, image files.

    Args:
      sources: opened subsets.
      image_root: check images below this folder instead of each source's own.
      headers: also open image files without decoding: all of them, or this many of them, spread
        evenly over the data.
      workers: threads that open image files.

    Returns:
      The problems in order of subset and row; empty if the data is good.
    """
    return _verify(sources, image_root, headers, workers, _train_findings, _TRAIN_PATHS)


def verify_eval(
    sources: Sequence[EvalSource],
    image_root: str | os.PathLike | None = None,
    *,
    headers: bool | int = False,
    workers: int = 4,
) -> list[Problem]:
    """The same for evaluation rows: also candidate lists that are empty or of unequal lengths."""
    return _verify(sources, image_root, headers, workers, _eval_findings, _EVAL_PATHS)


def report(problems: Sequence[Problem], *, advice: str = "") -> None:
    """Raise everything found as one message; nothing happens for an empty list.

    Raises:
      UserError: the first problems with file, row and column, and how many there are.
    """
    raise_problems("The data has bad rows", [str(p) for p in problems], advice=advice)


class GoodRows(NamedTuple):
    """What is left of each subset without its bad rows.

    Attributes:
      sources: the subsets restricted to good rows, in order; a subset may be empty.
      rows: subset -> int64 rows of its file that are good.
      skipped: subset -> reason -> number of rows (a row counts once, by its first problem).
    """

    sources: list[TrainSource]
    rows: dict[str, np.ndarray]
    skipped: dict[str, dict[str, int]]


def good_rows(
    sources: Sequence[TrainSource],
    image_root: str | os.PathLike | None = None,
    *,
    headers: bool | int = False,
    workers: int = 4,
) -> GoodRows:
    """Take bad rows out (`on_bad_example = skip`); arguments as in `verify_train`.

    Raises:
      UserError: if no row at all is left.
    """
    problems = verify_train(sources, image_root, headers=headers, workers=workers)
    first: dict[str, dict[int, str]] = {source.subset: {} for source in sources}
    for problem in problems:
        first[problem.subset].setdefault(problem.index, problem.kind)
    rows, kept = {}, []
    for source in sources:
        bad = np.fromiter(first[source.subset], np.int64, len(first[source.subset]))
        rows[source.subset] = source.rows[~np.isin(source.rows, bad)]
        kept.append(source.select(rows[source.subset]))
    if sources and not any(len(source) for source in kept):
        report(problems, advice="No row is good; is the image root right?")
        raise UserError("No training row at all")
    skipped = {name: dict(Counter(kinds.values())) for name, kinds in first.items() if kinds}
    return GoodRows(kept, rows, skipped)


_TRAIN_PATHS = (TRAIN_COLUMNS[1], TRAIN_COLUMNS[3], NEGATIVE_COLUMNS[1])
_EVAL_PATHS = (EVAL_COLUMNS[1], EVAL_COLUMNS[3])


def _verify(
    sources: Sequence,
    image_root: str | os.PathLike | None,
    headers: bool | int,
    workers: int,
    findings: Callable[..., Iterator[_Finding]],
    path_columns: Sequence[str],
) -> list[Problem]:
    folders: dict[Path, ImageFolder] = {}
    problems: list[Problem] = []
    chosen = [
        folders.setdefault(root, ImageFolder(root))
        for root in (Path(image_root or source.image_root) for source in sources)
    ]
    if headers:
        _check_headers(sources, chosen, path_columns, headers, workers)
    for source, images in zip(sources, chosen, strict=True):
        for rows, batch in source.table.scan(source.rows):
            # Stable: the columns of a row stay in the order of the check.
            for found in sorted(findings(rows, batch, images), key=lambda f: f.index):
                file, row = source.where(found.index)
                problems.append(
                    Problem(
                        file,
                        row,
                        found.column,
                        found.message,
                        found.kind,
                        source.subset,
                        found.index,
                    )  # fmt: skip
                )
    return problems


def _check_headers(
    sources: Sequence,
    chosen: Sequence[ImageFolder],
    columns: Sequence[str],
    headers: bool | int,
    workers: int,
) -> None:
    unique: dict[tuple[int, str], None] = {}
    for source, images in zip(sources, chosen, strict=True):
        for _, batch in source.table.scan(source.rows):
            for name in set(columns) & set(batch.schema.names):
                for path in pc.unique(_flat(batch.column(name))).to_pylist():
                    if path:
                        unique.setdefault((id(images), path))
    wanted = sorted(unique)
    if headers is not True and len(wanted) > headers:
        wanted = [wanted[i * len(wanted) // headers] for i in range(headers)]
    for images in {id(i): i for i in chosen}.values():
        images.check_headers([path for owner, path in wanted if owner == id(images)], workers)


def _flat(column: pa.Array) -> pa.Array:
    return column.flatten() if pa.types.is_list(column.type) else column


def _train_findings(
    rows: np.ndarray, batch: pa.RecordBatch, images: ImageFolder
) -> Iterator[_Finding]:
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
        yield _Finding(int(rows[i]), NEGATIVE_COLUMNS[0], UNEQUAL, message)
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


def _eval_findings(
    rows: np.ndarray, batch: pa.RecordBatch, images: ImageFolder
) -> Iterator[_Finding]:
    query_text, query_path, text, path = EVAL_COLUMNS
    yield from _pair_findings(
        rows, batch.column(query_text), batch.column(query_path), images, query_text, query_path
    )
    lengths = [list_lengths(batch.column(name)) for name in (text, path)]
    unequal = lengths[0] != lengths[1]
    for i in np.flatnonzero(unequal):
        message = f"{lengths[0][i]} candidate texts but {lengths[1][i]} candidate images"
        yield _Finding(int(rows[i]), text, UNEQUAL, message)
    for i in np.flatnonzero(~unequal & (lengths[0] == 0)):
        yield _Finding(int(rows[i]), text, NO_CANDIDATES, "the candidate list is empty")
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
) -> Iterator[_Finding]:
    """Check aligned texts and image paths; `place` is the position in a list, for messages."""
    texts, paths = pc.fill_null(texts, ""), pc.fill_null(paths, "")
    has_text = pc.not_equal(texts, "").to_numpy(zero_copy_only=False)
    has_image = pc.not_equal(paths, "").to_numpy(zero_copy_only=False)

    def found(i: int | np.integer, column: str, kind: str, message: str) -> _Finding:
        where = column if place is None else f"{column}[{place[i]}]"
        return _Finding(int(rows[i]), where, kind, message)

    if not may_be_empty:
        for i in np.flatnonzero(~has_text & ~has_image):
            yield found(i, text_column, EMPTY, EMPTY)
    any_marker = pc.count_substring_regex(texts, _MARKER_PATTERN).to_numpy()
    first_marker = pc.count_substring(texts, "<|image_1|>").to_numpy()
    suspects = has_text & ((any_marker != has_image) | (first_marker != has_image))
    for i in np.flatnonzero(suspects):
        image = (paths[int(i)].as_py(),) if has_image[i] else ()
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
