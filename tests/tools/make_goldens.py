# SPDX-License-Identifier: Apache-2.0
"""Writes the goldens of a backbone: `python tests/tools/make_goldens.py [qwen2_vl ...]`.

Needs torch 2.13 (CPU), transformers 5.24, peft 0.21, Pillow 13. Seeds: `golden_checkpoints.SEED`
for weights, `golden_adapters.SEED` for adapters and projections. A second run gives the same
files, bit for bit.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import golden_adapters as adapters
import golden_checkpoints as checkpoints
import golden_forward as forward
import golden_images
import numpy as np
import peft
import PIL
import torch
import transformers
from golden_tokenizers import write_json

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
IMAGES = GOLDENS / "image_processing" / "images"


def make(backbone: str) -> None:
    """Write all goldens of one backbone."""
    root = GOLDENS / backbone
    shutil.rmtree(root, ignore_errors=True)
    for place, variant in enumerate(checkpoints.VARIANTS[backbone]):
        folder = root / variant
        checkpoints.write(backbone, variant, folder, GOLDENS / "tiny_mha" / "tokenizer.json")
        cases = forward.prepare(backbone, folder, IMAGES)
        model = checkpoints.load(backbone, folder)
        rows, arrays = forward.record(model, cases, backbone == "qwen3_vl")
        write_json(root / f"{variant}_cases.json", {"versions": versions(), "cases": rows})
        np.savez_compressed(root / f"{variant}_arrays.npz", **arrays)
        write_json(root / f"{variant}_gradients.json", adapters.full_gradients(model, cases))
        adapters.write(backbone, place, folder, cases, root / "adapters")
    if backbone == "llava_next":
        write_compact(root / "sizes.json", golden_images.llava())
        write_json(root / "images.json", golden_images.llava_images(IMAGES))
    elif backbone == "qwen2_vl":  # the other two have the same image processor
        write_compact(root / "sizes.json", golden_images.qwen())
        write_json(root / "images.json", golden_images.qwen_images(IMAGES))


def write_compact(path: Path, value: object) -> None:
    """JSON without spaces: tables are long."""
    import json

    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """What computed the numbers."""
    modules = (torch, transformers, peft, np)
    found = {m.__name__: m.__version__.split("+")[0] for m in modules}
    return {**found, "pillow": PIL.__version__}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name in sys.argv[1:] or checkpoints.VARIANTS:
        make(name)
