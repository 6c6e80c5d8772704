# SPDX-License-Identifier: Apache-2.0
"""Writes a small untrained Phi-3.5-Vision model as an HF folder, to be trained from scratch.

    python -m vlm2vec_jax.models.phi3v.mini --data DIR --output DIR --seed 0 [--hidden_size 128 ...]

Every piece of the real architecture is there, only smaller: the same parameter names, HD transform,
rope scaling and kind of tokenizer (byte-fallback BPE, `<s>` in front), trained on the texts of an
MMEB-train folder. The CLIP tower's size stands in `vision_config` of config.json. No jax.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.models.phi3v.mini_tokenizer import (
    SPECIAL_TOKENS,
    build_tokenizer,
    named_tokens,
    tokenizer_config,
)
from vlm2vec_jax.models.shared.mini import check_output, command, training_texts, write_model

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class MiniSizes:
    """Sizes of the small model; each is a flag of the command line.

    Attributes:
      hidden_size: decoder width D.
      intermediate_size: decoder MLP width.
      layers: decoder layers.
      heads: attention heads; `kv_heads` of them with keys and values of their own.
      kv_heads: key/value heads.
      vision_size: CLIP width C.
      vision_intermediate: CLIP MLP width.
      vision_layers: CLIP layers; the last one is not used, as in the real model.
      vision_heads: CLIP attention heads.
      image_size: crop size in pixels, a multiple of twice the patch size.
      patch_size: patch size in pixels.
      num_crops: local crops at most.
      pieces: tokenizer pieces at most, 259 of them bytes and specials.
    """

    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    vision_size: int = 128
    vision_intermediate: int = 256
    vision_layers: int = 4
    vision_heads: int = 4
    image_size: int = 56
    patch_size: int = 14
    num_crops: int = 1
    pieces: int = 1000

    @property
    def image_tokens(self) -> int:
        """Tokens of one crop: its patches after the 2 x 2 merge."""
        return (self.image_size // self.patch_size // 2) ** 2

    def check(self) -> None:
        """Raise a `UserError` that lists all sizes that do not fit together."""
        problems = [
            f"{name} is {value}, it must be positive"
            for name, value in dataclasses.asdict(self).items()
            if value < 1
        ]
        if not problems:
            if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
                problems.append("hidden_size / heads must be an even whole number")
            if self.heads % self.kv_heads:
                problems.append("heads must be a multiple of kv_heads")
            if self.vision_size % self.vision_heads:
                problems.append("vision_size must be a multiple of vision_heads")
            if self.vision_layers < 2:
                problems.append("vision_layers must be at least 2: the last one is not used")
            if self.image_size % (2 * self.patch_size):
                problems.append("image_size must be a multiple of twice the patch_size")
            if self.pieces < 400:
                problems.append("pieces must be at least 400: 259 bytes, then the characters")
        raise_problems("The sizes of the small model", problems)


def write_mini_model(
    data: str | Path,
    output: str | Path,
    seed: int = 0,
    sizes: MiniSizes | None = None,
    *,
    force: bool = False,
) -> dict:
    """Write the untrained model, or leave it alone if it is there with the same settings.

    Args:
      data: folder of mini-MMEB (or its `train` part) whose texts the tokenizer learns.
      output: the HF folder to write.
      seed: of the random weights.
      sizes: the model's sizes; None for the defaults.
      force: overwrite the files of another model in `output`.

    Returns:
      The manifest: settings, number of parameters and of tokenizer pieces.

    Raises:
      UserError: for sizes that do not fit, a folder without training texts, or a non-empty
        `output` that is another model.
    """
    sizes = sizes or MiniSizes()
    sizes.check()
    output = Path(output)
    tokenizer = build_tokenizer(training_texts(data), sizes.pieces)
    pieces = len(tokenizer["model"]["vocab"])
    vocab = -(-(pieces + len(SPECIAL_TOKENS)) // 64) * 64
    wanted = {"seed": seed, "sizes": dataclasses.asdict(sizes), "pieces": pieces}
    check_output(output, wanted, tokenizer, force=force)
    files = {
        "config.json": model_config(sizes, vocab, pieces),
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": pieces,
        },
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "image_mean": list(CLIP_MEAN),
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": list(CLIP_STD),
            "num_crops": sizes.num_crops,
            "num_img_tokens": sizes.image_tokens,
            "processor_class": "Phi3VProcessor",
        },
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config(pieces),
        "special_tokens_map.json": named_tokens(),
    }
    weights = random_weights(sizes, vocab, seed)
    return write_model(output, files, weights, {**wanted, "vocab_size": vocab})


def model_config(sizes: MiniSizes, vocab: int, pieces: int) -> dict:
    """Return config.json as `phi3_v` writes it, with the CLIP tower's sizes in `vision_config`."""
    half = sizes.hidden_size // sizes.heads // 2
    return {
        "architectures": ["Phi3VForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "img_processor": {
            "image_dim_out": sizes.vision_size,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": sizes.image_tokens,
        },
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": 4096,
        "model_type": "phi3_v",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "original_max_position_embeddings": 512,
        "pad_token_id": pieces,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [round(1.0 + k / half, 4) for k in range(half)],
            "short_factor": [round(1.0 + 0.1 * k / half, 4) for k in range(half)],
            "type": "su",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "quick_gelu",
            "hidden_size": sizes.vision_size,
            "image_size": sizes.image_size,
            "intermediate_size": sizes.vision_intermediate,
            "layer_norm_eps": 1e-05,
            "model_type": "clip_vision_model",
            "num_attention_heads": sizes.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": sizes.vision_layers,
            "patch_size": sizes.patch_size,
        },
        "vocab_size": vocab,
    }


def random_weights(sizes: MiniSizes, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Draw float32 weights under the names and in the shapes of the real checkpoint.

    Matrices are normal with 1/sqrt(fan_in), those that write into a residual stream smaller by
    sqrt(2 layers), so that depth does not swell the stream; norms start at one, biases at zero.
    Embeddings of text and image start at about the same size.
    """
    rng = np.random.default_rng([seed, 3])
    d, f, c, vf = (
        sizes.hidden_size, sizes.intermediate_size, sizes.vision_size, sizes.vision_intermediate,
    )  # fmt: skip
    kv = d // sizes.heads * sizes.kv_heads
    residual, vision_residual = (2 * sizes.layers) ** -0.5, (2 * sizes.vision_layers) ** -0.5
    weights: dict[str, np.ndarray] = {}

    def normal(name: str, shape: tuple[int, ...], std: float) -> None:
        weights[name] = rng.normal(0.0, std, shape).astype(np.float32)

    def matrix(name: str, out: int, into: int, gain: float = 1.0) -> None:
        normal(f"{name}.weight", (out, into), gain / math.sqrt(into))

    def constant(name: str, size: int, value: float) -> None:
        weights[name] = np.full(size, value, np.float32)

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> None:
        matrix(name, out, into, gain)
        constant(f"{name}.bias", out, 0.0)

    def layer_norm(name: str) -> None:
        constant(f"{name}.weight", c, 1.0)
        constant(f"{name}.bias", c, 0.0)

    normal("model.embed_tokens.weight", (vocab, d), 0.2)
    for k in range(sizes.layers):
        layer = f"model.layers.{k}"
        constant(f"{layer}.input_layernorm.weight", d, 1.0)
        matrix(f"{layer}.self_attn.qkv_proj", d + 2 * kv, d)
        matrix(f"{layer}.self_attn.o_proj", d, d, residual)
        constant(f"{layer}.post_attention_layernorm.weight", d, 1.0)
        matrix(f"{layer}.mlp.gate_up_proj", 2 * f, d)
        matrix(f"{layer}.mlp.down_proj", d, f, residual)
    constant("model.norm.weight", d, 1.0)
    matrix("lm_head", vocab, d)

    vision = "model.vision_embed_tokens"
    normal(f"{vision}.sub_GN", (1, 1, 1, 4 * c), 0.2)
    normal(f"{vision}.glb_GN", (1, 1, 4 * c), 0.2)
    linear(f"{vision}.img_projection.0", d, 4 * c)
    linear(f"{vision}.img_projection.2", d, d, 0.5)
    clip = f"{vision}.img_processor.vision_model"
    p = sizes.patch_size
    normal(f"{clip}.embeddings.class_embedding", (c,), 0.3)
    normal(f"{clip}.embeddings.patch_embedding.weight", (c, 3, p, p), 1 / math.sqrt(3 * p * p))
    normal(
        f"{clip}.embeddings.position_embedding.weight", ((sizes.image_size // p) ** 2 + 1, c), 0.3
    )
    layer_norm(f"{clip}.pre_layrnorm")  # the real checkpoint's spelling
    for k in range(sizes.vision_layers):
        layer = f"{clip}.encoder.layers.{k}"
        layer_norm(f"{layer}.layer_norm1")
        for name in ("q_proj", "k_proj", "v_proj"):
            linear(f"{layer}.self_attn.{name}", c, c)
        linear(f"{layer}.self_attn.out_proj", c, c, vision_residual)
        layer_norm(f"{layer}.layer_norm2")
        linear(f"{layer}.mlp.fc1", vf, c)
        linear(f"{layer}.mlp.fc2", c, vf, vision_residual)
    layer_norm(f"{clip}.post_layernorm")
    return weights


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command(argv, __doc__, "phi3_v", write_mini_model, MiniSizes)


if __name__ == "__main__":
    sys.exit(main())
