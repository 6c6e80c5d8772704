# SPDX-License-Identifier: Apache-2.0
"""A small Qwen2-VL learns mini-MMEB from nothing on a CPU: the demonstration on another backbone.

    python -m vlm2vec_jax.data.mini_mmeb --output runs/demo/data --seed 0
    python -m vlm2vec_jax.models.qwen2_vl.mini --data runs/demo/data \\
        --output runs/demo/base_qwen2vl --seed 0
    python -m vlm2vec_jax.train --config configs/mini_qwen2vl.py
    python -m vlm2vec_jax.evaluate --model runs/demo/train_qwen2vl --data runs/demo/data/eval \\
        --output runs/demo/eval_qwen2vl --dtype float32

Nothing but `model.path` says which backbone it is. A short run, to show that it learns; `make demo`
trains its model for several times as long. Measured once, on 2026-11-25 on a shared CPU (4 min of
CPU time): the loss falls from 11.2 to about 0.8, and hit@1 of all 30 subsets of mini-MMEB is 9.7 %
(11.1 IND, 7.8 OOD); of ImageNet-1K 25.0 (untrained 2.5), of OK-VQA 25.8 (untrained 0.0).
"""

from vlm2vec_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
)
from vlm2vec_jax.errors import UserError


def get_config(arg: str = "") -> Config:
    """The run; it has no variants, so `arg` must be empty."""
    if arg:
        raise UserError(f"configs/mini_qwen2vl.py has no variants, but {arg!r} was asked for")
    return Config(
        model=ModelConfig(path="runs/demo/base_qwen2vl", dtype="float32"),
        adapter=AdapterConfig(type="none"),
        data=DataConfig(path="runs/demo/data/train", max_len=256),
        optim=OptimConfig(lr=2e-3, warmup_steps=30, schedule="cosine"),
        packing=PackingConfig(chunk_tokens=1024),
        checkpoint=CheckpointConfig(every=0, keep=1),
        loss=LossConfig(mask_duplicate_targets=True),
        batch_size=64,
        steps=200,
        seed=0,
        temperature=0.05,
        output="runs/demo/train_qwen2vl",
        grad_cache="on",
    )
