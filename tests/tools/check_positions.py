# SPDX-License-Identifier: Apache-2.0
"""Holds the golden positions against transformers' own: run once per generation.

`python tests/tools/check_positions.py` with transformers 5 checks `mrope`, with 4.49 to 4.57
`by_vision_start`, on all Qwen goldens.
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
MODELS = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
}


def check(backbone: str, variant: str) -> int:
    """Compare all cases of a checkpoint; returns how many there were."""
    generation = int(transformers.__version__.split(".")[0])
    cls = getattr(transformers, MODELS[backbone])
    config = cls.config_class.from_pretrained(GOLDENS / backbone / variant)
    model = types.SimpleNamespace(config=config)
    if generation >= 5:
        model.get_vision_position_ids = types.MethodType(cls.get_vision_position_ids, model)
    cases = json.loads((GOLDENS / backbone / f"{variant}_cases.json").read_text())["cases"]
    arrays = np.load(GOLDENS / backbone / f"{variant}_arrays.npz")
    for case in cases:
        ids = [x for i in case["input_ids"] for x in ([i] if isinstance(i, int) else [i[0]] * i[1])]
        ids = torch.tensor([ids])
        if "grids" not in case:
            continue
        grid = torch.tensor(case["grids"])
        if generation >= 5:
            rule, extra = "mrope", {"mm_token_type_ids": (ids == config.image_token_id).int()}
        else:
            rule, extra = "by_vision_start", {"attention_mask": torch.ones_like(ids)}
        found, _ = cls.get_rope_index(model, ids, image_grid_thw=grid, **extra)
        np.testing.assert_array_equal(
            found[:, 0].numpy(), arrays[f"{case['name']}/positions/{rule}"], err_msg=case["name"]
        )
    return len(cases)


if __name__ == "__main__":
    for backbone in MODELS:
        for variant in ("tied", "untied"):
            if (GOLDENS / backbone / variant).is_dir():
                print(transformers.__version__, backbone, variant, check(backbone, variant))
