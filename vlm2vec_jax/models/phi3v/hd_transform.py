# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision's HD transform on the host: into which crops an image is cut, and the cutting.

Behaviour: the `HD_transform` and `padding_336` functions of microsoft/Phi-3.5-vision-instruct's
image processor, with the crop size a parameter. The host sends 8-bit crops, equal bit by bit to
the reference's before normalisation; it neither normalises nor makes the global view, which the
device does. An image of a single crop is its own global view (a resize to the same size changes
nothing), so it is one unit, which CLIP sees once. The float functions at the end of this file say
in numpy what the device must compute; they are the tests' oracle and no part of the road.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from PIL import Image

from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD

NEWLINE = 0
SEPARATOR = 1
SHARED_FEATURES = 2
"""Rows of the visual feature table before the crops': newline (sub_GN), separator (glb_GN)."""

HD_ORDERS = ("sub_glb", "glb_sub")


@dataclasses.dataclass(frozen=True)
class HDGeometry:
    """How one image is scaled, padded and cut; all sizes in pixels, of the upright image.

    Attributes:
      rows: crops from top to bottom.
      columns: crops from left to right.
      crop: side of a crop.
      transposed: the image is taller than wide, and is scaled lying on its side.
      scaled: (width, height) to scale to, of the image as it lies then.
    """

    rows: int
    columns: int
    crop: int
    transposed: bool
    scaled: tuple[int, int]

    @property
    def units(self) -> int:
        """Visual units: the global view, where it is not the only crop itself, and every crop."""
        return self.views + self.rows * self.columns

    @property
    def views(self) -> int:
        """Units in front of the local crops: 1, or 0 for an image of a single crop."""
        return _views(self.rows, self.columns)

    @property
    def padded(self) -> tuple[int, int]:
        """(width, height) after padding."""
        return self.columns * self.crop, self.rows * self.crop

    def tokens(self, side: int) -> int:
        """Image tokens, when a crop has `side * side` of them after the 2x2 merge."""
        return (1 + self.rows * self.columns) * side * side + 1 + (self.rows + 1) * side


def _views(rows: int, columns: int) -> int:
    return int(rows * columns > 1)


def hd_geometry(width: int, height: int, num_crops: int, crop: int) -> HDGeometry | None:
    """Work out the cut of an image from its size alone.

    The arithmetic is the reference's, in the same floats: the wide side becomes the largest
    number of crops `s` with `s * ceil(s / ratio) <= num_crops`.

    Returns:
      None if the image is so narrow that it would be scaled to a height of 0.
    """
    transposed = width < height
    if transposed:
        width, height = height, width
    ratio = width / height
    across = 1
    while (across + 1) * math.ceil((across + 1) / ratio) <= num_crops:
        across += 1
    new_width = across * crop
    new_height = int(new_width / ratio)
    if new_height < 1:
        return None
    down = -(-new_height // crop)
    rows, columns = (across, down) if transposed else (down, across)
    return HDGeometry(rows, columns, crop, transposed, (new_width, new_height))


def cut_crops(image: Image.Image, geometry: HDGeometry) -> np.ndarray:
    """Scale, pad with white and cut an RGB image.

    Args:
      image: mode RGB, of the size that `geometry` was made for.
      geometry: from `hd_geometry`.

    Returns:
      u8 [units, crop, crop, 3]: zeros where a global view belongs, then the crops row by row.
    """
    # Transposing before and after the resize is not the same bit by bit; this is the reference's
    # order, and Pillow's transpose is twenty times faster than a strided numpy copy.
    if geometry.transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if image.size != geometry.scaled:
        image = image.resize(geometry.scaled, Image.Resampling.BILINEAR)
    if geometry.transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = np.asarray(image)
    width, height = geometry.padded
    if pixels.shape[:2] != (height, width):
        # Only one axis needs padding, and the odd pixel goes behind.
        top = (height - pixels.shape[0]) // 2
        left = (width - pixels.shape[1]) // 2
        canvas = np.full((height, width, 3), 255, np.uint8)
        canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        pixels = canvas
    rows, columns, crop = geometry.rows, geometry.columns, geometry.crop
    crops = np.empty((geometry.units, crop, crop, 3), np.uint8)
    crops[: geometry.views] = 0
    # A view of the crops in the image's order, so that one strided copy does the cutting.
    tiles = crops[geometry.views :].reshape(rows, columns, crop, crop * 3).transpose(0, 2, 1, 3)
    tiles[...] = pixels.reshape(rows, crop, columns, crop * 3)
    return crops


@functools.lru_cache(maxsize=256)
def crop_info(geometry: HDGeometry) -> np.ndarray:
    """Say where each crop belongs, for the device's global view.

    Returns:
      i32 [units, 5], read-only: (rows, row, columns, column, back) of a local crop, where `back` is
      how many units before it its global view stands; zeros for the global view.
    """
    rows, columns, views = geometry.rows, geometry.columns, geometry.views
    info = np.zeros((geometry.units, 5), np.int32)
    number = np.arange(rows * columns)
    info[views:, 0] = rows
    info[views:, 1] = number // columns
    info[views:, 2] = columns
    info[views:, 3] = number % columns
    info[views:, 4] = number + views
    info.setflags(write=False)
    return info


@functools.lru_cache(maxsize=256)
def image_feature_index(
    rows: int, columns: int, side: int, order: str, views: int | None = None
) -> np.ndarray:
    """Which row of the visual feature table stands at each of an image's tokens.

    The HD transform as an index: the local crops' cells as one large grid, each of its rows
    closed by the newline, then the separator, then the global view's grid in the same way
    (`sub_glb`), or the other way round (`glb_sub`).

    Args:
      rows: local crops from top to bottom.
      columns: local crops from left to right.
      side: cells along a crop after the 2x2 merge.
      order: `sub_glb` or `glb_sub`.
      views: units in front of the local crops, by default as `HDGeometry.views`. (The reference
        has 1 always.)

    Returns:
      i32 [(rows * columns + 1) * side**2 + 1 + (rows + 1) * side], read-only, units counted from
      the image's global view as 0: `SHARED_FEATURES + unit * side**2 + cell`. A single crop is
      unit 0 both times.
    """
    cells = np.arange(side * side, dtype=np.int32).reshape(side, side) + SHARED_FEATURES
    units = np.arange(rows * columns, dtype=np.int32).reshape(rows, 1, columns, 1)
    units = units + np.int32(_views(rows, columns) if views is None else views)
    local = units * (side * side) + cells[None, :, None, :]
    local = _close_rows(local.reshape(rows * side, columns * side))
    whole = _close_rows(cells)
    separator = np.array([SEPARATOR], np.int32)
    parts = (local, separator, whole) if order == "sub_glb" else (whole, separator, local)
    index = np.concatenate(parts)
    index.setflags(write=False)
    return index


def _close_rows(grid: np.ndarray) -> np.ndarray:
    newline = np.full((len(grid), 1), NEWLINE, np.int32)
    return np.concatenate([grid, newline], axis=1).reshape(-1)


# ---- What the device computes, in numpy: the tests' oracle.


def normalise(
    pixels: np.ndarray, mean: tuple[float, ...] = IMAGE_MEAN, std: tuple[float, ...] = IMAGE_STD
) -> np.ndarray:
    """Normalise u8 pixels [..., 3] to f32, `(v / 255 - mean) / std`, in the reference's steps."""
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.stack([table[:, c][pixels[..., c]] for c in range(3)], axis=-1)


def bicubic_matrix(size_in: int, size_out: int, a: float = -0.75) -> np.ndarray:
    """Resize one axis by torch's bicubic rule, as a matrix f64 [size_out, size_in].

    Cubic convolution over four taps with half-pixel centres and no antialiasing; taps beyond the
    border fall on the border pixel (torch: `interpolate(mode="bicubic", align_corners=False)`).
    Every row sums to 1.
    """
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    left = np.floor(centre).astype(int)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        x = np.abs(centre - (left + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        column = np.clip(left + tap, 0, size_in - 1)
        # Two clamped taps may share a column, so they are added one tap at a time.
        matrix[np.arange(size_out), column] += np.where(x <= 1, near, far)
    return matrix


def assemble_image(crops: np.ndarray, info: np.ndarray) -> np.ndarray:
    """Put one image's local crops together again.

    Args:
      crops: [units, crop, crop, 3]; a global view in front is ignored.
      info: its `crop_info`.

    Returns:
      [rows * crop, columns * crop, 3]: the scaled and padded image.
    """
    rows, columns = int(info[-1, 0]), int(info[-1, 2])
    crop = crops.shape[1]
    tiles = crops[len(crops) - rows * columns :].reshape(rows, columns, crop, crop, 3)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * crop, columns * crop, 3)


def global_view_numpy(
    crops: np.ndarray,
    info: np.ndarray,
    mean: tuple[float, ...] = IMAGE_MEAN,
    std: tuple[float, ...] = IMAGE_STD,
) -> np.ndarray:
    """One image's global view, f32 [crop, crop, 3]: its normalised, padded image made small.

    Args:
      crops: u8 [units, crop, crop, 3] of one image.
      info: its `crop_info`.
      mean: of each channel.
      std: of each channel.
    """
    image = normalise(assemble_image(crops, info), mean, std)
    crop = crops.shape[1]
    height = bicubic_matrix(image.shape[0], crop).astype(np.float32)
    width = bicubic_matrix(image.shape[1], crop).astype(np.float32)
    rows = np.tensordot(height, image, axes=(1, 0))
    return np.tensordot(rows, width, axes=(1, 1)).transpose(0, 2, 1)
