# SPDX-License-Identifier: Apache-2.0
"""Rows of a mixture as examples: read, checked, encoded, replaced where they are bad.

An example is a list of inputs: the query, the positive, then hard negatives as far as they are
wanted. A row is bad when it cannot be read or encoded; with `on_bad_example="skip"` the next good
row of its subset stands in, which is the same row however often and wherever the batch is made.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import TrainRow, TrainSource
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import EncodedInput, MultimodalInput, content_hash

Encode = Callable[[MultimodalInput], EncodedInput]
Size = tuple[int, int]
"""Tokens and visual units of an input."""

# What a bad example raises (`images.py` turns whatever Pillow raises into a `UserError`).
# Anything else is a fault of the program and ends the run as such.
BAD_EXAMPLE = (UserError, OSError)

MAX_REPLACEMENTS = 100
"""Bad rows in succession before "skip" gives up: then the storage is ill, not an example."""

RETRY_S = (0.2, 1.0, 5.0)
"""Pauses before a read is tried again that failed as storage fails and files do not."""

_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO EAGAIN EINTR EBUSY ESTALE ETIMEDOUT ECONNRESET ECONNABORTED EHOSTUNREACH EHOSTDOWN "
        "ENETDOWN ENETUNREACH ENETRESET EREMOTEIO ENOLINK EMFILE ENFILE"
    ).split()
    if hasattr(errno, name)
}
_Result = TypeVar("_Result")


class Example(NamedTuple):
    """A row in its place of a batch.

    Attributes:
      items: what `work` made of the query, the positive and the negatives; empty if no row was
        good.
      source: number of the source in the mixture.
      at: position of the row that was used in the source.
      row: the same row in its file.
      ids: content hashes of the items where they were encoded, else ().
      problems: a message for each bad row on the way.
    """

    items: tuple
    source: int
    at: int
    row: int
    ids: tuple[int, ...]
    problems: tuple[str, ...]


class Watch:
    """What is being read at the moment and since when, for messages about slow storage."""

    def __init__(self):
        """Nothing is being read."""
        self._reading: dict[int, tuple[str, float]] = {}

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Note that this thread reads a row."""
        me = threading.get_ident()
        self._reading[me] = (what, time.monotonic())
        try:
            yield
        finally:
            self._reading.pop(me, None)

    def words(self) -> str:
        """The rows that have been read at for longest."""
        now = time.monotonic()
        found = sorted(self._reading.copy().values(), key=lambda item: item[1])
        if not found:
            return "no row is being read; packing, or another process, takes the time"
        told = [f"{what} for {now - since:.0f} s" for what, since in found[:3]]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return f"being read: {', '.join(told)}{more}"


class Reader:
    """Reads rows of a mixture.

    Args:
      mixture: which rows there are.
      work: what is made of each input: a processor's `encode`, or its `length`.
      negatives: how many hard negatives are wanted at most.
      skip: replace bad rows; otherwise a bad row has no items and one problem.
      stop: set when the batch is not wanted any more.
    """

    def __init__(
        self,
        mixture: Mixture,
        work: Callable[[MultimodalInput], _Result],
        *,
        negatives: int = 0,
        skip: bool = False,
        stop: threading.Event,
    ):
        self._mixture, self._work, self._negatives = mixture, work, negatives
        self._attempts = 1 + MAX_REPLACEMENTS if skip else 1
        self._stop = stop
        self.watch = Watch()

    def first_good(
        self,
        source: int,
        start: int,
        tried: int = 0,
        inputs: Sequence[MultimodalInput] | None = None,
    ) -> Example:
        """The row at `start` of a source, or the next good one within the tries that are left.

        Args:
          source: number in the mixture.
          start: position in the source.
          tried: rows that were tried before in this place.
          inputs: of the row at `start`, where it has been read already.
        """
        rows = self._mixture.sources[source]
        problems: list[str] = []
        for attempt in range(min(self._attempts - tried, len(rows) - tried)):
            if self._stop.is_set():  # an empty example, not None: grain drops Nones and goes on
                break
            at = (start + attempt) % len(rows)
            found = self.one(source, at, inputs)
            if found.items:
                return found._replace(problems=tuple(problems))
            problems += found.problems
            inputs = None
        row = int(rows.rows[start % len(rows)])
        return Example((), source, start % len(rows), row, (), tuple(problems[:1]))

    def one(self, source: int, at: int, inputs: Sequence[MultimodalInput] | None = None) -> Example:
        """A single row, good or bad; `inputs` where it has been read already."""
        number = int(self._mixture.sources[source].rows[at])
        read = self.inputs(source, at) if inputs is None else inputs
        items = read if isinstance(read, str) else self.made_of(source, at, read)
        if isinstance(items, str):
            return Example((), source, at, number, (), (items,))
        return Example(tuple(items), source, at, number, _hashes(items), ())

    def inputs(self, source: int, at: int) -> list[MultimodalInput] | str:
        """The query, the positive and the negatives of a row, or what is wrong with it."""
        return self._attempt(
            source,
            at,
            lambda rows: _inputs(patiently(lambda: rows[at], self._stop), self._negatives),
        )

    def inputs_in_files(self, source: int, at: int) -> list[MultimodalInput] | None:
        """The same where images are files, at the first try; None for any other row."""
        rows = self._mixture.sources[source]
        if not rows.in_files or self._stop.is_set():
            return None
        with self.watch.reading(f"{rows.subset}: {rows.at(int(rows.rows[at]))}"):
            try:
                return _inputs(rows[at], self._negatives)
            except BAD_EXAMPLE:
                return None  # whoever needs the row tries again, and says what is wrong

    def made_of(self, source: int, at: int, inputs: Sequence[MultimodalInput]) -> list | str:
        """What `work` makes of inputs of a row, or what is wrong with the row."""
        return self._attempt(
            source,
            at,
            lambda _: [
                patiently(lambda item=item: self._work(item), self._stop) for item in inputs
            ],
        )

    def _attempt(self, source: int, at: int, work: Callable[[TrainSource], list]) -> list | str:
        rows = self._mixture.sources[source]
        number = int(rows.rows[at])
        with self.watch.reading(f"{rows.subset}: {rows.at(number)}"):
            try:
                return work(rows)
            except BAD_EXAMPLE as error:
                return explain(rows, number, error)


def explain(source: TrainSource, row: int, error: BaseException) -> str:
    """One line: subset, file, row, reason."""
    where = source.at(row)
    reason = str(error).removeprefix(f"{where}: ") or type(error).__name__
    return f"{source.subset}: {where}: {reason}"


def _inputs(row: TrainRow, negatives: int) -> list[MultimodalInput]:
    items = {"query": row.query, "positive": row.positive}
    items |= {f"negative {i}": item for i, item in enumerate(row.negatives[:negatives])}
    for side, item in items.items():
        problem = item.problem()
        if problem:
            raise UserError(f"{side}: {problem}")
    return list(items.values())


def _hashes(items: Sequence) -> tuple[int, ...]:
    return tuple(content_hash(item) for item in items if isinstance(item, EncodedInput))


def patiently(work: Callable[[], _Result], stop: threading.Event) -> _Result:
    """Do `work`, again after a pause where the storage failed and not the file."""
    for pause in RETRY_S:
        try:
            return work()
        except BAD_EXAMPLE as error:
            if not is_transient(error) or stop.wait(pause):
                raise
    return work()


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is one of a storage that may recover."""
    seen = 0
    while error is not None and seen < 8:
        if isinstance(error, OSError) and error.errno in _TRANSIENT:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
