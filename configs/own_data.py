# SPDX-License-Identifier: Apache-2.0
"""Training on your own pairs; `docs/your-own-data.md` explains the file and this recipe.

    python -m vlm2vec_jax.train --config configs/own_data.py \
        --config.model.path=Phi-3.5-vision-instruct --config.data.path=pairs.jsonl \
        --config.output=runs/mine

LoRA of rank 16 on a model folder or hub id, three hard negatives per row where a row has them,
equal targets of a batch left out of the negatives (small sets repeat their labels). For a few
thousand pairs: some epochs in batches of 64; raise `batch_size` and `steps` with the data.

    python -m vlm2vec_jax.train --config configs/own_data.py:mini

is the same on a CPU in a minute: the ten pairs of `examples/own_data` and the small untrained model
of `make demo`, every parameter trained. It shows that the road works, and teaches next to nothing.
"""

from vlm2vec_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
)
from vlm2vec_jax.errors import UserError


def get_config(arg: str = "") -> Config:
    """The recipe; `arg` is empty, or "mini" for the example on a CPU."""
    loss = LossConfig(mask_duplicate_targets=True, negatives=3)
    if arg == "mini":
        return Config(
            model=ModelConfig(path="runs/demo/base", dtype="float32"),
            adapter=AdapterConfig(type="none"),
            data=DataConfig(path="examples/own_data/pairs.jsonl", num_crops=1),
            optim=OptimConfig(lr=1e-3, warmup_steps=2, schedule="cosine"),
            checkpoint=CheckpointConfig(every=0),
            loss=loss,
            batch_size=8,
            steps=20,
            temperature=0.05,
            output="runs/own_data",
        )
    if arg:
        raise UserError(f"configs/own_data.py has no variant {arg!r}; known is mini")
    return Config(
        model=ModelConfig(path="models/Phi-3.5-vision-instruct", dtype="bfloat16"),
        adapter=AdapterConfig(type="lora", rank=16, alpha=32.0, dropout=0.1),
        data=DataConfig(path="pairs.jsonl", num_crops=4, max_len=256),
        optim=OptimConfig(lr=1e-4, warmup_steps=20, schedule="cosine"),
        checkpoint=CheckpointConfig(every=100, keep=2),
        loss=loss,
        batch_size=64,
        steps=500,
        temperature=0.02,
        output="runs/own_data",
    )
