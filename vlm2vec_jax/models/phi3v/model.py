# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision as an embedding model: packed rows in, one unit vector per sequence out.

Axis legend: R rows, T tokens, S sequences of a row, D model width, V vocabulary, C crops.
"""

from __future__ import annotations

import jax
from flax import nnx

from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.phi3v.decoder import Decoder, RopeTable
from vlm2vec_jax.models.phi3v.vision import Vision
from vlm2vec_jax.models.shared.parts import Embedding, put_features
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import l2_normalize
from vlm2vec_jax.packing import PackedBatch


class Phi3V(nnx.Module):
    """The whole checkpoint. `lm_head` never runs; it is kept so that nothing gets lost."""

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(
            config.vocab_size, config.hidden_size, pad=config.pad_token_id, rngs=rngs
        )
        self.vision = Vision(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self,
        batch: PackedBatch,
        compute: Compute,
        *,
        key: jax.Array | None = None,
        rope_table: RopeTable = "auto",
    ) -> jax.Array:
        """Embed every sequence of a packed batch.

        Args:
          batch: arrays of `PackedBatch`; without crops the vision tower does not run.
          compute: how to compute.
          key: dropout key of adapters, or None.
          rope_table: `auto`, or a table forced on all (goldens whose batch decided).

        Returns:
          float32 [R, S, D], unit length; meaningless where `batch.slot` is -1.
        """
        return l2_normalize(self.pooled(batch, compute, key=key, rope_table=rope_table))

    def pooled(
        self, batch, compute: Compute, *, key=None, rope_table: RopeTable = "auto"
    ) -> jax.Array:
        """Post-norm hidden state [R, S, D] of each sequence's last token, not normalised."""
        vision_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        x = self.input_embeddings(batch, compute, key=vision_key)
        places = self.decoder.places(batch, rope_table)
        return self.decoder(x, places, batch.pool_index, compute, decoder_key)

    def input_embeddings(self, batch, compute: Compute, *, key=None) -> jax.Array:
        """[R, T, D]: token vectors with the visual features gathered into their places."""
        x = self.embed(batch.tokens).astype(compute.dtype)
        if not batch.visual:
            return x
        table = self.vision.table(batch.visual, compute, key)
        return put_features(x, table, batch.feature_index)
