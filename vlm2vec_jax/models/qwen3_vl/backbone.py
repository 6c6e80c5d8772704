# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL's entry in the registry."""

import dataclasses

from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.qwen3_vl.config import from_hf
from vlm2vec_jax.models.qwen3_vl.processor import OPTIONS, TEMPLATES, Qwen3VLProcessor
from vlm2vec_jax.models.qwen3_vl.weights import table
from vlm2vec_jax.models.qwen_vl.backbone import COMMON, SENTENCE_TRANSFORMERS

BACKBONE = Backbone(
    name="qwen3_vl",
    read_config=from_hf,
    table=table,
    processor=Qwen3VLProcessor.from_pretrained,
    **{
        **COMMON,
        "options": OPTIONS,
        "sentence_transformers": dataclasses.replace(
            SENTENCE_TRANSFORMERS, conversations=TEMPLATES
        ),
    },
)
