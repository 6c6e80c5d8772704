# SPDX-License-Identifier: Apache-2.0
"""Attention behind one function: who sees whom is said once, kernels are chosen by name.

Rows are packed: several sequences lie end to end, told apart by segment ids.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vlm2vec_jax.nn.compute import AttentionKind

# Finite, so that a query which sees nothing gives a mean of values and not NaN.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query sees in a packed row.

    Attributes:
      query_segments: i32 [R, T]; key_segments: i32 [R, S]. A query sees its own segment.
      query_index: i32 [R, T], where the query stands in the row; it sees keys at or before it.
      window: if set, keys further back than this many tokens are hidden as well (HF 4.46's
        eager mask: `query - key <= window` is seen).
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_index: jax.Array
    window: int | None = None

    def mask(self) -> jax.Array:
        """Dense form, bool [R, T, S]."""
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
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
    return _attend_xla(q, k, v, visibility)


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
