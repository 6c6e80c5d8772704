# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's names, shapes and types held against a model's leaves, before anything is read.

Everything that disagrees is listed in one error. Only copies of other tensors are read here, to
see that they are copies.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.weights.rules import Table, collapse
from vlm2vec_jax.weights.safetensors import FLOATS, Checkpoint

_BLOCK_BYTES = 1 << 26
"""Copies of a tensor are compared in pieces of this many bytes."""


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
        f"misshapen: {label}{count(members)} is {found} in the file, the model has {expected}"
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
        lines.append(f"missing: {label}{count(members)}{hint}")
    return lines


def _list_unexpected(unexpected: list[str], table: Table, missing: list[str]) -> list[str]:
    lines = []
    for label, members in collapse(unexpected):
        # Names of what is missing are the likelier meaning; they were shown with their hints.
        near = difflib.get_close_matches(members[0], missing or table.slots, n=1, cutoff=0.8)
        hint = f"; nearest known: {near[0]}" if near else ""
        lines.append(f"unexpected: {label}{count(members)}{hint}")
    return lines


def count(members: list[str]) -> str:
    """How many tensors a collapsed name stands for, in brackets; "" for one."""
    return f" ({len(members)} tensors)" if len(members) > 1 else ""


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
