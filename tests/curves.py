# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of a small model on any mesh, in one process or in several: the loss of each."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from training_tools import encode, packer_for, pairs

from vlm2vec_jax.losses import LossOptions
from vlm2vec_jax.models.loading import add_adapter, load_model
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.packing import fill_chunks
from vlm2vec_jax.parallel.mesh import make_mesh, row_shards
from vlm2vec_jax.training.optimizer import AdamW, make_schedule
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import StepSpec, TrainBatch
from vlm2vec_jax.weights.adapter_config import AdapterConfig, resolve

STEPS, PAIRS = 20, 12
DIFFERENT = 3
"""Different batches, used in turn: enough that the curve says something."""


def curve(
    folder: Path,
    kind: str,
    mesh: tuple[int, int, int],
    *,
    cached: bool,
    part: tuple[int, int] = (0, 1),
) -> list[float]:
    """Losses of twenty updates in the way of configs/mini.py, float32, smaller.

    Args:
      folder: `training_tools.mini_model`.
      kind: "lora", "dora" or "full".
      mesh: data, fsdp, tensor.
      cached: GradCache.
      part: (process, processes): only this process's rows are looked at.
    """
    count = int(np.prod(mesh))
    devices = jax.devices() if part[1] > 1 else jax.devices()[:count]
    spread = make_mesh(*mesh, devices=devices)
    model = load_model(folder, dtype_of=lambda path: jnp.float32, mesh=spread)
    if kind != "full":
        adapter = AdapterConfig(
            rank=4, alpha=8.0, dropout=0.0, targets=("qkv_proj", "down_proj", "q_proj"),
            dora=kind == "dora", base="",
        )  # fmt: skip
        linears = resolve(adapter, model.table)
        add_adapter(model.module, linears, dora=adapter.dora, dropout=0.0, mesh=spread)
    optimizer = AdamW(make_schedule("cosine", 1e-3, 4, STEPS))
    trainer = Trainer.create(model, optimizer, spread, full=kind == "full")
    processor = model.backbone.processor(folder, model.config, num_crops=2, max_len=64)
    batches = [
        [item for side in encode(processor, *pairs(PAIRS, seed=n)) for item in side]
        for n in range(DIFFERENT)
    ]
    sizes = [[(len(item), item.units) for item in batch] for batch in batches]
    packer = packer_for(
        processor,
        [size for batch in sizes for size in batch],
        chunk_tokens=256 if cached else None,
        row_multiple=row_shards(spread),
    )
    for batch in sizes:
        packer.arrange(batch)  # shapes never shrink: one program for all
    ready = []
    for batch, size in zip(batches, sizes, strict=True):
        _, chunks = packer.arrange(size)
        mine = {i: batch[i] for chunk in chunks for i in chunk.items(part)}
        groups = tuple(fill_chunks(c, mine, processor.visual_layout, part=part) for c in chunks)
        ready.append(trainer.put(TrainBatch(groups, np.arange(PAIRS, dtype=np.int32))))
    options = LossOptions(mask_duplicates=True)
    spec = StepSpec(Compute("float32"), temperature=0.05, loss=options, cached=cached)
    losses = []
    with jax.set_mesh(spread):
        step = trainer.compile_step(spec)
        for n in range(STEPS):
            trainer.state, values = step(
                trainer.state, trainer.frozen, ready[n % DIFFERENT], jax.random.key(0)
            )
            losses.append(values["loss"])
    return [float(loss) for loss in losses]
