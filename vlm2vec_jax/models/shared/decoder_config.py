# SPDX-License-Identifier: Apache-2.0
"""Sizes of a decoder (Phi-3, Mistral, Llama, Qwen), and what it costs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What the layers need to know; positions are the caller's.

    Attributes:
      hidden_size: D.
      mlp_size: width inside the gated MLP.
      num_layers: how many.
      num_heads: of queries.
      num_kv_heads: of keys and values; divides `num_heads`.
      head_size: H, which need not be D / heads.
      rms_norm_eps: of every norm.
      window: how many tokens back a query sees beside itself; None for all of its sequence.
      fused: q, k, v in one kernel, and gate and up in one (Phi-3).
      qkv_bias: biases on q, k and v.
      out_bias: a bias on the attention's output projection.
      qk_norm: RMSNorm on each head of q and k before rotation.
      deepstack: to the outputs of how many first layers visual features are added.
    """

    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    window: int | None = None
    fused: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    deepstack: int = 0

    @property
    def stacks(self) -> list[tuple[str, tuple[int, int]]]:
        """Names of the stacks of layers, each with its first layer and the one behind its last.

        `first` gets visual features, `last` runs for pooled tokens only, `layers` is the rest.
        """
        end = self.num_layers - 1
        first = min(self.deepstack, end)
        stacks = [("first", (0, first)), ("layers", (first, end)), ("last", (end, end + 1))]
        return [(name, span) for name, span in stacks if span[0] < span[1]]


def stack_values(
    layers: int, remat: str, *, width: int, attended: int, products: int, elementwise: int
) -> float:
    """Values of a token that a stack of layers keeps on the device for its backward pass.

    A layer that is recomputed has all of its values while its own backward pass runs. What
    attention keeps for each pair of tokens is not counted (none, with a flash kernel).

    Args:
      layers: how many.
      remat: see `nn.compute.Compute`.
      width: of the residual stream.
      attended: of the attention's output.
      products: widths of all products with weights.
      elementwise: widths of what lies between them, and is the input of something.
    """
    kept = {
        "offload": 0,  # the stream itself waits in the host's memory
        "full": width,
        "dots": width + attended + products,
        "none": width + attended + products + elementwise,
    }
    return layers * kept[remat] + (kept["none"] if remat != "none" else 0)


def decoder_values(config: DecoderConfig, remat: str) -> float:
    """Values of a token that all layers keep, and one while it is recomputed: `layer_values`."""
    d, f = config.hidden_size, config.mlp_size
    heads, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return stack_values(
        config.num_layers,
        remat,
        width=d,
        attended=heads,
        products=heads + 2 * kv + d + 2 * f + d,
        # Two norms, the stream between attention and MLP, rotated q and k, silu and its product.
        elementwise=3 * d + heads + kv + 2 * f,
    )


def decoder_flops(config: DecoderConfig, tokens: int) -> float:
    """FLOPs that one sequence's embedding needs: the last layer for the last token only.

    A multiply and an add are two FLOPs; norms, rotary positions and softmax are not counted.
    """
    d, f = config.hidden_size, config.mlp_size
    heads, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    query = 2 * d * heads + 2 * heads * d + 2 * d * 2 * f + 2 * f * d
    keys_values = 2 * d * 2 * kv
    seen = tokens if config.window is None else min(tokens, config.window + 1)
    # A token sees those before it, at most `seen`: q k^T and the sum of values, 2 FLOPs each.
    pairs = seen * (seen + 1) / 2 + (tokens - seen) * seen
    layer = tokens * (query + keys_values) + 4 * heads * pairs
    last = query + tokens * keys_values + 4 * heads * seen
    return (config.num_layers - 1) * layer + last
