# SPDX-License-Identifier: Apache-2.0
"""Where parameters live: path patterns to PartitionSpecs, strictly, and the one constraint helper.

A backbone hands in its rules (`models/<backbone>/sharding.py`); nothing is replicated by
accident: a parameter that no rule matches, or a dimension that its axes do not divide, is an
error that lists all such parameters at once.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.parallel.mesh import AXES, ROWS

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


def is_cut(axis: str = "fsdp") -> bool:
    """Whether the ambient mesh leaves it to the compiler to spread something over `axis`."""
    return parts(axis) > 1


def parts(axis: str) -> int:
    """Into how many parts the compiler cuts what is spread over `axis` of the ambient mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(axis, 1) == 1:
        return 1
    manual = mesh.axis_types[mesh.axis_names.index(axis)] == AxisType.Manual
    return 1 if manual else mesh.shape[axis]


def gathered(module: Any, path: str, rules: Rules, *, stacked: bool = False) -> Any:
    """A part of a model with its weights whole over `fsdp`, for the time of its use.

    Called inside the scan body, and so inside what is rematerialised, it makes the compiler
    gather one layer at a time, again in the backward pass, and scatter that layer's gradient.
    The cut over `tensor` stays.

    Args:
      module: any pytree of parameters; a layer is a slice of its stack.
      path: of the module, as `decoder/layers`.
      rules: see `Rules`; leaves that no rule matches or whose rule has no `fsdp` stay as they are.
      stacked: the rules speak of the whole stack, whose leading axis is gone here.
    """
    if not is_cut():
        return module
    leaves, treedef = jax.tree_util.tree_flatten_with_path(module)
    out = []
    for key, leaf in leaves:
        name = jax.tree_util.keystr(key, simple=True, separator="/").removesuffix("/value")
        name = f"{path}/{name}" if name else path
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), ())
        if any("fsdp" in _names(entry) for entry in spec):
            cut = tuple(spec)[1:] if stacked else tuple(spec)
            whole = tuple(tuple(n for n in _names(e) if n != "fsdp") or None for e in cut)
            leaf = _gather(leaf, cut, whole)
        out.append(leaf)
    return jax.tree.unflatten(treedef, out)


# The gradient of a constraint is the same constraint, which would leave every chip with the
# whole gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf: jax.Array, cut: tuple, whole: tuple) -> jax.Array:
    return constrain(leaf, *whole)


def _gather_fwd(leaf, cut, whole):
    return _gather(leaf, cut, whole), None


def _gather_bwd(cut, whole, _, cotangent):
    # First a sum over the rows of all chips, then a slice; told only the slice, the compiler
    # may gather every row instead (it does so for the token table).
    return (constrain(constrain(cotangent, *whole), *cut),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: keep everything but weights that were gathered."""
    return primitive.name not in ("custom_vjp_call", "sharding_constraint")


def by_rows(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run a function on every chip's own rows, where weights are whole on every chip.

    Under plain data parallelism nothing inside the function then talks to another chip, except
    where it says so (`sum_over_rows`). On any other mesh, or none, the function is what it was,
    on the rows of all chips, and the compiler decides.

    Args:
      function: of arrays only, no keyword arguments.
      in_specs: as for `jax.shard_map`.
      out_specs: as for `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.shape.get("data") != mesh.size:
        return function
    if any(kind == AxisType.Manual for kind in mesh.axis_types):
        return function
    # check_vma off: gradients shall stay each chip's own until they are added up.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def by_rows_and_heads(
    function: Callable[..., jax.Array],
    heads: Sequence[jax.Array],
    rows: Sequence[jax.Array] = (),
) -> jax.Array:
    """Run a function on every chip's own rows and heads: for kernels, which no compiler can cut.

    Args:
      function: of all arrays in order; rows and heads must not know of each other. Its result is
        spread as `heads`.
      heads: arrays [R, T, heads, ...]; rows lie over `data` and `fsdp`, heads over `tensor`.
        Where these do not divide the dimension (of every array), each chip computes all of it.
      rows: arrays [R, ...].
    """
    axes = tuple(name for name in ROWS if parts(name) > 1)
    if any(x.shape[0] % math.prod(parts(name) for name in axes) for x in heads):
        axes = ()
    tensor = parts("tensor")
    partner = None
    if tensor > 1 and not any(x.shape[2] % tensor for x in heads):
        partner = "tensor"
    if not any(parts(name) > 1 for name in AXES):
        return function(*heads, *rows)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name for name, kind in kinds if kind != AxisType.Manual}
    cut, spread = PartitionSpec(axes or None, None, partner), PartitionSpec(axes or None)
    run = jax.shard_map(
        function,
        in_specs=(cut,) * len(heads) + (spread,) * len(rows),
        out_specs=cut,
        axis_names=free,
        check_vma=False,
    )
    return run(*heads, *rows)


def row_shard() -> jax.Array | None:
    """Which share of the rows this is, i32 []; None outside of `by_rows`."""
    return jax.lax.axis_index(ROWS) if _inside_by_rows() else None


def sum_over_rows(tree: Any) -> Any:
    """Add up every chip's share inside `by_rows`; elsewhere sums are whole already."""
    return jax.lax.psum(tree, ROWS) if _inside_by_rows() else tree


def _inside_by_rows() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Manual for kind in mesh.axis_types)


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
        rows.append((path, shape, np.dtype(leaf.dtype).name, _place(sharding), f"{size:,}"))
    rows.append((f"{len(abstract)} parameters", "", "", f"of {total:,} in all", f"{here:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)]
        lines.append("  ".join([*cells, row[4].rjust(widths[4])]).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _place(sharding: Any) -> str:
    return _words(sharding.spec) if isinstance(sharding, NamedSharding) else "replicated"


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
