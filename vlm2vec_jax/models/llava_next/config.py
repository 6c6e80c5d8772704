# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT's configuration, from the HF folder's `config.json` and `preprocessor_config.json`.

Published files leave out what equals the defaults of MistralConfig or LlamaConfig, so those
defaults are here. A value that changes the result and is not implemented is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD, ClipConfig, read_clip
from vlm2vec_jax.models.shared.decoder_config import DecoderConfig
from vlm2vec_jax.models.tokenizer import read_json

_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
}
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_BICUBIC = 3


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig:
    """All that model and processor need to know.

    Attributes:
      text: sizes of the decoder.
      vocab_size: V.
      rope_theta: of plain rotary positions.
      max_position_embeddings: longest sequence.
      clip: the vision tower.
      feature_layer: which of CLIP's hidden states is read (-2).
      projector_bias: whether the projector has biases.
      pinpoints: (height, width) in pixels that an image may be tiled into.
      image_token_id: of the placeholder.
      image_mean, image_std: the normalisation of pixels in [0, 1].
      pad_token_id: token whose vector gets no gradient.
      tie_word_embeddings: whether the head is the token table.
    """

    text: DecoderConfig
    vocab_size: int
    rope_theta: float
    max_position_embeddings: int
    clip: ClipConfig
    feature_layer: int
    projector_bias: bool
    pinpoints: tuple[tuple[int, int], ...]
    image_token_id: int
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    @property
    def tile(self) -> int:
        """Side of a tile in pixels (336)."""
        return self.clip.image_size

    @property
    def features_per_tile(self) -> int:
        """Features of a tile (576)."""
        return self.clip.patches_per_side**2

    @property
    def clip_layers_used(self) -> int:
        """CLIP layers that run (23 of 24)."""
        return self.clip.layers_used(self.feature_layer)


def from_hf(folder: str | Path) -> LlavaNextConfig:
    """Read the configuration of an HF folder.

    Raises:
      UserError: if `config.json` is missing or unreadable, or values are missing, contradictory
        or not implemented; all such values in one message.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{path} is missing: is {folder} a model folder?")
    return from_dicts(read_json(path), image_settings(Path(folder)), origin=str(path))


def image_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings: `preprocessor_config.json`, else `processor_config.json`."""
    raw = read_json(folder / "preprocessor_config.json")
    if raw:
        return raw
    raw = read_json(folder / "processor_config.json")
    # Newer transformers keeps the image processor's part one level down.
    nested = raw.get("image_processor")
    return nested if isinstance(nested, dict) else {}


def from_dicts(
    raw: dict[str, Any], images: dict[str, Any] | None = None, *, origin: str = "config.json"
) -> LlavaNextConfig:
    """Build the configuration from the fields of `config.json`.

    Args:
      raw: the parsed file.
      images: the image processor's settings; {} or None for its defaults.
      origin: what to call `raw` in error messages.

    Raises:
      UserError: listing every value that is missing, inconsistent or not implemented.
    """
    problems: list[str] = []
    _expect(problems, raw, "vision_feature_select_strategy", ("default",))
    _expect(problems, raw, "projector_hidden_act", ("gelu",))
    text = raw.get("text_config")
    if not isinstance(text, dict):
        problems.append(f"text_config must describe the decoder, not {text!r:.60}")
        text = {}
    kind = text.get("model_type", "llama")
    if kind not in _TEXT_DEFAULTS:
        told = " and ".join(_TEXT_DEFAULTS)
        problems.append(f"text_config.model_type is {kind!r}; implemented are {told}")
    text = {**_TEXT_DEFAULTS.get(kind, {}), **text}
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        problems.append(f"vision_config must describe the vision tower, not {vision!r:.60}")
        vision = dataclasses.asdict(ClipConfig())
    _expect(problems, vision, "model_type", ("clip_vision_model",), "vision_config.")
    clip = read_clip(problems, vision)
    layer = raw.get("vision_feature_layer", -2)
    if not _whole(layer) or not 0 < clip.layers_used(layer) <= clip.num_hidden_layers:
        problems.append(
            f"vision_feature_layer is {layer!r}; one of the tower's {clip.num_hidden_layers} "
            f"layers is implemented"
        )
        layer = -2
    for whole, part, words in (
        (clip.image_size, clip.patch_size, "the tile by a patch"),
        (clip.hidden_size, clip.num_attention_heads, "CLIP's hidden_size by its heads"),
    ):
        if whole % part:
            problems.append(f"{whole} is not divisible by {part}: {words}")
    images = images or {}
    config = LlavaNextConfig(
        text=_decoder(problems, text),
        vocab_size=_size(problems, text, "vocab_size", 32000),
        rope_theta=_theta(problems, text),
        max_position_embeddings=_size(problems, text, "max_position_embeddings"),
        clip=clip,
        feature_layer=layer,
        projector_bias=bool(raw.get("multimodal_projector_bias", True)),
        pinpoints=_pinpoints(problems, raw, images, clip.image_size),
        image_token_id=_image_token(problems, raw),
        **_norm(problems, images),
        pad_token_id=text.get("pad_token_id"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )
    _check_images(problems, images, clip.image_size)
    raise_problems(f"{origin} describes a model that is not implemented", problems)
    return config


def _decoder(problems: list[str], text: dict[str, Any]) -> DecoderConfig:
    _expect(problems, text, "hidden_act", ("silu",), "text_config.")
    _expect(problems, text, "attention_dropout", (0, 0.0), "text_config.")
    _expect(problems, text, "attention_bias", (False,), "text_config.")
    _expect(problems, text, "mlp_bias", (False,), "text_config.")
    heads = _size(problems, text, "num_attention_heads")
    hidden = _size(problems, text, "hidden_size")
    kv_heads = _size(problems, text, "num_key_value_heads", heads)
    head = text.get("head_dim")
    head = hidden // heads if head is None else _size(problems, text, "head_dim")
    if heads % kv_heads or head % 2:
        problems.append(
            f"text_config: {heads} heads of width {head} and {kv_heads} of keys do not fit together"
        )
    window = text.get("sliding_window")
    if window is not None and (not _whole(window) or window < 1):
        problems.append(f"text_config.sliding_window is {window!r}; null or a positive number")
        window = None
    if any(kind != "sliding_attention" for kind in text.get("layer_types") or ()):
        if any(kind != "full_attention" for kind in text["layer_types"]):
            problems.append("text_config.layer_types: layers of several kinds are not implemented")
        window = None
    return DecoderConfig(
        hidden_size=hidden,
        mlp_size=_size(problems, text, "intermediate_size"),
        num_layers=_size(problems, text, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head,
        rms_norm_eps=_number(problems, text, "rms_norm_eps"),
        # Transformers' window counts the query's own token.
        window=None if window is None else window - 1,
    )


def _theta(problems: list[str], text: dict[str, Any]) -> float:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        problems.append(f"text_config: rotary positions of type {kind!r} are not implemented")
        rope = {}
    return _number(problems, {**text, **rope}, "rope_theta")


def _image_token(problems: list[str], raw: dict[str, Any]) -> int:
    value = raw.get("image_token_index", raw.get("image_token_id", 32000))
    if not _whole(value) or value < 0:
        problems.append(f"image_token_index must be a token id, not {value!r}")
        return 0
    return value


def _pinpoints(
    problems: list[str], raw: dict[str, Any], images: dict[str, Any], tile: int
) -> tuple[tuple[int, int], ...]:
    model = raw.get("image_grid_pinpoints") or [list(p) for p in _PINPOINTS]
    mine = images.get("image_grid_pinpoints") or model
    good = isinstance(model, (list, tuple)) and all(
        isinstance(p, (list, tuple)) and len(p) == 2 and all(_whole(n) and n > 0 for n in p)
        for p in model
    )
    if not good or any(n % tile for p in model for n in p):
        problems.append(
            f"image_grid_pinpoints must be (height, width) pairs in multiples of {tile}, not "
            f"{model!r:.120}"
        )
        return ((tile, tile),)
    if [list(p) for p in mine] != [list(p) for p in model]:
        problems.append(
            f"image_grid_pinpoints are {mine!r} in preprocessor_config.json and {model!r} in "
            f"config.json; they must agree"
        )
    return tuple((p[0], p[1]) for p in model)


def _norm(problems: list[str], images: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for name, default in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        value = images.get(name) or default
        try:
            first, second, third = (float(v) for v in value)
        except (TypeError, ValueError):
            problems.append(f"preprocessor_config.json: {name} must be three numbers: {value!r}")
            first, second, third = default
        out[name] = (first, second, third)
    return out


def _check_images(problems: list[str], images: dict[str, Any], tile: int) -> None:
    """What the image processor may be told: nothing but what it does here."""
    name = "preprocessor_config.json: "
    for field in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"):
        _expect(problems, images, field, (True,), name)
    _expect(problems, images, "resample", (_BICUBIC,), name)
    factor = images.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or abs(factor - 1 / 255) > 1e-9:
        problems.append(f"{name}rescale_factor is {factor!r}; implemented is 1/255")
    whole = {"height": tile, "width": tile}
    _expect(problems, images, "size", ({"shortest_edge": tile}, whole, tile), name)
    if images.get("do_center_crop", True):
        _expect(problems, images, "crop_size", (whole, tile), name)


def _expect(
    problems: list[str], raw: dict[str, Any], name: str, allowed: Collection[Any], where: str = ""
) -> None:
    """Complain if a field has a value that is not implemented; absent is fine."""
    value = raw.get(name)
    if value is not None and value not in allowed:
        told = " or ".join(repr(v) for v in allowed)
        problems.append(f"{where}{name} is {value!r}; implemented is {told}")


def _size(problems: list[str], raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if value is None or not _whole(value) or value < 1:
        problems.append(f"text_config.{name} must be a whole number of at least 1, not {value!r}")
        return 1
    return value


def _number(problems: list[str], raw: dict[str, Any], name: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        problems.append(f"text_config.{name} must be a positive number, not {value!r}")
        return 1.0
    return float(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
