# SPDX-License-Identifier: Apache-2.0
"""From u8 crops to a row's visual feature table: pixels, CLIP, 2x2 merge, projector.

The host sends what it cut from the resized image; normalisation and the global view are made
here, where they cost two small products (`processor.py` describes `crop_info`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.shared.clip import Clip
from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD
from vlm2vec_jax.models.shared.parts import Projector
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain

_EXACT = jax.lax.Precision.HIGHEST


class Vision(nnx.Module):
    """CLIP tower, separators and projector (HF: Phi3ImageEmbedding without the loop)."""

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
        merged = 4 * config.clip.hidden_size
        self.clip = Clip(config.clip, used=config.clip_layers_used, rngs=rngs)
        self.newline = nnx.Param(0.02 * jax.random.normal(rngs.params(), (merged,)))
        self.separator = nnx.Param(0.02 * jax.random.normal(rngs.params(), (merged,)))
        self.projector = Projector(merged, config.hidden_size, rngs=rngs)

    def table(self, visual, compute: Compute, key=None) -> jax.Array:
        """The projected visual feature table [R, 2 + C * M * M, D] of each row.

        Args:
          visual: `crops` u8 [R, C, side, side, 3] (zeros for a global view) and `crop_info` i32
            [R, C, 5], (rows, row, columns, column, back) of each crop; or `pixels` float
            [R, C, side, side, 3], normalised, global views included.
          compute: how to compute.
          key: dropout key of adapters, or None.
        """
        clip_key, projector_key = (None, None) if key is None else jax.random.split(key)
        pixels = normalised(visual).astype(compute.dtype)
        rows, count = pixels.shape[:2]
        features = self.clip(pixels.reshape(-1, *pixels.shape[2:]), compute, clip_key)
        merged = merge_patches(features)
        merged = merged.reshape(rows, count * merged.shape[1], merged.shape[2])
        shared = jnp.stack([self.newline[...], self.separator[...]]).astype(merged.dtype)
        shared = jnp.broadcast_to(shared, (rows, *shared.shape))
        features = constrain(jnp.concatenate([shared, merged], axis=1), ROWS)
        return self.projector(features, projector_key)


def merge_patches(features: jax.Array) -> jax.Array:
    """Join 2x2 neighbours: [C, P, D] to [C, P / 4, 4 D] (HF: reshape_hd_patches_2x2merge)."""
    crops, patches, width = features.shape
    half = int(round(patches**0.5)) // 2
    x = features.reshape(crops, half, 2, half, 2, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(crops, half * half, 4 * width)


def normalised(visual) -> jax.Array:
    """What CLIP sees, float [R, C, side, side, 3]; `visual` as for `Vision.table`."""
    pixels = visual.get("pixels")
    return with_global_views(visual["crops"], visual["crop_info"]) if pixels is None else pixels


def with_global_views(crops: jax.Array, crop_info: jax.Array) -> jax.Array:
    """Normalise crops and fill in every image's global view, float32 [R, C, side, side, 3].

    The reference resizes the normalised, padded image of rows x columns crops to one crop by
    torch's bicubic interpolation without antialiasing. That is linear and separable, so every
    local crop adds its own share, A crop B^T.
    """
    mean, std = jnp.asarray(IMAGE_MEAN, jnp.float32), jnp.asarray(IMAGE_STD, jnp.float32)
    pixels = (crops.astype(jnp.float32) / 255.0 - mean) / std
    side, count = crops.shape[2], crops.shape[1]
    if count < 3:  # a view and two crops are the least of an image that has a view of its own
        return pixels
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
