# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's configuration (`model_type: qwen2_vl`), from flat and nested `config.json` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm2vec_jax.models.qwen_vl import config as family
from vlm2vec_jax.models.qwen_vl.config import Fields, QwenVLConfig, TextConfig, VisionConfig
from vlm2vec_jax.models.shared.decoder_config import DecoderConfig


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
    text = text_config(raw, problems)
    vision = _vision_config(Fields(raw.get("vision_config", {}), "vision_config", problems), text)
    images = family.ImageConfig()
    if folder:
        images = family.read_images(folder, images, vision, problems)
    ids = family.token_ids(raw, problems)
    head = family.tied(raw, family.text_fields(raw, problems))
    family.finish(problems, str(Path(folder) / "config.json"))
    return QwenVLConfig("qwen2_vl", text, vision, images, **ids, tie_word_embeddings=head)


def text_config(raw: dict[str, Any], problems: list[str]) -> TextConfig:
    """The decoder's configuration, which Qwen2.5-VL has as well."""
    fields = family.text_fields(raw, problems)
    fields.expect("hidden_act", ("silu",))
    fields.expect("attention_dropout", (0, 0.0))
    layers = fields.size("num_hidden_layers")
    # Published members have a window in the file and do not use it.
    types = fields.get("layer_types", ["full_attention"])
    windowed = fields.get("use_sliding_window") and fields.get("max_window_layers", 0) < layers
    if windowed or any(kind != "full_attention" for kind in types):
        problems.append(
            f"{fields.label('use_sliding_window')}: sliding windows are not implemented"
        )
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads", heads)
    family.check_heads(fields, heads, kv_heads)
    head_size = width // heads
    if width % heads:
        problems.append(
            f"{fields.label('hidden_size')} ({width}) is not a multiple of the {heads} heads"
        )
    half = head_size // 2
    times = half - 2 * (half * 3 // 8)
    theta, section = family.rope(
        fields,
        default_theta=1e6,
        default_section=(times, half * 3 // 8, half * 3 // 8),
        head_size=head_size,
    )
    return TextConfig(
        decoder=DecoderConfig(
            hidden_size=width,
            mlp_size=fields.size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
            qkv_bias=True,
        ),
        vocab_size=fields.size("vocab_size"),
        rope_theta=theta,
        mrope_section=section,
        mrope_interleaved=False,
        max_position_embeddings=fields.size("max_position_embeddings", 32768),
        pad_token_id=fields.get("pad_token_id"),
    )


def _vision_config(fields: Fields, text: TextConfig) -> VisionConfig:
    fields.expect("hidden_act", ("quick_gelu",))
    fields.expect("in_channels", (3,))
    fields.expect("in_chans", (3,))
    width = fields.size("embed_dim", 1280)
    heads = fields.size("num_heads", 16)
    ratio = fields.number("mlp_ratio", 4)
    if width % heads or width // heads % 4:
        fields.problems.append(
            f"{fields.label('embed_dim')} ({width}) does not give the {heads} heads a width that "
            f"is a multiple of 4"
        )
    out = fields.size("hidden_size", text.hidden_size)
    if out != text.hidden_size:
        fields.problems.append(
            f"{fields.label('hidden_size')} ({out}) is not the decoder's ({text.hidden_size})"
        )
    return VisionConfig(
        width=width,
        mlp_size=int(width * ratio),
        depth=fields.size("depth", 32),
        heads=heads,
        patch_size=fields.size("spatial_patch_size", fields.get("patch_size", 14)),
        temporal_patch_size=fields.size("temporal_patch_size", 2),
        merge=fields.size("spatial_merge_size", 2),
        out_size=out,
    )
