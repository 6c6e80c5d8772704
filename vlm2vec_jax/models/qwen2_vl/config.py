# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's configuration (`model_type: qwen2_vl`), from flat and nested `config.json` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm2vec_jax.models.qwen_vl import config as family
from vlm2vec_jax.models.qwen_vl.config import Fields, QwenVLConfig, VisionConfig


def from_hf(folder: str | Path) -> QwenVLConfig:
    """Read the configuration of an HF folder.

    Raises:
      UserError: if `config.json` is missing or unreadable, or values are missing or not
        implemented; all such values in one message.
    """
    return from_dict(family.read_config_file(folder), folder)


def from_dict(raw: dict[str, Any], folder: str | Path = "") -> QwenVLConfig:
    """Build the configuration from the fields of `config.json`.

    Args:
      raw: the parsed file.
      folder: where the image processor's settings lie; the class's defaults without it.

    Raises:
      UserError: listing every value that is missing, inconsistent or not implemented.
    """
    problems: list[str] = []
    text = family.qwen2_text(raw, problems)
    fields = Fields(raw.get("vision_config", {}), "vision_config", problems)
    vision = _vision_config(fields, text.hidden_size)
    return family.assemble("qwen2_vl", raw, text, vision, family.ImageConfig(), folder, problems)


def _vision_config(fields: Fields, text_width: int) -> VisionConfig:
    fields.expect("hidden_act", ("quick_gelu",))
    sizes = family.tower_sizes(fields, width="embed_dim", default_width=1280, default_depth=32)
    return VisionConfig(
        **sizes,
        mlp_size=int(sizes["width"] * fields.number("mlp_ratio", 4)),
        out_size=family.out_size(fields, "hidden_size", text_width),
    )
