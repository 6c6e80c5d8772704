# SPDX-License-Identifier: Apache-2.0
"""The rate of a matrix product: what 100 % is, measured in the same run as everything else."""

from __future__ import annotations

import functools

from benchmarks import common
from benchmarks.common import How, Result, Row


def measure(how: How) -> Result:
    """A row per size of the square product."""
    rates = _rates(how)
    rows = [
        Row(f"product of {size} x {size}, {how.dtype}", rate / 1e9, "GF/s")
        for size, rate in rates.items()
    ]
    return Result(rows, more={"peak_flops_per_s": max(rates.values())})


def peak(how: How) -> float:
    """FLOP/s of the best product, measured once in a process."""
    return max(_rates(how).values())


def useful(how: How, what: str, flops: float, seconds: float, target: float | None = None) -> Row:
    """The row that says which share of the peak useful FLOPs are."""
    rate = flops / seconds
    shapes = {"useful_flops": flops, "useful_gflops_per_s": rate / 1e9}
    ours = rate / peak(how)
    where = target if how.device != "cpu" else None
    return Row(what, ours, "share", "of the measured peak", target=where, shapes=shapes)


@functools.cache
def _rates(how: How) -> dict[int, float]:
    import jax
    import jax.numpy as jnp

    sizes = how.pick((512, 1024, 2048) if how.device == "cpu" else (2048, 4096, 8192), (128,))
    found = {}
    for size in sizes:
        a = jnp.full((size, size), 0.5, how.dtype)
        product = jax.jit(lambda x, y: x @ y)
        jax.block_until_ready(product(a, a))
        # Long enough for the clock, many times over on an accelerator.
        repeats = max(1, int(how.pick(4e9 if how.device == "cpu" else 4e12, 1e7) / size**3 / 2))
        best = float("inf")
        for _ in range(3):
            start = common.clock()
            out = a
            for _ in range(repeats):
                out = product(a, a)
            jax.block_until_ready(out)
            best = min(best, (common.clock() - start) / repeats)
        found[size] = 2 * size**3 / max(best, 1e-9)
    return found
