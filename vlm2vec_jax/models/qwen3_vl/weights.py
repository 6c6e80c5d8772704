# SPDX-License-Identifier: Apache-2.0
"""The name table of Qwen3-VL: `Qwen3VLForConditionalGeneration`'s tensors and our leaves."""

from __future__ import annotations

from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.qwen_vl.vision import spans
from vlm2vec_jax.models.qwen_vl.weights import new_names, patch_and_attention
from vlm2vec_jax.models.shared import names
from vlm2vec_jax.weights.rules import Rule, Table


def table(config: QwenVLConfig) -> Table:
    """Build the name table for a configuration."""
    return new_names(config, vision_rules(config))


def vision_rules(config: QwenVLConfig) -> list[Rule]:
    """The vision tower's part."""
    tower = "model.visual"
    found = patch_and_attention(config, tower)
    found.append(Rule(f"{tower}.pos_embed.weight", "vision/positions"))
    for n, span in enumerate(spans(config.vision)):
        hf, ours = f"{tower}.blocks.{{l}}", f"vision/layers_{n}"
        for part in ("norm1", "norm2"):
            found += names.norm(f"{hf}.{part}", f"{ours}/{part}", span)
        for part in ("fc1", "fc2"):
            found += names.linear(f"{hf}.mlp.linear_{part}", f"{ours}/mlp/{part}", span)
    mergers: list[tuple[str, str, names.Span | None]]
    mergers = [(f"{tower}.merger", "vision/merger", None)]
    if config.vision.deepstack:
        span = (0, len(config.vision.deepstack))
        mergers.append((f"{tower}.deepstack_merger_list.{{l}}", "vision/deepstack", span))
    for hf, ours, layers in mergers:
        found += names.norm(f"{hf}.norm", f"{ours}/norm", layers)
        for part in ("fc1", "fc2"):
            found += names.linear(f"{hf}.linear_{part}", f"{ours}/{part}", layers)
    return found
