# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the published models: `python tests/tools/make_names.py`.

Needs torch 2.13 and transformers 5.24; nothing is downloaded: the models are built on the meta
device from the configurations below, which are the published ones (the fields that shape it).
Writes `tests/goldens/names/<model>/config.json` and `names.txt`; the total is the number of
parameters that the model's page on the hub states, and is asserted.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from golden_checkpoints import CLASSES
from golden_tokenizers import write_json

NAMES = Path(__file__).resolve().parents[1] / "goldens" / "names"
_QWEN_IDS = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def _qwen2(kind, vision, *sizes, tie: bool, max_positions: int = 32768) -> dict:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys = (*keys, "num_key_value_heads", "vocab_size")
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **_QWEN_IDS,
        **dict(zip(keys, sizes, strict=True)),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tie,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": vision,
    }


def _vision2(hidden: int) -> dict:
    return {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }


def _vision2_5(hidden: int) -> dict:
    return {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }


def _qwen3(text: tuple[int, ...], vision: tuple[int, ...], deepstack: list[int], tie: bool) -> dict:
    hidden, mlp, layers, heads = text
    depth, width, vision_mlp = vision
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tie,
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "tie_word_embeddings": tie,
            "vocab_size": 151936,
        },
        "vision_config": {
            "deepstack_visual_indexes": deepstack,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": width,
            "in_channels": 3,
            "intermediate_size": vision_mlp,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _llava() -> dict:
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "ignore_index": -100,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }


# Model -> configuration and the number of parameters that its page states.
MODELS = {
    "qwen2-vl-2b": (
        _qwen2("qwen2_vl", _vision2(1536), 1536, 8960, 28, 12, 2, 151936, tie=True),
        2_208_985_600,
    ),
    "qwen2-vl-7b": (
        _qwen2("qwen2_vl", _vision2(3584), 3584, 18944, 28, 28, 4, 152064, tie=False),
        8_291_375_616,
    ),
    "qwen2.5-vl-3b": (
        _qwen2(
            "qwen2_5_vl",
            _vision2_5(2048),
            *(2048, 11008, 36, 16, 2, 151936),
            tie=True,
            max_positions=128000,
        ),
        3_754_622_976,
    ),
    "qwen2.5-vl-7b": (
        _qwen2(
            "qwen2_5_vl",
            _vision2_5(3584),
            *(3584, 18944, 28, 28, 4, 152064),
            tie=False,
            max_positions=128000,
        ),
        8_292_166_656,
    ),
    "qwen3-vl-2b": (
        _qwen3((2048, 6144, 28, 16), (24, 1024, 4096), [5, 11, 17], True),
        2_127_532_032,
    ),
    "qwen3-vl-8b": (
        _qwen3((4096, 12288, 36, 32), (27, 1152, 4304), [8, 16, 24], False),
        8_767_123_696,
    ),
    "llava-v1.6-mistral-7b": (_llava(), 7_566_747_648),
}


def old_name(kind: str, name: str) -> str:
    """The name that transformers 4.4x gives a tensor, from the one that 5.x has in memory."""
    if kind == "qwen3_vl":
        return name
    if kind == "llava_next":
        name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
        name = name.replace("model.language_model.", "language_model.model.", 1)
        name = re.sub(
            r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name
        )
        return re.sub(r"^model\.(?=multi_modal|image_newline)", "", name)
    name = re.sub(r"^model\.(?=visual\.)", "", name)
    return name.replace("model.language_model.", "model.", 1)


def lines(model: torch.nn.Module, kind: str) -> tuple[list[str], int]:
    """`shape  name of 4.x  name of 5.x`, layers that are alike in one line; parameters in all."""
    total = 0
    grouped: dict[tuple[str, str, str], list[int]] = {}
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        shape = "x".join(map(str, parameter.shape))
        layer = re.search(r"(?<=\.)(layers|blocks|deepstack_merger_list)\.(\d+)(?=\.)", name)
        generic = name
        if layer:
            generic = f"{name[: layer.start(2)]}*{name[layer.end(2) :]}"
        key = (shape, old_name(kind, generic), generic)
        grouped.setdefault(key, []).append(int(layer.group(2)) if layer else -1)
    out = []
    for (shape, old, new), layers in grouped.items():
        assert layers == list(range(len(layers))) or layers == [-1]
        out.append(
            " ".join([shape, *(n.replace("*", f"{{0..{len(layers) - 1}}}") for n in (old, new))])
        )
    return out, total


def main() -> None:
    """Write all lists."""
    for name, (config, published) in MODELS.items():
        folder = NAMES / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
        kind = config["model_type"]
        cls = getattr(transformers, CLASSES[kind])
        with torch.device("meta"):
            model = cls(cls.config_class.from_pretrained(folder))
        model.tie_weights()
        rows, total = lines(model, kind)
        (folder / "names.txt").write_text(
            f"# {total} parameters; shape, name in transformers 4.x, name in 5.x\n"
            + "\n".join(rows)
            + "\n",
            encoding="utf-8",
        )
        print(name, total, "as published" if total == published else f"PUBLISHED: {published}")
        assert total == published


if __name__ == "__main__":
    main()
