# SPDX-License-Identifier: Apache-2.0
"""The name table of Qwen2.5-VL: `Qwen2_5_VLForConditionalGeneration`'s tensors and our leaves."""

from __future__ import annotations

from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.qwen_vl.vision import spans
from vlm2vec_jax.models.qwen_vl.weights import merger, old_names, patch_and_attention
from vlm2vec_jax.models.shared import names
from vlm2vec_jax.weights.rules import Rule, Table


def table(config: QwenVLConfig) -> Table:
    """Build the name table for a configuration."""
    return old_names(config, vision_rules(config))


def vision_rules(config: QwenVLConfig) -> list[Rule]:
    """The vision tower's part."""
    found = patch_and_attention(config)
    for n, span in enumerate(spans(config.vision)):
        hf, ours = "visual.blocks.{l}", f"vision/layers_{n}"
        for part in ("norm1", "norm2"):
            found += names.norm(f"{hf}.{part}", f"{ours}/{part}", span, bias=False)
        for part in ("gate", "up", "down"):
            found += names.linear(f"{hf}.mlp.{part}_proj", f"{ours}/mlp/{part}", span)
    return found + names.norm("visual.merger.ln_q", "vision/merger/norm", bias=False) + merger()
