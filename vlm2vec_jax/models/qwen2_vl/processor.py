# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's processor: the family's, and what VLM2Vec's checkpoints were trained with."""

from vlm2vec_jax.models.qwen_vl.processor import QwenVLProcessor as Qwen2VLProcessor

__all__ = ["REFERENCE_OPTIONS", "V1_TRAINING_PIXELS", "Qwen2VLProcessor"]

REFERENCE_OPTIONS = {
    "image_positions": "sequential",
    "image_markers": "bare",
    "transparency": "drop",
}
"""How VLM2Vec's own checkpoints read images: bare placeholders, which the position rule of their
time did not count, and transparent pixels by their colour."""

V1_TRAINING_PIXELS = (256 * 28 * 28, 1280 * 28 * 28)
"""Pixel limits of v1's training; its evaluation took the folder's own, which are wider."""
