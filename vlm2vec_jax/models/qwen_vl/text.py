# SPDX-License-Identifier: Apache-2.0
"""The family's text model: the shared decoder with M-RoPE, positions on three axes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm2vec_jax.models.qwen_vl.config import TextConfig
from vlm2vec_jax.models.shared import decoder as shared
from vlm2vec_jax.models.shared.decoder import Places, places_of
from vlm2vec_jax.nn.rope import inverse_frequencies


class Decoder(shared.Decoder):
    """All layers and the final norm (HF: Qwen2VLTextModel without its embedding)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        super().__init__(config.decoder, rngs=rngs)
        self.config = config

    def places(self, batch) -> Places:
        """Rotary angles and segments of a `PackedBatch`."""
        size = self.config.decoder.head_size
        frequencies = inverse_frequencies(size, self.config.rope_theta, (1.0,) * (size // 2))
        # [R, T, H/2]: each frequency turns by the position on its own axis.
        positions = batch.positions[..., frequency_axes(self.config)].astype(jnp.float32)
        angles = positions * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)
        return places_of(batch, jnp.cos(angles), jnp.sin(angles))


def frequency_axes(config: TextConfig) -> np.ndarray:
    """Which position axis each of the H/2 frequencies turns by (0 time, 1 row, 2 column)."""
    if not config.mrope_interleaved:
        return np.repeat(np.arange(3), config.mrope_section)
    axes = np.zeros(config.decoder.head_size // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * config.mrope_section[axis] : 3] = axis
    return axes
