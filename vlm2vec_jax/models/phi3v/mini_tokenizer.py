# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the small model: a byte-fallback BPE built as Phi-3.5-Vision's is.

Learns from the texts of an MMEB-train folder, so that most words are one piece; what it has never
seen falls back to characters and bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

SPECIAL_TOKENS = (
    ["<|endoftext|>", "<|assistant|>"]
    + [f"<|placeholder{k}|>" for k in range(1, 5)]
    + ["<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
    + [f"<|placeholder{k}|>" for k in range(7, 40)]
    + ["<|image|>"]
)
"""Phi-3.5-Vision's added tokens in their order; `<|endoftext|>` is its padding and eos token."""
STRIP_RIGHT = {"</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"}


def build_tokenizer(texts: Sequence[str], pieces: int) -> dict:
    """Learn a byte-fallback BPE and return it as the content of tokenizer.json.

    As in the real one there is no pre-tokenizer: words are kept apart while it learns, so no piece
    reaches over a space or a punctuation mark, and none is needed afterwards.

    Args:
      texts: what to learn from.
      pieces: size of the vocabulary at most, without the added special tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    space = "\u2581"
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learner.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    learner.pre_tokenizer = pre_tokenizers.Split(  # type: ignore[assignment]
        Regex(f"{space}?[A-Za-z]+|[\\s\\S]"), "isolated"
    )
    basic = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=basic,
        initial_alphabet=["\n", space, *(chr(code) for code in range(33, 127))],
        show_progress=False,
    )
    learner.train_from_iterator(_in_order(texts), trainer)
    learned = json.loads(learner.to_str())
    vocab = dict(sorted(learned["model"]["vocab"].items(), key=lambda item: item[1]))
    added = [(0, "<unk>"), (1, "<s>"), (2, "</s>")]
    added += [(len(vocab) + k, token) for k, token in enumerate(SPECIAL_TOKENS)]
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **_added_token(token)} for number, token in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": space},
                {"type": "Replace", "pattern": {"String": " "}, "content": space},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, sequence],
            "pair": [
                start,
                sequence,
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": learned["model"]["merges"],
        },
    }


def _in_order(texts: Sequence[str]) -> Iterator[str]:
    """Sort, so that the pieces depend on the texts and not on the order of files."""
    yield from sorted(texts)


def _added_token(token: str) -> dict:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": token in STRIP_RIGHT,
        "normalized": False,
        "special": True,
    }


def named_tokens() -> dict:
    """Return the content of special_tokens_map.json."""
    end = "<|endoftext|>"
    return {"bos_token": "<s>", "eos_token": end, "pad_token": end, "unk_token": "<unk>"}


def tokenizer_config(pieces: int) -> dict:
    """Return tokenizer_config.json for a vocabulary of that many pieces."""
    added = [(0, "<unk>"), (1, "<s>"), (2, "</s>")]
    added += [(pieces + k, token) for k, token in enumerate(SPECIAL_TOKENS)]
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": {str(number): _added_token(token) for number, token in added},
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "padding_side": "right",
        "processor_class": "Phi3VProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **named_tokens(),
    }
