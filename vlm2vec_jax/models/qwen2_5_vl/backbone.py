# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL's entry in the registry."""

from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.qwen2_5_vl.config import from_hf
from vlm2vec_jax.models.qwen2_5_vl.processor import REFERENCE_OPTIONS, Qwen2_5VLProcessor
from vlm2vec_jax.models.qwen2_5_vl.weights import table
from vlm2vec_jax.models.qwen_vl.backbone import COMMON

# The endings alone would also match the gated MLPs of the vision tower.
_TEXT_ONLY = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

BACKBONE = Backbone(
    name="qwen2_5_vl",
    read_config=from_hf,
    table=table,
    processor=Qwen2_5VLProcessor.from_pretrained,
    reference_options=REFERENCE_OPTIONS,
    **{**COMMON, "targets": _TEXT_ONLY},
)
