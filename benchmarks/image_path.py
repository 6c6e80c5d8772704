# SPDX-License-Identifier: Apache-2.0
"""The reference's image path, written in numpy and Pillow: the baseline of three benchmarks.

What the image processor of microsoft/Phi-3.5-vision-instruct does to an image, step by step and
with the same copies, but none of its code: scale and pad, all pixels to normalised float32, the
global view by a bicubic resize of these, local crops cut, everything in one array, zeros up to
`num_crops + 1` crops. `photograph` draws what goes in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from vlm2vec_jax.models.phi3v.hd_transform import HDGeometry, hd_geometry
from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD

CROP = 336
_MEAN = np.asarray(IMAGE_MEAN, np.float32)[:, None, None]
_STD = np.asarray(IMAGE_STD, np.float32)[:, None, None]


@dataclasses.dataclass(frozen=True)
class Processed:
    """An image as the reference hands it to its model.

    Attributes:
      pixels: f32 [num_crops + 1, 3, crop, crop], the global view first, zeros behind the last crop.
      count: crops that are real, the global view included.
      tokens: image tokens.
    """

    pixels: np.ndarray
    count: int
    tokens: int


def process(image: Image.Image, num_crops: int, crop: int = CROP) -> Processed:
    """The reference's whole path for an RGB image; `crop` is 336 there."""
    geometry = hd_geometry(*image.size, num_crops, crop)
    assert geometry is not None
    scaled = _scaled_and_padded(image, geometry)
    pixels = np.asarray(scaled).transpose(2, 0, 1).astype(np.float32)  # ToTensor
    pixels = np.ascontiguousarray(pixels) / np.float32(255)
    pixels -= _MEAN
    pixels /= _STD
    rows, columns = geometry.rows, geometry.columns
    view = bicubic(pixels, crop)
    crops = pixels.reshape(3, rows, crop, columns, crop).transpose(1, 3, 0, 2, 4)
    crops = np.ascontiguousarray(crops).reshape(rows * columns, 3, crop, crop)
    joined = np.concatenate([view[None], crops])
    padding = np.zeros((num_crops + 1 - len(joined), 3, crop, crop), np.float32)
    padded = np.concatenate([joined, padding]) if len(padding) else joined
    return Processed(padded, len(joined), geometry.tokens(crop // 28))


def _scaled_and_padded(image: Image.Image, geometry: HDGeometry) -> Image.Image:
    if geometry.transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    image = image.resize(geometry.scaled, Image.Resampling.BILINEAR)
    width, height = image.size
    target = -(-height // geometry.crop) * geometry.crop
    canvas = Image.new("RGB", (width, target), (255, 255, 255))
    canvas.paste(image, (0, (target - height) // 2))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if geometry.transposed else canvas


def bicubic(pixels: np.ndarray, size: int, a: float = -0.75) -> np.ndarray:
    """Resize f32 [3, H, W] to a square by four taps each way, without antialiasing."""

    def taps(length: int) -> tuple[np.ndarray, np.ndarray]:
        centre = (np.arange(size) + 0.5) * (length / size) - 0.5
        left = np.floor(centre).astype(int)
        offsets = np.arange(-1, 3)
        x = np.abs((centre - left)[:, None] - offsets)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        index = np.clip(left[:, None] + offsets, 0, length - 1)
        return index, np.where(x <= 1, near, far).astype(np.float32)

    index, weight = taps(pixels.shape[1])
    rows = sum(pixels[:, index[:, k]] * weight[:, k, None] for k in range(4))
    index, weight = taps(pixels.shape[2])
    found: Any = sum(rows[:, :, index[:, k]] * weight[:, k] for k in range(4))
    return found


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth made-up photograph with some detail, so that it compresses like one."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(height // 24, 2), max(width // 24, 2), 3), np.uint8)
    base = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-6, 7, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(base).astype(int) + noise, 0, 255).astype(np.uint8))
