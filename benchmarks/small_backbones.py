# SPDX-License-Identifier: Apache-2.0
"""A small model with random weights of every registered backbone, built from a configuration.

The decoders have the same sizes, so that backbones differ in what makes them different: vision
tower, features of an image, positions. Inputs are made by each backbone's own processor from texts
of one-token words and photographs of `PHOTO` pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from vlm2vec_jax.inputs import EncodedInput, MultimodalInput

WORDS = 1000
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>")
ID = {word: WORDS + n for n, word in enumerate(SPECIAL)}
PHOTO = (320, 240)
"""Width and height of all photographs: equal ones spare the padded side any padding of images."""
_TILE = 112

_DECODER = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS + 24,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
_CLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": _TILE,
    "patch_size": 14,
}
_QWEN = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
    "tie_word_embeddings": True,
}
_TOWER = {"depth": 4, "num_heads": 2}


def _phi3_v():
    from vlm2vec_jax.models.phi3v.config import from_dicts
    from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor

    rope = {"type": "su", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    image = {**common.SIZES["img_processor"], "num_img_tokens": (_TILE // 28) ** 2}
    sizes = {**common.SIZES, **_DECODER, "rope_scaling": rope, "img_processor": image}
    sizes["original_max_position_embeddings"] = 4096
    config = from_dicts(sizes, _CLIP)
    return config, Phi3VProcessor(tokenizer(), crop_size=_TILE, num_crops=4)


def _llava_next():
    from vlm2vec_jax.models.llava_next.config import from_dicts
    from vlm2vec_jax.models.llava_next.processor import LlavaNextProcessor

    shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    config = from_dicts(
        {
            "text_config": {"model_type": "mistral", "sliding_window": None, **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_CLIP},
            "image_token_index": ID["<image>"],
            "image_grid_pinpoints": [[_TILE * a, _TILE * b] for a, b in shapes],
        }
    )
    return config, LlavaNextProcessor(tokenizer(), config)


def _qwen2_vl():
    from vlm2vec_jax.models.qwen2_vl.config import from_dict
    from vlm2vec_jax.models.qwen2_vl.processor import Qwen2VLProcessor

    tower = {**_TOWER, "embed_dim": 128, "hidden_size": 256, "mlp_ratio": 4}
    config = from_dict({**_QWEN, **_DECODER, "vision_config": tower})
    return config, Qwen2VLProcessor(tokenizer(), config)


def _qwen2_5_vl():
    from vlm2vec_jax.models.qwen2_5_vl.config import from_dict
    from vlm2vec_jax.models.qwen2_5_vl.processor import Qwen2_5VLProcessor

    tower = {**_TOWER, "hidden_size": 128, "intermediate_size": 344, "out_hidden_size": 256}
    tower |= {"fullatt_block_indexes": [3]}
    config = from_dict({**_QWEN, **_DECODER, "vision_config": tower})
    return config, Qwen2_5VLProcessor(tokenizer(), config)


def _qwen3_vl():
    from vlm2vec_jax.models.qwen3_vl.config import from_dict
    from vlm2vec_jax.models.qwen3_vl.processor import Qwen3VLProcessor

    tower = {**_TOWER, "hidden_size": 128, "intermediate_size": 512, "out_hidden_size": 256}
    tower |= {"num_position_embeddings": 48**2, "deepstack_visual_indexes": [0, 1, 2]}
    text = {**_DECODER, "head_dim": 64, "rope_scaling": {"mrope_section": [12, 10, 10]}}
    config = from_dict({**_QWEN, "text_config": text, "vision_config": tower})
    return config, Qwen3VLProcessor(tokenizer(), config)


SMALL: dict[str, Callable[[], tuple[Any, Any]]] = {
    "phi3_v": _phi3_v,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
"""`model_type` -> configuration and processor."""


def build(name: str):
    """The small model of a backbone, as `models.loading.Model`, and its processor."""
    from flax import nnx

    from vlm2vec_jax.models.loading import Model
    from vlm2vec_jax.models.registry import backbone

    config, processor = SMALL[name]()
    family = backbone(name)
    return Model(family, config, Path("."), family.build(config, rngs=nnx.Rngs(0))), processor


@functools.cache
def tokenizer():
    """A token for every word `w0` ... and every special word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from vlm2vec_jax.models.tokenizer import TextTokenizer

    vocabulary = {f"w{n}": n for n in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    return TextTokenizer(backend, hash="")


def text(processor, rng: np.random.Generator, words: int) -> EncodedInput:
    """A text of some words."""
    return processor.encode(MultimodalInput(_sentence(rng, words)))


def photo(processor, rng: np.random.Generator, words: int) -> EncodedInput:
    """A photograph and a question of some words."""
    from PIL import Image

    pixels = rng.integers(0, 256, (*PHOTO[::-1], 3), np.uint8)
    question = f"<|image_1|> {_sentence(rng, words)}"
    return processor.encode(MultimodalInput(question, (Image.fromarray(pixels),)))


def _sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(f"w{n}" for n in rng.integers(1, WORDS, words))
