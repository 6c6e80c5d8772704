# SPDX-License-Identifier: Apache-2.0
"""Normalisation and every image's global view, on the device.

The reference resizes the normalised, padded image of rows x columns crops to one crop by torch's
bicubic interpolation without antialiasing (cubic convolution with a = -0.75, half-pixel centres,
taps clamped to the border: upsample_bicubic2d, align_corners=False). That is linear and separable,
and the factor is a whole number. Accelerators take two products with each crop; a CPU, where
these would cost as much as a small vision tower, reads the taps of each global view instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD
from vlm2vec_jax.nn.exact import on_one_cpu

_EXACT = jax.lax.Precision.HIGHEST
_TAPS = 4


def with_global_views(crops: jax.Array, crop_info: jax.Array) -> jax.Array:
    """Normalise crops and fill in every image's global view, float32 [R, C, side, side, 3].

    Args:
      crops: u8 [R, C, side, side, 3], an image's crops row by row behind its global view.
      crop_info: i32 [R, C, 5], see `hd_transform.crop_info`.
    """
    if crops.shape[1] < 3:  # a view and two crops are the least of an image with a view of its own
        return _normalise(crops.astype(jnp.float32))
    if on_one_cpu():
        return by_taps(crops, crop_info)
    return by_products(crops, crop_info)


def by_taps(crops: jax.Array, crop_info: jax.Array) -> jax.Array:
    """`with_global_views` unit by unit: a global view reads at most 16 pixels for one of its own.

    An odd factor leaves one tap of weight 1, an even one four that are the same everywhere.
    """
    rows, count, side = crops.shape[:3]
    units = jnp.asarray(crops).reshape(rows * count, side, side, 3)
    crop_info = jnp.asarray(crop_info)
    info = crop_info.reshape(-1, 5)
    # What stands behind a unit; behind the last one of a row, nothing.
    behind = jnp.pad(crop_info[:, 1:], [(0, 0), (0, 1), (0, 0)]).reshape(-1, 5)

    def view(number, parts):
        pixels = units.reshape(-1, 3)
        row, row_weights = _taps(parts[0], side)
        column, column_weights = _taps(parts[2], side)
        total = jnp.zeros((side, side, 3), jnp.float32)
        for i in range(_TAPS):
            line = jnp.zeros((side, side, 3), jnp.float32)
            for j in range(_TAPS):
                # Crops lie row by row behind their global view.
                unit = number + 1 + (row[i] // side)[:, None] * parts[2] + column[j] // side
                place = (unit * side + (row[i] % side)[:, None]) * side + column[j] % side
                line = line + column_weights[j] * pixels[place].astype(jnp.float32)
            total = total + row_weights[i] * line
        return _normalise(total)

    def local(number, parts):
        return _normalise(units[number].astype(jnp.float32))

    def nothing(number, parts):
        return jnp.zeros((side, side, 3), jnp.float32)

    def unit(operands):
        number, own, parts = operands
        kind = jnp.where(own[0] > 0, 0, jnp.where(parts[4] == 1, 1, 2))
        return jax.lax.switch(kind, (local, view, nothing), number, parts)

    pixels = jax.lax.map(unit, (jnp.arange(rows * count), info, behind))
    return pixels.reshape(crops.shape)


def _taps(parts: jax.Array, side: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Pixels [side] of an axis of `parts * side` that each pixel of `side` reads, and weights."""
    first = ((2 * jnp.arange(side) + 1) * parts - 1) // 2 - 1
    half = (parts % 2 == 0) * jnp.float32(0.5)
    weights = [_outer(half + 1), _inner(half), _inner(1 - half), _outer(2 - half)]
    return [jnp.clip(first + tap, 0, parts * side - 1) for tap in range(_TAPS)], weights


def _normalise(pixels: jax.Array) -> jax.Array:
    mean, std = jnp.asarray(IMAGE_MEAN, jnp.float32), jnp.asarray(IMAGE_STD, jnp.float32)
    return (pixels / 255.0 - mean) / std


def by_products(crops: jax.Array, crop_info: jax.Array) -> jax.Array:
    """`with_global_views` by products: every local crop adds its own share, A crop B^T."""
    pixels = _normalise(crops.astype(jnp.float32))
    side, count = crops.shape[2], crops.shape[1]
    down = bicubic_shares(crop_info[..., 0], crop_info[..., 1], side)
    across = bicubic_shares(crop_info[..., 2], crop_info[..., 3], side)
    shares = jnp.einsum("rcop,rcpqd->rcoqd", down, pixels, precision=_EXACT)
    shares = jnp.einsum("rcnq,rcoqd->rcond", across, shares, precision=_EXACT)
    # owner[r, t, c]: crop c belongs to the global view at t.
    place = jnp.arange(count)
    is_local = crop_info[..., 0] > 0
    owner = (place - crop_info[..., 4])[:, None, :] == place[None, :, None]
    owner = (owner & is_local[:, None, :]).astype(jnp.float32)
    views = jnp.einsum("rtc,rcond->rtond", owner, shares, precision=_EXACT)
    return jnp.where(is_local[..., None, None, None], pixels, views)


def bicubic_shares(parts: jax.Array, part: jax.Array, side: int) -> jax.Array:
    """What each input pixel of one part gives to each output pixel, f32 [..., side, side].

    An axis of `parts * side` pixels shrinks to `side`; the columns are the pixels of part
    number `part`. Cubic convolution with a = -0.75, half-pixel centres, taps clamped to the
    border (torch: upsample_bicubic2d, align_corners=False). All zero where parts is 0.
    """
    parts = parts[..., None].astype(jnp.float32)
    source = (jnp.arange(side, dtype=jnp.float32) + 0.5) * parts - 0.5
    first = jnp.floor(source)
    t = source - first
    weights = (_outer(t + 1), _inner(t), _inner(1 - t), _outer(2 - t))
    start = part[..., None] * side
    columns = jnp.arange(side)
    total = jnp.zeros((*source.shape, side), jnp.float32)
    for tap, weight in enumerate(weights):
        pixel = jnp.clip(first - 1 + tap, 0, parts * side - 1).astype(jnp.int32) - start
        total = total + jnp.where(pixel[..., None] == columns, weight[..., None], 0.0)
    return jnp.where(parts[..., None] > 0, total, 0.0)


def _inner(x: jax.Array, a: float = -0.75) -> jax.Array:
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _outer(x: jax.Array, a: float = -0.75) -> jax.Array:
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
