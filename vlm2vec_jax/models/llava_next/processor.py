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

import numpy as np

from vlm2vec_jax import options
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.images import RESOLUTIONS, Transparency, image_size, load_image
from vlm2vec_jax.inputs import (
    IMAGE_MARKER,
    EncodedInput,
    ImageLike,
    MultimodalInput,
    VisualLayout,
)
from vlm2vec_jax.models.llava_next.config import LlavaNextConfig
from vlm2vec_jax.models.llava_next.tiles import (
    SHARED_FEATURES,
    Tiling,
    cut_tiles,
    feature_index,
    tiling,
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


class LlavaNextProcessor:
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
        problems = [
            f"{name} must be one of {', '.join(options.OPTIONS[name].choices)}, not {value!r}"
            for name, value in self._words.items()
            if value not in options.OPTIONS[name].choices
        ]
        if max_len is not None:
            try:
                options.check_number("max_len", max_len)
            except UserError as error:
                problems.append(str(error))
            else:
                if max_len < tokenizer.special_tokens:
                    problems.append(f"max_len={max_len} has no room for the special tokens")
        if tokenizer.encode(image_token, truncate=False).count(config.image_token_id) != 1:
            problems.append(
                f"the tokenizer does not read {image_token!r} as id {config.image_token_id}, "
                f"which config.json calls the image token"
            )
        raise_problems("Unusable settings of the LLaVA-NeXT processor", problems)
        self._tokenizer, self._config = tokenizer, config
        self._image_token, self._max_len = image_token, max_len
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
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer in use."""
        return self._tokenizer

    @property
    def tokenizer_hash(self) -> str:
        """sha256 (hex) of `tokenizer.json`."""
        return self._tokenizer.hash

    @property
    def visual_layout(self) -> VisualLayout:
        """See `visual_layout`."""
        return visual_layout(self._config)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything here that changes an encoding."""
        config = self._config
        return {
            "type": "llava_next",
            "max_len": self._max_len,
            **self._words,
            "image_token": self._image_token,
            "pinpoints": [list(p) for p in config.pinpoints],
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "tile": config.tile,
            "patch_size": config.clip.patch_size,
            "model_max_length": self._tokenizer.model_max_length,
        }

    def length(self, item: MultimodalInput) -> tuple[int, int]:
        """Tokens and visual units that `encode` would give; of images only headers are read.

        Raises:
          ImageError: if an image's header cannot be read.
          UserError: if markers and images do not agree.
        """
        ids, order = self._ids(item)
        cuts = [self._tiling(image) for image in item.images]
        tokens = len(ids) + sum(cuts[k].tokens(self._side) - 1 for k in order)
        return tokens, sum(cut.units for cut in cuts)

    def encode(self, item: MultimodalInput) -> EncodedInput:
        """Tokenise, decode, resize and cut.

        A marker without any image in the input is ordinary text. A marker that stands twice
        repeats its image's tokens; the tiles are there once.

        Raises:
          ImageError: if an image cannot be used.
          UserError: if markers and images do not agree.
        """
        ids, order = self._ids(item)
        given = np.asarray(ids, np.int32)
        if not item.images:
            places = np.arange(len(given), dtype=np.int32)
            return EncodedInput(given, np.full(len(given), -1, np.int32), places)
        tiles, indices, units = [], [], 0
        for image in item.images:
            cut = self._tiling(image)
            pixels = load_image(image, transparency=self._transparency, square=self._square)
            tiles.append(cut_tiles(pixels, cut))
            index = feature_index(cut, self._side)
            shift = units * self._config.features_per_tile
            indices.append(np.where(index >= SHARED_FEATURES, index + shift, index))
            units += cut.units
        tokens, index = self._interleave(given, order, indices)
        places = np.arange(len(tokens), dtype=np.int32)
        # With one image this spares a copy of megabytes.
        visual = {"tiles": tiles[0] if len(tiles) == 1 else np.concatenate(tiles)}
        return EncodedInput(tokens, index, places, visual, units)

    def _ids(self, item: MultimodalInput) -> tuple[list[int], list[int]]:
        """Token ids with one placeholder per marker, and which image each stands for (from 0)."""
        text, order = item.text, []
        if item.images:
            order = [int(k) - 1 for k in IMAGE_MARKER.findall(text)]
            if sorted(set(order)) != list(range(len(item.images))):
                found = ", ".join(f"<|image_{k + 1}|>" for k in order) or "none"
                raise UserError(
                    f"{len(item.images)} image(s) but markers {found} in the text {text!r:.80}; "
                    f"it needs <|image_1|> ... <|image_{len(item.images)}|>"
                )
            text = IMAGE_MARKER.sub(lambda _: self._image_token, text)
        ids = self._tokenizer.encode(text, self._max_len, truncate=not item.images)
        if ids.count(self._config.image_token_id) != len(order):
            raise UserError(
                f"the text {item.text!r:.80} holds {self._image_token} itself; images are named "
                f"by <|image_1|>, <|image_2|>, ..."
            )
        return ids, order

    def _interleave(
        self, given: np.ndarray, order: list[int], indices: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and feature index, every placeholder replaced by its image's features."""
        tokens, index, done = [], [], 0
        places = np.flatnonzero(given == self._config.image_token_id)
        for place, k in zip(places.tolist(), order, strict=True):
            tokens += [given[done:place], np.zeros(len(indices[k]), np.int32)]
            index += [np.full(place - done, -1, np.int32), indices[k].astype(np.int32)]
            done = place + 1
        tokens.append(given[done:])
        index.append(np.full(len(given) - done, -1, np.int32))
        return np.concatenate(tokens), np.concatenate(index)

    def _tiling(self, image: ImageLike) -> Tiling:
        width, height = image_size(image)
        side = self._square
        return tiling(side or width, side or height, self._config.pinpoints, self._config.tile)
