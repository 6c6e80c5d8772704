# SPDX-License-Identifier: Apache-2.0
"""A checkpoint into device arrays, through a name table, straight to the shards.

Leaves are read and handed to jax one by one, each tensor of the files once for all of this
process's devices, so that beside the model itself the host never holds more than the largest leaf
and a few tensors. All names and shapes
are checked, and every disagreement listed in one error, before the first tensor is read.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.weights.rules import Index, Rule, Table, collapse
from vlm2vec_jax.weights.safetensors import FLOATS, Checkpoint

_BLOCK_BYTES = 1 << 26
"""Copies of a tensor are compared in pieces of this many bytes."""


_WORKERS = min(4, os.cpu_count() or 1)
"""Layers of a stack that are read and turned at a time; each holds one tensor meanwhile."""
_FINITE_BLOCK = 1 << 16
_BITS = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
}


@dataclasses.dataclass(frozen=True)
class Matched:
    """A checkpoint whose names and shapes fit.

    Attributes:
      names: the table's spelling of each tensor -> the file's.
      skipped: tensors of the file that fill no leaf, with the reason (buffers, copies, not asked).
      absent: optional tensors that the file lacks; their leaves are zeros.
    """

    names: dict[str, str]
    skipped: dict[str, str]
    absent: tuple[str, ...] = ()


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
    bad: dict[str, None] = {}
    out = {}
    for path, leaf in abstract.items():
        dtype = np.dtype(leaf.dtype if dtype_of is None else dtype_of(path))
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        out[path] = _load_leaf(
            checkpoint,
            matched.names,
            table.by_leaf[path],
            leaf.shape,
            dtype,
            sharding,
            bad if check_finite else None,
        )
    raise_problems(
        f"{checkpoint.path} holds weights that are not finite in {_size(out)}",
        [f"{name}{_count(members)}" for name, members in collapse(bad)],
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
    for path, leaf in shapes.items():
        spans = tuple(slice(0, size) for size in leaf.shape)
        kind = np.dtype(leaf.dtype if dtype is None else dtype)
        parts = _read(checkpoint, names, table.by_leaf[path], [spans], kind, None)
        out[path] = parts[_key(spans)]
    return out


def abstract_from(
    checkpoint: Checkpoint, table: Table, *, skip: Collection[str] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaves as the file has them; missing tensors leave theirs out.

    Use it where there is no model to ask; `load` then reports what is missing.
    """
    names = table.canonical_names(checkpoint.names)
    out = {}
    for path, rule in table.by_leaf.items():
        source = rule.tied_to or rule.names()[0]
        if path in skip or source not in names:
            continue
        shape = rule.our_shape(checkpoint.shape(names[source]))
        if shape is not None:
            lead = (rule.depth,) if rule.stacked else ()
            out[path] = jax.ShapeDtypeStruct(lead + shape, checkpoint.dtype(names[source]))
    return out


def match(
    checkpoint: Checkpoint,
    table: Table,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    skip: Collection[str] = (),
) -> Matched:
    """Hold the names, shapes and types of a checkpoint against the leaves wanted; reads copies.

    Raises:
      UserError, ValueError: as `load`.
    """
    _check_leaves(table, abstract, skip)
    names = table.canonical_names(checkpoint.names)
    missing, absent, misshapen, wrong_type = [], [], {}, []
    for path, leaf in abstract.items():
        rule = table.by_leaf[path]
        expected = rule.hf_shape(tuple(leaf.shape[1:] if rule.stacked else leaf.shape))
        for name in rule.names():
            if rule.tied_to is not None:
                # The original is checked for its own leaf; this one has the same numbers.
                expected = rule.hf_shape(tuple(leaf.shape))
                name = rule.tied_to
            if name not in names:
                (absent if name in table.optional else missing).append(name)
                continue
            found = checkpoint.shape(names[name])
            if found != expected:
                misshapen.setdefault((found, expected), []).append(name)
            if checkpoint.dtype_name(names[name]) not in FLOATS:
                wrong_type.append(f"{name} is {checkpoint.dtype_name(names[name])}")
    missing = list(dict.fromkeys(missing))
    unexpected = [name for name in names if not table.knows(name)]
    problems = _list_missing(missing, unexpected) + _list_unexpected(unexpected, table, missing)
    problems += [
        f"misshapen: {label}{_count(members)} is {found} in the file, the model has {expected}"
        for (found, expected), group in misshapen.items()
        for label, members in collapse(dict.fromkeys(group))
    ]
    problems += [f"no weight: {text}, expected one of {', '.join(FLOATS)}" for text in wrong_type]
    raise_problems(
        f"{checkpoint.path} does not fit the model: {len(missing)} missing, {len(unexpected)} "
        f"unexpected, {sum(map(len, misshapen.values()))} misshapen tensors",
        problems,
        advice="Is config.json the one that belongs to these weights?",
    )
    skipped = _check_copies(checkpoint, table, names)
    for name in names:
        slot = table.slots.get(name)
        if slot is not None and slot.rule.ours in skip:
            skipped[name] = f"{slot.rule.ours} is not asked for"
    return Matched(names, skipped, tuple(absent))


def _check_leaves(table: Table, abstract: Mapping[str, Any], skip: Collection[str]) -> None:
    strange = sorted(set(abstract) - set(table.by_leaf))
    if strange:
        raise ValueError(f"leaves without a rule in the name table: {', '.join(strange[:10])}")
    absent = sorted(set(table.by_leaf) - set(abstract) - set(skip))
    if absent:
        raise ValueError(
            f"leaves of the name table that nobody asked for: {', '.join(absent[:10])}"
        )
    for path, leaf in abstract.items():
        rule = table.by_leaf[path]
        if rule.stacked and (not leaf.shape or leaf.shape[0] != rule.depth):
            raise ValueError(f"{path}: shape {leaf.shape}, the table stacks {rule.depth} layers")


def _list_missing(missing: list[str], unexpected: list[str]) -> list[str]:
    lines = []
    for label, members in collapse(missing):
        near = difflib.get_close_matches(members[0], unexpected, n=2, cutoff=0.8)
        hint = f"; the file has, unexpected, {' and '.join(near)}" if near else ""
        lines.append(f"missing: {label}{_count(members)}{hint}")
    return lines


def _list_unexpected(unexpected: list[str], table: Table, missing: list[str]) -> list[str]:
    lines = []
    for label, members in collapse(unexpected):
        # Names of what is missing are the likelier meaning; they were shown with their hints.
        near = difflib.get_close_matches(members[0], missing or table.slots, n=1, cutoff=0.8)
        hint = f"; nearest known: {near[0]}" if near else ""
        lines.append(f"unexpected: {label}{_count(members)}{hint}")
    return lines


def _count(members: list[str]) -> str:
    return f" ({len(members)} tensors)" if len(members) > 1 else ""


def _size(leaves: Mapping[str, Any]) -> str:
    return f"{sum(int(np.prod(leaf.shape)) for leaf in leaves.values()):,} parameters"


def _check_copies(checkpoint: Checkpoint, table: Table, names: dict[str, str]) -> dict[str, str]:
    """Compare copies with their originals; returns what fills no leaf, with the reason."""
    skipped: dict[str, str] = {}
    problems = []
    for name in names:
        original = table.copies.get(name)
        if original is None:
            reason = table.skipped(name)
            if reason is not None:
                skipped[name] = reason
        elif original in names and not _equal(checkpoint, names[name], names[original]):
            problems.append(f"{name} should be an equal copy of {original} and differs")
        elif original in names:
            skipped[name] = f"an equal copy of {original}"
        elif name not in table.slots:
            problems.append(f"{name} is there, {original}, of which it is a copy, is not")
    raise_problems(f"{checkpoint.path} contradicts itself", problems)
    return skipped


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    shape = checkpoint.shape(a)
    if shape != checkpoint.shape(b):
        return False
    if not shape:
        return bool(checkpoint.read(a) == checkpoint.read(b))
    row = max(1, int(np.prod(shape[1:])) * checkpoint.dtype(a).itemsize)
    step = max(1, _BLOCK_BYTES // row)
    for start in range(0, shape[0], step):
        rows = (slice(start, start + step), *(slice(None) for _ in shape[1:]))
        left, right = checkpoint.read(a, rows), checkpoint.read(b, rows)
        if left.dtype != right.dtype:
            left, right = left.astype(np.float64), right.astype(np.float64)
        if not np.array_equal(left, right):
            return False
    return True


def _load_leaf(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    rule: Rule,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    bad: dict[str, None] | None,
) -> jax.Array:
    wanted = {
        device: tuple(slice(*span.indices(size)) for span, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    # Devices that hold the same part (replicas) share it.
    parts = _read(checkpoint, names, rule, list(wanted.values()), dtype, bad)
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


def _read(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    rule: Rule,
    wanted: Sequence[Index],
    dtype: np.dtype,
    bad: dict[str, None] | None,
) -> dict[tuple, np.ndarray]:
    """Read parts of a leaf: for each layer what they need of its tensor, permuted and cast.

    Every tensor is read once for all parts, unless they lie so far apart (on other hosts' account)
    that most of what lies between them would be read for nothing.
    """
    spans = {_key(index): index for index in wanted}
    parts = {
        key: _aligned([span.stop - span.start for span in index], dtype)
        for key, index in spans.items()
    }
    box = tuple(
        slice(min(span.start for span in axis), max(span.stop for span in axis))
        for axis in zip(*spans.values(), strict=True)
    )
    whole = math.prod(span.stop - span.start for span in box)
    if whole > 2 * sum(part.size for part in parts.values()):
        groups = [(index, {key: index}) for key, index in spans.items()]
    else:
        groups = [(box, spans)]
    jobs = []
    for outer, members in groups:
        layers = range(outer[0].start, outer[0].stop) if rule.stacked else (None,)
        jobs += [(outer, members, layer) for layer in layers]

    def run(job: tuple[Index, Mapping[tuple, Index], int | None]) -> None:
        outer, members, layer = job
        inner = outer if layer is None else outer[1:]
        name = (rule.tied_to or rule.hf) if layer is None else rule.names()[layer]
        source = None  # optional, as `match` has made sure: zeros
        if name in names:
            source = rule.to_ours(checkpoint.read(names[name], rule.hf_index(inner)))
        for key, index in members.items():
            target, own = parts[key], index
            if layer is not None:
                if not index[0].start <= layer < index[0].stop:
                    continue
                target, own = target[layer - index[0].start], index[1:]
            if source is None:
                target[...] = 0
                continue
            shifted = tuple(
                slice(s.start - o.start, s.stop - o.start) for s, o in zip(own, inner, strict=True)
            )
            copy_cast(target, source[shifted])
            if bad is not None and not all_finite(target):
                bad[name] = None

    if len(jobs) < 2 or _WORKERS < 2:
        for job in jobs:
            run(job)
    else:
        with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(run, jobs))
    return parts


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that jax on a CPU takes over as it is, without a copy: it begins at 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def all_finite(array: np.ndarray) -> bool:
    """Whether no element of a floating-point array is NaN or infinite.

    Looks at the bits, in blocks that stay in the cache: an exponent of ones is what both have in
    common, and the largest magnitude shows it. Several times faster than `numpy.isfinite`, which
    does not know bfloat16.
    """
    kind = _BITS.get(array.dtype.name)
    if kind is None:
        return bool(np.isfinite(array.astype(np.float64)).all())
    unsigned, exponent = kind
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    magnitude = np.array(np.iinfo(unsigned).max >> 1, unsigned)
    scratch = np.empty(min(bits.size, _FINITE_BLOCK), unsigned)
    for start in range(0, bits.size, _FINITE_BLOCK):
        block = bits[start : start + _FINITE_BLOCK]
        part = np.bitwise_and(block, magnitude, out=scratch[: len(block)])
        if part.max() >= exponent:
            return False
    return True


def copy_cast(target: np.ndarray, source: np.ndarray) -> None:
    """Copy into `target`, rounding to its element type; transposed sources block by block.

    A transposed copy of a large matrix touches a new cache line for every element; in tiles it is
    several times faster.
    """
    if source.dtype == target.dtype and source.dtype.itemsize == 2:
        # The same bits: spare ml_dtypes' element loop.
        source, target = source.view(np.uint16), target.view(np.uint16)
    tile = 128
    if source.ndim != 2 or source.flags.c_contiguous or min(source.shape) <= tile:
        np.copyto(target, source, casting="unsafe")
        return
    for i in range(0, source.shape[0], tile):
        for j in range(0, source.shape[1], tile):
            block = (slice(i, i + tile), slice(j, j + tile))
            np.copyto(target[block], source[block], casting="unsafe")
