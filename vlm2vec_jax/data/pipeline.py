# SPDX-License-Identifier: Apache-2.0
"""From a mixture to packed batches: rows read, decoded and packed ahead of the train step.

Rows are encoded one by one in a pool of threads (Pillow releases the interpreter's lock while it
decodes and resizes), put together in order and packed in a thread of their own. A file that several
inputs of a step show is decoded once. Which rows, and in which order, never depends on the number
of threads or processes; a run resumes at a step by starting there.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.reading import Encode, Example, Reader, Watch
from vlm2vec_jax.data.sharing import Assembly, Sharing
from vlm2vec_jax.data.step_rows import StepRows
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import EncodedInput

if TYPE_CHECKING:
    import grain

__all__ = ["Batches", "BatchStats", "Encode", "Pack", "Sharing", "batches"]

Pack = Callable[[list[EncodedInput], list[EncodedInput], list[tuple[EncodedInput, ...]]], Any]
"""Called with the encoded queries, positives and hard negatives (per row, as many as it has)."""

SLOW_S = 60.0
"""A batch that is waited for longer is reported, again after twice the time, and so on."""

_ENDLESS = 2**62


class BatchStats(NamedTuple):
    """What is known about a batch besides its arrays; the same on all processes.

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


class _Closed(Exception):
    """The iterator was closed while a batch was being made."""


class Batches(Iterator[tuple[int, Any, BatchStats]]):
    """The iterator that `batches` returns; close it, or use it in a `with` block.

    After an error or `close` it is exhausted.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        start_step: int,
        stop: threading.Event,
        pool: ThreadPoolExecutor | None,
        slow: _Slow,
    ):
        """Start reading ahead, so that the first batches are made while the model compiles."""
        # In a box, so that the finalizer can drop grain's iterator: its own `__del__` complains
        # if it runs in the half-dismantled modules of a program's end, and so would ours.
        self._box = [iter(dataset)]
        self._step = start_step
        self._slow = slow
        self._finalizer = weakref.finalize(self, _shut, self._box, stop, pool)
        self._box[0].start_prefetch()

    def __next__(self) -> tuple[int, Any, BatchStats]:
        if not self._box:
            raise StopIteration
        try:
            with self._slow.waiting(self._step):
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


def _shut(
    box: list[grain.DatasetIterator], stop: threading.Event, pool: ThreadPoolExecutor | None
) -> None:
    stop.set()
    while box:
        with contextlib.suppress(RuntimeError):  # joining itself, if the collector runs in a worker
            box.pop().close()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)


class _Slow:
    """Says what is being read when a batch lets the train step wait for long."""

    def __init__(self, watch: Watch, report: Callable[[str], None] | None, slow_s: float):
        self._watch, self._report, self._slow_s = watch, report, slow_s

    @contextlib.contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        done = threading.Event()
        if self._report is not None:
            threading.Thread(target=self._tell, args=(step, done), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _tell(self, step: int, done: threading.Event) -> None:
        since, pause = time.monotonic(), self._slow_s
        while not done.wait(pause):
            waited = time.monotonic() - since
            assert self._report is not None
            self._report(
                f"the data of step {step + 1} has been waited for {waited:.0f} s; "
                f"{self._watch.words()}"
            )
            pause *= 2


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
    sharing: Sharing | None = None,
    report: Callable[[str], None] | None = None,
    slow_s: float = SLOW_S,
) -> Batches:
    """Packed batches from `start_step` on, without end.

    Args:
      mixture: which rows come when.
      batch_size: pairs in the global batch.
      start_step: the first batch wanted, counted from 0; any step costs the same to start at.
      encode: a processor's `encode`; called from several threads at once.
      pack: packs a batch that one process has for itself (`Pack`), in one thread.
      workers: decoding threads; 0 does everything in the caller's thread.
      on_bad_example: what to do about a row that cannot be read or encoded. "error" raises;
        "skip" puts the next good row of the same subset in its place, which is the same row
        however often and wherever the batch is made, and reports it in `BatchStats.skipped`.
      prefetch: batches made ahead of the one in use.
      negatives: hard negatives that a pair may bring along; 0 leaves them out.
      sharing: the other processes, where several have a part of each batch; `pack` is then not
        used, but `sharing.packer`.
      report: gets a sentence when a batch is waited for longer than `slow_s` seconds: what is
        being read.
      slow_s: see `report`.

    Returns:
      An iterator of (step, what was packed, `BatchStats`).

    Raises:
      UserError: for impossible arguments at once; while iterating, for bad examples, naming
        subset, file and row of each one in the batch.
    """
    skip = on_bad_example == "skip"
    process, processes = (0, 1) if sharing is None else (sharing.process, sharing.processes)
    _check(batch_size, process, processes, on_bad_example, start_step, workers, prefetch, negatives)
    stop = threading.Event()
    local = batch_size // processes
    work = encode if sharing is None else sharing.measure
    reader = Reader(mixture, work, negatives=negatives, skip=skip, stop=stop)
    assembly = pool = None
    if sharing is not None:
        pool = ThreadPoolExecutor(workers, "grain-decode") if workers else None
        encoder = Reader(mixture, encode, negatives=negatives, skip=skip, stop=stop)
        encoder.watch = reader.watch
        assembly = Assembly(sharing, reader, encoder, skip=skip, pool=pool, stop=stop)
    counted = start_step

    def draw(step: int) -> list[tuple[int, int]]:
        mine = mixture.batch_indices(step, batch_size)[process::processes]
        return [(source, position) for source, position in mine.tolist()]

    # Where processes share batches the rows' headers are read here, and pixels by `Assembly`.
    step_rows = StepRows(draw, reader.inputs_in_files if sharing is None else None)

    def load(number: int) -> Example:
        if stop.is_set():  # an empty example, not None: grain drops Nones and goes on to the next
            return Example((), 0, 0, 0, (), ())
        (source, position), inputs = step_rows.take(*divmod(int(number), local))
        return reader.first_good(source, position, inputs=inputs)

    def collate(examples: Sequence[Example]) -> tuple[Any, BatchStats]:
        nonlocal counted
        step, counted = counted, counted + 1
        if stop.is_set():
            raise _Closed
        packed = None
        if assembly is not None:
            try:
                packed, examples = assembly.batch(step, examples)
            except Exception as error:
                raise (_Closed() if stop.is_set() else error) from None
        lost = [e.problems[-1] for e in examples if not e.items]
        if lost and skip:
            lost = [f"{message} (and the rows after it failed as well)" for message in lost]
        raise_problems(
            "Bad training examples", lost, advice="--config.data.on_bad_example=skip skips them"
        )
        if assembly is None:
            packed = pack(
                [e.items[0] for e in examples],
                [e.items[1] for e in examples],
                [e.items[2:] for e in examples],
            )
        return packed, _stats(examples)

    # Here, so that the step can be built and measured where it is not installed.
    import grain
    import grain.experimental

    rows = grain.MapDataset.range(start_step * local, _ENDLESS).map(load)
    # Few enough rows ahead that crops do not pile up, enough that no thread waits for the others.
    ahead = min(max(local, 2 * workers), 16 * workers)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
    dataset = rows.to_iter_dataset(options).batch(local, drop_remainder=True, batch_fn=collate)
    if workers and prefetch:
        # One batch waits in the queue's hand besides those in it.
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=max(1, prefetch - 1)
        )
    return Batches(dataset, start_step, stop, pool, _Slow(reader.watch, report, slow_s))


def _check(batch_size, process, processes, on_bad_example, *numbers: int) -> None:
    if on_bad_example not in ("error", "skip"):
        raise UserError(f"on_bad_example must be 'error' or 'skip', not {on_bad_example!r}")
    if batch_size < 1 or processes < 1 or batch_size % processes:
        raise UserError(f"a batch of {batch_size} pairs cannot be shared by {processes} processes")
    if not 0 <= process < processes or min(numbers) < 0:
        names = ("start_step", "workers", "prefetch", "negatives")
        told = ", ".join(f"{name} {n}" for name, n in zip(names, numbers, strict=True))
        raise UserError(f"impossible pipeline: process {process} of {processes}, {told}")


def _stats(examples: Sequence[Example]) -> BatchStats:
    return BatchStats(
        rows=np.array([(e.source, e.row) for e in examples], np.int64),
        target_id=np.array([e.ids[1] for e in examples], np.int64),
        skipped=tuple(message for e in examples for message in e.problems),
        query_id=np.array([e.ids[0] for e in examples], np.int64),
        negative_ids=tuple(e.ids[2:] for e in examples),
    )
