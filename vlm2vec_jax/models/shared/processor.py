# SPDX-License-Identifier: Apache-2.0
"""What the backbones' processors have in common: markers, images, placeholders. Never imports jax.

`ImageTextProcessor` knows the tokenizer and puts the arrays of an input's images together;
`PlaceholderProcessor` is for the models whose tokenizer has a token that stands for an image: the
whole text is tokenised at once and the token repeated for the features of its image. (Phi-3.5-V
tokenises the pieces between its images instead.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm2vec_jax import options
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import (
    IMAGE_MARKER,
    EncodedInput,
    ImageLike,
    MultimodalInput,
    VisualLayout,
)
from vlm2vec_jax.models.tokenizer import TextTokenizer


class ImageParts(NamedTuple):
    """An image as a model reads it.

    Attributes:
      visual: name -> array [U, ...] of its units.
      index: i[F], for each of its tokens the row of a feature table that holds it alone.
      grid: rows and columns of its units where positions depend on them.
    """

    visual: dict[str, np.ndarray]
    index: np.ndarray
    grid: Any = None


class ImageTextProcessor:
    """A tokenizer, a limit for texts, and a layout of visual arrays."""

    def __init__(self, tokenizer: TextTokenizer, layout: VisualLayout, max_len: int | None):
        self._tokenizer, self._layout, self._max_len = tokenizer, layout, max_len

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer in use."""
        return self._tokenizer

    @property
    def tokenizer_hash(self) -> str:
        """sha256 (hex) of `tokenizer.json`."""
        return self._tokenizer.hash

    @property
    def max_len(self) -> int | None:
        """The most tokens of a text without an image; None means the tokenizer's own limit."""
        return self._max_len

    @property
    def visual_layout(self) -> VisualLayout:
        """How a row's visual arrays and feature table are laid out."""
        return self._layout

    def _image(self, image: ImageLike) -> ImageParts:
        """Decode and cut an image."""
        raise NotImplementedError

    def _images(
        self, images: Sequence[ImageLike]
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray], list[Any], tuple[int, ...]]:
        """Visual arrays of all images, index of each into their common table, grids, units."""
        parts, indices, counts, units = [], [], [], 0
        shared, features = self._layout.shared_features, self._layout.features_per_unit
        for image in images:
            part = self._image(image)
            parts.append(part)
            # Rows of the table that all images share stay; those of units move along.
            moved = part.index
            if units:
                moved = np.where(moved >= shared, moved + units * features, moved)
            indices.append(moved.astype(np.int32, copy=False))
            counts.append(len(next(iter(part.visual.values()))))
            units += counts[-1]
        visual = {
            # With one image this spares a copy of megabytes.
            name: first if len(parts) == 1 else np.concatenate([p.visual[name] for p in parts])
            for name, first in parts[0].visual.items()
        }
        return visual, indices, [part.grid for part in parts], tuple(counts)


class PlaceholderProcessor(ImageTextProcessor):
    """A processor of a model that has a token for images."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        layout: VisualLayout,
        max_len: int | None,
        *,
        placeholder: str,
        token_id: int,
        marker: str | None = None,
    ):
        """Set up.

        Args:
          tokenizer: of the model.
          layout: of the model.
          max_len: the most tokens of a text without an image.
          placeholder: the text that is the image token.
          token_id: its id.
          marker: what `<|image_k|>` becomes, the placeholder within; by default that alone.
        """
        super().__init__(tokenizer, layout, max_len)
        self._placeholder, self._image_token = placeholder, token_id
        self._marker = placeholder if marker is None else marker

    def length(self, item: MultimodalInput) -> tuple[int, int]:
        """Tokens and visual units that `encode` would give; of images only headers are read.

        Raises:
          ImageError: if an image's header cannot be read, or its shape cannot be used.
          UserError: if markers and images do not agree.
        """
        ids, order = self._ids(item)
        sizes = [self._image_size(image) for image in item.images]
        tokens = len(ids) + sum(sizes[k][0] - 1 for k in order)
        return tokens, sum(units for _, units in sizes)

    def encode(self, item: MultimodalInput) -> EncodedInput:
        """Tokenise, decode, resize and cut.

        A marker without any image in the input is ordinary text. A marker that stands twice
        repeats its image's tokens; its arrays are there once.

        Raises:
          ImageError: if an image cannot be used.
          UserError: if markers and images do not agree.
        """
        ids, order = self._ids(item)
        if not item.images:
            tokens = np.asarray(ids, np.int32)
            index = np.full(len(tokens), -1, np.int32)
            return EncodedInput(tokens, index, self._positions(tokens, [], [], []))
        visual, indices, grids, units = self._images(item.images)
        tokens, index, starts = self._interleave(ids, order, indices)
        places = self._positions(tokens, ids, starts, [grids[k] for k in order])
        return EncodedInput(tokens, index, places, visual, sum(units), units)

    def _image_size(self, image: ImageLike) -> tuple[int, int]:
        """Tokens and units of an image, from its header."""
        raise NotImplementedError

    def _positions(
        self, tokens: np.ndarray, ids: list[int], starts: list[int], grids: list[Any]
    ) -> np.ndarray:
        """Positions of a sequence: 0, 1, 2, ... unless a model has others.

        Args:
          tokens: i32 [T].
          ids: before placeholders were repeated.
          starts: the first token of every image in the text.
          grids: of the same images.
        """
        return np.arange(len(tokens), dtype=np.int32)

    def _templated(self, text: str) -> str:
        """The text as the model is to read it; for models with a prompt of their own."""
        return text

    def _ids(self, item: MultimodalInput) -> tuple[list[int], list[int]]:
        """Token ids with one placeholder per marker, and which image each stands for (from 0)."""
        text, order = item.text, []
        if item.images:
            order = marked_images(item)
            text = IMAGE_MARKER.sub(lambda _: self._marker, text)
        text = self._templated(text)
        ids = self._tokenizer.encode(text, self._max_len, truncate=not item.images)
        if ids.count(self._image_token) != len(order):
            raise UserError(
                f"the text {item.text!r:.80} holds {self._placeholder} itself; images are named "
                f"by <|image_1|>, <|image_2|>, ..."
            )
        return ids, order

    def _interleave(
        self, ids: list[int], order: list[int], indices: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens and feature index with every placeholder repeated, and where each image begins."""
        given = np.asarray(ids, np.int32)
        places = np.flatnonzero(given == self._image_token)
        tokens, index, starts = [], [], []
        done = length = 0
        for place, k in zip(places.tolist(), order, strict=True):
            length += place - done
            starts.append(length)
            tokens += [given[done:place], np.zeros(len(indices[k]), np.int32)]
            index += [np.full(place - done, -1, np.int32), indices[k]]
            length += len(indices[k])
            done = place + 1
        tokens.append(given[done:])
        index.append(np.full(len(given) - done, -1, np.int32))
        return np.concatenate(tokens), np.concatenate(index), starts


def marked_images(item: MultimodalInput) -> list[int]:
    """Which image (from 0) each marker `<|image_k|>` of the text names.

    Raises:
      UserError: if not every image is named, or one that is not there is.
    """
    order = [int(k) - 1 for k in IMAGE_MARKER.findall(item.text)]
    if sorted(set(order)) != list(range(len(item.images))):
        found = ", ".join(f"<|image_{k + 1}|>" for k in order) or "none"
        raise UserError(
            f"{len(item.images)} image(s) but markers {found} in the text {item.text!r:.80}; "
            f"it needs <|image_1|> ... <|image_{len(item.images)}|>"
        )
    return order


def setting_problems(
    words: Mapping[str, str], numbers: Mapping[str, Any], tokenizer: TextTokenizer
) -> list[str]:
    """What is wrong with chosen processor options.

    Args:
      words: option name -> one of its words.
      numbers: option name -> a whole number of at least 1, or None.
      tokenizer: whose special tokens `max_len` must have room for.
    """
    problems = [
        f"{name} must be one of {', '.join(options.OPTIONS[name].choices)}, not {value!r}"
        for name, value in words.items()
        if value not in options.OPTIONS[name].choices
    ]
    for name, value in numbers.items():
        if value is None:
            continue
        try:
            options.check_number(name, value)
        except UserError as error:
            problems.append(str(error))
            continue
        if name == "max_len" and value < tokenizer.special_tokens:
            problems.append(f"max_len={value} has no room for the text's special tokens")
    return problems
