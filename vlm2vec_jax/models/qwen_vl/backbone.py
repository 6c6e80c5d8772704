# SPDX-License-Identifier: Apache-2.0
"""What the members of the family say of themselves in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm2vec_jax.models.qwen_vl import vision
from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.qwen_vl.model import QwenVL
from vlm2vec_jax.models.qwen_vl.processor import OPTIONS, planned_image_size, visual_layout
from vlm2vec_jax.models.shared import decoder, parts
from vlm2vec_jax.models.shared.decoder_config import decoder_flops, decoder_values
from vlm2vec_jax.weights.sentence_transformers import SentenceTransformers

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def activation_bytes(
    config: QwenVLConfig, remat: str, remat_vision: str, itemsize: int
) -> tuple[float, float]:
    """Bytes kept on the device for the backward pass per token and per unit, an estimate."""
    token = decoder_values(config.text.decoder, remat)
    unit = vision.values(config.vision, remat_vision)
    return token * itemsize, unit * itemsize


def forward_flops(config: QwenVLConfig, tokens: int, units: int | Sequence[int] = 0) -> float:
    """FLOPs of one sequence's forward pass; an image's patches see each other alone.

    Args:
      config: sizes.
      tokens: all tokens of the sequence.
      units: of each image; a number for a sequence of one.
    """
    images = [units] if isinstance(units, int) else units
    seen = sum(vision.flops(config.vision, count) for count in images)
    return decoder_flops(config.text.decoder, tokens) + seen


SENTENCE_TRANSFORMERS = SentenceTransformers(
    "<|image_pad|>",
    wrapped="<|vision_start|><|image_pad|><|vision_end|>",
    requires={
        "image_positions": ("mrope", "transformers always places images by row and column"),
        "resolution": ("native", "transformers makes no squares of images"),
        "transparency": ("white", "transformers puts transparent images on white"),
    },
    pixel_limits=True,
    pillow=True,
)
"""The same text for all members: the tokens have these names in every published one."""


COMMON: dict[str, Any] = {
    "build": QwenVL,
    "options": OPTIONS,
    "sharding": parts.RULES + decoder.RULES + vision.SHARDING,
    "unused": r"lm_head/.*",
    "targets": TEXT_TARGETS,
    "width": lambda config: config.text.hidden_size,
    "max_tokens": lambda config: config.text.max_position_embeddings,
    "activation_bytes": activation_bytes,
    "flops": forward_flops,
    "image_size": planned_image_size,
    "visual_layout": visual_layout,
    "sentence_transformers": SENTENCE_TRANSFORMERS,
}
"""Fields of `Backbone` that are the same for all."""
