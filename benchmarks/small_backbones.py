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

from benchmarks.beds import SIZES, text_lengths
from benchmarks.common import How, Result, alternate, compared
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
    image = {**SIZES["scaled"]["img_processor"], "num_img_tokens": (_TILE // 28) ** 2}
    sizes = {**SIZES["scaled"], **_DECODER, "rope_scaling": rope, "img_processor": image}
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


def measure(how: How) -> Result:
    """Every registered backbone, packed against right-padded; packing must not be slower.

    Each kind of input has an Embedder of its own, which gets a program for every call, as each
    right-padded batch does. One that has embedded the texts before takes their programs for some
    of the mixture, for a while (`embedding/calls.py`): the last rows say at what cost.
    """
    from vlm2vec_jax.models.registry import BACKBONES

    missing = sorted(set(BACKBONES) - set(SMALL))
    assert not missing, f"no small model of {missing}"
    rows, timings, differences = [], {}, {}
    for name in how.pick(sorted(BACKBONES), ["qwen2_vl"]):
        rng = np.random.default_rng(how.seed)
        model, processor = build(name)
        texts = [text(processor, rng, n) for n in text_lengths(rng, how.pick(96, 6))]
        mixture = [text(processor, rng, n) for n in text_lengths(rng, how.pick(10, 2))]
        mixture += [photo(processor, rng, n) for n in text_lengths(rng, how.pick(6, 1))]
        mixture = [mixture[i] for i in rng.permutation(len(mixture))]
        bench = Bench(model, processor)
        kinds = (
            ("texts", texts, 64, 1.0),
            ("mixed", mixture, 8, 1.0),
            ("mixed, with programs for texts", mixture, 8, None),
        )
        for kind, items, size, target in kinds:
            what = f"{name}, {kind}"
            bench.begin(texts if target is None else ())
            timings[what] = timing = bench.compare(items, size, how.rounds)
            against = f"right-padded, batches of {size}"
            shapes = {"inputs": len(items), "tokens": sum(map(len, items)), **bench.packed(items)}
            rows.append(compared(what, against, timing, "packed", "padded", target, shapes))
        differences[name] = bench.largest_difference
    return Result(rows, timings, {"largest_difference": differences})


class Bench:
    """A model of any backbone behind an Embedder, and behind right-padded batches."""

    def __init__(self, model, processor):
        import jax
        from flax import nnx

        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.nn.compute import Compute

        compute = Compute("float32")
        self.layout = processor.visual_layout
        self._new = lambda: Embedder(model, processor, compute, None)
        self.begin(())
        graphdef, self.state = nnx.split(model.module)
        self.padded = jax.jit(lambda s, b: right_padded_apart(nnx.merge(graphdef, s), b, compute))
        self.largest_difference = 0.0

    def begin(self, before) -> None:
        """Take a new Embedder that has embedded these items only."""
        self.embedder = self._new()
        if before:
            self.embedder.encode_encoded(before)

    def packed(self, items) -> dict[str, int]:
        """Tokens and visual units that the Embedder computes for these items, padding included."""
        sizes = [(len(item), item.units) for item in items]
        calls = list(self.embedder._batches.rows(sizes, None))
        return {
            "packed_tokens": sum(count * shape.tokens for _, count, shape in calls),
            "packed_units": sum(count * shape.units for _, count, shape in calls),
        }

    def compare(self, items, size: int, rounds: int):
        """Check that both give the same, then time them."""
        cases = {
            "packed": lambda: self.embedder.encode_encoded(items),
            "padded": lambda: self.embed_padded(items, size),
        }
        first, second = (function() for function in cases.values())
        difference = float(np.abs(first - second).max())
        assert difference < 1e-5, difference
        self.largest_difference = max(self.largest_difference, difference)
        return alternate(cases, rounds, warm=False)

    def embed_padded(self, items, size: int) -> np.ndarray:
        """Embeddings [N, D] in the order of the items, batch by batch."""
        import jax
        import jax.numpy as jnp

        from benchmarks.reference_shaped import right_padded

        out = []
        for start in range(0, len(items), size):
            batch = right_padded(items[start : start + size], self.layout)
            found = np.asarray(self.padded(self.state, jax.tree.map(jnp.array, batch)))
            ordered = np.empty_like(found)
            ordered[batch.slot[:, 0]] = found
            out.append(ordered)
        return np.concatenate(out)


def right_padded_apart(module, batch, compute):
    """Embeddings f32 [R, D] of a right-padded batch by any backbone, which need only be callable.

    Rows with images and rows without are run one after the other, all as long as the batch's
    longest: for one thread as much work as together.
    """
    import jax.numpy as jnp

    pictures = len(next(iter(batch.visual.values()))) if batch.visual else 0
    front = type(batch)(*(leaf[:pictures] for leaf in batch[:-1]), batch.visual)
    rest = type(batch)(*(leaf[pictures:] for leaf in batch[:-1]), {})
    parts = [part for part in (front, rest) if len(part.tokens)]
    return jnp.concatenate([module(part, compute)[:, 0] for part in parts])


def _sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(f"w{n}" for n in rng.integers(1, WORDS, words))
