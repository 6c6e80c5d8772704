# SPDX-License-Identifier: Apache-2.0
"""One process of `test_multiprocess.py`: loss and gradients of a train step, written to a file.

    python multiprocess_step.py MODEL OUTPUT PORT PROCESSES PROCESS

Eight CPU devices in all, as a mesh of data 2, fsdp 2, tensor 2; then twenty losses of LoRA with
GradCache on data 2, fsdp 4.
"""

# ruff: noqa: E402 (jax is imported after the number of devices is said)
import os
import sys
from pathlib import Path

import simulated

processes, process = int(sys.argv[4]), int(sys.argv[5])
os.environ["XLA_FLAGS"] = simulated.flags(8 // processes)

import jax
import jax.numpy as jnp
import numpy as np
from curves import curve
from jax.experimental import multihost_utils
from training_tools import encode, packer_for, pairs

from vlm2vec_jax.models.loading import flatten, load_model
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.packing import fill_chunks
from vlm2vec_jax.parallel.cluster import Place
from vlm2vec_jax.parallel.mesh import make_mesh, row_shards
from vlm2vec_jax.parallel.peers import join
from vlm2vec_jax.training.optimizer import AdamW, make_schedule
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import StepSpec, TrainBatch


def main(folder: str, output: str, port: str) -> None:
    if processes > 1:
        join(Place(f"127.0.0.1:{port}", processes, process), timeout_s=240)
    mesh = make_mesh(2, 2, 2)
    model = load_model(folder, dtype_of=lambda path: jnp.float32, mesh=mesh)
    processor = model.backbone.processor(folder, model.config, num_crops=2, max_len=64)
    encoded = [item for side in encode(processor, *pairs(12)) for item in side]

    sizes = [(len(item), item.units) for item in encoded]
    packer = packer_for(processor, sizes, chunk_tokens=256, row_multiple=row_shards(mesh))
    _, chunks = packer.arrange(sizes)
    part = (process, processes)
    mine = {i for chunk in chunks for i in chunk.items(part)}
    held = {i: encoded[i] for i in mine}  # nothing of the other process's rows is looked at
    groups = tuple(fill_chunks(c, held, processor.visual_layout, part=part) for c in chunks)
    assert processes == 1 or len(mine) < len(encoded)

    optimizer = AdamW(make_schedule("constant", 1e-3, 0, 10))
    trainer = Trainer.create(model, optimizer, mesh, full=True)
    spec = StepSpec(Compute("float32"), temperature=0.1)
    batch = trainer.put(TrainBatch(groups, np.arange(12, dtype=np.int32)))
    with jax.set_mesh(mesh):
        step = trainer.compile_step(spec)
        trainer.state, values = step(trainer.state, trainer.frozen, batch, jax.random.key(0))
    # After one update the first moment is a tenth of the (clipped) gradient.
    moments = flatten(trainer.state.opt.mu)
    found = {"loss": values["loss"], "grad_norm": values["grad_norm"], **moments}
    found = multihost_utils.process_allgather(found, tiled=True)
    found["curve"] = np.array(curve(Path(folder), "lora", (2, 4, 1), cached=True, part=part))
    if process == 0:
        np.savez(output, **{name.replace("/", "|"): value for name, value in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:4])
