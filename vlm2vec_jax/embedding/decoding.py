# SPDX-License-Identifier: Apache-2.0
"""Reading inputs with many hands: threads always, and processes for images where asked for.

Pillow decodes outside of Python's lock, so threads go far; on hosts with many cores the parts
that do not (numpy, Python itself) hold them up, and processes help. Those are spawned, not
forked: a fork of a process that runs jax may hang.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import EncodedInput, MultimodalInput

_AT_ONCE = 32
"""Most inputs of one call of a thread: a text takes less time than handing it over."""
_PARTS = 4
"""Calls of a thread that images are dealt into, if there are enough, so that none waits for one."""


class Reads(Protocol):
    """The part of `models.base.Processor` that is needed here."""

    def length(self, item: MultimodalInput) -> tuple[int, int]:
        """Tokens and visual units of an input, without decoding pixels."""
        ...

    def encode(self, item: MultimodalInput) -> EncodedInput:
        """Encode one input."""
        ...


class Workers:
    """Processes that decode images, started when first needed and closed by `close` or `with`.

    They end by themselves when the process that started them is gone, however that ended.
    """

    def __init__(self, processor: Reads, count: int):
        """Say what to decode with; nothing is started yet.

        Args:
          processor: is sent to every worker once.
          count: number of processes, at least 1.

        Raises:
          UserError: for a number that is none.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"workers must be a whole number from 0 on, not {count!r}")
        self._processor, self.count = processor, count
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, item: MultimodalInput) -> concurrent.futures.Future:
        """Begin to encode an input; `result` of what this gives may raise as `take` says."""
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self._processor,),
            )
        try:
            return self._pool.submit(_encode_in_worker, item)
        except BrokenProcessPool as error:
            raise self._died() from error

    def take(self, future: concurrent.futures.Future) -> EncodedInput | UserError:
        """The encoded input, or the user's mistake in it.

        Raises:
          UserError: if a worker died.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise self._died() from error

    def close(self) -> None:
        """End the workers; what they were asked for and nobody took is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _died(self) -> UserError:
        self.close()
        return UserError(
            f"one of the {self.count} processes that decode images has died. Either it was "
            f"killed, for instance because memory ran out (use fewer workers), or it could not "
            f'start (a script that starts workers needs `if __name__ == "__main__":` around what '
            f"it does)"
        )


_processor_of_worker: Reads | None = None


def _start_worker(processor: Reads) -> None:
    global _processor_of_worker
    _processor_of_worker = processor
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Leave as soon as the parent has: a worker would otherwise wait for work for ever."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _encode_in_worker(item: MultimodalInput) -> EncodedInput | UserError:
    assert _processor_of_worker is not None
    return attempt(_processor_of_worker.encode)(item)


class Decoder:
    """The hands of one call: threads of its own, and the workers that outlive it, if any."""

    def __init__(self, processor: Reads, workers: Workers | None = None):
        self._processor, self._workers = processor, workers
        self._count = _cpus()
        self._threads = concurrent.futures.ThreadPoolExecutor(self._count)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    @property
    def shares_memory(self) -> bool:
        """Whether all inputs are read by this process, so that they may share what they hold."""
        return self._workers is None

    def lengths(self, items: Sequence[MultimodalInput]) -> list[Any]:
        """(tokens, visual units) of every input, or the `UserError` in its place."""
        measure = attempt(self._processor.length)
        found = [self._each(measure, part) for part in _parts(items, _AT_ONCE)]
        return [size for part in found for size in part.result()]

    def start(self, items: Sequence[MultimodalInput]) -> Callable[[], list[Any]]:
        """Begin to encode; calling the result waits for all and gives them in order.

        An input that cannot be encoded is a `UserError` in the list.
        """
        # Images in memory are decoded already, or belong to a file that this process has open.
        encode = attempt(self._processor.encode)
        sent: list[Callable[[], Any]] = []
        own: tuple[list[MultimodalInput], ...] = ([], [])
        kinds = []
        for item in items:
            kind = int(bool(item.images))
            if item.images and self._workers is not None and _in_files(item):
                kind, workers, future = 2, self._workers, self._workers.submit(item)
                sent.append(lambda workers=workers, future=future: workers.take(future))
            else:
                own[kind].append(item)
            kinds.append(kind)
        few = max(min(len(own[1]) // (_PARTS * self._count), _AT_ONCE), 1)
        futures = [
            [self._each(encode, part) for part in _parts(own[kind], size)]
            for kind, size in enumerate((_AT_ONCE, few))
        ]

        def wait() -> list[Any]:
            found: list[Iterator[Any]] = [
                (encoded for future in of_kind for encoded in future.result())
                for of_kind in futures
            ]
            found.append(take() for take in sent)
            return [next(found[kind]) for kind in kinds]

        return wait

    def _each(
        self, function: Callable[[Any], Any], part: Sequence[MultimodalInput]
    ) -> concurrent.futures.Future[list[Any]]:
        """Begin to apply a function to some inputs, one after the other in one thread."""
        return self._threads.submit(lambda: [function(item) for item in part])

    def problems(self, items: Sequence[MultimodalInput]) -> dict[int, str]:
        """Encode everything, keep nothing, and tell what is wrong by number."""

        def without_result(item: MultimodalInput) -> None:
            self._processor.encode(item)

        return problems_among(self._threads.map(attempt(without_result), items))


def _cpus() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _in_files(item: MultimodalInput) -> bool:
    return all(isinstance(image, str | os.PathLike) for image in item.images)


def _parts(items: Sequence[MultimodalInput], size: int) -> list[Sequence[MultimodalInput]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def attempt(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, with a user's mistake returned instead of raised, to be listed with others."""

    def attempted(item):
        try:
            return function(item)
        except (UserError, OSError) as error:
            return UserError(str(error))

    return attempted


def problems_among(results: Any) -> dict[int, str]:
    """The mistakes among results of `attempt`, by number."""
    return {n: str(r) for n, r in enumerate(results) if isinstance(r, UserError)}


@contextlib.contextmanager
def progress_bar(wanted: Any, total: int | None, what: str = "embedding") -> Iterator[Callable]:
    """`advance(n)` that feeds a rich bar, a callback, or nothing.

    Args:
      wanted: True for a bar, a function that takes a number, or False.
      total: how many there will be, if that is known.
      what: the bar's name.
    """
    if callable(wanted) or not wanted:
        yield wanted if callable(wanted) else lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)  # what a program prints stays apart from its bar
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
