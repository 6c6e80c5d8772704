# SPDX-License-Identifier: Apache-2.0
"""Configuration of the Qwen-VL family: what its three members share, and how `config.json` is read.

A `config.json` comes in two forms. The flat one (transformers 4.x) has the text model's fields at
its root and `rope_theta` and `rope_scaling`; the nested one (transformers 5, and Qwen3-VL always)
has them under `text_config`, with `rope_parameters`. Fields that change the result and are not
implemented are errors that name them, all in one message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD
from vlm2vec_jax.models.shared.config_fields import (
    Fields,
    image_fields,
    read_config_file,
    three,
)
from vlm2vec_jax.models.shared.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text model.

    Attributes:
      decoder: its layers.
      mrope_section: how many of the H/2 frequencies turn by time, row and column.
      mrope_interleaved: Qwen3's order of them, t h w t h w ... t t; else three blocks.
    """

    decoder: DecoderConfig
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    max_position_embeddings: int
    pad_token_id: int | None = None

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.decoder.hidden_size


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
      norm: `layer` or `rms`, eps 1e-6 either way.
      mlp: activation of `fc2(act(fc1(x)))`, or `swiglu` for `down(silu(gate(x)) * up(x))`.
      patch_bias: a bias on the patch convolution.
      window_units: units along a side of an attention window; 0 where every layer sees the image.
      full_layers: the layers that see the whole image where there are windows.
      position_side: side of the learned position table; 0 for none.
      deepstack: layers whose output goes to the first layers of the decoder.
    """

    width: int
    mlp_size: int
    depth: int
    heads: int
    patch_size: int
    temporal_patch_size: int
    merge: int
    out_size: int
    norm: str = "layer"
    mlp: str = "quick_gelu"
    patch_bias: bool = False
    window_units: int = 0
    full_layers: tuple[int, ...] = ()
    position_side: int = 0
    deepstack: tuple[int, ...] = ()

    @property
    def unit_pixels(self) -> int:
        """Pixels along a side of a unit (28; 32 in Qwen3-VL)."""
        return self.patch_size * self.merge

    @property
    def patches_per_unit(self) -> int:
        """m^2."""
        return self.merge**2


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The image processor's settings: limits in pixels (areas), and the normalisation."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """All that a model of the family needs to know."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    images: ImageConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool


def text_fields(raw: dict[str, Any], problems: list[str]) -> Fields:
    """The text model's fields, wherever this form of the file has them."""
    if raw.get("text_config") is not None:
        return Fields(raw["text_config"], "text_config", problems)
    return Fields(raw, "", problems)


def rope(
    fields: Fields, *, default_theta: float, default_section: tuple[int, int, int], head_size: int
) -> tuple[float, tuple[int, int, int]]:
    """theta and M-RoPE sections, from `rope_parameters` or `rope_theta` and `rope_scaling`."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    inner = Fields(raw, fields.label("rope_parameters"), fields.problems)
    for name in ("rope_type", "type"):
        inner.expect(name, ("mrope", "default"))
    theta = inner.number("rope_theta", fields.get("rope_theta", default_theta))
    section = inner.get("mrope_section", default_section)
    if (
        not isinstance(section, (list, tuple))
        or len(section) != 3
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in section)
        or sum(section) != head_size // 2
    ):
        fields.problems.append(
            f"{inner.label('mrope_section')} must be three numbers that add up to half a head "
            f"({head_size // 2}), not {section!r}"
        )
        section = default_section
    return theta, (section[0], section[1], section[2])


def check_heads(fields: Fields, heads: int, kv_heads: int) -> None:
    """Complain if key heads do not divide the heads."""
    if heads % kv_heads:
        fields.problems.append(
            f"{fields.label('num_attention_heads')} ({heads}) is not a multiple of "
            f"{fields.label('num_key_value_heads')} ({kv_heads})"
        )


def tied(raw: dict[str, Any], text: Fields) -> bool:
    """Whether the head is the token table; older nested files say so inside `text_config`."""
    return bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))


def read_images(
    folder: str | Path, default: ImageConfig, vision: VisionConfig, problems: list[str]
) -> ImageConfig:
    """The image processor's settings in `preprocessor_config.json` (or `processor_config.json`).

    Limits are `size.shortest_edge` and `size.longest_edge`, which are areas, or `min_pixels` and
    `max_pixels`, at the root (which go first, as in transformers 5) or in `size`.

    Args:
      folder: the model folder; where it has neither file the defaults hold.
      default: what holds for fields that are absent.
      vision: what patch sizes must agree with.
      problems: gets a line per setting that is not implemented.
    """
    fields = image_fields(folder, problems)
    fields.expect("patch_size", (vision.patch_size,))
    fields.expect("merge_size", (vision.merge,))
    fields.expect("temporal_patch_size", (vision.temporal_patch_size,))
    size = Fields(fields.get("size", {}), fields.label("size"), problems)
    least = size.get("shortest_edge", size.get("min_pixels", default.min_pixels))
    most = size.get("longest_edge", size.get("max_pixels", default.max_pixels))
    least = fields.size("min_pixels", least)
    most = fields.size("max_pixels", most)
    return ImageConfig(
        least,
        most,
        three(fields, "image_mean", default.mean),
        three(fields, "image_std", default.std),
    )


def token_ids(raw: dict[str, Any], problems: list[str]) -> dict[str, int]:
    """The ids of image and vision tokens; by default those of every published member."""
    fields = Fields(raw, "", problems)
    defaults = {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
    return {name: fields.size(name, default) for name, default in defaults.items()}


def qwen2_text(raw: dict[str, Any], problems: list[str]) -> TextConfig:
    """The text model of Qwen2-VL and Qwen2.5-VL."""
    fields = text_fields(raw, problems)
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
    check_heads(fields, heads, kv_heads)
    head_size = width // heads
    if width % heads:
        problems.append(
            f"{fields.label('hidden_size')} ({width}) is not a multiple of the {heads} heads"
        )
    half = head_size // 2
    times = half - 2 * (half * 3 // 8)
    theta, section = rope(
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


def tower_sizes(
    fields: Fields, *, width: str, default_width: int, default_depth: int, default_patch: int = 14
) -> dict[str, Any]:
    """The fields of `VisionConfig` that all members name alike, but for the width."""
    for name in ("in_channels", "in_chans"):
        fields.expect(name, (3,))
    sizes = {
        "width": fields.size(width, default_width),
        "depth": fields.size("depth", default_depth),
        "heads": fields.size("num_heads", 16),
        "patch_size": fields.size("spatial_patch_size", fields.get("patch_size", default_patch)),
        "temporal_patch_size": fields.size("temporal_patch_size", 2),
        "merge": fields.size("spatial_merge_size", 2),
    }
    if sizes["width"] % (4 * sizes["heads"]):
        fields.problems.append(
            f"{fields.label(width)} ({sizes['width']}) does not give the {sizes['heads']} heads a "
            f"width that is a multiple of 4"
        )
    return sizes


def out_size(fields: Fields, name: str, text_width: int) -> int:
    """Width of the tower's features, which must be the decoder's."""
    out = fields.size(name, text_width)
    if out != text_width:
        fields.problems.append(f"{fields.label(name)} ({out}) is not the decoder's ({text_width})")
    return out


def assemble(
    model_type: str,
    raw: dict[str, Any],
    text: TextConfig,
    vision: VisionConfig,
    images: ImageConfig,
    folder: str | Path,
    problems: list[str],
) -> QwenVLConfig:
    """Put the parts together.

    Args:
      model_type: HF's.
      raw: the parsed `config.json`.
      text: read before.
      vision: read before.
      images: the defaults of the image processor.
      folder: where its settings lie; empty for the defaults.
      problems: what was found so far.

    Raises:
      UserError: listing all problems.
    """
    if folder:
        images = read_images(folder, images, vision, problems)
    ids = token_ids(raw, problems)
    head = tied(raw, text_fields(raw, problems))
    # A tower that is no object was complained about in several places.
    found = list(dict.fromkeys(problems))
    raise_problems(f"{Path(folder) / 'config.json'} describes a model not implemented here", found)
    return QwenVLConfig(model_type, text, vision, images, **ids, tie_word_embeddings=head)


def reader(from_dict: Callable[..., QwenVLConfig]) -> Callable[[str | Path], QwenVLConfig]:
    """From the fields of a `config.json` to the folder that has one (`Backbone.read_config`).

    Args:
      from_dict: (parsed file, folder) -> configuration.
    """

    def from_hf(folder: str | Path) -> QwenVLConfig:
        return from_dict(read_config_file(folder), folder)

    return from_hf


def qwen2(
    model_type: str,
    raw: dict[str, Any],
    folder: str | Path,
    vision: Callable[[Fields, int], VisionConfig],
) -> QwenVLConfig:
    """The configuration of Qwen2-VL and Qwen2.5-VL, which differ in the vision tower alone.

    Args:
      model_type: HF's.
      raw: the parsed `config.json`.
      folder: where the image processor's settings lie; the class's defaults without it.
      vision: (fields of `vision_config`, D) -> the tower.

    Raises:
      UserError: listing every value that is missing, inconsistent or not implemented.
    """
    problems: list[str] = []
    text = qwen2_text(raw, problems)
    fields = Fields(raw.get("vision_config", {}), "vision_config", problems)
    tower = vision(fields, text.hidden_size)
    return assemble(model_type, raw, text, tower, ImageConfig(), folder, problems)
