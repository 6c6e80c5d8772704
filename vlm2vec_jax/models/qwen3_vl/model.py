# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL's model: the family's, with its own configuration and nothing added."""

from vlm2vec_jax.models.qwen_vl.model import QwenVL as Qwen3VL

__all__ = ["Qwen3VL"]
