# SPDX-License-Identifier: Apache-2.0
"""The name table of LLaVA-NeXT: `LlavaNextForConditionalGeneration`'s tensors and our leaves.

The rules have the names of transformers 4.4x, which every later generation loads. Read are also
the names that 5.x has in memory (`model.language_model.*`, `model.vision_tower.*`, `lm_head.*`),
the mixture that it writes (`vision_tower.*` without `vision_model.`), and the model without its
head.
"""

from __future__ import annotations

from vlm2vec_jax.models.llava_next.config import LlavaNextConfig
from vlm2vec_jax.models.shared import names, old_settings
from vlm2vec_jax.models.shared.names import TRANSPOSED
from vlm2vec_jax.weights.rules import Alias, Rule, Skip, Table

_TEXT = "language_model.model"
_CLIP = "vision_tower.vision_model"


def table(config: LlavaNextConfig) -> Table:
    """Build the name table for a configuration (sizes do not matter, layer counts and ties do)."""
    clip, tied = config.clip, config.tie_word_embeddings
    rules = [Rule(f"{_TEXT}.embed_tokens.weight", "embed/table")]
    rules += names.decoder(_TEXT, config.text)
    if not tied:
        rules.append(Rule("language_model.lm_head.weight", "lm_head/kernel", TRANSPOSED))
    rules += names.clip(
        _CLIP, "vision/clip", used=config.clip_layers_used, layers=clip.num_hidden_layers
    )
    for hf, ours in (("linear_1", "fc1"), ("linear_2", "fc2")):
        path = f"multi_modal_projector.{hf}"
        rules += names.linear(path, f"vision/projector/{ours}", bias=config.projector_bias)
    rules.append(Rule("image_newline", "vision/newline"))
    head = Alias("language_model.lm_head.weight", of=f"{_TEXT}.embed_tokens.weight")
    return Table(
        rules=tuple(rules),
        aliases=(head,) if tied else (),
        skips=(
            Skip(r".*\.rotary_emb\.inv_freq", "rotary frequencies follow from the configuration"),
            Skip(r".*\.embeddings\.position_ids", "a counting buffer of the CLIP tower"),
        ),
        renames=(
            # Wrappers around the model: torch.compile, DDP, the reference's own, PEFT's.
            (r"^(_orig_mod|module|encoder|base_model\.model)\.", ""),
            # In memory of transformers 5; then without the head.
            (
                r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline)",
                "",
            ),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^language_model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
            # Transformers 5 took a level out of CLIPVisionModel.
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
        heads=("language_model.lm_head",),
        optional=() if tied else ("language_model.lm_head.weight",),
        layouts={
            "5": (
                (r"^language_model\.model\.", "model.language_model."),
                (r"^language_model\.lm_head(?=\.|$)", "lm_head"),
                (r"^vision_tower\.vision_model\.", "model.vision_tower."),
                (r"^(?=multi_modal_projector\.|image_newline)", "model."),
            ),
        },
        settings=old_settings.nested,
    )
