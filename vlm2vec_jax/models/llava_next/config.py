# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT's configuration, from the HF folder's `config.json` and `preprocessor_config.json`.

Published files leave out what equals the defaults of MistralConfig or LlamaConfig, so those
defaults are here. A value that changes the result and is not implemented is an error.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD, ClipConfig, read_clip
from vlm2vec_jax.models.shared.config_fields import (
    Fields,
    check_image_processing,
    image_fields,
    read_config_file,
    three,
)
from vlm2vec_jax.models.shared.decoder_config import DecoderConfig

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
    problems: list[str] = []
    images = image_fields(folder, problems)
    origin = str(Path(folder) / "config.json")
    return _assemble(read_config_file(folder), images, problems, origin)


def from_dicts(raw: dict[str, Any], images: dict[str, Any] | None = None) -> LlavaNextConfig:
    """Build the configuration from the fields of `config.json`.

    Args:
      raw: the parsed file.
      images: the image processor's settings; {} or None for its defaults.

    Raises:
      UserError: listing every value that is missing, inconsistent or not implemented.
    """
    problems: list[str] = []
    fields = Fields(images or {}, "preprocessor_config.json", problems)
    check_image_processing(fields)
    return _assemble(raw, fields, problems, "config.json")


def _assemble(
    raw: dict[str, Any], images: Fields, problems: list[str], origin: str
) -> LlavaNextConfig:
    whole = Fields(raw, "", problems)
    whole.expect("vision_feature_select_strategy", ("default",))
    whole.expect("projector_hidden_act", ("gelu",))
    text = Fields(raw.get("text_config"), "text_config", problems)
    kind = text.get("model_type", "llama")
    text.expect("model_type", tuple(_TEXT_DEFAULTS))
    text.values = {**_TEXT_DEFAULTS.get(str(kind), {}), **text.values}
    vision = Fields(raw.get("vision_config"), "vision_config", problems)
    vision.expect("model_type", ("clip_vision_model",))
    clip = read_clip(problems, vision.values or dataclasses.asdict(ClipConfig()))
    layer = raw.get("vision_feature_layer", -2)
    if not _whole(layer) or not 0 < clip.layers_used(layer) <= clip.num_hidden_layers:
        problems.append(
            f"vision_feature_layer is {layer!r}; one of the tower's {clip.num_hidden_layers} "
            f"layers is implemented"
        )
        layer = -2
    for size, part, words in (
        (clip.image_size, clip.patch_size, "the tile by a patch"),
        (clip.hidden_size, clip.num_attention_heads, "CLIP's hidden_size by its heads"),
    ):
        if size % part:
            problems.append(f"{size} is not divisible by {part}: {words}")
    config = LlavaNextConfig(
        text=_decoder(text),
        vocab_size=text.size("vocab_size", 32000),
        rope_theta=_theta(text),
        max_position_embeddings=text.size("max_position_embeddings"),
        clip=clip,
        feature_layer=layer,
        projector_bias=bool(raw.get("multimodal_projector_bias", True)),
        pinpoints=_pinpoints(problems, raw, images, clip.image_size),
        image_token_id=_image_token(problems, raw),
        image_mean=three(images, "image_mean", IMAGE_MEAN),
        image_std=three(images, "image_std", IMAGE_STD),
        pad_token_id=text.get("pad_token_id"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )
    _check_images(images, clip.image_size)
    raise_problems(f"{origin} describes a model that is not implemented", problems)
    return config


def _decoder(text: Fields) -> DecoderConfig:
    text.expect("hidden_act", ("silu",))
    text.expect("attention_dropout", (0, 0.0))
    text.expect("attention_bias", (False,))
    text.expect("mlp_bias", (False,))
    heads, hidden = text.size("num_attention_heads"), text.size("hidden_size")
    kv_heads = text.size("num_key_value_heads", heads)
    head = text.size("head_dim", max(hidden // heads, 1))
    if heads % kv_heads or head % 2:
        text.problems.append(
            f"text_config: {heads} heads of width {head} and {kv_heads} of keys do not fit together"
        )
    window = text.get("sliding_window")
    if window is not None and (not _whole(window) or window < 1):
        text.problems.append(f"text_config.sliding_window is {window!r}; null or a positive number")
        window = None
    kinds = set(text.get("layer_types") or ())
    if kinds - {"sliding_attention"}:
        if kinds - {"full_attention"}:
            text.problems.append("text_config.layer_types: several kinds are not implemented")
        window = None
    return DecoderConfig(
        hidden_size=hidden,
        mlp_size=text.size("intermediate_size"),
        num_layers=text.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head,
        rms_norm_eps=text.number("rms_norm_eps"),
        # Transformers' window counts the query's own token.
        window=None if window is None else window - 1,
    )


def _theta(text: Fields) -> float:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        text.problems.append(f"text_config: rotary positions of type {kind!r} are not implemented")
        rope = {}
    # The newer place goes first; the defaults above are in the older one.
    return Fields({**text.values, **rope}, text.name, text.problems).number("rope_theta")


def _image_token(problems: list[str], raw: dict[str, Any]) -> int:
    value = raw.get("image_token_index", raw.get("image_token_id", 32000))
    if not _whole(value) or value < 0:
        problems.append(f"image_token_index must be a token id, not {value!r}")
        return 0
    return value


def _pinpoints(
    problems: list[str], raw: dict[str, Any], images: Fields, tile: int
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


def _check_images(images: Fields, tile: int) -> None:
    """What the image processor may be told: nothing but what it does here."""
    images.expect("do_pad", (True,))
    whole = {"height": tile, "width": tile}
    images.expect("size", ({"shortest_edge": tile}, whole, tile))
    if images.get("do_center_crop", True):
        images.expect("crop_size", (whole, tile))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
