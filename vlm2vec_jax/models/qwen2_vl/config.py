# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's configuration (`model_type: qwen2_vl`), from flat and nested `config.json` files."""

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
    return family.qwen2("qwen2_vl", raw, folder, _vision_config)


def _vision_config(fields: Fields, text_width: int) -> VisionConfig:
    fields.expect("hidden_act", ("quick_gelu",))
    sizes = family.tower_sizes(fields, width="embed_dim", default_width=1280, default_depth=32)
    return VisionConfig(
        **sizes,
        mlp_size=int(sizes["width"] * fields.number("mlp_ratio", 4)),
        out_size=family.out_size(fields, "hidden_size", text_width),
    )


from_hf = family.reader(from_dict)
"""Reads the configuration of an HF folder."""
