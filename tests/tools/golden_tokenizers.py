# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers of the same construction as the genuine ones, for the golden checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_PIECES = 320
"""Byte pieces and merges; the special tokens follow."""

# As in Qwen2's tokenizer.json.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "Represent the given image with the following question: What is shown in the picture?\n",
    "Find an image that matches the given caption. Represent the given image.\n",
    "Retrieve images or text relevant to the user's query. A red square, two dogs and 3 cats.\n",
    "system user assistant Represent the user's input.\n",
)


def write_qwen(folder: Path) -> dict[str, int]:
    """Write byte-level BPE `tokenizer.json` and its configuration; returns the special ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=QWEN_PIECES,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # The corpus is small: pieces that training did not need keep the special ids in place.
    assert tokenizer.get_vocab_size() == QWEN_PIECES, tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in QWEN_SPECIALS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in QWEN_SPECIALS}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): _added(name) for name, i in ids.items()},
        "additional_special_tokens": list(QWEN_SPECIALS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    return ids


def write_llama(folder: Path, source: Path) -> dict[str, int]:
    """Write a Llama tokenizer with `<image>` and `<pad>`.

    Args:
      folder: where to.
      source: a `tokenizer.json` of that construction; its own added tokens are replaced.
    """
    data = json.loads(source.read_text(encoding="utf-8"))
    first = 640  # the first id after the pieces of `source`
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < 3]
    ids = {"<s>": 1, "</s>": 2, "<image>": first, "<pad>": first + 1}
    for name in ("<image>", "<pad>"):
        data["added_tokens"].append({"id": ids[name], "content": name, **_flags()})
    data["model"]["vocab"] = {k: i for k, i in data["model"]["vocab"].items() if i < first}
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": {str(t["id"]): _added(t["content"]) for t in data["added_tokens"]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    return ids


def write_json(path: Path, value: object) -> None:
    """Write readable JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flags() -> dict[str, bool]:
    return {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _added(name: str) -> dict[str, object]:
    return {"content": name, **_flags()}
