# SPDX-License-Identifier: Apache-2.0
"""VLM2Vec's recipe for Qwen2-VL (VLM2Vec-Qwen2VL-2B and -7B), the command of its README.

    python -m vlm2vec_jax.train --config configs/mmeb_qwen2vl.py:2b \
        --config.model.path=Qwen2-VL-2B-Instruct --config.data.path=MMEB-train \
        --config.output=runs/mmeb_qwen2vl

Batches of 1024 pairs (8 cards x 128 there), 2000 updates, the learning rate up to 2e-5 in 200 and
linearly down to 0, DoRA of rank 8 and alpha 64 on the suffixes of v1, every image squeezed into a
square of 1344 pixels and then brought under 1280 tokens, which is what the reference's training
does (its evaluation lets the square through whole: `evaluate --pixel_limits=folder`). Image tokens
have the positions of text, since the reference's model looks for `<|vision_start|>` and its data
has none; transparent images lose their alpha, as in the transformers of its time.

    configs/mmeb_qwen2vl.py:2b          Qwen2-VL-2B-Instruct
    configs/mmeb_qwen2vl.py:7b          Qwen2-VL-7B-Instruct
    configs/mmeb_qwen2vl.py:7b,v5e-64   the same laid out for a v5e-64 slice
    configs/mmeb_qwen2vl.py:7b,v5p-32   ... and for a v5p-32 slice (16 chips)

`python -m vlm2vec_jax.compile --config configs/mmeb_qwen2vl.py:7b,v5e-64 --topology v5e:8x8` tells
the memory per chip on any machine; docs/compile/ has the reports of both. Expect scores near the
published ones, 60.1 (2B) and 65.8 (7B) on the 36 tasks with the reference's evaluation.
"""

from vlm2vec_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    variant,
)

SUBSETS = (
    "A-OKVQA,CIRR,ChartQA,DocVQA,HatefulMemes,ImageNet_1K,InfographicsVQA,MSCOCO,MSCOCO_i2t,"
    "MSCOCO_t2i,N24News,NIGHTS,OK-VQA,SUN397,VOC2007,VisDial,Visual7W,VisualNews_i2t,"
    "VisualNews_t2i,WebQA"
)

MODELS = {"2b": "Qwen2-VL-2B-Instruct", "7b": "Qwen2-VL-7B-Instruct"}
MACHINES = {"v5e-64": (8, 8), "v5p-32": (4, 4)}
"""Machine -> mesh (data, fsdp). With 7B a chip of 16 GB shares the weights with seven others."""


def get_config(arg: str = "") -> Config:
    """The recipe; `arg` is what stands behind the colon: a model ("2b" without), a machine."""
    model, machine = variant("configs/mmeb_qwen2vl.py", arg, MODELS, MACHINES)
    model = model or "2b"
    data, fsdp = MACHINES.get(machine, (-1, 1))
    return Config(
        model=ModelConfig(
            path=f"models/{MODELS[model]}",
            dtype="bfloat16",
            image_positions="sequential",
            image_markers="bare",
        ),
        # The code's default alpha is 64 (the paper says 32); its adapters are always DoRA.
        adapter=AdapterConfig(type="dora", rank=8, alpha=64.0, dropout=0.1),
        data=DataConfig(
            path="data/MMEB-train",
            subsets=SUBSETS,
            split="original",
            max_examples_per_subset=100_000,  # --num_sample_per_subset of the README
            resolution="high",
            pixel_limits="vlm2vec_train",
            transparency="drop",
            max_len=4096,
        ),
        optim=OptimConfig(lr=2e-5, warmup_steps=200, schedule="linear", clip_norm=1.0),
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=1),
        checkpoint=CheckpointConfig(every=100, keep=2),
        batch_size=1024,
        steps=2000,
        temperature=0.02,
        output=f"runs/mmeb_qwen2vl_{model}",
    )
