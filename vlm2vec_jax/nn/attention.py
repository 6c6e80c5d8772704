# SPDX-License-Identifier: Apache-2.0
"""Attention behind one function: who sees whom is said once, kernels are chosen by name.

Rows are packed: several sequences lie end to end, told apart by segment ids. `xla` is exact and
runs anywhere, `dense` is what it is held to (`nn/exact.py`); `splash` is the kernel of TPUs
(`nn/splash.py`), `cudnn` and `triton` are those of NVIDIA cards (`nn/cuda.py`);
docs/performance.md has their figures.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.nn.compute import AttentionKind
from vlm2vec_jax.nn.exact import Visibility, attend_dense, attend_exact, platform
from vlm2vec_jax.parallel.sharding import by_rows_and_heads, parts

__all__ = ["AttentionKinds", "Visibility", "attend", "attend_near", "interpreted", "platform"]

AttentionKinds: tuple[str, ...] = get_args(AttentionKind)

_LEAST_BLOCK = 64


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
      implementation: `xla`, exact on every platform; `dense`, the same with all logits at once,
        for comparisons; `splash` on TPUs; `triton` on NVIDIA cards; `cudnn` there, which means
        `triton` for packed rows; `auto` for what is best on the platform at these shapes. What a
        kernel has no form for is `xla`: queries of which a causal `visibility` says where they
        stand (a few pooled tokens), a window on NVIDIA cards.

    Returns:
      [R, T, N, H] in q's dtype.

    Raises:
      UserError: if the platform has no such kernel.
    """
    kind = chosen(implementation, q, k, visibility)
    if kind in ("xla", "dense"):
        exact = attend_exact if kind == "xla" else attend_dense
        return exact(q, k, v, visibility)
    tensor = parts("tensor")
    if q.shape[2] % tensor == 0 and k.shape[2] % tensor:
        # Fewer key heads than partners: every partner takes those that its heads read.
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    # Imported where they are used: most programs need none of them.
    if kind == "splash":
        from vlm2vec_jax.nn.splash import attend as kernel
    else:
        from vlm2vec_jax.nn.cuda import attend_cudnn
        from vlm2vec_jax.nn.cuda import attend_triton as kernel

        if kind == "cudnn":
            return by_rows_and_heads(attend_cudnn, (q, k, v))
    options: dict[str, Any] = {"interpret": _interpreted}
    segments = ()
    if visibility is not None:
        options["causal"] = visibility.causal
        segments = (visibility.query_segments, visibility.key_segments)
        if visibility.window is not None:
            options["window"] = visibility.window
    return by_rows_and_heads(functools.partial(kernel, **options), (q, k, v), segments)


def chosen(
    kind: AttentionKind, q: jax.Array, k: jax.Array, visibility: Visibility | None
) -> AttentionKind:
    """The kernel for these operands.

    Raises:
      UserError: if the platform has no such kernel.
    """
    where = platform()
    needed = {"splash": "tpu", "cudnn": "gpu", "triton": "gpu"}.get(kind, where)
    if kind not in AttentionKinds:
        raise UserError(f"attention={kind}: known are {', '.join(AttentionKinds)}")
    if needed != where and not _interpreted:
        names = {"tpu": "TPUs", "gpu": "NVIDIA cards"}
        raise UserError(
            f"attention={kind} is a kernel of {names[needed]}, but this runs on {where}: choose "
            f"attention=auto"
        )
    if kind in ("xla", "dense"):
        return kind
    if visibility is not None and visibility.query_index is not None:
        return "xla"
    if kind == "splash" or (kind == "auto" and where == "tpu"):
        long = kind == "splash" or q.shape[1] * k.shape[1] >= LEAST_PAIRS
        return "splash" if long else "xla"
    if where != "gpu" and not _interpreted:
        return "xla"
    from vlm2vec_jax.nn import cuda

    wanted = "cudnn" if kind != "triton" and visibility is None else "triton"
    if wanted == "cudnn" and not cuda.cudnn_takes(q):
        wanted = "triton"
    if wanted == "triton" and (
        q.shape[1] != k.shape[1] or (visibility is not None and visibility.window is not None)
    ):
        return "xla"
    if kind == "auto" and not (
        jax.default_backend() == "gpu" and cuda.works(wanted, q.shape[3], str(q.dtype))
    ):
        return "xla"
    return wanted


LEAST_PAIRS = 512 * 512
"""Pairs of query and key in a row from which on `auto` takes splash."""


_interpreted = False


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Let the kernels of TPUs and cards run in an interpreter, on any platform: for tests."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


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
        return attend(q, k, v, Visibility(segments, segments), implementation=implementation)
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
    seen = Visibility(own.reshape(-1, block), around(own, -1))
    y = attend(
        blocks(q).reshape(-1, block, heads, width),
        around(blocks(k)),
        around(blocks(v)),
        seen,
        implementation=implementation,
    )
    return y.reshape(rows, count * block, heads, width)[:, :tokens]
