# SPDX-License-Identifier: Apache-2.0
"""Adapters of ours in an old PEFT: run by the python of an environment that has one.

    python tests/tools/old_peft.py MODEL FULL_EXPORT INPUTS.npz OUTPUT.npz ADAPTER...

Needs torch, transformers 4.4x, peft and safetensors, and nothing of this package. transformers' own
decoder and CLIP tower stand in the module tree of the published model (whose own class would be
remote code); the full export is loaded strictly, each adapter by peft. Written are, per adapter,
the hidden states of decoder and tower, what peft would save of it, the merged weights, and once
the states without an adapter and the versions.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.numpy import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3Model

VISION = "model.vision_embed_tokens.img_processor."
SAME = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size rms_norm_eps rope_theta max_position_embeddings original_max_position_embeddings "
    "pad_token_id"
).split()


def build(folder: Path, tensors: dict) -> torch.nn.Module:
    """Decoder and tower where the published model has them, with the export's weights."""
    raw = json.loads((folder / "config.json").read_text())
    factors = {name: raw["rope_scaling"][name] for name in ("short_factor", "long_factor")}
    decoder = Phi3Model(
        Phi3Config(
            **{name: raw[name] for name in SAME},
            rope_scaling={"type": "longrope", **factors},
            attn_implementation="eager",
        )
    )
    vision = json.loads((folder / "clip_config.json").read_text())
    tower = CLIPVisionModel(CLIPVisionConfig(**vision, attn_implementation="eager"))
    for prefix, module, other in (("model.", decoder, "vision_embed"), (VISION, tower, "nothing")):
        own = {
            name[len(prefix) :]: torch.from_numpy(array.copy())
            for name, array in tensors.items()
            if name.startswith(prefix) and not name[len(prefix) :].startswith(other)
        }
        module.load_state_dict(own, strict=True)
    root = torch.nn.Module()
    root.model = decoder
    root.model.vision_embed_tokens = torch.nn.Module()
    root.model.vision_embed_tokens.img_processor = tower
    return root.eval()


def states(root: torch.nn.Module, inputs: dict, name: str) -> dict:
    """Hidden states after every layer, the decoder's final norm last."""
    with torch.no_grad():
        text = root.model(torch.from_numpy(inputs["ids"]), output_hidden_states=True)
        pixels = torch.from_numpy(inputs["pixels"].transpose(0, 3, 1, 2).copy())
        tower = root.model.vision_embed_tokens.img_processor
        seen = tower(pixels, output_hidden_states=True)
    out = {f"{name}/text/{i:02d}": s.numpy() for i, s in enumerate(text.hidden_states)}
    return out | {f"{name}/seen/{i:02d}": s.numpy() for i, s in enumerate(seen.hidden_states)}


def main(model: str, full: str, inputs: str, output: str, *adapters: str) -> None:
    """Compute and write."""
    torch.set_num_threads(1)
    given = dict(np.load(inputs))
    tensors = load_file(Path(full) / "model.safetensors")
    out = states(build(Path(model), tensors), given, "plain")
    for folder in adapters:
        name = Path(folder).name
        wrapped = peft.PeftModel.from_pretrained(build(Path(model), tensors), folder).eval()
        out |= states(wrapped.base_model.model, given, name)
        stored = peft.utils.save_and_load.get_peft_model_state_dict(wrapped)
        out |= {f"{name}/stored/{key}": value.numpy() for key, value in stored.items()}
        merged = wrapped.merge_and_unload().state_dict()
        out |= {f"{name}/merged/{key}": value.numpy() for key, value in merged.items()}
    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    np.savez(output, versions=json.dumps(versions), **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
