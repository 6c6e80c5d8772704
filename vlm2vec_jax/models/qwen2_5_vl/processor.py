# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL's processor: the family's, with units in the order of attention windows."""

from vlm2vec_jax.models.qwen_vl.processor import QwenVLProcessor as Qwen2_5VLProcessor

__all__ = ["REFERENCE_OPTIONS", "Qwen2_5VLProcessor"]

_BOTH = {"image_positions": "sequential", "image_markers": "bare"}
REFERENCE_OPTIONS = {
    "v1": {**_BOTH, "resolution": "high", "pixel_limits": "folder"},
    "v2": {**_BOTH, "pixel_limits": "vlm2vec_v2"},
}
"""How VLM2Vec uses this family: bare placeholders, which the position rule of its time did not
count, and images as Qwen2-VL's."""
