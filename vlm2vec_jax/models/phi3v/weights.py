# SPDX-License-Identifier: Apache-2.0
"""The name table of Phi-3.5-Vision: `Phi3VForCausalLM`'s tensors and the leaves of our model.

The CLIP stack is split at the feature layer: layers that run are stacked in `vision/clip/layers`,
those behind it (one in the published model) in `vision/clip/unused_layers`, so that they keep
their place in a checkpoint without costing a step. The last decoder layer, which runs for pooled
tokens only, is a stack of one in `decoder/last`.
"""

from __future__ import annotations

from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.shared import names
from vlm2vec_jax.models.shared.names import TRANSPOSED
from vlm2vec_jax.weights.rules import Alias, Rule, Skip, Table

_VISION = "model.vision_embed_tokens"
_CLIP = f"{_VISION}.img_processor.vision_model"


def table(config: Phi3VConfig) -> Table:
    """Build the name table for a configuration (sizes do not matter, layer counts and ties do)."""
    rules = [Rule("model.embed_tokens.weight", "embed/table")]
    rules += names.decoder("model", config.decoder)
    rules.append(
        Rule(
            "lm_head.weight",
            "lm_head/kernel",
            permute=TRANSPOSED,
            tied_to="model.embed_tokens.weight" if config.tie_word_embeddings else None,
        )
    )
    rules += names.clip(
        _CLIP, "vision/clip", used=config.clip_layers_used, layers=config.clip.num_hidden_layers
    )
    for hf, ours in (("img_projection.0", "fc1"), ("img_projection.2", "fc2")):
        rules += names.linear(f"{_VISION}.{hf}", f"vision/projector/{ours}")
    rules.append(Rule(f"{_VISION}.sub_GN", "vision/newline", lead_ones=3))
    rules.append(Rule(f"{_VISION}.glb_GN", "vision/separator", lead_ones=2))
    return Table(
        rules=tuple(rules),
        # The image embedding holds a reference to the word embedding; some saves write it twice.
        aliases=(Alias(f"{_VISION}.wte.weight", of="model.embed_tokens.weight"),),
        skips=(
            Skip(r".*\.rotary_emb\.inv_freq", "rotary frequencies follow from the configuration"),
            Skip(r".*\.embeddings\.position_ids", "a counting buffer of the CLIP tower"),
        ),
        renames=(
            # Wrappers around the model: torch.compile, DDP, the reference's own, PEFT's.
            (r"^(_orig_mod|module|encoder|base_model\.model)\.", ""),
            # Transformers 5 took a level out of CLIPVisionModel, which the image embedding holds.
            (r"(?<=\.img_processor\.)(?!vision_model\.)", "vision_model."),
            # Saves of the model without its head, and vLLM's tree.
            (r"^language_model\.(?=model\.|lm_head\.)", ""),
            (r"^(?=embed_tokens\.|layers\.|norm\.|vision_embed_tokens\.)", "model."),
        ),
        heads=("lm_head",),
        # No embedding needs the head; a tied one is a copy and may be absent anyway.
        optional=() if config.tie_word_embeddings else ("lm_head.weight",),
        layouts={
            "4.46": (),
            "5": ((r"(?<=\.img_processor\.)vision_model\.", ""),),
        },
    )
