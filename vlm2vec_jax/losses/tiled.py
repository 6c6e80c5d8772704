# SPDX-License-Identifier: Apache-2.0
"""The loss without its matrix: blocks are gone through twice, for the value and for the gradient.

The first time an online log-sum-exp is kept per row; the second time each block is computed again
and its share of the gradient added up. Nothing of size rows x columns is ever held. On a mesh the
rows are shared out; columns are either whole on every device (`tiled`) or shared out as well and
passed around (`ring`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.losses.block import (
    Columns,
    Rows,
    Stats,
    block,
    merge,
    no_stats,
    product,
    stats_of,
)
from vlm2vec_jax.losses.options import LossOptions
from vlm2vec_jax.parallel.mesh import ROWS


class RowLosses(NamedTuple):
    """Per row: log of the candidates' sum, mean logit of the positives, and the stats behind."""

    log_total: jax.Array
    positive: jax.Array
    stats: Stats


def row_losses(found: Stats) -> RowLosses:
    """What a row's loss is made of."""
    mean = found.positive / jnp.maximum(found.positives, 1.0)
    return RowLosses(found.log_total, mean, found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def streamed(
    options: LossOptions,
    q: jax.Array,
    rows: Rows,
    t: jax.Array,
    columns: Columns,
    temperature: jax.Array,
) -> RowLosses:
    """`dense.whole` in blocks: differentiable in q [B, D], t [M, D] and the temperature.

    The stats of the result are constants.
    """
    return _forward(options, q, rows, t, columns, temperature)


def _forward(options, q, rows, t, columns, temperature):
    def run(q, rows, t, columns, temperature):
        found = no_stats(q.shape[0])

        def visit(found, t, columns, extra):
            return accumulate(options, q, rows, t, columns, temperature, found), extra

        found, _ = _around(options, visit, found, t, columns, None)
        return found

    spread = _spread(options, run, q, t, 1)
    return row_losses(spread(q, rows, t, columns, temperature))


def _streamed_fwd(options, q, rows, t, columns, temperature):
    found = _forward(options, q, rows, t, columns, temperature)
    return found, (q, rows, t, columns, temperature, found)


def _streamed_bwd(options, kept, cotangent: RowLosses):
    q, rows, t, columns, temperature, found = kept
    positives = jnp.maximum(found.stats.positives, 1.0)
    pulls = Pulls(found.log_total, cotangent.log_total, cotangent.positive / positives, positives)

    def run(q, rows, t, columns, temperature, pulls):
        start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros((), jnp.float32))

        def visit(carry, t, columns, dt):
            dq, dtemperature = carry
            more, dt, warmth = pull(options, q, rows, t, columns, temperature, pulls, dt)
            return (dq + more, dtemperature + warmth), dt

        empty = jnp.zeros(t.shape, jnp.float32)
        (dq, dtemperature), dt = _around(options, visit, start, t, columns, empty)
        all_in_all = pulls.of_total + pulls.of_positive * pulls.positives
        dtemperature -= jnp.sum(all_in_all * rows.own) / temperature**2
        if _inside_map():
            dtemperature = jax.lax.psum(dtemperature, ROWS)
            if options.form != "ring":
                dt = jax.lax.psum(dt, ROWS)
        return dq, dt, dtemperature

    spread = _spread(options, run, q, t, 3)
    dq, dt, dtemperature = spread(q, rows, t, columns, temperature, pulls)
    return dq, None, dt, None, dtemperature


streamed.defvjp(_streamed_fwd, _streamed_bwd)


class Pulls(NamedTuple):
    """What the backward pass knows of a row.

    Attributes:
      log_total: f32 [B].
      of_total: f32 [B], gradient of `RowLosses.log_total`.
      of_positive: f32 [B], gradient of each positive's logit by way of `RowLosses.positive`.
      positives: f32 [B], how many these are.
    """

    log_total: Any
    of_total: Any
    of_positive: Any
    positives: Any


def accumulate(options, q, rows: Rows, t, columns: Columns, temperature, found: Stats) -> Stats:
    """Add columns to the rows' stats, block by block."""
    count = q.shape[0]
    by_column = _tiles((t, columns), t.shape[0], options.tile)
    tiles = jax.tree.leaves(by_column)[0].shape[0]

    def of_rows(part):
        q, rows, found = part

        def body(k, found):
            t, columns = _tile(by_column, k)
            seen = block(q, rows, t, columns, temperature, options)
            return merge(found, stats_of(seen, rows, columns))

        return jax.lax.fori_loop(0, tiles, body, found)

    out = jax.lax.map(of_rows, _tiles((q, rows, found), count, options.tile))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], out)


def pull(options, q, rows: Rows, t, columns: Columns, temperature, pulls: Pulls, dt):
    """The gradient of q, `dt` with that of t added, and that of the temperature."""
    count, width = q.shape
    by_column = _tiles((t, columns), t.shape[0], options.tile)
    by_row = _tiles((q, rows, pulls), count, options.tile)
    dts = _tiles(dt, t.shape[0], options.tile)
    tiles, size = dts.shape[:2]

    def of_rows(carry, part):
        q, rows, pulls = part

        def body(k, carry):
            dq, dts, warmth = carry
            t, columns = _tile(by_column, k)
            seen = block(q, rows, t, columns, temperature, options)
            weights = jnp.exp(seen.logits - pulls.log_total[:, None])
            dlogits = pulls.of_total[:, None] * weights
            dlogits += jnp.where(seen.positives, pulls.of_positive[:, None], 0.0)
            # From the row's own similarity, because the gradients of a row's logits cancel out.
            warmth -= jnp.sum(dlogits * (seen.similarity - rows.own[:, None]), axis=1)
            dsimilarity = dlogits / temperature
            dq += product(dsimilarity, t)
            more = jax.lax.dynamic_index_in_dim(dts, k, keepdims=False)
            more += product(dsimilarity.T, q)
            return dq, jax.lax.dynamic_update_index_in_dim(dts, more, k, 0), warmth

        start = jnp.zeros(q.shape, jnp.float32), carry, jnp.zeros(q.shape[:1], jnp.float32)
        dq, dts, warmth = jax.lax.fori_loop(0, tiles, body, start)
        return dts, (dq, warmth)

    dts, (dq, warmth) = jax.lax.scan(of_rows, dts, by_row)
    dq = dq.reshape(-1, width)[:count]
    dt = dts.reshape(tiles * size, width)[: t.shape[0]]
    return dq, dt, warmth.sum() / temperature**2


def _tiles(tree: Any, count: int, tile: int) -> Any:
    """Leaves [count, ...] as [tiles, size, ...], zeros behind the last where it does not divide."""
    tiles = max(1, -(-count // tile))
    # A few more tiles that divide evenly save a padded copy of the embeddings.
    even = next((n for n in range(tiles, 2 * tiles + 1) if count % n == 0), None)
    tiles = even or tiles
    size = -(-count // tiles)

    def cut(leaf):
        if tiles * size != count:
            behind = [(0, tiles * size - count)] + [(0, 0)] * (leaf.ndim - 1)
            leaf = jnp.pad(leaf, behind)
        return leaf.reshape(tiles, size, *leaf.shape[1:])

    return jax.tree.map(cut, tree)


def _tile(tree: Any, k: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), tree)


def _around(options: LossOptions, visit: Callable, carry: Any, t, columns: Columns, extra: Any):
    """Show all columns to `visit(carry, t, columns, extra) -> (carry, extra)`.

    In a ring each device's columns go once round, and what belongs to them (`extra`) with them,
    so that it comes home complete.
    """
    if options.form != "ring" or not _inside_map():
        return visit(carry, t, columns, extra)
    devices = jax.lax.axis_size(ROWS)
    neighbours = [(j, (j + 1) % devices) for j in range(devices)]

    def step(state, _):
        carry, (t, columns, extra) = state
        carry, extra = visit(carry, t, columns, extra)
        moving = (t, columns, extra)
        return (carry, jax.lax.ppermute(moving, ROWS, neighbours)), None

    (carry, (_, _, extra)), _ = jax.lax.scan(step, (carry, (t, columns, extra)), None, devices)
    return carry, extra


def row_devices() -> int:
    """Among how many devices the ambient mesh spreads rows; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)


def _inside_map() -> bool:
    """Whether this is inside of `_spread`'s map over the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Manual for kind in mesh.axis_types)


def _spread(options: LossOptions, run: Callable, q: jax.Array, t: jax.Array, results: int):
    """`run` on every device's rows; the columns whole, or in a ring its own as well."""
    devices = row_devices()
    ring = options.form == "ring"
    if devices == 1 or q.shape[0] % devices or (ring and t.shape[0] % devices):
        return run
    mine, columns = P(ROWS), P(ROWS) if ring else P()
    inputs = (mine, mine, columns, columns, P())
    if results == 1:
        return jax.shard_map(run, in_specs=inputs, out_specs=mine, check_vma=False)
    out = (mine, columns, P())
    return jax.shard_map(run, in_specs=(*inputs, mine), out_specs=out, check_vma=False)
