# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's processor: the family's, and what VLM2Vec's checkpoints were trained with."""

from vlm2vec_jax.models.qwen_vl.processor import QwenVLProcessor as Qwen2VLProcessor

__all__ = ["REFERENCE_OPTIONS", "Qwen2VLProcessor"]

_BOTH = {"image_positions": "sequential", "image_markers": "bare", "transparency": "drop"}
REFERENCE_OPTIONS = {
    "v1": {**_BOTH, "resolution": "high", "pixel_limits": "folder"},
    "v2": {**_BOTH, "pixel_limits": "vlm2vec_v2"},
}
"""How VLM2Vec's own checkpoints read images: bare placeholders, which the position rule of their
time did not count, and transparent pixels by their colour. v1 makes a square of every image, and
the evaluation that its published numbers come from leaves it whole (training: `vlm2vec_train`)."""
