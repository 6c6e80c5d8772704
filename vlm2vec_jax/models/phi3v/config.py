# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision's configuration, read from the HF folder's `config.json` (`model_type: phi3_v`).

Every field that changes the result is read, none is assumed; a value that this code does not
implement is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.models.shared.clip_config import ClipConfig, read_clip
from vlm2vec_jax.models.shared.decoder_config import DecoderConfig

REAL_CLIP = "openai/clip-vit-large-patch14-336"
"""The tower that real checkpoints name without spelling out its sizes."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Su or longrope scaling: factors [H/2] for rows up to, and beyond, the original window."""

    theta: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    max_position_embeddings: int
    original_max_position_embeddings: int

    @property
    def attention_scale(self) -> float:
        """Factor on cos and sin, for short rows too (HF: Phi3SuScaledRotaryEmbedding)."""
        original = self.original_max_position_embeddings
        scale = self.max_position_embeddings / original
        if scale <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(scale) / math.log(original))


@dataclasses.dataclass(frozen=True)
class Phi3VConfig:
    """All that the model needs to know; field names follow HF where HF has one."""

    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    clip: ClipConfig
    pad_token_id: int | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    hd_order: str = "sub_glb"
    layer_idx: int = -2

    @property
    def head_size(self) -> int:
        """H, the width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder's part. `sliding_window` tokens back are seen (HF 4.46's eager mask)."""
        return DecoderConfig(
            hidden_size=self.hidden_size,
            mlp_size=self.mlp_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            rms_norm_eps=self.rms_norm_eps,
            window=self.sliding_window,
            fused=True,
        )

    @property
    def crop_size(self) -> int:
        """Side of a crop in pixels (336 in the real one)."""
        return self.clip.image_size

    @property
    def merged_side(self) -> int:
        """M, visual tokens along one side of a crop after the 2x2 merge (12)."""
        return self.clip.patches_per_side // 2

    @property
    def tokens_per_crop(self) -> int:
        """Visual tokens of a crop (144)."""
        return self.merged_side**2

    @property
    def clip_layers_used(self) -> int:
        """CLIP layers that run to reach `hidden_states[layer_idx]` (23 of 24)."""
        return self.clip.layers_used(self.layer_idx)


def from_hf(folder: str | Path) -> Phi3VConfig:
    """Read the configuration of an HF folder.

    The CLIP tower is ViT-L/14-336 unless `vision_config` inside `config.json`, or a file
    `clip_config.json` beside it, describes another.

    Raises:
      UserError: if a file is missing or unreadable, or a value is missing or not implemented;
        all such values in one message.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    vision = raw.get("vision_config")
    if vision is None and (folder / "clip_config.json").exists():
        vision = _read_json(folder / "clip_config.json")
    return from_dicts(raw, vision, origin=str(folder / "config.json"))


def from_dicts(
    raw: dict[str, Any], vision: dict[str, Any] | None = None, *, origin: str = "config.json"
) -> Phi3VConfig:
    """Build the configuration from `config.json`'s and CLIPVisionConfig's fields.

    Args:
      raw: the parsed `config.json`.
      vision: CLIPVisionConfig fields, or None for the tower that `raw` names.
      origin: what to call `raw` in error messages.

    Raises:
      UserError: listing every value that is missing, inconsistent or not implemented.
    """
    problems: list[str] = []

    def need(name: str, kind: type = int) -> Any:
        value = raw.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            problems.append(f"{name} must be a positive number, not {value!r}")
            return kind(1)
        return kind(value)

    _expect(problems, raw, "model_type", ["phi3_v"])
    _expect(problems, raw, "hidden_act", ["silu"])
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        _expect(problems, raw, name, [0, 0.0, None])
    embed = raw.get("embd_layer")
    if not isinstance(embed, dict):
        problems.append(f"embd_layer must describe the image embedding, not {embed!r}")
        embed = {}
    _expect(problems, embed, "embd_layer.embedding_cls", ["image", None])
    _expect(problems, embed, "embd_layer.hd_transform_order", ["sub_glb", "glb_sub", None])
    _expect(problems, embed, "embd_layer.projection_cls", ["mlp"])
    _expect(problems, embed, "embd_layer.use_hd_transform", [True])
    _expect(problems, embed, "embd_layer.with_learnable_separator", [True])
    img = raw.get("img_processor")
    if not isinstance(img, dict):
        problems.append(f"img_processor must describe the vision tower, not {img!r}")
        img = {}
    _expect(problems, img, "img_processor.name", ["clip_vision_model"])
    _expect(problems, img, "img_processor.type_feature", ["patch", None])

    clip = _clip(problems, img, vision)
    heads = need("num_attention_heads")
    hidden = need("hidden_size")
    config = Phi3VConfig(
        hidden_size=hidden,
        mlp_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=need("num_key_value_heads") if raw.get("num_key_value_heads") else heads,
        vocab_size=need("vocab_size"),
        rms_norm_eps=need("rms_norm_eps", float),
        rope=_rope(problems, raw, need, head_size=hidden // heads),
        clip=clip,
        pad_token_id=raw.get("pad_token_id"),
        sliding_window=raw.get("sliding_window"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        hd_order=embed.get("hd_transform_order") or "glb_sub",
        layer_idx=img.get("layer_idx", -2),
    )
    _check_sizes(problems, config, img)
    raise_problems(f"{origin} does not describe a model that this code implements", problems)
    return config


def _clip(problems: list[str], img: dict[str, Any], vision: dict[str, Any] | None) -> ClipConfig:
    if vision is None:
        if img.get("model_name") != REAL_CLIP:
            problems.append(
                f"img_processor.model_name is {img.get('model_name')!r}: its sizes are not known; "
                f"describe it by vision_config or in clip_config.json (known: {REAL_CLIP})"
            )
        return ClipConfig()
    return read_clip(problems, vision)


def _rope(problems: list[str], raw: dict[str, Any], need, *, head_size: int) -> RopeConfig:
    longest = need("max_position_embeddings")
    scaling = raw.get("rope_scaling")
    half = head_size // 2
    short = long = (1.0,) * half
    if scaling is None:
        # Plain rotary positions: one table, no scale on cos and sin.
        return RopeConfig(need("rope_theta", float), short, long, longest, longest)
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
    if kind not in ("su", "longrope"):
        problems.append(f"rope_scaling.type is {kind!r}; implemented are 'su' and 'longrope'")
    else:
        factors = []
        for name in ("short_factor", "long_factor"):
            value = scaling.get(name)
            if (
                not isinstance(value, list)
                or len(value) != half
                or not all(isinstance(v, (int, float)) and v > 0 for v in value)
            ):
                problems.append(f"rope_scaling.{name} must be {half} positive numbers (head/2)")
                value = [1.0] * half
            factors.append(tuple(float(v) for v in value))
        short, long = factors
    original = need("original_max_position_embeddings")
    return RopeConfig(need("rope_theta", float), short, long, longest, original)


def _check_sizes(problems: list[str], config: Phi3VConfig, img: dict[str, Any]) -> None:
    clip = config.clip
    for whole, part, text in (
        (config.hidden_size, config.num_heads, "hidden_size by num_attention_heads"),
        (config.num_heads, config.num_kv_heads, "num_attention_heads by num_key_value_heads"),
        (config.head_size, 2, "the head width by 2"),
        (clip.hidden_size, clip.num_attention_heads, "CLIP's hidden_size by its heads"),
        (clip.image_size, 2 * clip.patch_size, "the crop size by two patches"),
    ):
        if whole % part:
            problems.append(f"{whole} is not divisible by {part}: {text}")
    if not isinstance(config.layer_idx, int) or not 0 < config.clip_layers_used <= (
        clip.num_hidden_layers
    ):
        problems.append(
            f"img_processor.layer_idx is {config.layer_idx!r}; the tower has "
            f"{clip.num_hidden_layers} layers"
        )
    width = img.get("image_dim_out", clip.hidden_size)
    if width != clip.hidden_size:
        problems.append(f"img_processor.image_dim_out is {width}, CLIP is {clip.hidden_size} wide")
    tokens = img.get("num_img_tokens", config.tokens_per_crop)
    if tokens != config.tokens_per_crop:
        problems.append(
            f"img_processor.num_img_tokens is {tokens}; a crop of {clip.image_size} pixels in "
            f"patches of {clip.patch_size} gives {config.tokens_per_crop}"
        )
    pad = config.pad_token_id
    if pad is not None and (not isinstance(pad, int) or not 0 <= pad < config.vocab_size):
        problems.append(f"pad_token_id is {pad!r}, outside of the vocabulary")
    window = config.sliding_window
    if window is not None and (not isinstance(window, int) or window <= 0):
        problems.append(f"sliding_window is {window!r}; it must be null or a positive number")


def _expect(problems: list[str], raw: dict[str, Any], name: str, allowed: list[Any]) -> None:
    value = raw.get(name.split(".")[-1])
    if value not in allowed:
        shown = ", ".join(repr(v) for v in allowed if v is not None)
        problems.append(f"{name} is {value!r}; implemented: {shown}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is {path.parent} a model folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a JSON object")
    return raw
