# SPDX-License-Identifier: Apache-2.0
"""Part of `test_spread.py`: a chip's memory where 16, 64 and 256 of them have the same rows each.

    python chips_memory.py MODEL

Prints JSON: chips -> bytes of temporaries and the largest collective, compiled for simulated CPUs.
"""

# ruff: noqa: E402 (jax is imported after the number of devices is said)
import json
import os
import sys

import simulated

os.environ["XLA_FLAGS"] = simulated.flags(256)

import jax

from vlm2vec_jax.config import AdapterConfig, Config, DataConfig, LossConfig, ModelConfig
from vlm2vec_jax.models.loading import abstract_model
from vlm2vec_jax.packing import ChunkShape, RowShape
from vlm2vec_jax.parallel import hlo
from vlm2vec_jax.parallel.mesh import make_mesh, row_shards
from vlm2vec_jax.training import aot, setup

CHEAP = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
ROWS, CHUNKS, SEQUENCES = 2, 3, 2


def measure(folder: str, chips: int) -> dict:
    mesh = make_mesh(chips // 4, 4, 1, devices=jax.devices()[:chips])
    pairs = chips * ROWS * CHUNKS * SEQUENCES // 2
    config = Config(
        model=ModelConfig(path=folder, dtype="float32"),
        adapter=AdapterConfig(type="lora", rank=4, dropout=0.0),
        data=DataConfig(path="-"),
        loss=LossConfig(form="ring", tile=64),
        batch_size=pairs,
        output="-",
    )
    trainer = aot.abstract_trainer(config, mesh)
    model = abstract_model(folder)
    layout = model.backbone.visual_layout(model.config)
    shape = ChunkShape(RowShape(tokens=40, units=4, sequences=SEQUENCES), chips * ROWS, CHUNKS)
    spec = setup.step_spec(config, model, cached=True, shards=row_shards(mesh))
    batch = aot.abstract_batch([shape], pairs, layout, mesh, spec.loss)
    compiled = aot.compile_step(trainer, spec, batch, CHEAP)
    found = hlo.collectives(compiled)
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "largest": max(op.bytes for op in found),
        "largest_moved": max(
            (op.bytes for op in found if op.kind in ("all-gather", "collective-permute")),
        ),
    }


if __name__ == "__main__":
    print(json.dumps({chips: measure(sys.argv[1], chips) for chips in (16, 64, 256)}))
