# SPDX-License-Identifier: Apache-2.0
"""Parts of the family's name tables, and the spellings of their generations.

* transformers 4.x, and what 5 still writes for Qwen2-VL and Qwen2.5-VL: `visual.*`, `model.*`,
  `lm_head.*`. Exports of these two have them: every generation loads them.
* transformers 5 in memory, and Qwen3-VL's files always: `model.visual.*`,
  `model.language_model.*`, `lm_head.*`.
* the bare model without its head, as sentence-transformers writes it: `visual.*`,
  `language_model.*`.
"""

from __future__ import annotations

from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.qwen_vl.vision import spans
from vlm2vec_jax.models.shared import names, old_settings
from vlm2vec_jax.weights.rules import Alias, Rule, Skip, Table

CONVOLUTION = (2, 3, 4, 1, 0)
"""Convolution: HF [out, in, t, kh, kw] to ours [t, kh, kw, in, out]."""

_SKIPS = (Skip(r".*\.inv_freq", "rotary frequencies follow from the configuration"),)
_WRAPPERS = ((r"^encoder\.", ""),)


def old_names(config: QwenVLConfig, vision: list[Rule]) -> Table:
    """A table with the names of transformers 4.x; it reads every other spelling.

    Args:
      config: of the model.
      vision: the rules of the vision tower.
    """
    return _table(
        config,
        vision,
        prefix="model",
        renames=(
            *_WRAPPERS,
            (r"^model\.visual\.", "visual."),
            (r"^model\.language_model\.", "model."),
            (r"^language_model\.(?!model\.)", "model."),
        ),
        layouts={
            "5": ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
        },
        settings=old_settings.flat,
    )


def new_names(config: QwenVLConfig, vision: list[Rule]) -> Table:
    """A table with the names of transformers 5; see `old_names`."""
    return _table(
        config,
        vision,
        prefix="model.language_model",
        renames=(
            *_WRAPPERS,
            (r"^visual\.", "model.visual."),
            (r"^language_model\.(?!model\.)", "model.language_model."),
        ),
        layouts={"5": ()},
    )


def _table(
    config: QwenVLConfig, vision: list[Rule], prefix: str, renames, layouts, settings=None
) -> Table:
    tied = config.tie_word_embeddings
    rules = [Rule(f"{prefix}.embed_tokens.weight", "embed/table")]
    rules += names.decoder(prefix, config.text.decoder) + vision
    if not tied:
        rules.append(Rule("lm_head.weight", "lm_head/kernel", names.TRANSPOSED))
    return Table(
        rules=tuple(rules),
        aliases=(Alias("lm_head.weight", of=f"{prefix}.embed_tokens.weight"),) if tied else (),
        skips=_SKIPS,
        renames=renames,
        heads=("lm_head",),
        optional=() if tied else ("lm_head.weight",),
        layouts=layouts,
        settings=settings,
    )


def patch_and_attention(config: QwenVLConfig, hf: str = "visual") -> list[Rule]:
    """The patch convolution and the attention of every layer."""
    found = [Rule(f"{hf}.patch_embed.proj.weight", "vision/patch/kernel", CONVOLUTION)]
    if config.vision.patch_bias:
        found.append(Rule(f"{hf}.patch_embed.proj.bias", "vision/patch/bias"))
    for n, span in enumerate(spans(config.vision)):
        layer, ours = f"{hf}.blocks.{{l}}", f"vision/layers_{n}"
        found += names.linear(f"{layer}.attn.qkv", f"{ours}/attn/qkv", span)
        found += names.linear(f"{layer}.attn.proj", f"{ours}/attn/out", span)
    return found


def merger(hf: str = "visual") -> list[Rule]:
    """The merger's two linear layers as Qwen2-VL and Qwen2.5-VL name them."""
    return [
        *names.linear(f"{hf}.merger.mlp.0", "vision/merger/fc1"),
        *names.linear(f"{hf}.merger.mlp.2", "vision/merger/fc2"),
    ]
