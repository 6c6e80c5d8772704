# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: the shared model with CLIP tiles, plain rotary positions and a Mistral decoder."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.models.llava_next.config import LlavaNextConfig
from vlm2vec_jax.models.llava_next.vision import Vision
from vlm2vec_jax.models.shared import clip, decoder, parts
from vlm2vec_jax.models.shared.decoder import Decoder, Places, places_of
from vlm2vec_jax.models.shared.model import EmbeddingModel
from vlm2vec_jax.nn.rope import cos_sin, inverse_frequencies

RULES: list[tuple[str, P]] = [
    *parts.RULES,
    *decoder.RULES,
    *clip.RULES,
    (r"vision/newline", P()),
]
"""Rules for the tree of this model, for `vlm2vec_jax.parallel.sharding`."""


class LlavaNext(EmbeddingModel):
    """The whole checkpoint."""

    def __init__(self, config: LlavaNextConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config,
            vocab_size=config.vocab_size,
            width=config.text.hidden_size,
            pad=config.pad_token_id,
            tied=config.tie_word_embeddings,
            vision=lambda rngs: Vision(config, rngs=rngs),
            decoder=lambda rngs: Decoder(config.text, rngs=rngs),
            rngs=rngs,
        )

    def features(self, visual, compute, key):
        """See `EmbeddingModel`: the newline, then the tiles' features."""
        return self.vision.table(visual, compute, key), []

    def places(self, batch) -> Places:
        """Rotary angles and segments of a `PackedBatch`."""
        head = self.config.text.head_size
        ones = (1.0,) * (head // 2)
        frequencies = jnp.asarray(inverse_frequencies(head, self.config.rope_theta, ones))
        return places_of(batch, *cos_sin(batch.positions, frequencies, 1.0))
