# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a small model of the Phi-3.5-Vision architecture learns mini-MMEB on a CPU.

    make demo

does everything; its training step alone is

    python -m vlm2vec_jax.data.mini_mmeb --output runs/demo/data --seed 0
    python -m vlm2vec_jax.models.phi3v.mini --data runs/demo/data --output runs/demo/base --seed 0
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python -m vlm2vec_jax.train --config configs/mini.py

Every parameter is trained from random values, in float32, on a simulated mesh of two devices.
Mini-MMEB has few distinct targets per subset (a classification has only so many labels), so equal
targets in a batch are left out of the negatives; the reference's data is large enough not to.
Expect the loss to fall from about the logarithm of the batch size, and `runs/demo/train` to hold
config.json, metrics.jsonl, checkpoints/ and the trained model.
"""

from vlm2vec_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
)
from vlm2vec_jax.errors import UserError


def get_config(arg: str = "") -> Config:
    """The demonstration; it has no variants, so `arg` must be empty."""
    if arg:
        raise UserError(f"configs/mini.py has no variants, but {arg!r} was asked for")
    return Config(
        model=ModelConfig(path="runs/demo/base", dtype="float32"),
        adapter=AdapterConfig(type="none"),
        data=DataConfig(path="runs/demo/data/train", num_crops=1, max_len=256),
        optim=OptimConfig(lr=1e-3, warmup_steps=40, schedule="cosine"),
        mesh=MeshConfig(data=2, fsdp=1, tensor=1),
        packing=PackingConfig(chunk_tokens=1024),
        checkpoint=CheckpointConfig(every=250, keep=2),
        loss=LossConfig(mask_duplicate_targets=True),
        batch_size=128,
        steps=1000,
        seed=0,
        temperature=0.05,
        output="runs/demo/train",
        grad_cache="on",
    )
