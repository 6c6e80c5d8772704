# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision's entry in the registry."""

from __future__ import annotations

from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.phi3v.config import from_hf
from vlm2vec_jax.models.phi3v.model import Phi3V
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.phi3v.sharding import RULES
from vlm2vec_jax.models.phi3v.weights import table

BACKBONE = Backbone(
    name="phi3_v",
    read_config=from_hf,
    build=Phi3V,
    table=table,
    processor=Phi3VProcessor.from_pretrained,
    sharding=RULES,
    unused=r"lm_head/.*|vision/clip/(unused_layers|post_norm)/.*",
    width=lambda config: config.hidden_size,
    max_tokens=lambda config: config.rope.max_position_embeddings,
)
