# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision's entry in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.phi3v.config import Phi3VConfig, from_hf
from vlm2vec_jax.models.phi3v.flops import forward_flops, image_size, visual_layout
from vlm2vec_jax.models.phi3v.model import Phi3V
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.phi3v.sharding import RULES
from vlm2vec_jax.models.phi3v.weights import table
from vlm2vec_jax.models.shared.clip_config import clip_values
from vlm2vec_jax.models.shared.decoder_config import decoder_values


def activation_bytes(
    config: Phi3VConfig, remat: str, remat_vision: str, itemsize: int
) -> tuple[float, float]:
    """Bytes kept on the device for the backward pass per token and per crop, an estimate."""
    token = decoder_values(config.decoder, remat)
    unit = clip_values(config.clip, config.clip_layers_used, remat_vision)
    return token * itemsize, unit * itemsize


def planned_image_size(
    config: Phi3VConfig, options: Mapping[str, Any], width: int, height: int
) -> tuple[int, int]:
    """Tokens and crops of an image under the options of a configuration.

    Raises:
      UserError: if the number of crops is left to the model's folder.
    """
    if not options.get("num_crops"):
        raise UserError("data.num_crops must be given: no processor is read here")
    return image_size(config, options["num_crops"], width, height)


BACKBONE = Backbone(
    name="phi3_v",
    read_config=from_hf,
    build=Phi3V,
    table=table,
    processor=Phi3VProcessor.from_pretrained,
    options=("num_crops", "max_len"),
    sharding=RULES,
    unused=r"lm_head/.*|vision/clip/(unused_layers|post_norm)/.*",
    targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    width=lambda config: config.hidden_size,
    max_tokens=lambda config: config.rope.max_position_embeddings,
    activation_bytes=activation_bytes,
    flops=forward_flops,
    image_size=planned_image_size,
    visual_layout=visual_layout,
    sentence_transformers=(
        "transformers has no class for phi3_v of its own, only code that the checkpoint brings "
        "along, and sentence-transformers' modules do not know its processor"
    ),
)
