# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL's configuration (`model_type: qwen2_5_vl`), from flat and nested `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm2vec_jax.models.qwen_vl import config as family
from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig, VisionConfig
from vlm2vec_jax.models.shared.config_fields import Fields


def from_dict(raw: dict[str, Any], folder: str | Path = "") -> QwenVLConfig:
    """Build the configuration from the fields of `config.json`.

    Args:
      raw: the parsed file.
      folder: where the image processor's settings lie; the class's defaults without it.

    Raises:
      UserError: listing every value that is missing, inconsistent or not implemented.
    """
    return family.qwen2("qwen2_5_vl", raw, folder, _vision_config)


def _vision_config(fields: Fields, text_width: int) -> VisionConfig:
    fields.expect("hidden_act", ("silu",))
    sizes = family.tower_sizes(fields, width="hidden_size", default_width=1280, default_depth=32)
    unit = sizes["patch_size"] * sizes["merge"]
    window = fields.size("window_size", 112)
    if window % unit:
        fields.problems.append(
            f"{fields.label('window_size')} ({window}) is not a multiple of a unit of {unit} pixels"
        )
    return VisionConfig(
        **sizes,
        mlp_size=fields.size("intermediate_size", 3420),
        out_size=family.out_size(fields, "out_hidden_size", text_width),
        norm="rms",
        mlp="swiglu",
        window_units=max(window // unit, 1),
        full_layers=fields.indices("fullatt_block_indexes", (7, 15, 23, 31), sizes["depth"]),
    )


from_hf = family.reader(from_dict)
"""Reads the configuration of an HF folder."""
