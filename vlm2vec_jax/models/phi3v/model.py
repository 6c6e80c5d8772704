# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision: the shared model with the HD transform's table and a choice of rope tables."""

from __future__ import annotations

from flax import nnx

from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.phi3v.decoder import Decoder, RopeTable
from vlm2vec_jax.models.phi3v.vision import Vision
from vlm2vec_jax.models.shared.decoder import Places
from vlm2vec_jax.models.shared.model import EmbeddingModel


class Phi3V(EmbeddingModel):
    """The whole checkpoint."""

    decoder: Decoder

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config,
            vocab_size=config.vocab_size,
            width=config.hidden_size,
            pad=config.pad_token_id,
            tied=False,
            vision=lambda rngs: Vision(config, rngs=rngs),
            decoder=lambda rngs: Decoder(config, rngs=rngs),
            rngs=rngs,
        )

    def features(self, visual, compute, key):
        """See `EmbeddingModel`: newline and separator, then the crops' features."""
        return self.vision.table(visual, compute, key), []

    def places(self, batch, rope_table: RopeTable = "auto") -> Places:
        """Rotary angles and segments; `rope_table` forces one on all (tests of goldens)."""
        return self.decoder.places(batch, rope_table)
