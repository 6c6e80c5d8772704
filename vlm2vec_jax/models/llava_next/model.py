# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT as an embedding model: packed rows in, one unit vector per sequence out.

Axis legend: R rows, T tokens, S sequences of a row, D model width, V vocabulary, C tiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.models.llava_next.config import LlavaNextConfig
from vlm2vec_jax.models.llava_next.vision import Vision
from vlm2vec_jax.models.shared import clip, decoder, parts
from vlm2vec_jax.models.shared.decoder import Decoder, Places, places_of
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import l2_normalize
from vlm2vec_jax.nn.rope import cos_sin, inverse_frequencies
from vlm2vec_jax.packing import PackedBatch

RULES: list[tuple[str, P]] = [
    *parts.RULES,
    *decoder.RULES,
    *clip.RULES,
    (r"vision/newline", P()),
]
"""Rules for the tree of this model, for `vlm2vec_jax.parallel.sharding`."""


class LlavaNext(nnx.Module):
    """The whole checkpoint. An untied `lm_head` never runs; it is kept so that nothing is lost."""

    def __init__(self, config: LlavaNextConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.text.hidden_size
        self.embed = parts.Embedding(config.vocab_size, width, pad=config.pad_token_id, rngs=rngs)
        self.vision = Vision(config, rngs=rngs)
        self.decoder = Decoder(config.text, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(width, config.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self, batch: PackedBatch, compute: Compute, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed every sequence of a packed batch.

        Args:
          batch: arrays of `PackedBatch`; without tiles the vision tower does not run.
          compute: how to compute.
          key: dropout key of adapters, or None.

        Returns:
          float32 [R, S, D], unit length; meaningless where `batch.slot` is -1.
        """
        return l2_normalize(self.pooled(batch, compute, key=key))

    def pooled(self, batch, compute: Compute, *, key=None) -> jax.Array:
        """Post-norm hidden state [R, S, D] of each sequence's last token, not normalised."""
        vision_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        x = self.input_embeddings(batch, compute, key=vision_key)
        return self.decoder(x, self.places(batch), batch.pool_index, compute, decoder_key)

    def input_embeddings(self, batch, compute: Compute, *, key=None) -> jax.Array:
        """[R, T, D]: token vectors with the visual features gathered into their places."""
        x = self.embed(batch.tokens).astype(compute.dtype)
        if not batch.visual:
            return x
        table = self.vision.table(batch.visual, compute, key)
        return parts.put_features(x, table, batch.feature_index)

    def places(self, batch) -> Places:
        """Rotary angles and segments of a `PackedBatch`."""
        head = self.config.text.head_size
        ones = (1.0,) * (head // 2)
        frequencies = jnp.asarray(inverse_frequencies(head, self.config.rope_theta, ones))
        return places_of(batch, *cos_sin(batch.positions, frequencies, 1.0))
