# SPDX-License-Identifier: Apache-2.0
"""From a mixture to packed batches: rows read, decoded and packed ahead of the train step.

Rows are encoded one by one in a pool of threads (Pillow releases the interpreter's lock while it
decodes and resizes), put together in order and packed in a thread of their own. Which rows, and
in which order, never depends on the number of threads; a run resumes at a step by starting there.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import grain.experimental
import numpy as np

from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import EncodedInput, MultimodalInput, content_hash

Encode = Callable[[MultimodalInput], EncodedInput]
Pack = Callable[[list[EncodedInput], list[EncodedInput], list[tuple[EncodedInput, ...]]], Any]

# What a bad example raises (`images.py` turns whatever Pillow raises into a `UserError`).
# Anything else is a fault of the program and ends the run as such.
BAD_EXAMPLE = (UserError, OSError)

MAX_REPLACEMENTS = 100
"""Bad rows in succession before "skip" gives up: then the storage is ill, not an example."""


class BatchStats(NamedTuple):
    """What is known about a batch besides its arrays.

    Attributes:
      rows: int64 [B, 2], the rows really used: source of the mixture, row in its file.
      target_id: int64 [B]; equal for positives of the same content (`inputs.content_hash`: text
        and pixels), in any batch.
      skipped: a message for each bad row that was replaced.
      query_id: int64 [B]; the same of queries.
      negative_ids: per row, the same of its hard negatives.
    """

    rows: np.ndarray
    target_id: np.ndarray
    skipped: tuple[str, ...]
    query_id: np.ndarray
    negative_ids: tuple[tuple[int, ...], ...]

    @property
    def duplicate_targets(self) -> int:
        """How many rows have a target that an earlier row of the batch has."""
        return len(self.target_id) - len(np.unique(self.target_id))


class _Example(NamedTuple):
    query: EncodedInput | None
    positive: EncodedInput | None
    row: tuple[int, int]
    problems: tuple[str, ...]
    negatives: tuple[EncodedInput, ...] = ()
    query_id: int = 0
    target_id: int = 0
    negative_ids: tuple[int, ...] = ()


class _Closed(Exception):
    """The iterator was closed while a batch was being made."""


class Batches(Iterator[tuple[int, Any, BatchStats]]):
    """The iterator that `batches` returns; close it, or use it in a `with` block.

    After an error or `close` it is exhausted.
    """

    def __init__(self, dataset: grain.IterDataset, start_step: int, stop: threading.Event):
        """Start reading ahead, so that the first batches are made while the model compiles."""
        # In a box, so that the finalizer can drop grain's iterator: its own `__del__` complains
        # if it runs in the half-dismantled modules of a program's end, and so would ours.
        self._box = [iter(dataset)]
        self._step = start_step
        self._finalizer = weakref.finalize(self, _shut, self._box, stop)
        self._box[0].start_prefetch()

    def __next__(self) -> tuple[int, Any, BatchStats]:
        if not self._box:
            raise StopIteration
        try:
            packed, stats = next(self._box[0])
        except BaseException:
            self.close()
            raise
        step, self._step = self._step, self._step + 1
        return step, packed, stats

    def close(self) -> None:
        """Stop the threads; rows being decoded are finished, the others are dropped."""
        self._finalizer()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _shut(box: list[grain.DatasetIterator], stop: threading.Event) -> None:
    stop.set()
    while box:
        with contextlib.suppress(RuntimeError):  # joining itself, if the collector runs in a worker
            box.pop().close()


def batches(
    mixture: Mixture,
    batch_size: int,
    *,
    start_step: int = 0,
    encode: Encode,
    pack: Pack,
    workers: int = 4,
    on_bad_example: Literal["error", "skip"] = "error",
    prefetch: int = 2,
    negatives: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Batches:
    """Packed batches from `start_step` on, without end.

    Args:
      mixture: which rows come when.
      batch_size: pairs in the global batch.
      start_step: the first batch wanted, counted from 0; any step costs the same to start at.
      encode: a processor's `encode`; called from several threads at once.
      pack: called with the encoded queries, positives and hard negatives (per row, as many as it
        has) of a batch, in order, in one thread.
      workers: decoding threads; 0 does everything in the caller's thread.
      on_bad_example: what to do about a row that cannot be read or encoded. "error" raises;
        "skip" puts the next good row of the same subset in its place, which is the same row
        however often and wherever the batch is made, and reports it in `BatchStats.skipped`.
      prefetch: batches made ahead of the one in use.
      negatives: most hard negatives of a row that are read, its first ones.
      process: this process' number; it reads rows process, process + processes, ... of a batch.
      processes: how many processes share a global batch.

    Returns:
      An iterator of (step, what `pack` returned, `BatchStats`).

    Raises:
      UserError: for impossible arguments at once; while iterating, for bad examples, naming
        subset, file and row of each one in the batch.
    """
    if on_bad_example not in ("error", "skip"):
        raise UserError(f"on_bad_example must be 'error' or 'skip', not {on_bad_example!r}")
    if batch_size < 1 or processes < 1 or batch_size % processes:
        raise UserError(f"a batch of {batch_size} pairs cannot be shared by {processes} processes")
    numbers = (start_step, workers, prefetch, negatives)
    if not 0 <= process < processes or min(numbers) < 0:
        raise UserError(
            f"impossible pipeline: process {process} of {processes}, start_step {start_step}, "
            f"workers {workers}, prefetch {prefetch}, negatives {negatives}"
        )
    stop = threading.Event()
    local = batch_size // processes
    attempts = 1 if on_bad_example == "error" else 1 + MAX_REPLACEMENTS

    def load(flat: int) -> _Example:
        if stop.is_set():  # an empty example, not None: grain drops Nones and goes on to the next
            return _Example(None, None, (0, 0), ())
        return _load(mixture, int(flat), encode, attempts, negatives)

    def collate(examples: Sequence[_Example]) -> tuple[Any, BatchStats]:
        if stop.is_set():
            raise _Closed
        lost = [e.problems[-1] for e in examples if e.query is None]
        if lost and on_bad_example == "skip":
            lost = [f"{message} (and the rows after it failed as well)" for message in lost]
        raise_problems(
            "Bad training examples", lost, advice="--config.data.on_bad_example=skip skips them"
        )
        packed = pack(
            [e.query for e in examples],  # type: ignore
            [e.positive for e in examples],  # type: ignore
            [e.negatives for e in examples],
        )
        return packed, BatchStats(
            rows=np.array([e.row for e in examples], np.int64),
            target_id=np.array([e.target_id for e in examples], np.int64),
            skipped=tuple(message for e in examples for message in e.problems),
            query_id=np.array([e.query_id for e in examples], np.int64),
            negative_ids=tuple(e.negative_ids for e in examples),
        )

    rows = mixture.stream[start_step * batch_size + process :: processes].map(load)
    # Few enough rows ahead that crops do not pile up, enough that no thread waits for the others.
    ahead = min(max(local, 2 * workers), 16 * workers)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
    dataset = rows.to_iter_dataset(options).batch(local, drop_remainder=True, batch_fn=collate)
    if workers and prefetch:
        # One batch waits in the queue's hand besides those in it.
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=max(1, prefetch - 1)
        )
    return Batches(dataset, start_step, stop)


def _load(mixture: Mixture, flat: int, encode: Encode, attempts: int, negatives: int) -> _Example:
    """Encode a row, or the next good one of its subset within `attempts` tries."""
    number, position = mixture.locate(flat).tolist()
    source = mixture.sources[number]
    problems: list[str] = []
    for attempt in range(min(attempts, len(source))):
        at = (position + attempt) % len(source)
        try:
            row = source[at]
            query = _encode(row.query, "query", encode)
            positive = _encode(row.positive, "positive", encode)
            hard = tuple(
                _encode(item, f"negative {k}", encode)
                for k, item in enumerate(row.negatives[:negatives])
            )
        except BAD_EXAMPLE as error:
            where = source.at(int(source.rows[at]))
            reason = str(error).removeprefix(f"{where}: ") or type(error).__name__
            problems.append(f"{source.subset}: {where}: {reason}")
            continue
        return _Example(
            query,
            positive,
            (number, row.index),
            tuple(problems),
            hard,
            content_hash(query),
            content_hash(positive),
            tuple(content_hash(item) for item in hard),
        )
    return _Example(None, None, (number, int(source.rows[position])), tuple(problems[:1]))


def _encode(item: MultimodalInput, side: str, encode: Encode) -> EncodedInput:
    problem = item.problem()
    if problem:
        raise UserError(f"{side}: {problem}")
    return encode(item)
