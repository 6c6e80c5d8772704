# SPDX-License-Identifier: Apache-2.0
"""Any resolution on the host: into which tiles an image is cut, and which features are its tokens.

Behaviour: `LlavaNextImageProcessorPil` of transformers 5 and `LlavaNextModel.pack_image_features`.
An image becomes a base view (squashed to one tile) and the tiles of its canvas: the pinpoint that
keeps most of it, the image scaled to fit, black around it. The features of the tiles' canvas are
unpadded, every row closed by a newline. Here that is an index; sizes alone decide it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from PIL import Image

NEWLINE = 0
SHARED_FEATURES = 1
"""Rows of the visual feature table before the tiles': the newline."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one image is scaled, padded and cut.

    Attributes:
      tile: side of a tile in pixels.
      rows, columns: tiles of the canvas.
      scaled: (height, width) of the image on the canvas.
      original: (height, width) of the image.
    """

    tile: int
    rows: int
    columns: int
    scaled: tuple[int, int]
    original: tuple[int, int]

    @property
    def units(self) -> int:
        """Visual units: the base view and every tile."""
        return 1 + self.rows * self.columns

    def unpadded(self, side: int) -> tuple[int, int, int, int]:
        """Rows and columns of features that are kept: top, bottom, left, right.

        Worked out from the original's shape, as HF does (`unpad_image`), not from the pixels
        that were padded: the two may differ by a row.
        """
        height, width = self.original
        high, wide = self.rows * side, self.columns * side
        if width / height > wide / high:
            new = int(round(height * (wide / width), 7))
            cut = (high - new) // 2
            return cut, high - cut, 0, wide
        new = int(round(width * (high / height), 7))
        cut = (wide - new) // 2
        return 0, high, cut, wide - cut

    def tokens(self, side: int) -> int:
        """Image tokens, where a tile has `side * side` features."""
        top, bottom, left, right = self.unpadded(side)
        return side * side + (bottom - top) * (right - left + 1)


def tiling(width: int, height: int, pinpoints: tuple[tuple[int, int], ...], tile: int) -> Tiling:
    """Work out the tiles of an image from its size.

    Args:
      width: of the image in pixels.
      height: of the image.
      pinpoints: (height, width) of the canvases to choose from.
      tile: side of a tile.
    """
    best, most, least_waste = pinpoints[0], 0, math.inf
    for high, wide in pinpoints:
        scale = min(wide / width, high / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = high * wide - effective
        if effective > most or (effective == most and waste < least_waste):
            best, most, least_waste = (high, wide), effective, waste
    high, wide = best
    across, down = wide / width, high / height
    if across < down:
        scaled = (min(math.ceil(height * across), high), wide)
    else:
        scaled = (high, min(math.ceil(width * down), wide))
    return Tiling(tile, high // tile, wide // tile, scaled, (height, width))


def cut_tiles(image: Image.Image, cut: Tiling) -> np.ndarray:
    """The base view and the tiles row by row.

    Args:
      image: mode RGB, of the size that `cut` was made for.
      cut: from `tiling`.

    Returns:
      u8 [units, tile, tile, 3].
    """
    tile, (height, width) = cut.tile, cut.scaled
    tiles = np.empty((cut.units, tile, tile, 3), np.uint8)
    tiles[0] = np.asarray(image.resize((tile, tile), Image.Resampling.BICUBIC))
    canvas = np.zeros((cut.rows * tile, cut.columns * tile, 3), np.uint8)
    # An odd pixel of padding goes below or to the right.
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas[top : top + height, left : left + width] = np.asarray(scaled)
    grid = canvas.reshape(cut.rows, tile, cut.columns, tile, 3).swapaxes(1, 2)
    tiles[1:] = grid.reshape(-1, tile, tile, 3)
    return tiles


def feature_index(cut: Tiling, side: int) -> np.ndarray:
    """Which row of the visual feature table stands at each of an image's tokens.

    Args:
      cut: from `tiling`.
      side: features along a tile.

    Returns:
      i32 [tokens], read-only, units counted from the image's base view as 0:
      `SHARED_FEATURES + unit * side**2 + cell`; `NEWLINE` behind every row of the canvas.
    """
    return _feature_index(cut.rows, cut.columns, cut.unpadded(side), side)


@functools.lru_cache(maxsize=256)
def _feature_index(
    rows: int, columns: int, kept: tuple[int, int, int, int], side: int
) -> np.ndarray:
    cells = np.arange(side * side, dtype=np.int32) + SHARED_FEATURES
    units = 1 + np.arange(rows * columns, dtype=np.int32).reshape(rows, 1, columns, 1)
    grid = units * (side * side) + cells.reshape(1, side, 1, side)
    top, bottom, left, right = kept
    grid = grid.reshape(rows * side, columns * side)[top:bottom, left:right]
    newline = np.full((len(grid), 1), NEWLINE, np.int32)
    index = np.concatenate([cells, np.concatenate([grid, newline], axis=1).reshape(-1)])
    index.setflags(write=False)
    return index


def pixel_values(
    tiles: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """Transformers' `pixel_values` of tiles [..., 3], f32 [units, 3, tile, tile], bit by bit.

    The device normalises by itself; this is for comparisons.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
    table = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.stack([table[:, c][tiles[..., c]] for c in range(3)], axis=1)
