# SPDX-License-Identifier: Apache-2.0
"""The exact form of attention, for every platform: memory that grows with the row, not its square.

On a CPU it also skips what no query sees and works in pieces that the cache holds; elsewhere the
kernels do that (`nn/attention.py`). `attend_dense` is the form that all others are held to.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from vlm2vec_jax.parallel.sharding import parts

_MOST_LOGITS = 1 << 28
"""Logits on a chip beyond which they are made in blocks (1 GB in float32)."""
_BLOCK_LOGITS = 1 << 26
"""Logits of such a block."""
_PIECE = 256
"""Queries, at least, of a piece of a causal row on a CPU."""
_MOST_PIECES = 8
"""Of a row: each is compiled by itself."""
_CACHED_LOGITS = 3 << 18
"""Logits that a CPU makes at a time (3 MB in float32) ..."""
_LOOP_LOGITS = 3 << 20
"""... if there are more than these in all: a loop costs, too."""
# Finite, so that a query which sees nothing gives a mean of values and not NaN.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query sees in a packed row.

    Attributes:
      query_segments: i32 [R, T]; key_segments: i32 [R, S]. A query sees its own segment.
      causal: it sees keys at or before its own place only, else its whole segment.
      query_index: i32 [R, T], where a causal query stands in the row; None where the queries are
        the row's tokens in order.
      window: if set, keys further back than this many tokens are hidden from a causal query (HF
        4.46's eager mask: `query - key <= window` is seen).
    """

    query_segments: jax.Array
    key_segments: jax.Array
    causal: bool = False
    query_index: jax.Array | None = None
    window: int | None = None

    def take(self, start: jax.Array, size: int) -> Visibility:
        """The same for `size` queries from `start` on."""

        def part(x):
            return jax.lax.dynamic_slice_in_dim(x, start, size, 1)

        own = part(self.query_segments)
        if self.query_index is None:
            index = jnp.broadcast_to(start + jnp.arange(size), own.shape)
        else:
            index = part(self.query_index)
        return Visibility(own, self.key_segments, self.causal, index, self.window)

    def rows(self, start: jax.Array, count: int) -> Visibility:
        """The same for `count` rows from `start` on."""
        arrays = (self.query_segments, self.key_segments, self.query_index)
        own, keys, index = (
            None if x is None else jax.lax.dynamic_slice_in_dim(x, start, count, 0) for x in arrays
        )
        assert own is not None and keys is not None
        return Visibility(own, keys, self.causal, index, self.window)

    def part(self, start: int, end: int, first: int) -> Visibility:
        """The same for the queries from `start` to `end` and the keys from `first` to `end`.

        Queries must be the row's tokens in order, and causal.
        """
        own = self.query_segments[:, start:end]
        index = jnp.broadcast_to(jnp.arange(start - first, end - first), own.shape)
        return Visibility(own, self.key_segments[:, first:end], True, index, self.window)

    def mask(self) -> jax.Array:
        """Dense form, bool [R, T, S]."""
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if not self.causal:
            return same
        index = self.query_index
        if index is None:
            index = jnp.arange(self.query_segments.shape[1])[None]
        back = index[:, :, None] - jnp.arange(self.key_segments.shape[1])
        seen = same & (back >= 0)
        return seen if self.window is None else seen & (back <= self.window)


def attend_exact(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility | None):
    """`nn.attention.attend` by products and sums of XLA, on any platform.

    Args:
      q: [R, T, N, H].
      k: [R, S, K, H] with N a multiple of K.
      v: [R, S, K, H].
      visibility: None if every query sees every key.

    Returns:
      [R, T, N, H] in q's dtype.
    """
    tokens = q.shape[1]
    own = q.shape[0] * q.shape[2] * k.shape[1] / _chips()
    if visibility is not None and own * tokens > _MOST_LOGITS:
        return _in_pieces(_attend_in_blocks, q, k, v, visibility)
    if on_one_cpu():
        return _attend_by_cache(q, k, v, visibility)
    return _in_pieces(_attend_at_once, q, k, v, visibility)


def _in_pieces(attend, q, k, v, visibility: Visibility | None):
    """`attend`; on a CPU piece by piece where a piece sees less than the whole row."""
    tokens = q.shape[1]
    found = _pieces(tokens, k.shape[1], visibility)
    if visibility is None or len(found) == 1:
        return attend(q, k, v, visibility)
    out = []
    for start, end, first in found:
        seen = visibility.part(start, end, first)
        out.append(attend(q[:, start:end], k[:, first:end], v[:, first:end], seen))
    return jnp.concatenate(out, axis=1)


def _pieces(queries: int, keys: int, visibility: Visibility | None) -> list[tuple[int, int, int]]:
    """Pieces of a row: queries from `start` to `end`, keys from `first` to the same end."""
    ordered = visibility is not None and visibility.causal and visibility.query_index is None
    if visibility is None or not ordered or queries != keys or platform() != "cpu":
        return [(0, queries, queries - keys)]
    back = queries if visibility.window is None else visibility.window
    return [(start, end, max(start - back, 0) // 16 * 16) for start, end in pieces(queries)]


def pieces(tokens: int) -> list[tuple[int, int]]:
    """The pieces (start, end) in which a CPU takes the queries of a causal row.

    A piece sees keys up to its own end only, so that of T^2 logits about half are never made.
    """
    count = min(-(-tokens // _PIECE), _MOST_PIECES)
    size = -(-tokens // (count * 16)) * 16  # as matrix products like it
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def attend_dense(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility | None):
    """The same sums as they are written in a book: all logits, softmax in float32, the values.

    For comparisons: its time and its memory grow with the square of the row.
    """
    rows, queries, heads, width = q.shape
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q = q.reshape(rows, k.shape[1], heads // k.shape[1], queries, width)
    logits = jnp.einsum("rkgth,rksh->rkgts", q, k) * width**-0.5
    if visibility is not None:
        logits = jnp.where(visibility.mask()[:, None, None], logits, _HIDDEN)
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(v.dtype)
    out = jnp.einsum("rkgts,rksh->rkgth", weights, v)
    return jnp.swapaxes(out.reshape(rows, heads, queries, width), 1, 2)


def platform() -> str:
    """Of the devices that a program is traced for: `cpu`, `gpu`, `tpu`."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def on_one_cpu() -> bool:
    """Whether a program is for a CPU that shares rows and heads with no other.

    Loops over rows that several share would send them to and fro.
    """
    return platform() == "cpu" and _chips() == 1


def _chips() -> int:
    """That share the rows and heads of an array."""
    return parts("data") * parts("fsdp") * parts("tensor")


def _attend_in_blocks(q, k, v, visibility: Visibility, size: int | None = None):
    """The same sums, `size` queries at a time; the backward pass makes their logits again."""
    rows, tokens, heads, width = q.shape
    if size is None:
        own = rows * heads * k.shape[1] / _chips()
        size = max(int(_BLOCK_LOGITS / own) // 128 * 128, 128)
    count = -(-tokens // size)
    missing = count * size - tokens
    q = jnp.pad(q, [(0, 0), (0, missing), (0, 0), (0, 0)])
    index = visibility.query_index
    visibility = dataclasses.replace(
        visibility,
        query_segments=jnp.pad(
            visibility.query_segments, [(0, 0), (0, missing)], constant_values=-1
        ),
        query_index=None if index is None else jnp.pad(index, [(0, 0), (0, missing)]),
    )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(start):
        part = jax.lax.dynamic_slice_in_dim(q, start, size, 1)
        return _attend_at_once(part, k, v, visibility.take(start, size))

    y = jax.lax.map(block, jnp.arange(count) * size)
    return jnp.moveaxis(y, 0, 1).reshape(rows, count * size, heads, width)[:, :tokens]


def _attend_by_cache(q, k, v, visibility):
    """The same for as many rows, or heads of a row, at a time as a CPU's cache holds logits of."""
    rows, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    sizes = [
        (end - start) * (end - first) for start, end, first in _pieces(queries, keys, visibility)
    ]
    most = _CACHED_LOGITS // (heads // kv_heads * max(sizes))
    if most >= kv_heads:
        row_step, head_step = _divisor(rows, most // kv_heads), kv_heads
    else:
        row_step, head_step = 1, _divisor(kv_heads, most)
    across = kv_heads // head_step
    count = rows // row_step * across
    if count == 1 or rows * heads * sum(sizes) <= _LOOP_LOGITS:
        return _in_pieces(_attend_at_once, q, k, v, visibility)

    def cut(x):
        x = x.reshape(rows // row_step, row_step, x.shape[1], across, -1, width)
        return jnp.moveaxis(x, 3, 1).reshape(count, row_step, x.shape[2], -1, width)

    def step(operands):
        number, *qkv = operands
        start = number // across * row_step
        seen = None if visibility is None else visibility.rows(start, row_step)
        return _in_pieces(_attend_at_once, *qkv, seen)

    out = jax.lax.map(step, (jnp.arange(count), cut(q), cut(k), cut(v)))
    out = out.reshape(rows // row_step, across, row_step, queries, -1, width)
    return jnp.moveaxis(out, 1, 3).reshape(q.shape)


def _attend_at_once(q, k, v, visibility):
    rows, queries, heads, width = q.shape
    # Heads in front: on a CPU a gradient takes half the time.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q = q.reshape(rows, k.shape[1], heads // k.shape[1], queries, width)
    mask = None if visibility is None else visibility.mask()
    out = (_weighted_on_cpu if platform() == "cpu" else _weighted)(q, k, v, mask)
    return jnp.swapaxes(out.reshape(rows, heads, queries, width), 1, 2)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`, or 1."""
    return next(d for d in range(min(max(most, 1), number), 0, -1) if number % d == 0)


def _weighted(q, k, v, mask):
    """Sums [R, K, G, T, H] of v by the softmax of logits, which are read and written least.

    Args:
      q: [R, K, G, T, H].
      k: [R, K, S, H].
      v: [R, K, S, H].
      mask: bool [R, T, S], or None.
    """
    logits = _logits("rkgth,rksh->rkgts", q, k)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, _HIDDEN)
    return _average("rkgts,rksh->rkgth", logits, v)


@jax.custom_vjp
def _weighted_on_cpu(q, k, v, mask):
    """`_weighted` without the axis G where it is 1: there it costs a copy of the logits.

    With it a gradient is faster, which is why that is taken of `_weighted`.
    """
    if q.shape[2] > 1:
        return _weighted(q, k, v, mask)
    logits = _logits("rkth,rksh->rkts", q[:, :, 0], k)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, _HIDDEN)
    return _average("rkts,rksh->rkth", logits, v)[:, :, None]


def _forward(q, k, v, mask):
    return jax.vjp(lambda q, k, v: _weighted(q, k, v, mask), q, k, v)


def _backward(pull, cotangent):
    return *pull(cotangent), None


_weighted_on_cpu.defvjp(_forward, _backward)


def _logits(product: str, q, k):
    scale = q.shape[-1] ** -0.5
    early = q.dtype == jnp.float32  # else scaling would round once more
    logits = jnp.einsum(product, q * scale if early else q, k, preferred_element_type=jnp.float32)
    return logits if early else logits * scale


def _average(product: str, logits, v):
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # The division comes behind the product: there are fewer sums than weights.
    out = jnp.einsum(product, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)
