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

and machines, alone or behind a comma, which set the mesh:

    configs/mmeb.py:v5e-64, configs/mmeb.py:lora,v5p-32, configs/mmeb.py:full,v6e-16,
    configs/mmeb.py:h100-8, configs/mmeb.py:lora,h200-1

`python -m vlm2vec_jax.compile` checks one without the machine; docs/compile/ has its reports.
Checked is LoRA on the three TPU slices; the others are worked out from sizes (`PRESETS`).

Expect two folders to be read (a model folder in Hugging Face layout and MMEB-train as it is on
the hub, images unpacked under it), and a start-up page that names mesh, trained parameters, batch
and memory before the first step. The batch is cut into chunks that fit, so the recipe is the same
on one card and on a pod; `--config.mesh.fsdp=N` shares the weights among N devices.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Preset:
    """Mesh for a machine; chunks and what is kept are chosen for its memory (`fitting`).

    Attributes:
      adapters: (data, fsdp) where adapters are trained: weights of 8.3 GB whole on every chip that
        can hold them beside a chunk's activations, so that no chunk waits for another chip.
      full: (data, fsdp) where every parameter is, with 66 GB of masters, moments and gradients.
      checked: how it is known to fit.
    """

    adapters: tuple[int, int]
    full: tuple[int, int]
    checked: str


UNCHECKED = "unchecked: worked out from sizes, neither compiled nor run there"

PRESETS = {
    "v5e-64": Preset(
        (8, 8), (1, 64), "LoRA compiled (docs/compile/lora_v5e-64.txt); else unchecked"
    ),
    "v5p-32": Preset(
        (16, 1), (1, 16), "LoRA compiled (docs/compile/lora_v5p-32.txt), full in smaller chunks"
    ),
    "v6e-16": Preset(
        (16, 1), (1, 16), "LoRA compiled (docs/compile/lora_v6e-16.txt); else unchecked"
    ),
    "h100-8": Preset((8, 1), (1, 8), UNCHECKED),
    "h200-1": Preset((1, 1), (1, 1), UNCHECKED),
}
"""Machine -> preset. v5p counts two cores to a chip: v5p-32 has 16 chips."""


def get_config(arg: str = "") -> Config:
    """The recipe.

    Args:
      arg: what stands behind the colon: "lora", "dora" or "full", a machine of `PRESETS`, or both
        with a comma ("lora,v5e-64").
    """
    words = [word for word in arg.split(",") if word]
    unknown = [word for word in words if word not in VARIANTS and word not in PRESETS]
    if unknown:
        known = ", ".join(v for v in (*VARIANTS, *PRESETS) if v)
        raise UserError(
            f"configs/mmeb.py has no variant {', '.join(map(repr, unknown))}; known are {known}"
        )
    kinds = [word for word in words if word in VARIANTS]
    machines = [word for word in words if word in PRESETS]
    if len(kinds) > 1 or len(machines) > 1:
        raise UserError(
            f"configs/mmeb.py:{arg} asks for {' and '.join(kinds if len(kinds) > 1 else machines)}"
        )
    kind = kinds[0] if kinds else ""
    config = _recipe(kind)
    if machines:
        preset = PRESETS[machines[0]]
        config.mesh.data, config.mesh.fsdp = preset.full if kind == "full" else preset.adapters
    return config


def _recipe(arg: str) -> Config:
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
