# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's entry in the registry."""

from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.qwen2_vl.config import from_hf
from vlm2vec_jax.models.qwen2_vl.processor import REFERENCE_OPTIONS, Qwen2VLProcessor
from vlm2vec_jax.models.qwen2_vl.weights import table
from vlm2vec_jax.models.qwen_vl.backbone import COMMON

BACKBONE = Backbone(
    name="qwen2_vl",
    read_config=from_hf,
    table=table,
    processor=Qwen2VLProcessor.from_pretrained,
    reference_options=REFERENCE_OPTIONS,
    **COMMON,
)
