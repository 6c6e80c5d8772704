# SPDX-License-Identifier: Apache-2.0
"""From u8 tiles to a row's visual feature table: pixels, CLIP, projector, newline."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.models.llava_next.config import LlavaNextConfig
from vlm2vec_jax.models.shared.clip import Clip
from vlm2vec_jax.models.shared.parts import Projector
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain


class Vision(nnx.Module):
    """CLIP tower, projector and newline (HF: LlavaNextModel without its decoder)."""

    def __init__(self, config: LlavaNextConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.text.hidden_size
        self.clip = Clip(config.clip, used=config.clip_layers_used, rngs=rngs)
        self.projector = Projector(
            config.clip.hidden_size, width, bias=config.projector_bias, rngs=rngs
        )
        self.newline = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width,)))

    def table(self, visual, compute: Compute, key=None) -> jax.Array:
        """The projected visual feature table [R, 1 + C * P, D] of each row.

        Args:
          visual: `tiles` u8 [R, C, side, side, 3].
          compute: how to compute.
          key: dropout key of adapters, or None.
        """
        clip_key, projector_key = (None, None) if key is None else jax.random.split(key)
        tiles = visual["tiles"]
        rows = tiles.shape[0]
        pixels = self.pixels(tiles).astype(compute.dtype)
        features = self.clip(pixels.reshape(-1, *tiles.shape[2:]), compute, clip_key)
        features = constrain(features.reshape(rows, -1, features.shape[-1]), ROWS)
        features = self.projector(features, projector_key)
        newline = self.newline[...].astype(features.dtype)
        newline = jnp.broadcast_to(newline, (rows, 1, newline.shape[0]))
        return constrain(jnp.concatenate([newline, features], axis=1), ROWS)

    def pixels(self, tiles: jax.Array) -> jax.Array:
        """Normalised pixels, float32, of u8 tiles [..., 3]."""
        mean = jnp.asarray(self.config.image_mean, jnp.float32)
        std = jnp.asarray(self.config.image_std, jnp.float32)
        return (tiles.astype(jnp.float32) / 255.0 - mean) / std
