# SPDX-License-Identifier: Apache-2.0
"""What a data-parallel step sends, read out of the program compiled for simulated devices.

Expected: one sum of the trained leaves' gradients and of a few numbers over all devices, the
embeddings of the others gathered once, and nothing inside the loops over chunks and layers.
"""

from __future__ import annotations

from benchmarks.abstract import train_step
from benchmarks.beds import Bed
from benchmarks.common import SIMULATED, How, Result, Row

PAIRS = 64


def measure(how: How) -> Result:
    """Bytes by kind on the most devices, against what must be sent."""
    devices = how.pick(SIMULATED, 2)
    sent = collectives(devices)
    trained, width = sent["trained"], sent["width"]
    exchanged = 2 * PAIRS * width * 4
    rows = [
        Row(
            f"all-reduce bytes on {devices} devices", sent["all-reduce"], "bytes",
            "gradients of the adapters in float32, once", 4 * trained,
            sent["all-reduce"] / (4 * trained), 1.05, at_most=True, shapes=sent, must=True,
        ),
        Row(
            f"all-gather bytes on {devices} devices", sent["all-gather"], "bytes",
            "embeddings of both sides, once", exchanged,
            sent["all-gather"] / exchanged, 1.05, at_most=True, shapes=sent, must=True,
        ),
        Row(
            "collectives inside loops", sent["inside_loops"], "", target=0, at_most=True, must=True,
        ),
    ]  # fmt: skip
    return Result(rows)


def collectives(devices: int, pairs: int = PAIRS, size: str = "tiny") -> dict[str, int]:
    """Bytes on one device by kind of a LoRA GradCache step, and how many stand in loops."""
    from vlm2vec_jax.packing import RowShape
    from vlm2vec_jax.parallel import hlo

    compiled = train_step(
        Bed(size), pairs=pairs, rows=2 * SIMULATED, row=RowShape(64, 6, 4), devices=devices
    )
    found = hlo.collectives(compiled.program)
    sent = {"all-reduce": 0, "all-gather": 0}
    for op in found:
        sent[op.kind] = sent.get(op.kind, 0) + op.total()
    told = {"trained": compiled.trained, "width": compiled.width}
    return {**sent, **told, "inside_loops": sum(bool(op.loops) for op in found)}
