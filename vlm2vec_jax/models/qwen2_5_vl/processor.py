# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL's processor: the family's, with units in the order of attention windows."""

from vlm2vec_jax.models.qwen_vl.processor import QwenVLProcessor as Qwen2_5VLProcessor

__all__ = ["REFERENCE_OPTIONS", "Qwen2_5VLProcessor"]

REFERENCE_OPTIONS = {"image_positions": "sequential", "image_markers": "bare"}
"""How VLM2Vec uses this family: bare placeholders, which the position rule of its time did not
count."""
