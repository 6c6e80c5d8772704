# SPDX-License-Identifier: Apache-2.0
"""How long training stands still for a checkpoint, against how long writing it takes."""

from __future__ import annotations

import statistics
import tempfile
import time

from benchmarks.common import How, Result, Row


def measure(how: How) -> Result:
    """Wall seconds in `save` against wall seconds until everything is on disk."""
    import jax
    import jax.numpy as jnp

    from vlm2vec_jax.training.checkpoint import Checkpoints

    count, size = how.pick((32, 1 << 20), (4, 1 << 10))
    state = {"params": {f"leaf{n}": jnp.full((size,), n, jnp.float32) for n in range(count)}}
    jax.block_until_ready(state)
    stalls, wholes = [], []
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as folder:
        for turn in range(how.rounds + 1):
            with Checkpoints(f"{folder}/{turn}", keep=1, every=1) as checkpoints:
                start = time.perf_counter()
                checkpoints.save(1, state, {"turn": turn})
                stalls.append(time.perf_counter() - start)
                checkpoints.wait()
                wholes.append(time.perf_counter() - start)
    # The first turn imports and starts threads.
    ratio = statistics.median(a / b for a, b in zip(stalls[1:], wholes[1:]))
    stall, whole = statistics.median(stalls[1:]), statistics.median(wholes[1:])
    shapes = {"bytes": 4 * count * size, "leaves": count, "wall_s": [stalls, wholes]}
    what = f"stall of a save of {4 * count * size / 1e6:,.0f} MB, wall"
    return Result(
        [Row(what, stall, "s", "until it is on disk", whole, ratio, at_most=True, shapes=shapes)]
    )
