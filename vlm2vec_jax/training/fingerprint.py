# SPDX-License-Identifier: Apache-2.0
"""Telling whether two things are the same: checksums of arrays, differences of documents.

For checkpoints: is what was read what was saved, and does it belong to this run?
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def explain_difference(saved: Any, now: Any, ignore: tuple[str, ...] = ()) -> list[str]:
    """Compare two json-able documents field by field, for errors on resume.

    Args:
      saved: as read from a checkpoint's meta.
      now: the present one.
      ignore: dotted names (and all below them) that may differ.

    Returns:
      Lines as `optim.lr: 1e-05 in the checkpoint, 2e-05 now`; empty if all is equal.
    """
    # Through json, so that tuples equal lists and keys are strings on both sides.
    return _differences(json.loads(json.dumps(saved)), json.loads(json.dumps(now)), "", ignore)


def _differences(saved: Any, now: Any, name: str, ignore: tuple[str, ...]) -> list[str]:
    if name in ignore:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(set(saved) | set(now)):
            below = f"{name}.{key}" if name else key
            if below in ignore:
                continue
            if key not in saved:
                lines.append(f"{below}: not in the checkpoint, {json.dumps(now[key])} now")
            elif key not in now:
                lines.append(f"{below}: {json.dumps(saved[key])} in the checkpoint, gone now")
            else:
                lines += _differences(saved[key], now[key], below, ignore)
        return lines
    if saved == now:
        return []
    return [f"{name}: {json.dumps(saved)} in the checkpoint, {json.dumps(now)} now"]


def explain_arrays(saved: Mapping[str, Mapping[str, Any]], abstract: Any) -> list[str]:
    """Compare the arrays of a checkpoint with those a run has: a line per difference.

    Args:
      saved: `digest` of what was saved.
      abstract: pytree of anything with `shape` and `dtype`.
    """
    wanted = {leaf_path(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    lines = [f"{path} is not in the checkpoint" for path in wanted if path not in saved]
    lines += [f"{path} is only in the checkpoint" for path in saved if path not in wanted]
    for path, leaf in wanted.items():
        here = (list(leaf.shape), str(leaf.dtype))
        there = (saved[path]["shape"], saved[path]["dtype"]) if path in saved else here
        if here != there:
            lines.append(f"{path} is {there[1]} {there[0]} there, {here[1]} {here[0]} here")
    return lines


def digest(state: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of every array of a pytree, by path.

    The checksum is the sum, modulo 2^32, of each element's bits times an odd number that depends
    on its position: computed on the devices where the shards are, independent of the mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = [_checksum(_bits_of(leaf)) for _, leaf in leaves]  # all started before any is read
    return {
        leaf_path(key): {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "sum": int(value),
        }
        for (key, leaf), value in zip(leaves, sums, strict=True)
    }


def _bits_of(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # Mixed, so that exchanging two elements, or the same change in two places, shows.
    weight = (position * jnp.uint32(2654435761)) ^ (position >> 15)
    return jnp.sum(bits * (weight * 2 + 1), dtype=jnp.uint32)


def leaf_path(key: tuple) -> str:
    """The path of a leaf in a pytree, as `opt_state/mu/decoder/norm/scale`.

    The last key that nnx puts around every leaf (`value`) says nothing and is left out.
    """
    return jax.tree_util.keystr(key, simple=True, separator="/").removesuffix("/value")
