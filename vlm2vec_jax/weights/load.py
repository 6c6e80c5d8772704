# SPDX-License-Identifier: Apache-2.0
"""A checkpoint into device arrays, through a name table, straight to the shards.

Leaves are read and handed to jax one by one, each tensor of the files once for all of this
process's devices, so that beside the model itself the host never holds more than the largest leaf
and a few megabytes. All names and shapes are checked, and every disagreement listed in one error,
before the first tensor is read (`matching`).

A tensor is read in blocks that stay in a processor's cache while they are looked through, cast and
turned (`arrays`), several at a time: some threads wait for the disk while others compute.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.weights.arrays import aligned, all_finite, copy_cast, keeps_finite
from vlm2vec_jax.weights.matching import abstract_from, count, match
from vlm2vec_jax.weights.rules import Index, Rule, Table, collapse
from vlm2vec_jax.weights.safetensors import Checkpoint

_WORKERS = min(16, 2 * (os.cpu_count() or 1))
"""Threads that read; more than processors, because they wait for the disk in turn."""
_JOB_BYTES = (1 << 24, 1 << 27)
"""What a thread takes on at a time, at least and at most: the eighth part of its share of a leaf.
Small jobs of a large leaf make threads meet in the same pages of it."""
_BLOCK_BYTES = 1 << 21
"""What it reads at a time; about as much as a processor's second-level cache."""
_BLOCK_ROWS = 256
"""Blocks have a multiple of so many rows where they can: turned, whole lines of the cache."""
_MOST_BYTES = 1 << 23
"""What a block may be for the sake of its rows."""


def load(
    checkpoint: Checkpoint,
    table: Table,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype_of: Callable[[str], Any] | None = None,
    skip: Collection[str] = (),
    check_finite: bool = False,
) -> dict[str, jax.Array]:
    """Read the leaves of a model.

    Args:
      checkpoint: an open checkpoint.
      table: the backbone's name table.
      abstract: path -> shape, dtype and optionally sharding of every leaf wanted (the first local
        device where there is no sharding).
      dtype_of: path -> element type to cast to; by default the abstract leaf's.
      skip: leaves of the table that are not wanted; the file may or may not hold their tensors.
      check_finite: also look for NaN and infinite values (after the cast).

    Returns:
      path -> array, for exactly the paths of `abstract`. Leaves of optional tensors that the file
      lacks are zeros, which is said by a warning.

    Raises:
      UserError: listing everything missing, unexpected, misshapen or of a type that is no weight;
        copies that differ from their original; with `check_finite` all tensors that are not finite.
      ValueError: if `abstract` and the table disagree, which is no fault of the checkpoint.
    """
    matched = match(checkpoint, table, abstract, skip=skip)
    if matched.absent:
        warnings.warn(
            f"{checkpoint.path} lacks {', '.join(matched.absent)}: no embedding needs it, it is "
            f"zero here, and exports leave it out",
            stacklevel=2,
        )
    out = {}
    with _Reader(checkpoint, matched.names, check_finite=check_finite) as reader:
        for path, leaf in abstract.items():
            dtype = np.dtype(leaf.dtype if dtype_of is None else dtype_of(path))
            sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            out[path] = _load_leaf(reader, table.by_leaf[path], leaf.shape, dtype, sharding)
    numbers = sum(leaf.size for leaf in out.values())
    raise_problems(
        f"{checkpoint.path} holds weights that are not finite in {numbers:,} parameters",
        [f"{name}{count(members)}" for name, members in collapse(sorted(reader.bad))],
    )
    return out


def load_host(
    checkpoint: Checkpoint,
    table: Table,
    *,
    dtype: Any = None,
    skip: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Read all leaves as numpy arrays, shapes as the file has them (for tools and comparisons).

    Args:
      checkpoint: an open checkpoint.
      table: the backbone's name table.
      dtype: element type of all leaves; by default each leaf's own in the file.
      skip: leaves not wanted.

    Raises:
      UserError: as `load`.
    """
    shapes = abstract_from(checkpoint, table, skip=skip)
    headless = {table.slots[name].rule.ours for name in table.optional if name in table.slots}
    skip = {*skip, *(headless - set(shapes))}
    names = match(checkpoint, table, shapes, skip=skip).names
    out = {}
    with _Reader(checkpoint, names) as reader:
        for path, leaf in shapes.items():
            spans = tuple(slice(0, size) for size in leaf.shape)
            kind = np.dtype(leaf.dtype if dtype is None else dtype)
            out[path] = reader.read(table.by_leaf[path], [spans], kind)[_key(spans)]
    return out


def _load_leaf(
    reader: _Reader,
    rule: Rule,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    wanted = {
        device: tuple(slice(*span.indices(size)) for span, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    # Devices that hold the same part (replicas) share it.
    parts = reader.read(rule, list(wanted.values()), dtype)
    return jax.make_array_from_callback(
        shape,
        sharding,
        lambda index: parts[
            _key(tuple(slice(*s.indices(n)) for s, n in zip(index or (), shape, strict=True)))
        ],
        dtype=dtype,
    )


def _key(spans: Index) -> tuple[tuple[int, int], ...]:
    return tuple((span.start, span.stop) for span in spans)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Rows of one tensor, and where they go.

    Attributes:
      name: in the file; None for an optional tensor that it lacks, which becomes zeros.
      rule: of its leaf.
      box: the part of the leaf (of its layer, if it is a stack) to read.
      targets: (part of the leaf, array that holds this part), as far as they have it.
    """

    name: str | None
    rule: Rule
    box: Index
    targets: Sequence[tuple[Index, np.ndarray]]


class _Reader:
    """Reads leaves of a checkpoint with some threads; a context manager.

    Args:
      checkpoint: open.
      names: the table's spelling of a tensor -> the file's.
      check_finite: note in `bad` the tensors with numbers that are not finite after the cast.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Mapping[str, str], *, check_finite: bool = False
    ):
        self.bad: set[str] = set()
        self._checkpoint, self._names, self._check = checkpoint, names, check_finite
        self._pool = concurrent.futures.ThreadPoolExecutor(_WORKERS, "weights")
        self._own = threading.local()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *unused) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, rule: Rule, wanted: Sequence[Index], dtype: np.dtype) -> dict[tuple, np.ndarray]:
        """Read parts of a leaf: for each layer what they need of its tensor, permuted and cast.

        Every tensor is read once for all parts, unless they lie so far apart (on other hosts'
        account) that most of what lies between them would be read for nothing.
        """
        spans = {_key(index): index for index in wanted}
        parts = {
            key: aligned([span.stop - span.start for span in index], dtype)
            for key, index in spans.items()
        }
        box = tuple(
            slice(min(span.start for span in axis), max(span.stop for span in axis))
            for axis in zip(*spans.values(), strict=True)
        )
        whole = math.prod(span.stop - span.start for span in box)
        if whole > 2 * sum(part.size for part in parts.values()):
            groups = [(index, [key]) for key, index in spans.items()]
        else:
            groups = [(box, list(spans))]
        share = whole * dtype.itemsize // (8 * _WORKERS)
        size = min(max(share, _JOB_BYTES[0]), _JOB_BYTES[1])
        jobs = []
        for outer, keys in groups:
            targets = [(spans[key], parts[key]) for key in keys]
            if not rule.stacked:
                jobs += self._jobs(rule.tied_to or rule.hf, rule, outer, targets, size)
                continue
            for layer in range(outer[0].start, outer[0].stop):
                inside = [
                    (index[1:], part[layer - index[0].start])
                    for index, part in targets
                    if index[0].start <= layer < index[0].stop
                ]
                jobs += self._jobs(rule.names()[layer], rule, outer[1:], inside, size)
        if len(jobs) == 1:
            self._run(jobs[0])
        else:
            list(self._pool.map(self._run, jobs))
        return parts

    def _jobs(self, name: str, rule: Rule, box: Index, targets, size: int) -> list[_Job]:
        """The tensor's rows in pieces of about `size` bytes."""
        found = self._names.get(name)
        if found is None or not box:
            return [_Job(found, rule, box, targets)]
        pieces = self._cut(found, rule, box, size)
        return [_Job(found, rule, piece, targets) for piece in pieces]

    def _cut(self, name: str, rule: Rule, box: Index, size: int) -> list[Index]:
        """Cut a part of a leaf along the rows of the tensor in the file."""
        axis = rule.rows_axis
        span = box[axis]
        count = max(span.stop - span.start, 1)
        row = math.prod(s.stop - s.start for s in box) // count
        row *= self._checkpoint.dtype(name).itemsize
        step = max(1, size // max(row, 1))
        if step % _BLOCK_ROWS and _BLOCK_ROWS * row <= _MOST_BYTES:
            step = max(_BLOCK_ROWS, step - step % _BLOCK_ROWS)
        return [
            (*box[:axis], slice(start, min(start + step, span.stop)), *box[axis + 1 :])
            for start in range(span.start, span.stop, step)
        ]

    def _run(self, job: _Job) -> None:
        if job.name is None:
            for _, array in job.targets:
                array[...] = 0
            return
        blocks = self._cut(job.name, job.rule, job.box, _BLOCK_BYTES) if job.box else [job.box]
        for block in blocks:
            self._block(job, job.name, block)

    def _block(self, job: _Job, name: str, block: Index) -> None:
        read = self._checkpoint.read(name, job.rule.hf_index(block), out=self._scratch())
        source = job.rule.to_ours(read)
        for index, array in job.targets:
            shared = [
                slice(max(a.start, b.start), min(a.stop, b.stop))
                for a, b in zip(index, block, strict=True)
            ]
            if any(span.start >= span.stop for span in shared):
                continue
            target = array[_shifted(shared, index)]
            copy_cast(target, source[_shifted(shared, block)])
            if self._check and not keeps_finite(read.dtype, array.dtype):
                self._look(name, target)
        if self._check:
            self._look(name, read)

    def _look(self, name: str, array: np.ndarray) -> None:
        if not all_finite(array):
            self.bad.add(name)

    def _scratch(self) -> np.ndarray:
        """A place for a block of this thread's: new memory costs as much as what is done in it."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = np.empty(_MOST_BYTES, np.uint8)
        return self._own.scratch


def _shifted(spans: Sequence[slice], origin: Index) -> Index:
    return tuple(
        slice(span.start - o.start, span.stop - o.start)
        for span, o in zip(spans, origin, strict=True)
    )
