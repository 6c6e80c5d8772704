# SPDX-License-Identifier: Apache-2.0
"""A vision-language model as an embedding model: packed rows in, one unit vector per sequence out.

Axis legend: R rows, T tokens, S sequences of a row, F rows of a visual feature table, D model
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.models.shared.decoder import Decoder, Places
from vlm2vec_jax.models.shared.parts import Embedding, put_features
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import l2_normalize
from vlm2vec_jax.packing import PackedBatch


class EmbeddingModel(nnx.Module):
    """The whole checkpoint. An untied `lm_head` never runs; it is kept so that nothing is lost.

    A backbone gives its vision tower and decoder, and says how the tower makes a row's table of
    features (`features`) and where tokens stand (`places`).
    """

    vision: Any
    decoder: Decoder

    def __init__(
        self,
        config: Any,
        *,
        vocab_size: int,
        width: int,
        pad: int | None,
        tied: bool,
        vision: Callable[[nnx.Rngs], nnx.Module],
        decoder: Callable[[nnx.Rngs], Decoder],
        rngs: nnx.Rngs,
    ):
        """Set up.

        Args:
          config: of the backbone.
          vocab_size: V.
          width: D.
          pad: the token whose vector gets no gradient.
          tied: the head is the token table.
          vision: makes the tower.
          decoder: makes the decoder.
          rngs: for random weights.
        """
        self.config = config
        self.embed = Embedding(vocab_size, width, pad=pad, rngs=rngs)
        self.vision = vision(rngs)
        self.decoder = decoder(rngs)
        if not tied:
            self.lm_head = Linear(width, vocab_size, bias=False, rngs=rngs)

    def __call__(
        self, batch: PackedBatch, compute: Compute, *, key: jax.Array | None = None, **placing: Any
    ) -> jax.Array:
        """Embed every sequence of a packed batch.

        Args:
          batch: arrays of `PackedBatch`; without visual ones the vision tower does not run.
          compute: how to compute.
          key: dropout key of adapters, or None.
          **placing: for the backbone's `places`.

        Returns:
          float32 [R, S, D], unit length; meaningless where `batch.slot` is -1.
        """
        return l2_normalize(self.pooled(batch, compute, key=key, **placing))

    def pooled(self, batch, compute: Compute, *, key=None, **placing: Any) -> jax.Array:
        """Post-norm hidden state [R, S, D] of each sequence's last token, not normalised."""
        vision_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        x, deep = self.inputs(batch, compute, key=vision_key)
        places = self.places(batch, **placing)
        return self.decoder(x, places, batch.pool_index, compute, decoder_key, deep)

    def inputs(self, batch, compute: Compute, *, key=None) -> tuple[jax.Array, jax.Array | None]:
        """What the decoder reads.

        Returns:
          [R, T, D], token vectors with the visual features in their places; and [N, R, T, D], what
          is added behind the first N layers, zero where a token is text, or None for nothing.
        """
        x = self.embed(batch.tokens).astype(compute.dtype)
        if not batch.visual:
            return x, None
        table, deep = self.features(batch.visual, compute, key)
        x = put_features(x, table, batch.feature_index)
        if not deep:
            return x, None
        nothing = jnp.zeros_like(x)
        return x, jnp.stack([put_features(nothing, f, batch.feature_index) for f in deep])

    def input_embeddings(self, batch, compute: Compute, *, key=None) -> jax.Array:
        """[R, T, D], token vectors with the visual features in their places."""
        return self.inputs(batch, compute, key=key)[0]

    def features(
        self, visual: dict[str, jax.Array], compute: Compute, key: jax.Array | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """A row's table of features [R, F, D], and those of the first decoder layers, if any."""
        raise NotImplementedError

    def places(self, batch) -> Places:
        """Rotary angles and segments of a `PackedBatch`."""
        raise NotImplementedError
