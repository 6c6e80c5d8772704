# SPDX-License-Identifier: Apache-2.0
"""What later work found to beat VLM2Vec on the same base and data at the same cost.

    python -m vlm2vec_jax.train --config configs/mmeb_best.py:2b \
        --config.model.path=Qwen2-VL-2B-Instruct --config.data.path=MMEB-train \
        --config.output=runs/mmeb_best

The reference's recipe gives Qwen2-VL-2B 59.7 on the 36 tasks. ReMatch (arXiv 2511.19278) takes it
step by step: its settings alone 65.5, an instruction on targets 67.3, one hard negative 67.9.
Every field below names its source; what is not named is as in configs/mmeb_qwen2vl.py. This
combination as a whole has been measured by nobody, so expect the direction, not a number.

MMEB-train comes without hard negatives; `loss.negatives` reads the columns `neg_text` and
`neg_image_path` where a data set has them (such as the one mined for mmE5) and is idle elsewhere.
Images are placed and marked as Qwen2-VL was pretrained (M-RoPE between vision start and end).

    configs/mmeb_best.py:2b    Qwen2-VL-2B-Instruct
    configs/mmeb_best.py:7b    Qwen2-VL-7B-Instruct

and, behind a comma, machines: `7b,v5e-64` and `7b,v5p-32` are compiled in docs/compile/.
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
    variant,
)

SUBSETS = (
    "A-OKVQA,CIRR,ChartQA,DocVQA,HatefulMemes,ImageNet_1K,InfographicsVQA,MSCOCO,MSCOCO_i2t,"
    "MSCOCO_t2i,N24News,NIGHTS,OK-VQA,SUN397,VOC2007,VisDial,Visual7W,VisualNews_i2t,"
    "VisualNews_t2i,WebQA"
)
MODELS = {"2b": "Qwen2-VL-2B-Instruct", "7b": "Qwen2-VL-7B-Instruct"}
MACHINES = {"v5e-64": (8, 8), "v5p-32": (4, 4)}
"""Machine -> mesh (data, fsdp)."""


def get_config(arg: str = "") -> Config:
    """The recipe; `arg` is a model ("2b" without), a machine, or both with a comma."""
    model, machine = variant("configs/mmeb_best.py", arg, MODELS, MACHINES)
    model = model or "2b"
    data, fsdp = MACHINES.get(machine, (-1, 1))
    return Config(
        model=ModelConfig(
            path=f"models/{MODELS[model]}",
            dtype="bfloat16",
            image_positions="mrope",  # how the base was pretrained; Qwen3-VL-Embedding keeps it
            image_markers="wrapped",
        ),
        adapter=AdapterConfig(
            type="lora",  # ReMatch, B3, mmE5 and GME train plain LoRA
            rank=32,  # ReMatch
            alpha=64.0,  # ReMatch
            dropout=0.1,  # the reference's
            targets="auto",  # the text model's projections
        ),
        data=DataConfig(
            path="data/MMEB-train",
            subsets=SUBSETS,
            split="original",
            sub_batch=64,  # VLM2Vec-V2; without such batches WeMM-Embedding loses 3.4
            max_examples_per_subset=50_000,  # the VLM2Vec paper's cap
            target_instruction="task",  # ReMatch: +1.8; also B3 and QQMM-embed
            resolution="native",
            pixel_limits="vlm2vec_v2",  # VLM2Vec-V2; most: Qwen3-VL-Embedding, too
            max_len=0,
        ),
        optim=OptimConfig(
            lr=1e-4,  # ReMatch, B3, UniME-V2
            schedule="cosine",  # ReMatch
            warmup_steps=200,  # B3, UniME-V2
            clip_norm=1.0,  # the reference's
        ),
        loss=LossConfig(
            negatives=1,  # ReMatch: +0.6
            mask_duplicate_targets=True,  # WeMM-Embedding loses 0.5 without
            same_query="mask",  # equal queries with other answers are no negatives either
        ),
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=1),
        checkpoint=CheckpointConfig(every=100, keep=2),
        batch_size=1024,  # ReMatch, B3
        steps=2500,  # ReMatch
        temperature=0.02,  # ReMatch, B3, LLaVE
        output=f"runs/mmeb_best_{model}",
    )
