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

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.images import (
    RESOLUTIONS,
    ImageError,
    Transparency,
    describe_image,
    image_size,
    load_image,
)
from vlm2vec_jax.inputs import ImageLike, VisualLayout
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
from vlm2vec_jax.models.shared.processor import (
    ImageParts,
    PlaceholderProcessor,
    setting_problems,
)
from vlm2vec_jax.models.tokenizer import TextTokenizer, load_tokenizer

OPTIONS = (
    "max_len",
    "resolution",
    "pixel_limits",
    "min_pixels",
    "max_pixels",
    "image_positions",
    "image_markers",
    "transparency",
)
"""The processor options of the family."""
LIMITS = {"vlm2vec_train": (256, 1280), "vlm2vec_v2": (4, 1280)}
"""Fewest and most units of an image by `pixel_limits`: training of VLM2Vec v1, and V2 throughout.
v1's evaluation took what the model's folder says (4 to 16384 in Qwen2-VL's), which is `folder`."""


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
    least, most = limits_of(config, chosen.get("pixel_limits") or "folder")
    side = RESOLUTIONS.get(chosen.get("resolution") or "native")
    size = smart_resize(
        side or width,
        side or height,
        config.vision.unit_pixels,
        chosen.get("min_pixels") or least,
        chosen.get("max_pixels") or most,
    )
    if isinstance(size, str):
        raise UserError(f"an image of {width} x {height} pixels: {size}")
    units = size[0] * size[1] // config.vision.unit_pixels**2
    return units, units


def limits_of(config: QwenVLConfig, name: str) -> tuple[int, int]:
    """Fewest and most pixels of an image under the option `pixel_limits`."""
    if name not in LIMITS:
        return config.images.min_pixels, config.images.max_pixels
    fewest, most = LIMITS[name]
    return fewest * config.vision.unit_pixels**2, most * config.vision.unit_pixels**2


class QwenVLProcessor(PlaceholderProcessor):
    """Tokens, patches and positions; thread-safe."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        config: QwenVLConfig,
        *,
        max_len: int | None = None,
        resolution: str = "native",
        pixel_limits: str = "folder",
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
          pixel_limits: `folder`, or a name in `LIMITS`.
          min_pixels: None for what `pixel_limits` says.
          max_pixels: likewise.
          image_positions: see `positions.py`.
          image_markers: `bare` or `wrapped`.
          transparency: `white` or `drop`.

        Raises:
          UserError: listing every setting that cannot be used.
        """
        fewest, largest = limits_of(config, pixel_limits)
        least = fewest if min_pixels is None else min_pixels
        most = largest if max_pixels is None else max_pixels
        self._words = {
            "resolution": resolution,
            "pixel_limits": pixel_limits,
            "image_positions": image_positions,
            "image_markers": image_markers,
            "transparency": transparency,
        }
        numbers = {"max_len": max_len, "min_pixels": least, "max_pixels": most}
        problems = setting_problems(self._words, numbers, tokenizer)
        unit = config.vision.unit_pixels
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
        marker = placeholder = tokens["image"] or ""
        if image_markers == "wrapped":
            marker = f"{tokens['vision start']}{placeholder}{tokens['vision end']}"
        super().__init__(
            tokenizer,
            visual_layout(config),
            max_len,
            placeholder=placeholder,
            token_id=config.image_token_id,
            marker=marker,
        )
        self._config, self._least, self._most = config, least, most
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

    def _image_size(self, image: ImageLike) -> tuple[int, int]:
        units = self._grid(image)[1].units
        return units, units

    def _positions(
        self, tokens: np.ndarray, ids: list[int], starts: list[int], grids: list[Grid]
    ) -> np.ndarray:
        places = [n for n, token in enumerate(ids) if token == self._image_token]
        start = self._config.vision_start_token_id
        wrapped = [n > 0 and ids[n - 1] == start for n in places]
        images = list(zip(starts, grids, strict=True))
        return positions(len(tokens), images, self._words["image_positions"], wrapped)

    def _grid(self, image: ImageLike) -> tuple[tuple[int, int], Grid]:
        """Pixels (width, height) and units of an image."""
        side = RESOLUTIONS.get(self._words["resolution"])
        width, height = image_size(image)
        unit = self._config.vision.unit_pixels
        size = smart_resize(side or width, side or height, unit, self._least, self._most)
        if isinstance(size, str):
            raise ImageError(f"{describe_image(image)}: {width} x {height} pixels: {size}")
        return size, Grid(size[1] // unit, size[0] // unit)

    def _image(self, image: ImageLike) -> ImageParts:
        """An image's arrays, and for its tokens, row by row, which unit each reads."""
        vision = self._config.vision
        size, grid = self._grid(image)
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
        return ImageParts(visual, rows, grid)


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
