# SPDX-License-Identifier: Apache-2.0
"""Splash attention, jax's flash attention kernel for TPUs, over packed rows of any length.

Nothing of the size of queries x keys is kept, forward or backward. Blocks that order or window hide
as a whole are skipped; segments are told apart inside of a block. The kernel wants lengths that
are multiples of its blocks and unscaled logits; the rest is done here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from vlm2vec_jax.nn.compute import ATTENTION, apart

LANES = 128
"""Lengths of blocks are multiples of this."""

_LARGEST = 1024
"""Longest side of a block; the tiles of larger ones do not fit a core's own memory (16 MB)
with room to fetch the next."""
_STEP = 256 * 256
"""A step of the kernel's grid costs about as much as so many pairs: some 0.35 us (Pallas' guide to
TPU pipelining) at 4 x 128 FLOPs a pair and half of a v5e's peak."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v on one chip.

    Args:
      q: [R, T, N, H].
      k: [R, S, K, H], N a multiple of K.
      v: [R, S, K, H].
      query_segments: i32 [R, T], at least 0: a query sees its own segment; None for all.
      key_segments: i32 [R, S].
      causal: query i sees keys 0..i; T is S.
      window: a causal query sees keys at most so far back; None for no limit.
      interpret: run the kernel in an interpreter, on any platform.

    Returns:
      [R, T, N, H] in q's dtype.
    """
    tokens, keys, width = q.shape[1], k.shape[1], q.shape[3]
    block_q = block(tokens, causal=causal, window=window)
    block_kv = block_q if causal else block(keys)
    rows_q, rows_kv = -(-tokens // block_q) * block_q, -(-keys // block_kv) * block_kv
    if query_segments is None and rows_kv > keys:
        query_segments = jnp.zeros(q.shape[:2], jnp.int32)
        key_segments = jnp.zeros(k.shape[:2], jnp.int32)
    kernel = _kernel(q.shape[2], rows_q, rows_kv, block_q, block_kv, causal, window, interpret)

    scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    operands = [
        jnp.swapaxes(_longer(x, length), 1, 2)
        for x, length in ((scaled, rows_q), (k, rows_kv), (v, rows_kv))
    ]
    ids = None
    if query_segments is not None and key_segments is not None:
        # Filled up with a segment of its own, which no real token sees.
        ids = splash.SegmentIds(
            _longer(query_segments, rows_q, -1), _longer(key_segments, rows_kv, -1)
        )
    run = _run if q.dtype == jnp.bfloat16 else _by_rows
    return jnp.swapaxes(run(kernel, *operands, ids), 1, 2)[:, :tokens]


def _by_rows(kernel, q, k, v, ids):
    return jax.vmap(kernel)(q, k, v, ids)


# The kernel multiplies bfloat16 only as such, also where `jax_default_matmul_precision` asks for
# more; and its backward pass is traced when the caller's context is long gone.
@jax.custom_vjp
def _run(kernel, q, k, v, ids):
    with jax.default_matmul_precision("default"):
        return _by_rows(kernel, q, k, v, ids)


def _run_forward(kernel, q, k, v, ids):
    with jax.default_matmul_precision("default"):
        return jax.vjp(lambda q, k, v: _by_rows(kernel, q, k, v, ids), q, k, v)


def _run_backward(back, cotangent):
    with jax.default_matmul_precision("default"):
        return (None, *back(cotangent), None)


_run.defvjp(_run_forward, _run_backward)


def block(length: int, *, causal: bool = False, window: int | None = None) -> int:
    """Side of the blocks that cost least for rows of this length, a multiple of `LANES`.

    Long blocks have few steps, short ones fill up less and skip more of what order and window hide.
    """

    def cost(side: int) -> float:
        count = -(-length // side)
        back = count if window is None else -(-window // side) + 1
        steps = sum(min(i, back) for i in range(1, count + 1)) if causal else count * count
        return steps * (side * side + _STEP)

    longest = min(_LARGEST, -(-length // LANES) * LANES)
    return min(range(longest, 0, -LANES), key=cost)


def _longer(x: jax.Array, length: int, fill: int = 0) -> jax.Array:
    """`x` filled up along its second axis."""
    pad = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=fill)


@functools.lru_cache(maxsize=256)
def _kernel(heads, queries, keys, block_q, block_kv, causal, window, interpret):
    """The kernel for these shapes; what it knows of the mask are numpy arrays."""
    shape = (queries, keys)
    if not causal:
        mask = splash.FullMask(shape)
    elif window is None:
        mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, (window, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        # Logits and their gradient once for q, k and v: five products a block where two kernels
        # have seven.
        use_fused_bwd_kernel=True,
    )

    def make():
        return splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )

    # Its arrays would belong to the trace, or lie on devices that only exist on paper.
    return jax.tree.map(np.asarray, apart(make))
