# SPDX-License-Identifier: Apache-2.0
"""The Phi-3 decoder: the shared one with a rope table chosen by each sequence's length."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.shared import decoder as shared
from vlm2vec_jax.models.shared.decoder import Places, places_of
from vlm2vec_jax.nn.rope import cos_sin, inverse_frequencies

RopeTable = Literal["auto", "short", "long"]
"""`auto` chooses by each sequence's own length; the others force a table (tests of goldens)."""


class Decoder(shared.Decoder):
    """All layers and the final norm (HF: Phi3Model without its embedding)."""

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
        super().__init__(config.decoder, rngs=rngs)
        self.config = config

    def places(self, batch, rope_table: RopeTable = "auto") -> Places:
        """Rotary angles and segments of a `PackedBatch`.

        The rope table follows each sequence's own length, not the longest of the batch as in
        the reference: an embedding must not depend on its neighbours.
        """
        config, rope = self.config, self.config.rope
        short = inverse_frequencies(config.head_size, rope.theta, rope.short_factor)
        long = inverse_frequencies(config.head_size, rope.theta, rope.long_factor)
        if rope_table == "auto":
            last = jnp.take_along_axis(batch.positions, batch.pool_index, 1)
            lengths = jnp.where(batch.slot >= 0, last + 1, 0)
            owner = jnp.maximum(batch.segment_ids - 1, 0)
            is_long = jnp.take_along_axis(lengths, owner, 1) > rope.original_max_position_embeddings
            frequencies = jnp.where(is_long[..., None], long, short)
        else:
            frequencies = jnp.asarray(long if rope_table == "long" else short)
        cos, sin = cos_sin(batch.positions, frequencies, rope.attention_scale)
        return places_of(batch, cos, sin)
