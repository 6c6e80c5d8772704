# SPDX-License-Identifier: Apache-2.0
"""Writes a small untrained Qwen2-VL as an HF folder, to be trained from scratch.

    python -m vlm2vec_jax.models.qwen2_vl.mini --data DIR --output DIR [--seed 0]

Every piece of the real architecture is there, only smaller: names, M-RoPE, grouped keys and values,
tied token table, a byte-level BPE trained on the texts of an MMEB-train folder. Its patches are of
7 pixels, so that mini-MMEB's pictures of 56 x 56 have 16 tokens. `configs/mini_qwen2vl.py` is its
training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from vlm2vec_jax.models.qwen2_vl.config import from_dict
from vlm2vec_jax.models.qwen2_vl.weights import table
from vlm2vec_jax.models.qwen_vl.model import QwenVL
from vlm2vec_jax.models.shared.mini import check_output, command, training_texts, write_model

PIECES = 1000
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_PATCH = 7
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer: words with the space in front, single digits."""


def write_mini_model(
    data: str | Path, output: str | Path, seed: int = 0, *, force: bool = False
) -> dict[str, Any]:
    """Write the untrained model; where it is already, the same files again.

    Args:
      data: folder of mini-MMEB (or its `train` part) whose texts the tokenizer learns.
      output: the HF folder to write.
      seed: of the random weights.
      force: overwrite the files of another model in `output`.

    Returns:
      The manifest: seed, number of parameters and of tokenizer pieces.

    Raises:
      UserError: for a folder without training texts, or a non-empty `output` that is another
        model.
    """
    output = Path(output)
    tokenizer, pieces = build_tokenizer(training_texts(data))
    settings = {"backbone": "qwen2_vl", "seed": seed, "pieces": pieces}
    check_output(output, settings, tokenizer, force=force)
    ids = {name: pieces + k for k, name in enumerate(SPECIAL_TOKENS)}
    config = model_config(-(-(pieces + len(ids)) // 64) * 64, ids)
    files = {
        "tokenizer.json": tokenizer,
        "config.json": config,
        "preprocessor_config.json": image_config(),
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(k): _added(name) for name, k in ids.items()},
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
        },
    }
    return write_model(output, files, random_weights(config, seed), settings)


def model_config(vocab: int, ids: dict[str, int]) -> dict[str, Any]:
    """`config.json` in the flat form of transformers 4.x.

    Args:
      vocab: V.
      ids: of the special tokens.
    """
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 128,
        "image_token_id": ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [4, 6, 6], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": 3,
            "embed_dim": 96,
            "hidden_act": "quick_gelu",
            "hidden_size": 128,
            "in_channels": 3,
            "mlp_ratio": 2,
            "model_type": "qwen2_vl",
            "num_heads": 4,
            "patch_size": _PATCH,
            "spatial_merge_size": 2,
            "spatial_patch_size": _PATCH,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vocab_size": vocab,
    }


def image_config() -> dict[str, Any]:
    """`preprocessor_config.json`: pictures of 56 x 56 stay as they are, larger ones shrink."""
    unit = (2 * _PATCH) ** 2
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 16 * unit,
        "merge_size": 2,
        "min_pixels": 4 * unit,
        "patch_size": _PATCH,
        "processor_class": "Qwen2VLProcessor",
        "temporal_patch_size": 2,
    }


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Draw float32 weights under the names and in the shapes of the real checkpoint.

    Matrices are normal with 1/sqrt(fan_in), those that write into a residual stream smaller by
    sqrt(2 layers), so that depth does not swell the stream; norms start at one, biases at zero.
    Embeddings of text and image start at about the same size.
    """
    read = from_dict(config)
    module = nnx.eval_shape(lambda: QwenVL(read, rngs=nnx.Rngs(0)))
    leaves = {
        "/".join(map(str, path)): jax.tree.leaves(leaf)[0].shape
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }
    rng = np.random.default_rng([seed, 7])
    gains = {
        ("self_attn.o_proj.weight", "mlp.down_proj.weight"): (2 * read.text.decoder.num_layers),
        ("attn.proj.weight", "mlp.fc2.weight"): 2 * read.vision.depth,
        ("merger.mlp.2.weight",): 4,
    }
    weights = {}
    for name, slot in table(read).written():
        shape = leaves[slot.rule.ours]
        shape = slot.rule.hf_shape(shape[1:] if slot.rule.stacked else shape)
        if len(shape) == 1:
            weights[name] = np.full(shape, float(name.endswith(".weight")), np.float32)
            continue
        smaller = next((n for ends, n in gains.items() if name.endswith(ends)), 1)
        std = (smaller * float(np.prod(shape[1:]))) ** -0.5
        std = 0.2 if "embed_tokens" in name else std
        weights[name] = rng.normal(0.0, std, shape).astype(np.float32)
    return weights


def build_tokenizer(texts: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Learn a byte-level BPE as Qwen's; returns `tokenizer.json` and the number of its pieces."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()  # type: ignore[assignment]
    words = pre.Split(Regex(_SPLIT), behavior="isolated")
    into_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre.Sequence([words, into_bytes])  # type: ignore[assignment]
    learner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    # Sorted, so that the pieces depend on the texts and not on the order of files.
    learner.train_from_iterator(sorted(texts), trainer)
    pieces = learner.get_vocab_size()
    learner.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    return json.loads(learner.to_str()), pieces


def _added(name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": name, **flags, "special": True}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command(argv, __doc__, "qwen2_vl", write_mini_model)


if __name__ == "__main__":
    sys.exit(main())
