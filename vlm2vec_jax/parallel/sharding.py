# SPDX-License-Identifier: Apache-2.0
"""Where parameters live: path patterns to PartitionSpecs, strictly, and the one constraint helper.

A backbone hands in its rules (`models/<backbone>/sharding.py`); nothing is replicated by
accident: a parameter that no rule matches, or a dimension that its axes do not divide, is an
error that lists all such parameters at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm2vec_jax.errors import UserError, raise_problems

Rules = Sequence[tuple[str, PartitionSpec]]
"""(regular expression for the whole path, spec); the first match wins."""


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Say how an intermediate value is spread, where the compiler must not decide.

    Under fsdp the partitioner, left alone, gathers the activations of the whole batch instead of
    one layer's weights; these constraints prevent it.

    Args:
      x: any array inside `jit`.
      *spec: per dimension an axis name, a tuple of names, None for "whole", or
        `PartitionSpec.UNCONSTRAINED`; missing trailing dimensions are whole.
        `constrain(x, ROWS)` spreads rows; `constrain(w)` makes a weight whole on every chip.

    Returns:
      `x`, constrained if there is an ambient mesh (`jax.set_mesh`), else as it is. Axes that a
      surrounding `shard_map` has made manual are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    manual = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Manual
    }
    if manual == set(mesh.axis_names):
        return x
    kept = []
    for entry in spec:
        if entry is PartitionSpec.UNCONSTRAINED:
            kept.append(entry)
            continue
        names = tuple(name for name in _names(entry) if name not in manual)
        kept.append(names if len(names) > 1 else (names[0] if names else None))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def spec_for(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The spec of one parameter by the first rule whose pattern matches the whole path.

    Args:
      path: as `decoder/layers/attn/qkv/kernel`.
      shape: its shape, stacked layers in front.
      mesh: axes of size 1 divide everything.
      rules: see `Rules`.

    Raises:
      UserError: if no rule matches, the spec is longer than the shape, an axis is not in the
        mesh or used twice, or a dimension is not a multiple of its axes' sizes.
    """
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            problem = _problem(shape, spec, mesh)
            if problem:
                raise UserError(f"{path} {tuple(shape)}: {problem} (rule {pattern!r})")
            return spec
    raise UserError(f"{path} {tuple(shape)}: no sharding rule matches")


def shardings(abstract: Mapping[str, Any], mesh: Mesh, rules: Rules) -> dict[str, NamedSharding]:
    """Shardings for all parameters.

    Args:
      abstract: path -> anything with a `shape` (`jax.ShapeDtypeStruct`, an array).
      mesh: from `make_mesh`.
      rules: see `Rules`.

    Raises:
      UserError: one message with every parameter that has no legal place (see `spec_for`).
    """
    found, problems = {}, []
    for path, leaf in abstract.items():
        try:
            found[path] = NamedSharding(mesh, spec_for(path, leaf.shape, mesh, rules))
        except UserError as error:
            problems.append(str(error))
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    raise_problems(
        f"the parameters cannot be spread over the mesh ({sizes})",
        problems,
        advice="Choose mesh.fsdp and mesh.tensor that divide these dimensions.",
    )
    return found


def bytes_per_chip(leaf: Any, sharding: NamedSharding) -> int:
    """Bytes that one chip holds of an array of this shape, dtype and sharding."""
    shard = sharding.shard_shape(tuple(leaf.shape))
    return math.prod(shard) * np.dtype(leaf.dtype).itemsize


def table(abstract: Mapping[str, Any], placed: Mapping[str, NamedSharding]) -> str:
    """A text table: parameter, shape, dtype, spec, bytes per chip; the sums in the last line.

    Args:
      abstract: path -> anything with `shape` and `dtype`.
      placed: path -> sharding, from `shardings`.
    """
    rows = [("parameter", "shape", "dtype", "spec", "bytes per chip")]
    total = here = 0
    for path in sorted(abstract):
        leaf, sharding = abstract[path], placed[path]
        size = bytes_per_chip(leaf, sharding)
        total += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        here += size
        shape = " x ".join(str(n) for n in leaf.shape) or "scalar"
        rows.append((path, shape, np.dtype(leaf.dtype).name, _words(sharding.spec), f"{size:,}"))
    rows.append((f"{len(abstract)} parameters", "", "", f"of {total:,} in all", f"{here:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)]
        lines.append("  ".join([*cells, row[4].rjust(widths[4])]).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _problem(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> str | None:
    """Say why `spec` does not fit `shape` on `mesh`; None if it does."""
    if len(spec) > len(shape):
        return f"{_words(spec)} names {len(spec)} dimensions, the parameter has {len(shape)}"
    used: set[str] = set()
    for dim, entry in enumerate(spec):
        parts = 1
        for name in _names(entry):
            if name not in mesh.shape:
                return f"{_words(spec)} names the axis {name!r}; the mesh has {mesh.axis_names}"
            if name in used:
                return f"{_words(spec)} uses the axis {name!r} twice"
            used.add(name)
            parts *= mesh.shape[name]
        if shape[dim] % parts:
            names = " x ".join(f"{name} {mesh.shape[name]}" for name in _names(entry))
            return f"dimension {dim} ({shape[dim]}) is not a multiple of {names}"
    return None


def _words(spec: PartitionSpec) -> str:
    """`replicated`, or per dimension the axes or `-`."""
    if not any(_names(entry) for entry in spec):
        return "replicated"
    return ", ".join("+".join(_names(entry)) or "-" for entry in spec)
