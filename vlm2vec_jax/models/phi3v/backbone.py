# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision's entry in the registry."""

from __future__ import annotations

from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.phi3v.config import Phi3VConfig, from_hf
from vlm2vec_jax.models.phi3v.flops import forward_flops, image_size, visual_layout
from vlm2vec_jax.models.phi3v.model import Phi3V
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.phi3v.sharding import RULES
from vlm2vec_jax.models.phi3v.weights import table


def activation_bytes(config: Phi3VConfig, remat: str, itemsize: int) -> tuple[float, float]:
    """Bytes kept for the backward pass per token and per crop, an estimate.

    With everything recomputed a layer keeps its input; without, about 16 values of its width per
    token, the attention weights not counted.
    """
    values = {"none": 16, "dots": 8, "full": 1}[remat]
    clip = config.clip
    token = config.num_layers * config.hidden_size * values * itemsize
    patches = clip.patches_per_side**2 + 1
    return token, config.clip_layers_used * patches * clip.hidden_size * values * itemsize


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
    activation_bytes=activation_bytes,
    flops=forward_flops,
    image_size=image_size,
    visual_layout=visual_layout,
)
