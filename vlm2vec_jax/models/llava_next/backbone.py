# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT's entry in the registry."""

from __future__ import annotations

from collections.abc import Sequence

from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.llava_next.config import LlavaNextConfig, from_hf
from vlm2vec_jax.models.llava_next.model import RULES, LlavaNext
from vlm2vec_jax.models.llava_next.processor import (
    OPTIONS,
    LlavaNextProcessor,
    planned_image_size,
    visual_layout,
)
from vlm2vec_jax.models.llava_next.weights import table
from vlm2vec_jax.models.shared.clip_config import clip_flops, clip_values
from vlm2vec_jax.models.shared.decoder_config import decoder_flops, decoder_values


def activation_bytes(
    config: LlavaNextConfig, remat: str, remat_vision: str, itemsize: int
) -> tuple[float, float]:
    """Bytes kept on the device for the backward pass per token and per tile, an estimate."""
    token = decoder_values(config.text, remat)
    unit = clip_values(config.clip, config.clip_layers_used, remat_vision)
    return token * itemsize, unit * itemsize


def forward_flops(config: LlavaNextConfig, tokens: int, tiles: int | Sequence[int] = 0) -> float:
    """FLOPs of one sequence's forward pass; all of a tile's features are projected."""
    c, d = config.clip.hidden_size, config.text.hidden_size
    project = config.features_per_tile * 2 * (c * d + d * d)
    tile = clip_flops(config.clip, config.clip_layers_used) + project
    count = tiles if isinstance(tiles, int) else sum(tiles)
    return decoder_flops(config.text, tokens) + count * tile


BACKBONE = Backbone(
    name="llava_next",
    read_config=from_hf,
    build=LlavaNext,
    table=table,
    processor=LlavaNextProcessor.from_pretrained,
    options=OPTIONS,
    sharding=RULES,
    unused=r"lm_head/.*|vision/clip/(unused_layers|post_norm)/.*",
    # Endings such as q_proj would match CLIP's attention, too.
    targets=r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    width=lambda config: config.text.hidden_size,
    max_tokens=lambda config: config.max_position_embeddings,
    activation_bytes=activation_bytes,
    flops=forward_flops,
    image_size=planned_image_size,
    visual_layout=visual_layout,
    # Trained with transformers 4.46, which drops alpha, on squares of 1344 pixels.
    reference_options={"v1": {"resolution": "high", "transparency": "drop"}},
    sentence_transformers=(
        "transformers 5, which sentence-transformers loads models with, rebuilds LLaVA-NeXT's "
        "tokenizer and gives other ids behind <image>, so embeddings would differ from ours"
    ),
)
