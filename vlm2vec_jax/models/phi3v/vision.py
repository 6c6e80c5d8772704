# SPDX-License-Identifier: Apache-2.0
"""From u8 crops to a row's visual feature table: pixels, CLIP, 2x2 merge, projector.

The host sends what it cut from the resized image; normalisation and the global view are made
here (`global_view.py`; `processor.py` describes `crop_info`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.phi3v.global_view import with_global_views
from vlm2vec_jax.models.shared.clip import Clip
from vlm2vec_jax.models.shared.parts import Projector
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain


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
