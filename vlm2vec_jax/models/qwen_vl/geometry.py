# SPDX-License-Identifier: Apache-2.0
"""Sizes and patches of the Qwen-VL family's images. Numpy and Pillow only.

Behaviour: `smart_resize` and `Qwen2VLImageProcessorPil` of transformers 5 (those of 4.x give the
same numbers). An image becomes units, squares of m x m patches, one feature each.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

MOST_ASPECT = 200
"""Images of a larger ratio of their sides are refused, as transformers does."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """An image in units: its rows and columns."""

    rows: int
    columns: int

    @property
    def units(self) -> int:
        """How many units, which is how many tokens."""
        return self.rows * self.columns


def smart_resize(
    width: int, height: int, unit: int, min_pixels: int, max_pixels: int
) -> tuple[int, int] | str:
    """The size in pixels, multiples of `unit`, that an image is resized to.

    Args:
      width: of the image.
      height: of the image.
      unit: side of a unit in pixels.
      min_pixels: fewest pixels wanted.
      max_pixels: most pixels allowed.

    Returns:
      (width, height), or in words why the image cannot be used.
    """
    if max(height, width) > MOST_ASPECT * min(height, width):
        return (
            f"the longer side is more than {MOST_ASPECT} times the shorter, which the model "
            f"refuses; crop or pad the image"
        )
    # Python rounds halves to even, as transformers does here.
    new_height, new_width = round(height / unit) * unit, round(width / unit) * unit
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(unit, math.floor(height / shrink / unit) * unit)
        new_width = max(unit, math.floor(width / shrink / unit) * unit)
        if new_height * new_width > max_pixels:
            return (
                f"at least {new_width} x {new_height} pixels are needed to keep its shape, and "
                f"max_pixels={max_pixels} allows fewer; crop the image or raise max_pixels"
            )
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / unit) * unit
        new_width = math.ceil(width * grow / unit) * unit
    return new_width, new_height


def cut_patches(image: Image.Image, size: tuple[int, int], patch: int, merge: int) -> np.ndarray:
    """Resize and cut.

    Args:
      image: RGB.
      size: (width, height), multiples of patch * merge.
      patch: side of a patch in pixels.
      merge: m.

    Returns:
      u8 [units, m^2, patch * patch * 3]: units row by row, in each its patches row by row, in
      each its pixels row by row, channels last.
    """
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    width, height = size
    side = patch * merge
    x = np.asarray(image)
    x = x.reshape(height // side, merge, patch, width // side, merge, patch, 3)
    x = x.transpose(0, 3, 1, 4, 2, 5, 6)
    return np.ascontiguousarray(x).reshape(-1, merge * merge, patch * patch * 3)


def pixel_table(mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """Normalised value of every byte in every channel, f32 [256, 3], bit by bit transformers'."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def grid_info(grid: Grid) -> np.ndarray:
    """i32 [units, 5]: place in the image, row, column, rows, columns, all in units."""
    place = np.arange(grid.units, dtype=np.int32)
    info = np.empty((grid.units, 5), np.int32)
    info[:, 0] = place
    info[:, 1], info[:, 2] = np.divmod(place, grid.columns)
    info[:, 3:] = grid.rows, grid.columns
    return info


def window_order(grid: Grid, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Order the units of an image window by window, as Qwen2.5-VL's tower looks at them.

    Windows at the right and bottom edges are smaller.

    Args:
      grid: the image in units.
      side: units along a side of a window.

    Returns:
      `order` i64 [units], which unit comes at each place, and `place` i32 [units], the place of
      the unit that comes there inside its window.
    """
    rows, columns = np.divmod(np.arange(grid.units), grid.columns)
    across = -(-grid.columns // side)
    window = rows // side * across + columns // side
    order = np.argsort(window, kind="stable")
    window = window[order]
    first = np.r_[True, window[1:] != window[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(grid.units), 0))
    return order, (np.arange(grid.units) - start).astype(np.int32)
