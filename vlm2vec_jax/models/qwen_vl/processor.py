# SPDX-License-Identifier: Apache-2.0
"""The Qwen-VL family's processor: one `MultimodalInput` to the `EncodedInput` the models read.

Markers `<|image_k|>` become image placeholders, the whole text is tokenised at once, and every
placeholder is repeated for the units of its image. Pixels go to the device as bytes, which
normalises them. Behaviour: `Qwen2VLProcessor` and `Qwen2VLImageProcessorPil` of transformers, and
VLM2Vec's use of them. Never imports jax.

`max_len` cuts texts without an image. An input with an image is never cut (the reference cuts
behind the expanded placeholders, and then fails for the images it has cut into).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vlm2vec_jax import options
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.images import (
    RESOLUTIONS,
    ImageError,
    Transparency,
    describe_image,
    image_size,
    load_image,
)
from vlm2vec_jax.inputs import (
    IMAGE_MARKER,
    EncodedInput,
    ImageLike,
    MultimodalInput,
    VisualLayout,
)
from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.qwen_vl.geometry import (
    Grid,
    cut_patches,
    grid_info,
    pixel_table,
    smart_resize,
    window_order,
)
from vlm2vec_jax.models.qwen_vl.positions import positions
from vlm2vec_jax.models.tokenizer import TextTokenizer, load_tokenizer

OPTIONS = (
    "max_len",
    "resolution",
    "min_pixels",
    "max_pixels",
    "image_positions",
    "image_markers",
    "transparency",
)
"""The processor options of the family."""


def visual_layout(config: QwenVLConfig) -> VisualLayout:
    """How a row's arrays are laid out: a feature per unit, three position axes."""
    vision = config.vision
    pixels = (vision.patches_per_unit, vision.patch_size**2 * 3)
    units: dict[str, tuple[tuple[int, ...], str]] = {
        "patches": (pixels, "uint8"),
        "grid": ((5,), "int32"),
    }
    if vision.window_units:
        units["window"] = ((), "int32")
    return VisualLayout(0, 1, units, position_axes=3)


def planned_image_size(
    config: QwenVLConfig, chosen: Any, width: int, height: int
) -> tuple[int, int]:
    """Tokens and units of an image under the options of a configuration.

    Raises:
      UserError: if the image cannot be used.
    """
    limits = config.images
    side = RESOLUTIONS.get(chosen.get("resolution") or "native")
    size = smart_resize(
        side or width,
        side or height,
        config.vision.unit_pixels,
        chosen.get("min_pixels") or limits.min_pixels,
        chosen.get("max_pixels") or limits.max_pixels,
    )
    if isinstance(size, str):
        raise UserError(f"an image of {width} x {height} pixels: {size}")
    units = size[0] * size[1] // config.vision.unit_pixels**2
    return units, units


class QwenVLProcessor:
    """Tokens, patches and positions; thread-safe."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        config: QwenVLConfig,
        *,
        max_len: int | None = None,
        resolution: str = "native",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_positions: str = "mrope",
        image_markers: str = "bare",
        transparency: Transparency = "white",
    ):
        """Set up.

        Args:
          tokenizer: of the model.
          config: of the model; also says the folder's pixel limits.
          max_len: the most tokens of a text without an image; None for the tokenizer's limit.
          resolution: see `options.OPTIONS`, as all that follow.
          min_pixels: None for the folder's.
          max_pixels: None for the folder's.
          image_positions: see `positions.py`.
          image_markers: `bare` or `wrapped`.
          transparency: `white` or `drop`.

        Raises:
          UserError: listing every setting that cannot be used.
        """
        least = config.images.min_pixels if min_pixels is None else min_pixels
        most = config.images.max_pixels if max_pixels is None else max_pixels
        self._words = {
            "resolution": resolution,
            "image_positions": image_positions,
            "image_markers": image_markers,
            "transparency": transparency,
        }
        problems = [
            f"{name} must be one of {', '.join(options.OPTIONS[name].choices)}, not {value!r}"
            for name, value in self._words.items()
            if value not in options.OPTIONS[name].choices
        ]
        unit = config.vision.unit_pixels
        for name, value in (("max_len", max_len), ("min_pixels", least), ("max_pixels", most)):
            if value is None:
                continue
            try:
                options.check_number(name, value)
            except UserError as error:
                problems.append(str(error))
        if not problems and least > most:
            problems.append(f"min_pixels ({least}) is more than max_pixels ({most})")
        if not problems and most < unit * unit:
            problems.append(
                f"max_pixels ({most}) is less than one unit of {unit} x {unit} pixels ({unit**2})"
            )
        ids = {
            "image": config.image_token_id,
            "vision start": config.vision_start_token_id,
            "vision end": config.vision_end_token_id,
        }
        tokens = {name: tokenizer.token(number) for name, number in ids.items()}
        for name, token in tokens.items():
            if token is None:
                problems.append(f"the tokenizer has no {name} token: no id {ids[name]}")
            elif tokenizer.encode(token, truncate=False) != [ids[name]]:
                problems.append(f"the {name} token {token!r} does not stand for itself in a text")
        raise_problems(f"Unusable settings of the {config.model_type} processor", problems)
        self._tokenizer, self._config = tokenizer, config
        self._max_len, self._least, self._most = max_len, least, most
        self._placeholder = tokens["image"] or ""
        self._marker = self._placeholder
        if image_markers == "wrapped":
            self._marker = f"{tokens['vision start']}{self._placeholder}{tokens['vision end']}"
        self._transparency: Transparency = transparency

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, config: QwenVLConfig, **chosen: Any
    ) -> QwenVLProcessor:
        """Read a model folder's tokenizer; options that are None are the folder's or the default.

        Raises:
          UserError: for missing or contradictory files, and unusable options.
        """
        given = {name: value for name, value in chosen.items() if value is not None}
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
        """Everything here that changes an encoding; `folder_pixels` is what the folder says."""
        config = self._config
        return {
            "type": config.model_type,
            "max_len": self._max_len,
            "min_pixels": self._least,
            "max_pixels": self._most,
            **self._words,
            "folder_pixels": [config.images.min_pixels, config.images.max_pixels],
            "image_mean": list(config.images.mean),
            "image_std": list(config.images.std),
            "patch_size": config.vision.patch_size,
            "merge_size": config.vision.merge,
            "model_max_length": self._tokenizer.model_max_length,
        }

    def length(self, item: MultimodalInput) -> tuple[int, int]:
        """Tokens and visual units that `encode` would give; of images only headers are read.

        Raises:
          ImageError: if an image's header cannot be read, or its shape cannot be used.
          UserError: if markers and images do not agree.
        """
        ids, order = self._ids(item)
        units = [self._grid(image)[1].units for image in item.images]
        return len(ids) + sum(units[k] - 1 for k in order), sum(units)

    def encode(self, item: MultimodalInput) -> EncodedInput:
        """Tokenise, decode, resize and cut.

        A marker without any image in the input is ordinary text. A marker that stands twice
        repeats its image's tokens; the patches are there once.

        Raises:
          ImageError: if an image cannot be used.
          UserError: if markers and images do not agree.
        """
        ids, order = self._ids(item)
        if not item.images:
            tokens = np.asarray(ids, np.int32)
            places = positions(len(tokens), [], "sequential")
            return EncodedInput(tokens, np.full(len(tokens), -1, np.int32), places)
        parts: list[dict[str, np.ndarray]] = []
        grids, rows, units = [], [], 0
        for image in item.images:
            size, grid = self._grid(image)
            visual, row = self._cut(image, size, grid)
            parts.append(visual)
            grids.append(grid)
            rows.append(row + units)
            units += grid.units
        one = len(parts) == 1  # spares a copy of megabytes
        visual = {
            k: parts[0][k] if one else np.concatenate([p[k] for p in parts]) for k in parts[0]
        }
        tokens, index, images, wrapped = self._interleave(ids, order, grids, rows)
        places = positions(len(tokens), images, self._words["image_positions"], wrapped)
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
            text = IMAGE_MARKER.sub(lambda _: self._marker, text)
        text = self._templated(text)
        ids = self._tokenizer.encode(text, self._max_len, truncate=not item.images)
        found = ids.count(self._config.image_token_id)
        if found != len(order) and (found or item.images):
            raise UserError(
                f"the text {item.text!r:.80} holds {self._placeholder} itself; images are named "
                f"by <|image_1|>, <|image_2|>, ..."
            )
        return ids, order

    def _templated(self, text: str) -> str:
        """The text as the model is to read it; for members with a prompt of their own."""
        return text

    def _interleave(
        self, ids: list[int], order: list[int], grids: list[Grid], rows: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, Grid]], list[bool]]:
        """Tokens and feature index, and first token, grid and wrapping of each placed image."""
        given = np.asarray(ids, np.int32)
        places = np.flatnonzero(given == self._config.image_token_id)
        tokens, index, images, wrapped = [], [], [], []
        done = length = 0
        for place, k in zip(places.tolist(), order, strict=True):
            tokens.append(given[done:place])
            index.append(np.full(place - done, -1, np.int32))
            length += place - done
            images.append((length, grids[k]))
            wrapped.append(place > 0 and ids[place - 1] == self._config.vision_start_token_id)
            tokens.append(np.zeros(grids[k].units, np.int32))
            index.append(rows[k].astype(np.int32))
            length += grids[k].units
            done = place + 1
        tokens.append(given[done:])
        index.append(np.full(len(given) - done, -1, np.int32))
        return np.concatenate(tokens), np.concatenate(index), images, wrapped

    def _grid(self, image: ImageLike) -> tuple[tuple[int, int], Grid]:
        """Pixels (width, height) and units of an image."""
        side = RESOLUTIONS.get(self._words["resolution"])
        width, height = image_size(image)
        unit = self._config.vision.unit_pixels
        size = smart_resize(side or width, side or height, unit, self._least, self._most)
        if isinstance(size, str):
            raise ImageError(f"{describe_image(image)}: {width} x {height} pixels: {size}")
        return size, Grid(size[1] // unit, size[0] // unit)

    def _cut(
        self, image: ImageLike, size: tuple[int, int], grid: Grid
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """An image's arrays, and for its tokens, row by row, which unit each reads."""
        vision = self._config.vision
        side = RESOLUTIONS.get(self._words["resolution"])
        pixels = load_image(image, transparency=self._transparency, square=side)
        patches = cut_patches(pixels, size, vision.patch_size, vision.merge)
        visual = {"patches": patches, "grid": grid_info(grid)}
        rows = np.arange(grid.units)
        if vision.window_units:
            order, visual["window"] = window_order(grid, vision.window_units)
            visual["patches"] = patches[order]
            visual["grid"][:, 1:] = visual["grid"][order, 1:]
            rows = np.argsort(order)
        return visual, rows


def pixel_values(visual: dict[str, np.ndarray], config: QwenVLConfig) -> np.ndarray:
    """Transformers' `pixel_values` of an image's arrays, f32 [P, 3 * t * p * p], bit by bit.

    For units in row order (not Qwen2.5-VL's windows). The device normalises by itself; this is
    for comparisons.
    """
    vision = config.vision
    x = visual["patches"].reshape(-1, vision.patch_size, vision.patch_size, 3)
    x = pixel_table(config.images.mean, config.images.std)[x, np.arange(3)]
    x = x.transpose(0, 3, 1, 2)[:, :, None]
    x = np.broadcast_to(x, (*x.shape[:2], vision.temporal_patch_size, *x.shape[3:]))
    return np.ascontiguousarray(x).reshape(len(x), -1)
