# SPDX-License-Identifier: Apache-2.0
"""From a stream of inputs to vectors: windows are planned, decoded, computed and put in order.

A window is a list of inputs that are planned together; there may be any number of windows, and no
more than three are held at a time. While one batch is computed on the device, the next is being
packed and the images of the one after are being decoded, across the borders of windows.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vlm2vec_jax.embedding.calls import Calls
from vlm2vec_jax.embedding.decoding import Decoder, problems_among
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import share_images
from vlm2vec_jax.inputs import BadInputs, EncodedInput, MultimodalInput, raise_bad_inputs
from vlm2vec_jax.packing import PackedBatch, RowShape, unpack
from vlm2vec_jax.row_choice import Price, plan_rows

_CPU_VISUAL_TOKENS = 1024
"""Of a call of rows with images on a CPU, whose cache holds the attention of one long row only."""
_COMPILING = {"cpu": 2e11}
"""FLOPs that a device does while a program is compiled: here one thread, in one or two seconds."""
_COMPILING_ELSEWHERE = 2e16
"""The same of an accelerator in half a minute, at a tenth to a half of its peak."""
CANNOT_READ = "some inputs cannot be read"


class Fill(Protocol):
    """How encoded inputs are laid in rows (`packing.fill` with the backbone's layout)."""

    def __call__(
        self, rows: list[list[int]], encoded: Mapping[int, Any], shape: RowShape, count: int, /
    ) -> PackedBatch:
        """Rows of indices, the inputs by index, the rows' shape, rows of the batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Device:
    """What the batches must know of where they are computed.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      shards: devices that share the rows of a batch.
      budget: tokens of a batch if the caller does not say.
    """

    platform: str
    shards: int
    budget: int


def windows_of(inputs: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The inputs in lists of `size`, the last one shorter.

    Raises:
      UserError: for a size that is none.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"window must be a whole number from 1 on, not {size!r}")
    iterator = iter(inputs)
    while window := list(itertools.islice(iterator, size)):
        yield window


class _Window:
    """A window on its way: where its vectors go, and how many are still to come."""

    def __init__(self, items: Sequence[Any], dimension: int):
        self.items = items
        self.left = len(items)
        self.out = np.zeros((len(items), dimension), np.float32)
        self.error: BadInputs | None = None

    @property
    def done(self) -> bool:
        return self.left == 0 or self.error is not None


@dataclasses.dataclass
class _Job:
    """A batch on its way: its rows, and how to get at what is in them."""

    window: _Window
    indices: list[int]
    rows: list[list[int]]
    count: int
    shape: RowShape
    wait: Callable[[], list[Any]]


class Batches:
    """Plans and runs batches for one model. Remembers row lengths, each of which was compiled."""

    def __init__(
        self,
        *,
        dimension: int,
        price: Price,
        max_tokens: int,
        device: Device,
        fill: Fill,
        compute: Callable[[PackedBatch], Any],
    ):
        """Say how to compute.

        Args:
          dimension: D.
          price: what rows cost in this model.
          max_tokens: most tokens of an input.
          device: where it runs.
          fill: lays encoded inputs in rows.
          compute: a batch to its embeddings [R, S, D]; may return before they are there.
        """
        self._dimension, self._max_tokens, self._device = dimension, max_tokens, device
        self._price = price
        self._fill, self._compute = fill, compute
        self._used_rows: set[tuple[bool, int]] = set()
        compiling = _COMPILING.get(device.platform, _COMPILING_ELSEWHERE)
        self._calls = Calls(price.row, compiling / price.token)

    def run(
        self,
        windows: Iterable[Sequence[Any]],
        decoder: Decoder,
        *,
        prepare: Callable[[Any], MultimodalInput] = MultimodalInput.of,
        batch_tokens: int | None = None,
        advance: Callable[[int], Any] = lambda count: None,
    ) -> Iterator[np.ndarray | BadInputs]:
        """Embed windows.

        Args:
          windows: lists of inputs, taken one after the other as they are needed.
          decoder: reads them.
          prepare: from what is in a window to an input; raises UserError for what is none.
          batch_tokens: tokens of one batch on all devices together.
          advance: called with the number of inputs finished.

        Yields:
          For each window in order its embeddings float32 [n, D], or everything that is wrong
          with it, numbered within the window.
        """
        opened: collections.deque[_Window] = collections.deque()
        decoding: collections.deque[_Job] = collections.deque()
        computing: tuple[_Job, Any, np.ndarray] | None = None

        def step() -> None:
            """Hand the oldest decoded batch to the device, then fetch the one before it."""
            nonlocal computing
            before = computing
            computing = self._begin(decoding.popleft(), decoder) if decoding else None
            if before is not None:
                job, embeddings, slot = before
                unpack(np.asarray(embeddings), slot, job.window.out)
                job.window.left -= len(job.indices)
                advance(len(job.indices))

        def finished() -> Iterator[np.ndarray | BadInputs]:
            while opened and opened[0].done:
                window = opened.popleft()
                yield window.out if window.error is None else window.error

        for job in self._jobs(windows, opened, decoder, prepare, batch_tokens):
            if job is not None:
                decoding.append(job)
            while len(decoding) > 1:
                step()
            yield from finished()
        while decoding or computing is not None:
            step()
        yield from finished()

    def encoded(self, items: Sequence[EncodedInput]) -> np.ndarray:
        """Embed what the processor has already encoded, float32 [N, D]."""
        out = np.zeros((len(items), self._dimension), np.float32)
        sizes = [(len(item), item.units) for item in items]
        for rows, count, shape in self.rows(sizes, None):
            batch = self._fill(rows, dict(enumerate(items)), shape, count)
            unpack(np.asarray(self._compute(batch)), batch.slot, out)
        return out

    def rows(
        self, sizes: Sequence[tuple[int, int]], batch_tokens: int | None
    ) -> Iterator[tuple[list[list[int]], int, RowShape]]:
        """Plan inputs of these (tokens, units): rows of a batch, how many to fill up to, shape."""
        budget = batch_tokens or self._device.budget
        shards = self._device.shards
        planned, taken = plan_rows(
            [tokens for tokens, _ in sizes],
            [units for _, units in sizes],
            price=self._price,
            # No row need be longer than what one device takes at a time, unless an input is.
            most=max(budget // shards, 128),
            longest=self._max_tokens,
            step=16 if self._device.platform == "cpu" else 128,
            used=self._used_rows,
        )
        self._used_rows |= taken
        # Inputs that show the same image usually follow each other: its pixels go soon.
        groups = [dataclasses.replace(g, rows=sorted(g.rows, key=min)) for g in planned.groups]
        visual = min(budget, _CPU_VISUAL_TOKENS) if self._device.platform == "cpu" else None
        yield from self._calls.of(groups, budget, shards, visual)

    def _jobs(self, windows, opened, decoder, prepare, batch_tokens) -> Iterator[_Job | None]:
        """Batches whose decoding has begun; windows appear in `opened`. None: one without any."""
        for values in windows:
            window = _Window(values, self._dimension)
            opened.append(window)
            try:
                window.items = _prepared(values, prepare)
                if decoder.shares_memory:
                    window.items = share_images(window.items)
                sizes = self._sizes(window.items, decoder)
            except BadInputs as error:
                window.error = error
                sizes = []
            if not sizes:
                yield None
                continue
            for rows, count, shape in self.rows(sizes, batch_tokens):
                if window.error is not None:
                    break
                indices = [i for row in rows for i in row]
                wait = decoder.start([window.items[i] for i in indices])
                yield _Job(window, indices, rows, count, shape, wait)

    def _sizes(self, items: Sequence[MultimodalInput], decoder: Decoder) -> list[tuple[int, int]]:
        """Tokens and visual units of every input, after checking that each can be embedded."""
        sizes = decoder.lengths(items)
        raise_bad_inputs(CANNOT_READ, problems_among(sizes))
        problems = {
            number: f"{tokens} tokens are more than the {self._max_tokens} that the model takes"
            for number, (tokens, _) in enumerate(sizes)
            if tokens > self._max_tokens
        }
        raise_bad_inputs(
            "some inputs are too long",
            problems,
            advice=f"max_len (at most {self._max_tokens}) cuts texts. An input with images is "
            f"never cut: shorten its text, give it fewer images, or lower num_crops "
            f"or max_pixels.",
        )
        return sizes

    def _begin(self, job: _Job, decoder: Decoder) -> tuple[_Job, Any, np.ndarray] | None:
        """Wait for a batch's inputs and begin to compute it; None if its window is lost."""
        encoded = job.wait()
        if job.window.error is not None:
            return None
        if problems_among(encoded):
            try:
                _complain(job.window.items, decoder)
            except BadInputs as error:
                job.window.error = error
                return None
        batch = self._fill(
            job.rows, dict(zip(job.indices, encoded, strict=True)), job.shape, job.count
        )
        return job, self._compute(batch), batch.slot


def _prepared(values: Sequence[Any], prepare) -> list[MultimodalInput]:
    items, problems = [], {}
    for number, value in enumerate(values):
        try:
            items.append(prepare(value))
        except UserError as error:
            problems[number] = str(error)
            continue
        problem = items[-1].problem()
        if problem:
            problems[number] = problem
    raise_bad_inputs("some inputs cannot be embedded", problems)
    return items


def _complain(items: Sequence[MultimodalInput], decoder: Decoder) -> None:
    """Raise for all inputs that cannot be decoded, once it is known that there are some."""
    raise_bad_inputs(CANNOT_READ, decoder.problems(items))
    raise UserError("an input could not be read, but now it can: did a file change meanwhile?")
