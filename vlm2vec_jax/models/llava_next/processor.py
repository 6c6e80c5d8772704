# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT's processor: one `MultimodalInput` to the `EncodedInput` that the model reads.

Markers `<|image_k|>` become `<image>`, the whole text is tokenised at once, and every placeholder
is repeated for the features of its image. Pixels go to the device as bytes, which normalises them.
Behaviour: `LlavaNextProcessor` of transformers with the ids of `tokenizer.json` (transformers 5
rebuilds a Llama tokenizer and gives other ids behind `<image>`). Never imports jax.

`max_len` cuts texts without an image; an input with an image is never cut.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.images import RESOLUTIONS, Transparency, image_size, load_image
from vlm2vec_jax.inputs import ImageLike, VisualLayout
from vlm2vec_jax.models.llava_next.config import LlavaNextConfig
from vlm2vec_jax.models.llava_next.tiles import (
    SHARED_FEATURES,
    Tiling,
    cut_tiles,
    feature_index,
    tiling,
)
from vlm2vec_jax.models.shared.processor import (
    ImageParts,
    PlaceholderProcessor,
    setting_problems,
)
from vlm2vec_jax.models.tokenizer import TextTokenizer, load_tokenizer, read_json

OPTIONS = ("max_len", "resolution", "transparency")
"""The processor options of this backbone."""


def visual_layout(config: LlavaNextConfig) -> VisualLayout:
    """How a row's visual feature table is laid out: the newline, then the tiles."""
    tile = ((config.tile, config.tile, 3), "uint8")
    return VisualLayout(SHARED_FEATURES, config.features_per_tile, {"tiles": tile})


def planned_image_size(
    config: LlavaNextConfig, chosen: Any, width: int, height: int
) -> tuple[int, int]:
    """Tokens and tiles of an image under the options of a configuration."""
    side = RESOLUTIONS.get(chosen.get("resolution") or "native")
    cut = tiling(side or width, side or height, config.pinpoints, config.tile)
    return cut.tokens(config.clip.patches_per_side), cut.units


class LlavaNextProcessor(PlaceholderProcessor):
    """Tokens, tiles and the feature index; thread-safe."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        config: LlavaNextConfig,
        *,
        image_token: str = "<image>",
        max_len: int | None = None,
        resolution: str = "native",
        transparency: Transparency = "white",
    ):
        """Set up.

        Args:
          tokenizer: of the model.
          config: of the model.
          image_token: the placeholder's text.
          max_len: the most tokens of a text without an image; None for the tokenizer's limit.
          resolution: see `options.OPTIONS`, as `transparency`.
          transparency: `white` or `drop`.

        Raises:
          UserError: listing every setting that cannot be used.
        """
        self._words = {"resolution": resolution, "transparency": transparency}
        problems = setting_problems(self._words, {"max_len": max_len}, tokenizer)
        if tokenizer.encode(image_token, truncate=False).count(config.image_token_id) != 1:
            problems.append(
                f"the tokenizer does not read {image_token!r} as id {config.image_token_id}, "
                f"which config.json calls the image token"
            )
        raise_problems("Unusable settings of the LLaVA-NeXT processor", problems)
        super().__init__(
            tokenizer,
            visual_layout(config),
            max_len,
            placeholder=image_token,
            token_id=config.image_token_id,
        )
        self._config = config
        self._transparency: Transparency = transparency
        self._square = RESOLUTIONS.get(resolution)
        self._side = config.clip.patches_per_side

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, config: LlavaNextConfig, **chosen: Any
    ) -> LlavaNextProcessor:
        """Read a model folder's tokenizer; options that are None have their default.

        Raises:
          UserError: for missing or contradictory files, and unusable options.
        """
        given = {name: value for name, value in chosen.items() if value is not None}
        token = read_json(Path(folder) / "processor_config.json").get("image_token")
        if token is not None:
            given["image_token"] = token["content"] if isinstance(token, dict) else str(token)
        return cls(load_tokenizer(folder), config, **given)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything here that changes an encoding."""
        config = self._config
        return {
            "type": "llava_next",
            "max_len": self._max_len,
            **self._words,
            "image_token": self._placeholder,
            "pinpoints": [list(p) for p in config.pinpoints],
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "tile": config.tile,
            "patch_size": config.clip.patch_size,
            "model_max_length": self._tokenizer.model_max_length,
        }

    def _image_size(self, image: ImageLike) -> tuple[int, int]:
        cut = self._tiling(image)
        return cut.tokens(self._side), cut.units

    def _image(self, image: ImageLike) -> ImageParts:
        cut = self._tiling(image)
        pixels = load_image(image, transparency=self._transparency, square=self._square)
        return ImageParts({"tiles": cut_tiles(pixels, cut)}, feature_index(cut, self._side))

    def _tiling(self, image: ImageLike) -> Tiling:
        width, height = image_size(image)
        side = self._square
        return tiling(side or width, side or height, self._config.pinpoints, self._config.tile)
