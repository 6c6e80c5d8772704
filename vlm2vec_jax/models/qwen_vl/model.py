# SPDX-License-Identifier: Apache-2.0
"""A model of the Qwen-VL family: packed rows in, one unit vector per sequence out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.qwen_vl.text import Decoder
from vlm2vec_jax.models.qwen_vl.vision import Vision
from vlm2vec_jax.models.shared.parts import Embedding, put_features
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import l2_normalize
from vlm2vec_jax.packing import PackedBatch


class QwenVL(nnx.Module):
    """The whole checkpoint. An untied `lm_head` never runs; it is kept so that nothing is lost."""

    def __init__(self, config: QwenVLConfig, *, rngs: nnx.Rngs):
        self.config = config
        text = config.text
        self.embed = Embedding(text.vocab_size, text.hidden_size, pad=text.pad_token_id, rngs=rngs)
        self.vision = Vision(config, rngs=rngs)
        self.decoder = Decoder(text, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self, batch: PackedBatch, compute: Compute, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed every sequence of a packed batch.

        Args:
          batch: arrays of `PackedBatch`; without patches the vision tower does not run.
          compute: how to compute.
          key: dropout key of adapters, or None.

        Returns:
          float32 [R, S, D], unit length; meaningless where `batch.slot` is -1.
        """
        return l2_normalize(self.pooled(batch, compute, key=key))

    def pooled(self, batch, compute: Compute, *, key=None) -> jax.Array:
        """Post-norm hidden state [R, S, D] of each sequence's last token, not normalised."""
        vision_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        x, deep = self.input_embeddings(batch, compute, key=vision_key)
        places = self.decoder.places(batch)
        return self.decoder(x, places, batch.pool_index, compute, decoder_key, deep)

    def input_embeddings(
        self, batch, compute: Compute, *, key=None
    ) -> tuple[jax.Array, jax.Array | None]:
        """[R, T, D], token vectors with the visual features in their places; and deepstack's.

        The latter are [N, R, T, D], zero where a token is text; None without any.
        """
        x = self.embed(batch.tokens).astype(compute.dtype)
        if not batch.visual:
            return x, None
        features, deep = self.vision(batch.visual, compute, key)
        x = put_features(x, features, batch.feature_index)
        if not deep:
            return x, None
        nothing = jnp.zeros_like(x)
        return x, jnp.stack([put_features(nothing, f, batch.feature_index) for f in deep])
