# SPDX-License-Identifier: Apache-2.0
"""A model of the Qwen-VL family: the shared one with the family's tower and M-RoPE."""

from __future__ import annotations

from flax import nnx

from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.qwen_vl.text import Decoder
from vlm2vec_jax.models.qwen_vl.vision import Vision
from vlm2vec_jax.models.shared.decoder import Places
from vlm2vec_jax.models.shared.model import EmbeddingModel


class QwenVL(EmbeddingModel):
    """The whole checkpoint."""

    decoder: Decoder

    def __init__(self, config: QwenVLConfig, *, rngs: nnx.Rngs):
        text = config.text
        super().__init__(
            config,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            pad=text.pad_token_id,
            tied=config.tie_word_embeddings,
            vision=lambda rngs: Vision(config, rngs=rngs),
            decoder=lambda rngs: Decoder(text, rngs=rngs),
            rngs=rngs,
        )

    def features(self, visual, compute, key):
        """See `EmbeddingModel`: a row per unit, and deepstack's tables."""
        return self.vision(visual, compute, key)

    def places(self, batch) -> Places:
        """Rotary angles by three axes, and segments."""
        return self.decoder.places(batch)
