# SPDX-License-Identifier: Apache-2.0
"""Flash attention on NVIDIA cards: cuDNN's where rows are whole, a Triton kernel where packed.

cuDNN's own form of packed rows (offsets of sequences) is out of reach of jax's public functions,
and a mask handed to it costs memory of queries x keys and a gradient for the mask that not every
shape has. So packed rows go through jax's Pallas kernel, which knows segments.

Nothing here has been run on a card by its authors; `works` looks before `auto` relies on it, and
`pytest -m gpu` compares values and gradients.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm2vec_jax.nn.compute import apart

_BLOCK = 64
"""Side of the Triton kernel's blocks: at width 128 its tiles fit every card from Ampere on."""
_HALVES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))


def cudnn_takes(q: jax.Array) -> bool:
    """Whether cuDNN's flash attention has this dtype and head width on every card from Ampere."""
    return q.dtype in _HALVES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v by cuDNN; q [R, T, N, H], k and v [R, S, K, H].

    Lengths that are no multiple of 8 are filled up and told: jax refuses to differentiate odd ones
    (CLIP's 577), a mask or none.

    Raises:
      RuntimeError: if there is no cuDNN.
    """
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    rows, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
    if tokens % 8 == 0 and keys % 8 == 0:
        return attend(q, k, v)
    q, k, v = (jnp.pad(x, [(0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)]) for x in (q, k, v))
    out = attend(
        q,
        k,
        v,
        query_seq_lengths=jnp.full((rows,), tokens, jnp.int32),
        key_value_seq_lengths=jnp.full((rows,), keys, jnp.int32),
    )
    return out[:, :tokens]


def attend_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    *,
    causal: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v by jax's Pallas kernel.

    Args:
      q: [R, T, N, H].
      k: [R, T, K, H], N a multiple of K.
      v: [R, T, K, H].
      query_segments: i32 [R, T], at least 0; None if every query sees every key.
      key_segments: the same array: the kernel knows one.
      causal: query i sees keys 0..i.
      interpret: run the kernel in an interpreter, on any platform.

    Returns:
      [R, T, N, H] in q's dtype.
    """
    # Newer versions of jax call it deprecated; where it is gone, `works` says so and not an import.
    from jax.experimental.pallas.ops.gpu import attention as pallas

    del key_segments
    tokens, groups = q.shape[1], q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    missing = -tokens % _BLOCK
    if missing:
        q, k, v = (jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) for x in (q, k, v))
        if query_segments is None:
            query_segments = jnp.zeros((q.shape[0], tokens), jnp.int32)
        query_segments = jnp.pad(query_segments, [(0, 0), (0, missing)], constant_values=-1)
    sizes = pallas.BlockSizes(*(_BLOCK,) * 2, *(_BLOCK // 2,) * 4)
    out: Any = pallas.mha(
        q,
        k,
        v,
        query_segments,
        sm_scale=float(q.shape[-1] ** -0.5),
        causal=causal,
        block_sizes=sizes,
        interpret=interpret,
    )
    return out[:, :tokens]


@functools.cache
def works(kind: str, width: int, dtype: str) -> bool:
    """Whether a kernel runs on this card and agrees with plain attention, forward and backward.

    Tried once for each head width and dtype, on small operands; why it failed is logged.
    """
    try:
        # The caller may be in the middle of tracing, and on a mesh.
        worst = apart(functools.partial(_difference, kind, width, dtype))
        # Two bfloat16 computations of values near 1 may differ by some units of 2^-8.
        allowed = 0.05 if jnp.dtype(dtype) in _HALVES else 1e-3
        problem = "" if worst <= allowed else f"it is off by {worst:.3g}"
    except Exception as error:  # whatever a compiler or driver raises
        problem = f"{type(error).__name__}: {str(error).strip()[:200]}"
    if problem:
        logging.getLogger(__name__).warning(
            "attention=%s is not used at head width %d in %s: %s", kind, width, dtype, problem
        )
    return not problem


def _difference(kind: str, width: int, dtype: str) -> float:
    """Largest difference of values and gradients from plain attention."""
    shape = (1, 192, 2, width)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys)
    segments = jnp.asarray(np.repeat([[0, 1, 2]], [70, 90, 32], axis=1), jnp.int32)

    def plain(q, k, v):
        logits = jnp.einsum("rtnh,rsnh->rnts", q, k, preferred_element_type=jnp.float32)
        seen = jnp.ones((192, 192), bool)
        if kind == "triton":
            seen = jnp.tril(seen) & (segments[0, :, None] == segments[0])
        weights = jax.nn.softmax(jnp.where(seen, logits * width**-0.5, -1e30))
        return jnp.einsum("rnts,rsnh->rtnh", weights.astype(v.dtype), v)

    def kernel(q, k, v):
        if kind == "triton":
            return attend_triton(q, k, v, segments, segments, causal=True)
        return attend_cudnn(q, k, v)

    def values(function):
        def total(*operands):
            y = function(*operands).astype(jnp.float32)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

        (_, y), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in (y, *grads)]

    pairs = zip(values(kernel), values(plain), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)
