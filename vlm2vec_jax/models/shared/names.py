# SPDX-License-Identifier: Apache-2.0
"""Building blocks of name tables: linear layers, norms, a CLIP tower."""

from __future__ import annotations

from vlm2vec_jax.models.shared.decoder_config import DecoderConfig
from vlm2vec_jax.weights.rules import Rule

TRANSPOSED = (1, 0)
"""Linear: HF [out, in] to ours [in, out]."""
CONVOLUTION = (2, 3, 1, 0)
"""Convolution: HF [out, in, kh, kw] to ours [kh, kw, in, out]."""

Span = tuple[int, int]


def linear(hf: str, ours: str, layers: Span | None = None, *, bias: bool = True) -> list[Rule]:
    """The kernel, and the bias if there is one, of a `nn.linear.Linear`."""
    rules = [Rule(f"{hf}.weight", f"{ours}/kernel", TRANSPOSED, layers)]
    return rules + [Rule(f"{hf}.bias", f"{ours}/bias", layers=layers)] * bias


def norm(hf: str, ours: str, layers: Span | None = None, *, bias: bool = True) -> list[Rule]:
    """Scale, and bias of a LayerNorm."""
    rules = [Rule(f"{hf}.weight", f"{ours}/scale", layers=layers)]
    return rules + [Rule(f"{hf}.bias", f"{ours}/bias", layers=layers)] * bias


def clip(hf: str, ours: str, *, used: int, layers: int) -> list[Rule]:
    """A CLIP tower (HF: CLIPVisionTransformer) split at the layer whose output is used.

    Layers that run are stacked in `layers`, those behind it in `unused_layers`, so that they keep
    their place in a checkpoint without costing a step.

    Args:
      hf: name of the tower, up to `embeddings`, `encoder` and so on.
      ours: path of the module `shared.clip.Clip`.
      used: how many layers run.
      layers: how many there are.
    """
    rules = [
        Rule(f"{hf}.embeddings.class_embedding", f"{ours}/class_embedding"),
        Rule(f"{hf}.embeddings.patch_embedding.weight", f"{ours}/patch/kernel", CONVOLUTION),
        Rule(f"{hf}.embeddings.position_embedding.weight", f"{ours}/position_embedding"),
        # The missing letter is Hugging Face's.
        *norm(f"{hf}.pre_layrnorm", f"{ours}/pre_norm"),
    ]
    spans = [("layers", (0, used))] + [("unused_layers", (used, layers))] * (used < layers)
    for name, span in spans:
        layer = f"{hf}.encoder.layers.{{l}}"
        rules += norm(f"{layer}.layer_norm1", f"{ours}/{name}/norm1", span)
        for part in ("q", "k", "v", "out"):
            rules += linear(f"{layer}.self_attn.{part}_proj", f"{ours}/{name}/attn/{part}", span)
        rules += norm(f"{layer}.layer_norm2", f"{ours}/{name}/norm2", span)
        for part in ("fc1", "fc2"):
            rules += linear(f"{layer}.mlp.{part}", f"{ours}/{name}/mlp/{part}", span)
    return rules + norm(f"{hf}.post_layernorm", f"{ours}/post_norm")


def decoder(hf: str, config: DecoderConfig) -> list[Rule]:
    """A decoder at `decoder`, its final norm included; stacked as `DecoderConfig.stacks` says.

    Args:
      hf: name of the text model, up to `layers` and `norm`.
      config: which tensors there are.
    """
    attention = ("qkv",) if config.fused else ("q", "k", "v")
    gates = ("gate_up",) if config.fused else ("gate", "up")
    rules = []
    for name, span in config.stacks:
        layer, ours = f"{hf}.layers.{{l}}", f"decoder/{name}"
        rules += norm(f"{layer}.input_layernorm", f"{ours}/input_norm", span, bias=False)
        for part in attention:
            path = f"{layer}.self_attn.{part}_proj"
            rules += linear(path, f"{ours}/attn/{part}", span, bias=config.qkv_bias)
        for part in ("q", "k") * config.qk_norm:
            path = f"{layer}.self_attn.{part}_norm"
            rules += norm(path, f"{ours}/attn/{part}_norm", span, bias=False)
        path = f"{layer}.self_attn.o_proj"
        rules += linear(path, f"{ours}/attn/out", span, bias=config.out_bias)
        rules += norm(f"{layer}.post_attention_layernorm", f"{ours}/post_norm", span, bias=False)
        for part in (*gates, "down"):
            rules += linear(f"{layer}.mlp.{part}_proj", f"{ours}/mlp/{part}", span, bias=False)
    return rules + norm(f"{hf}.norm", "decoder/norm", bias=False)
