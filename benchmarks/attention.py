# SPDX-License-Identifier: Apache-2.0
"""Attention of packed rows: the kernel that `auto` takes on the platform against the exact form.

Memory is the compiler's plan for one layer's gradient: it must not grow with the square of the row.
"""

from __future__ import annotations

import numpy as np

from benchmarks import common
from benchmarks.common import How, Result, Row

HEADS, WIDTH = 4, 96
LENGTHS = (512, 2048)
REAL_LENGTHS = (789, 1953, 2541)
SEQUENCES = 4
"""Of a packed row."""


def measure(how: How) -> Result:
    """Time of `auto` by row length, and memory by row length."""
    import jax

    rows, timings = [], {}
    if how.device != "cpu":  # there `auto` is the exact form
        for tokens in REAL_LENGTHS:
            cases = {kind: timed(how, kind, tokens) for kind in ("auto", "xla")}
            timings[f"{tokens} tokens"] = timing = common.alternate(cases, how.rounds)
            target = 2.0 if tokens == 1953 else None
            what = f"gradient of attention, {tokens} tokens"
            rows.append(common.compared(what, "exact form", timing, "auto", "xla", target))
            if how.device == "gpu":
                cases = {"packed": timed(how, "auto", tokens), "apart": apart(how, tokens)}
                timings[f"{tokens} tokens apart"] = timing = common.alternate(cases, how.rounds)
                against = "cuDNN, a row for each sequence"
                rows.append(common.compared(what, against, timing, "packed", "apart"))
    else:
        for tokens in how.pick(LENGTHS, (64,)):
            seconds = common.alternate({"x": timed(how, "auto", tokens)}, how.rounds).median("x")
            flops = 3 * 4 * HEADS * WIDTH * tokens**2
            shapes = {"gflops_per_s_of_the_whole_square": flops / seconds / 1e9}
            what = f"gradient of attention, {tokens} tokens"
            rows.append(Row(what, seconds, "s", shapes=shapes))
    small, large = how.pick((4096, 16384), (64, 128))
    plans = {n: planned(how, n) for n in (small, large)}
    share = plans[large] / plans[small] / (large / small)
    rows.append(
        Row(
            f"memory of attention, {small:,} to {large:,} tokens", plans[large] / 1e9, "GB",
            "in proportion to the row", plans[small] * large / small / 1e9, share,
            target=2.0, at_most=True, shapes={"bytes": plans, "device": jax.default_backend()},
        )
    )  # fmt: skip
    return Result(rows, timings)


def gradient(kind: str, tokens: int, dtype: str):
    """(jitted gradient of a row's attention, its arguments as shapes)."""
    import jax
    import jax.numpy as jnp

    from vlm2vec_jax.nn import attention

    def value(q, k, v, segments):
        seen = attention.Visibility(segments, segments, causal=True)
        return attention.attend(q, k, v, seen, implementation=kind).astype(jnp.float32).sum()

    heads = jax.ShapeDtypeStruct((1, tokens, HEADS, WIDTH), dtype)
    segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return jax.jit(jax.grad(value, argnums=(0, 1, 2))), (heads, heads, heads, segments)


def planned(how: How, tokens: int) -> int:
    """Bytes of temporaries."""
    function, shapes = gradient("auto", tokens, how.dtype)
    return function.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def timed(how: How, kind: str, tokens: int):
    """A function that takes the gradient of a row of a few sequences."""
    import jax

    function, shapes = gradient(kind, tokens, how.dtype)
    rng = np.random.default_rng(how.seed)
    q, k, v = (jax.numpy.asarray(rng.normal(size=shape.shape), shape.dtype) for shape in shapes[:3])
    segments = np.repeat(np.arange(SEQUENCES) + 1, -(-tokens // SEQUENCES))[None, :tokens]
    segments = segments.astype(np.int32)
    return lambda: jax.block_until_ready(function(q, k, v, segments))


def apart(how: How, tokens: int, implementation: str = "cudnn"):
    """The same for those sequences in a row each, filled up to a multiple of 8: without packing."""
    import jax
    import jax.numpy as jnp

    length = -(-tokens // SEQUENCES)
    shape = (SEQUENCES, -(-length // 8) * 8, HEADS, WIDTH)
    rng = np.random.default_rng(how.seed)
    q, k, v = (jnp.asarray(rng.normal(size=shape), how.dtype) for _ in range(3))

    @jax.jit
    def function(q, k, v):
        def value(q, k, v):
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
            return y[:, :length].astype(jnp.float32).sum()

        return jax.grad(value, argnums=(0, 1, 2))(q, k, v)

    return lambda: jax.block_until_ready(function(q, k, v))
