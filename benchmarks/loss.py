# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the three forms of the loss against the batch size.

    python -m benchmarks.loss [--measured 14] [--width 256]

Memory is the compiler's plan for loss and gradient at the real width (3072), for batches of 2^10 to
2^17 pairs: embeddings, their gradients and everything in between, per device; nothing of that size
is run. `dense` and `tiled` are on one device, `ring` on eight simulated ones. Time is CPU seconds
of one thread, at a smaller width, up to 2^`measured` pairs (the dense form up to 2^12); the ring's
eight devices share that thread, so its time is the sum of theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time

from benchmarks.common import RESULTS, machine, pin

DEVICES = 8
WIDTH = 3072
DENSE_MEASURED = 12


def main() -> None:
    """Plan, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=int, default=14, help="largest power of two to run")
    parser.add_argument("--width", type=int, default=256, help="of the vectors that are run")
    args = parser.parse_args()
    pin()
    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"

    lines = []
    for power in range(10, 18):
        for form in ("dense", "tiled", "ring"):
            line = {"pairs": 2**power, "form": form, "bytes": planned(form, 2**power)}
            if power <= (DENSE_MEASURED if form == "dense" else args.measured):
                line["cpu_s"] = measured(form, 2**power, args.width)
            lines.append(line)
            print(line, flush=True)
    show(lines, args.width)
    record = {
        "benchmark": "loss",
        **machine(),
        "method": "memory: compiler's plan of loss and gradient, per device; time: one call after "
        "a first one, CPU seconds of one pinned thread, machine shared with other work",
        "memory_width": WIDTH,
        "time_width": args.width,
        "ring_devices": DEVICES,
        "results": lines,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{record['date']}-cpu-loss.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


def program(form: str, pairs: int, width: int):
    """(jitted loss and gradient, its arguments as shapes, mesh)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from vlm2vec_jax.losses import LossOptions, contrastive_loss
    from vlm2vec_jax.parallel.mesh import ROWS, make_mesh

    options = dataclasses.replace(LossOptions(mask_duplicates=True), form=form)  # type: ignore
    mesh = make_mesh(devices=jax.devices()[: DEVICES if form == "ring" else 1])
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


def measured(form: str, pairs: int, width: int) -> float:
    """CPU seconds of a call."""
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
        if pairs <= 4096:
            jax.block_until_ready(compiled(*placed))
        start = time.process_time()
        loss, _ = jax.block_until_ready(compiled(*placed))
        seconds = time.process_time() - start
    assert np.isfinite(loss)
    return round(seconds, 3)


def show(lines: list[dict], width: int) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"loss: GB per device at width {WIDTH}, CPU seconds at width {width}")
    for column in ("pairs", "dense", "tiled", f"ring of {DEVICES}", "dense", "tiled", "ring"):
        table.add_column(column, justify="right")
    for pairs in sorted({line["pairs"] for line in lines}):
        row = {line["form"]: line for line in lines if line["pairs"] == pairs}
        forms = ("dense", "tiled", "ring")
        sizes = [f"{row[form]['bytes'] / 1e9:.2f}" for form in forms]
        times = [f"{row[form]['cpu_s']:.2f}" if "cpu_s" in row[form] else "-" for form in forms]
        table.add_row(f"{pairs:,}", *sizes, *times)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
