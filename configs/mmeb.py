# SPDX-License-Identifier: Apache-2.0
"""The VLM2Vec paper's recipe for Phi-3.5-Vision on MMEB-train.

    python -m vlm2vec_jax.train --config configs/mmeb.py \
        --config.model.path=Phi-3.5-vision-instruct --config.data.path=MMEB-train \
        --config.output=runs/mmeb

Batches of 1024 pairs, 2000 updates, the learning rate up to 2e-5 in 200 and linearly down to 0,
temperature 0.02, four crops per image, texts of at most 256 tokens, at most 50,000 pairs of each
of the 20 training subsets, bfloat16. Variants stand behind a colon:

    configs/mmeb.py        DoRA adapters, rank 8, alpha 64: what the reference trains as "LoRA"
    configs/mmeb.py:lora   plain LoRA of the same size
    configs/mmeb.py:full   every parameter, float32 masters

Expect two folders to be read (a model folder in Hugging Face layout and MMEB-train as it is on
the hub, images unpacked under it), and a start-up page that names mesh, trained parameters, batch
and memory before the first step. The batch is cut into chunks that fit, so the recipe is the same
on one card and on a pod; `--config.mesh.fsdp=N` shares the weights among N devices.
"""

from vlm2vec_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)
from vlm2vec_jax.errors import UserError

SUBSETS = (
    "A-OKVQA",
    "CIRR",
    "ChartQA",
    "DocVQA",
    "HatefulMemes",
    "ImageNet_1K",
    "InfographicsVQA",
    "MSCOCO",
    "MSCOCO_i2t",
    "MSCOCO_t2i",
    "N24News",
    "NIGHTS",
    "OK-VQA",
    "SUN397",
    "VOC2007",
    "VisDial",
    "Visual7W",
    "VisualNews_i2t",
    "VisualNews_t2i",
    "WebQA",
)
"""The in-distribution subsets, all that MMEB-train has."""

VARIANTS = {"": "dora", "dora": "dora", "lora": "lora", "full": "none"}


def get_config(arg: str = "") -> Config:
    """The recipe; `arg` is what stands behind the colon: "lora", "dora" or "full"."""
    if arg not in VARIANTS:
        known = ", ".join(v for v in VARIANTS if v)
        raise UserError(f"configs/mmeb.py has no variant {arg!r}; known are {known}")
    return Config(
        model=ModelConfig(path="models/Phi-3.5-vision-instruct", dtype="bfloat16"),
        adapter=AdapterConfig(type=VARIANTS[arg], rank=8, alpha=64.0, dropout=0.1),
        data=DataConfig(
            path="data/MMEB-train",
            subsets=",".join(SUBSETS),
            split="original",
            max_examples_per_subset=50_000,
            num_crops=4,
            max_len=256,
        ),
        optim=OptimConfig(lr=2e-5, warmup_steps=200, schedule="linear", clip_norm=1.0),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        checkpoint=CheckpointConfig(every=100, keep=2),
        batch_size=1024,
        steps=2000,
        temperature=0.02,
        output="runs/mmeb" if not arg else f"runs/mmeb_{arg}",
    )
