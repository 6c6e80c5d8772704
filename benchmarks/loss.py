# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the three forms of the loss against the batch size.

Memory is the compiler's plan for loss and gradient at the real width (3072), for batches of 2^10 to
2^17 pairs: embeddings, their gradients and everything in between, per device; nothing of that size
is run. `dense` and `tiled` are on one device, `ring` on eight simulated ones. Time is taken at a
smaller width; the ring's eight devices share a CPU's one thread, so it is not timed there.
"""

from __future__ import annotations

import dataclasses

from benchmarks import common
from benchmarks.common import How, Result, Row

DEVICES = 8
WIDTH = 3072
TIMED_WIDTH = 512


def measure(how: How) -> Result:
    """Memory by batch and form, and time of tiled against dense."""
    powers = how.pick((10, 12, 14, 17), (8, 9))
    rows, timings = [], {}
    planned_bytes = {
        form: {2**power: planned(form, 2**power) for power in powers}
        for form in ("dense", "tiled", "ring")
    }
    small, large = 2 ** powers[-2], 2 ** powers[-1]
    for form in ("tiled", "ring"):
        of = planned_bytes[form]
        share = of[large] / of[small] / (large / small)
        rows.append(
            Row(
                f"memory of {form}, {small:,} to {large:,} pairs", of[large] / 1e9, "GB",
                "in proportion to the batch", large / small * of[small] / 1e9, share, 1.1,
                at_most=True, shapes={"bytes": of, "dense_bytes": planned_bytes["dense"]},
            )
        )  # fmt: skip
    for pairs, target in how.pick(((1024, None), (4096, 1.1)), ((64, None),)):
        cases = {form: timed(form, pairs, how.pick(TIMED_WIDTH, 16)) for form in ("dense", "tiled")}
        timings[f"{pairs} pairs"] = timing = common.alternate(cases, how.rounds)
        what = f"time of tiled, {pairs:,} pairs"
        told = {"width": TIMED_WIDTH}
        rows.append(common.overhead(what, "dense", timing, "tiled", "dense", target, told))
    return Result(rows, timings)


def program(form: str, pairs: int, width: int):
    """(jitted loss and gradient, its arguments as shapes, mesh)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from vlm2vec_jax.losses import LossOptions, contrastive_loss
    from vlm2vec_jax.parallel.mesh import ROWS, make_mesh

    options = dataclasses.replace(LossOptions(mask_duplicates=True), form=form)  # type: ignore
    # Simulated devices where there are not enough: only the compiler's plan is read.
    devices = jax.devices() if form != "ring" else jax.devices("cpu")[:DEVICES]
    mesh = make_mesh(devices=devices if form == "ring" else devices[:1])
    spread, whole = NamedSharding(mesh, P(ROWS)), NamedSharding(mesh, P())

    def loss(q, t, ids):
        return contrastive_loss(q, t, temperature=0.02, target_id=ids, options=options)[0]

    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(whole, (spread, spread))
    )
    vectors = jax.ShapeDtypeStruct((pairs, width), jnp.float32, sharding=spread)
    ids = jax.ShapeDtypeStruct((pairs,), jnp.int32, sharding=whole)
    return step, (vectors, vectors, ids), mesh


def planned(form: str, pairs: int) -> int:
    """Bytes of a device for arguments, results and temporaries, as compiled."""
    import jax

    step, shapes, mesh = program(form, pairs, WIDTH)
    with jax.set_mesh(mesh):
        plan = step.lower(*shapes).compile().memory_analysis()
    assert plan is not None
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes


def timed(form: str, pairs: int, width: int):
    """A function that takes loss and gradient of vectors of so many pairs."""
    import jax
    import numpy as np

    step, shapes, mesh = program(form, pairs, width)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, pairs, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    values = (*vectors, np.arange(pairs, dtype=np.int32))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(v, s.sharding) for v, s in zip(values, shapes, strict=True)]
        compiled = step.lower(*shapes).compile()
    return lambda: jax.block_until_ready(compiled(*placed))
