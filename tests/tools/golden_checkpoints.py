# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of each backbone, as their Hugging Face folders look.

Every weight is a function of (seed, name in memory) alone, rounded to bfloat16 and stored so.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import golden_tokenizers as tok
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

SEED = 71
VARIANTS = {
    "qwen2_vl": ("tied", "untied"),
    "qwen2_5_vl": ("tied", "untied"),
    "qwen3_vl": ("tied", "untied"),
    "llava_next": ("gqa", "window"),
}
"""Two checkpoints each; the second one is written as transformers 4.4x wrote them."""

CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write(backbone: str, variant: str, folder: Path, llama_source: Path) -> None:
    """Write one checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if backbone == "llava_next":
        ids = tok.write_llama(folder, llama_source)
        config = _llava(variant, ids)
    else:
        ids = tok.write_qwen(folder)
        config = _qwen(backbone, variant, ids)
    _preprocessor(backbone, variant, folder)
    cls = getattr(transformers, CLASSES[backbone])
    model = cls(cls.config_class(**json.loads(json.dumps(config)))).eval()
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if variant == VARIANTS[backbone][1]:
        _as_written_by_4(backbone, config, folder)


def fill(model: torch.nn.Module) -> None:
    """Random weights: norms 1 + 0.2 n, biases 0.1 n, matrices n / sqrt(fan in), embeddings n."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
            values = rng.standard_normal(parameter.shape).astype(np.float32)
            if name.endswith("bias"):
                values *= 0.1
            elif parameter.ndim == 1 and "norm" in name or name.endswith("ln_q.weight"):
                values = 1 + 0.2 * values
            elif parameter.ndim > 1 and "embed_tokens" not in name:
                values /= np.sqrt(parameter[0].numel())
            parameter.copy_(torch.from_numpy(values).to(torch.bfloat16))
    model.tie_weights()


def load(backbone: str, folder: Path) -> torch.nn.Module:
    """A checkpoint in float32 with plain attention."""
    cls = getattr(transformers, CLASSES[backbone])
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _qwen(backbone: str, variant: str, ids: dict[str, int]) -> dict:
    """The nested configuration of transformers 5."""
    tied = variant == "tied"
    text = {
        "vocab_size": 336,
        "hidden_size": 48 if tied else 32,
        "intermediate_size": 64 if tied else 48,
        "num_hidden_layers": 3 if tied else 2,
        "num_attention_heads": 4 if tied else 2,
        "num_key_value_heads": 2 if tied else 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {"depth": 3, "num_heads": 2, "patch_size": 4 if tied else 14}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2] if tied else [2, 3, 3]}
    width = 24 if tied else 16
    if backbone == "qwen2_vl":
        vision |= {"embed_dim": width, "hidden_size": text["hidden_size"], "mlp_ratio": 2}
        vision |= {"depth": 2}
    else:
        vision |= {"hidden_size": width, "intermediate_size": 2 * width + 4}
        vision |= {"out_hidden_size": text["hidden_size"]}
    if backbone == "qwen2_5_vl":
        # Windows of 2 x 2 (tied) and 4 x 4 merged tokens.
        vision |= {"window_size": 16 if tied else 112, "fullatt_block_indexes": [1]}
    theta = 1000000.0
    if backbone == "qwen3_vl":
        vision |= {"num_position_embeddings": 36 if tied else 64}
        vision |= {"patch_size": 4 if tied else 16}
        vision |= {"deepstack_visual_indexes": [0, 2] if tied else [1]}
        text["head_dim"] = 16
        rope |= {"mrope_section": [4, 2, 2] if tied else [2, 3, 3], "mrope_interleaved": True}
        theta = 5000000.0
    text["rope_parameters"] = {**rope, "rope_theta": theta}
    return {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _llava(variant: str, ids: dict[str, int]) -> dict:
    gqa = variant == "gqa"
    side = 24 if gqa else 28
    return {
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 648,
            "hidden_size": 48 if gqa else 32,
            "intermediate_size": 64 if gqa else 48,
            "num_hidden_layers": 3 if gqa else 2,
            "num_attention_heads": 4 if gqa else 2,
            "num_key_value_heads": 2 if gqa else 1,
            "head_dim": 12 if gqa else 16,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": None if gqa else 24,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3 if gqa else 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": 4 if gqa else 7,
            "projection_dim": 16,
            "hidden_act": "quick_gelu",
        },
        "image_token_index": ids["<image>"],
        "image_grid_pinpoints": _pinpoints(side),
        "image_seq_length": 36 if gqa else 16,
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
    }


def _pinpoints(side: int) -> list[list[int]]:
    return [[side * h, side * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _preprocessor(backbone: str, variant: str, folder: Path) -> None:
    first = variant == VARIANTS[backbone][0]
    if backbone == "llava_next":
        side = 24 if first else 28
        value = {
            "aspect_ratio_setting": "anyres",
            "crop_size": {"height": side, "width": side},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": _pinpoints(side),
            "image_processor_type": "LlavaNextImageProcessor",
            **_CLIP,
            "processor_class": "LlavaNextProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": side},
        }
        tok.write_json(folder / "preprocessor_config.json", value)
        processor = {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 4 if first else 7,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        }
        tok.write_json(folder / "processor_config.json", processor)
        return
    qwen3 = backbone == "qwen3_vl"
    patch = 4 if first else 16 if qwen3 else 14
    unit = (2 * patch) ** 2
    limits = {"shortest_edge": 4 * unit, "longest_edge": 12 * unit}
    if not first:
        limits = {"min_pixels": 4 * unit, "max_pixels": 12 * unit}
    value = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        **(_HALF if qwen3 else _CLIP),
        "image_processor_type": "Qwen2VLImageProcessor" + "Fast" * qwen3,
        "merge_size": 2,
        "patch_size": patch,
        **({"size": limits} if first else limits),
        "processor_class": "Qwen2VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": 2,
    }
    tok.write_json(folder / "preprocessor_config.json", value)


def _as_written_by_4(backbone: str, config: dict, folder: Path) -> None:
    """Rewrite configuration and names as transformers 4.4x to 4.5x wrote them."""
    architecture = {"architectures": [CLASSES[backbone]], "model_type": backbone}
    common = {"torch_dtype": "bfloat16", "transformers_version": "4.46.3"}
    if backbone == "qwen3_vl":  # nested from its first day, with rope_scaling
        text = dict(config["text_config"], model_type="qwen3_vl_text")
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
        common["transformers_version"] = "4.57.0"
        value = {**config, **architecture, **common, "text_config": text}
        value["vision_config"] = dict(config["vision_config"], model_type="qwen3_vl")
    elif backbone == "llava_next":
        value = {**config, **architecture, **common}
    else:
        text = dict(config["text_config"])
        rope = text.pop("rope_parameters")
        value = {**config, **text, **architecture, **common}
        del value["text_config"]
        value["rope_theta"] = rope["rope_theta"]
        value["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        value |= {"sliding_window": 2048, "use_sliding_window": False, "max_window_layers": 2}
        value["vision_config"] = dict(config["vision_config"], model_type=backbone)
        if backbone == "qwen2_vl":
            # 4.4x calls the channels `in_chans` and the patch size `spatial_patch_size`, too.
            value["vision_config"] |= {
                "in_chans": 3,
                "spatial_patch_size": config["vision_config"]["patch_size"],
            }
    tok.write_json(folder / "config.json", value)
    if backbone == "llava_next":
        path = folder / "model.safetensors"
        tensors = load_file(path)
        renamed = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1)
            if name.startswith("vision_tower.") and "vision_model" not in name
            else name: value
            for name, value in tensors.items()
        }
        save_file(renamed, path, metadata={"format": "pt"})
