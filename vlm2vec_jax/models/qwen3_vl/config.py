# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL's configuration (`model_type: qwen3_vl`), read from `config.json`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vlm2vec_jax.models.qwen_vl import config as family
from vlm2vec_jax.models.qwen_vl.config import (
    ImageConfig,
    QwenVLConfig,
    TextConfig,
    VisionConfig,
)
from vlm2vec_jax.models.shared.config_fields import Fields
from vlm2vec_jax.models.shared.decoder_config import DecoderConfig

_HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(256 * 256, 4096 * 4096, _HALF, _HALF)
"""What published folders say, for one that says nothing."""


def from_dict(raw: dict[str, Any], folder: str | Path = "") -> QwenVLConfig:
    """Build the configuration from the fields of `config.json`.

    Args:
      raw: the parsed file.
      folder: where the image processor's settings lie; those of published folders without it.

    Raises:
      UserError: listing every value that is missing, inconsistent or not implemented.
    """
    problems: list[str] = []
    fields = Fields(raw.get("vision_config", {}), "vision_config", problems)
    width = family.text_fields(raw, problems).size("hidden_size")
    vision = _vision_config(fields, width)
    text = _text_config(family.text_fields(raw, []), len(vision.deepstack), problems)
    return family.assemble("qwen3_vl", raw, text, vision, IMAGES, folder, problems)


def _text_config(fields: Fields, deepstack: int, problems: list[str]) -> TextConfig:
    fields.problems = problems
    fields.expect("hidden_act", ("silu",))
    fields.expect("attention_dropout", (0, 0.0))
    heads = fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    family.check_heads(fields, heads, kv_heads)
    width = fields.size("hidden_size")
    head_size = fields.size("head_dim", 128)
    bias = bool(fields.get("attention_bias", False))
    theta, section = family.rope(
        fields, default_theta=500000.0, default_section=(24, 20, 20), head_size=head_size
    )
    return TextConfig(
        decoder=DecoderConfig(
            hidden_size=width,
            mlp_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            deepstack=deepstack,
        ),
        vocab_size=fields.size("vocab_size"),
        rope_theta=theta,
        mrope_section=section,
        mrope_interleaved=True,
        max_position_embeddings=fields.size("max_position_embeddings", 128000),
        pad_token_id=fields.get("pad_token_id"),
    )


def _vision_config(fields: Fields, text_width: int) -> VisionConfig:
    fields.expect("hidden_act", ("gelu_pytorch_tanh",))
    sizes = family.tower_sizes(
        fields, width="hidden_size", default_width=1152, default_depth=27, default_patch=16
    )
    positions = fields.size("num_position_embeddings", 2304)
    side = math.isqrt(positions)
    if side * side != positions:
        fields.problems.append(
            f"{fields.label('num_position_embeddings')} ({positions}) is no square"
        )
    return VisionConfig(
        **sizes,
        mlp_size=fields.size("intermediate_size", 4304),
        out_size=family.out_size(fields, "out_hidden_size", text_width),
        mlp="gelu_tanh",
        patch_bias=True,
        position_side=side,
        deepstack=fields.indices("deepstack_visual_indexes", (8, 16, 24), sizes["depth"]),
    )


from_hf = family.reader(from_dict)
"""Reads the configuration of an HF folder."""
