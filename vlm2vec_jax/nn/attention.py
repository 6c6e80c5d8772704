# SPDX-License-Identifier: Apache-2.0
"""Attention behind one function: who sees whom is said once, kernels are chosen by name.

Rows are packed: several sequences lie end to end, told apart by segment ids.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from vlm2vec_jax.nn.compute import AttentionKind

_MOST_PAIRS = 1 << 24
"""Pairs of query and key in a row beyond which their logits are made in blocks."""
_LEAST_BLOCK = 64
# Finite, so that a query which sees nothing gives a mean of values and not NaN.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query sees in a packed row.

    Attributes:
      query_segments: i32 [R, T]; key_segments: i32 [R, S]. A query sees its own segment.
      query_index: i32 [R, T], where the query stands in the row; it sees keys at or before it.
        None for no order: a query sees its whole segment.
      window: if set, keys further back than this many tokens are hidden as well (HF 4.46's
        eager mask: `query - key <= window` is seen).
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_index: jax.Array | None
    window: int | None = None

    def take(self, start: jax.Array, size: int) -> Visibility:
        """The same for `size` queries from `start` on."""
        index = self.query_index
        return Visibility(
            jax.lax.dynamic_slice_in_dim(self.query_segments, start, size, 1),
            self.key_segments,
            None if index is None else jax.lax.dynamic_slice_in_dim(index, start, size, 1),
            self.window,
        )

    def mask(self) -> jax.Array:
        """Dense form, bool [R, T, S]."""
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.query_index is None:
            return same
        back = self.query_index[:, :, None] - jnp.arange(self.key_segments.shape[1])
        seen = same & (back >= 0)
        return seen if self.window is None else seen & (back <= self.window)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility | None = None,
    *,
    implementation: AttentionKind = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v.

    Args:
      q: [R, T, N, H].
      k: [R, S, K, H] with N a multiple of K; head n reads key head n // (N / K).
      v: [R, S, K, H].
      visibility: None if every query sees every key.
      implementation: `xla` is exact on every platform; `auto` is `xla` so far.

    Returns:
      [R, T, N, H] in q's dtype.

    Raises:
      ValueError: if the implementation is not there.
    """
    if implementation not in ("auto", "xla"):
        raise ValueError(f"attention {implementation!r} is not available; use 'xla' or 'auto'")
    if visibility is not None and q.shape[1] * k.shape[1] > _MOST_PAIRS:
        return _attend_in_blocks(q, k, v, visibility)
    return _attend_xla(q, k, v, visibility)


def attend_near(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    reach: int,
    *,
    implementation: AttentionKind = "auto",
) -> jax.Array:
    """Attention within short runs: a query sees its whole segment, which lies close around it.

    The cost is linear in T: blocks of at least `reach` queries look at themselves and at both
    neighbours.

    Args:
      q: [R, T, N, H].
      k: [R, T, K, H].
      v: [R, T, K, H].
      segments: i32 [R, T], at least 0, each a run of at most `reach` + 1 tokens.
      reach: see `segments`.
      implementation: see `attend`.

    Returns:
      [R, T, N, H] in q's dtype.
    """
    rows, tokens, heads, width = q.shape
    block = max(reach, _LEAST_BLOCK)
    count = -(-tokens // block)
    if count < 4:
        return attend(q, k, v, Visibility(segments, segments, None), implementation=implementation)
    missing = count * block - tokens

    def blocks(x: jax.Array, fill: int = 0) -> jax.Array:
        pad = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill)
        return x.reshape(rows, count, block, *x.shape[2:])

    def around(x: jax.Array, fill: int = 0) -> jax.Array:
        edge = jnp.full_like(x[:, :1], fill)
        before = jnp.concatenate([edge, x[:, :-1]], axis=1)
        after = jnp.concatenate([x[:, 1:], edge], axis=1)
        near = jnp.concatenate([before, x, after], axis=2)
        return near.reshape(rows * count, 3 * block, *x.shape[3:])

    own = blocks(segments, -1)
    seen = Visibility(own.reshape(-1, block), around(own, -1), None)
    y = attend(
        blocks(q).reshape(-1, block, heads, width),
        around(blocks(k)),
        around(blocks(v)),
        seen,
        implementation=implementation,
    )
    return y.reshape(rows, count * block, heads, width)[:, :tokens]


def _attend_in_blocks(q, k, v, visibility: Visibility):
    """The same sums, some queries at a time: the logits of all of them would not fit."""
    rows, tokens, heads, width = q.shape
    size = max(_MOST_PAIRS // 4 // k.shape[1] // 128 * 128, 128)
    count = -(-tokens // size)
    missing = count * size - tokens
    q = jnp.pad(q, [(0, 0), (0, missing), (0, 0), (0, 0)])
    index = visibility.query_index
    visibility = Visibility(
        jnp.pad(visibility.query_segments, [(0, 0), (0, missing)], constant_values=-1),
        visibility.key_segments,
        None if index is None else jnp.pad(index, [(0, 0), (0, missing)]),
        visibility.window,
    )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(start):
        part = jax.lax.dynamic_slice_in_dim(q, start, size, 1)
        return _attend_xla(part, k, v, visibility.take(start, size))

    y = jax.lax.map(block, jnp.arange(count) * size)
    return jnp.moveaxis(y, 0, 1).reshape(rows, count * size, heads, width)[:, :tokens]


def _attend_xla(q, k, v, visibility):
    rows, queries, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(rows, queries, k.shape[2], groups, width)
    logits = jnp.einsum("rtkgh,rskh->rkgts", q, k, preferred_element_type=jnp.float32)
    logits = logits * width**-0.5
    if visibility is not None:
        logits = jnp.where(visibility.mask()[:, None, None], logits, _HIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("rkgts,rskh->rtkgh", weights, v)
    return out.reshape(rows, queries, heads, width)
