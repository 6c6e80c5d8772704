# SPDX-License-Identifier: Apache-2.0
"""A decoder over packed rows: scanned layers, the last one for pooled tokens only.

Wherever it is used it stands at `decoder` of the model. Axis legend: R rows, T tokens,
S sequences of a row, D model width, H width of a head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.models.shared.decoder_config import DecoderConfig
from vlm2vec_jax.nn.attention import Visibility, attend
from vlm2vec_jax.nn.compute import Compute, layer_at, scan_layers
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import RMSNorm
from vlm2vec_jax.nn.rope import rotate
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain, gathered

_LAYERS = r"decoder/(first|layers|last)"
RULES: list[tuple[str, P]] = [
    # Leading None: the axis of stacked layers, which `lax.scan` walks along.
    (_LAYERS + r"/(attn/(qkv|q|k|v)|mlp/(gate_up|gate|up))/kernel", P(None, "fsdp", "tensor")),
    (_LAYERS + r"/(attn/out|mlp/down)/kernel", P(None, "tensor", "fsdp")),
    (_LAYERS + r"/attn/(q|k|v|out)/bias", P()),
    (_LAYERS + r"/(input_norm|post_norm|attn/q_norm|attn/k_norm)/scale", P()),
    (r"decoder/norm/scale", P()),
]
"""Rules of the decoder for `parallel.sharding`."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of packed rows stand.

    Attributes:
      cos, sin: f32 [R, T, H].
      segments: i32 [R, T], 0 for padding.
      index: i32 [R, T], place in the row.
    """

    cos: jax.Array
    sin: jax.Array
    segments: jax.Array
    index: jax.Array

    def take(self, index: jax.Array) -> Places:
        """The places of some tokens, index i32 [R, S]."""
        return Places(
            *(jnp.take_along_axis(x, index[..., None], 1) for x in (self.cos, self.sin)),
            *(jnp.take_along_axis(x, index, 1) for x in (self.segments, self.index)),
        )


def places_of(batch, cos: jax.Array, sin: jax.Array) -> Places:
    """The places of a `PackedBatch` with its rotary angles [R, T, H]."""
    index = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    return Places(cos, sin, batch.segment_ids, index)


class Attention(nnx.Module):
    """Self-attention with rotary positions (HF: Phi3Attention, MistralAttention and the like)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_size
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.window = config.window
        d, bias = config.hidden_size, config.qkv_bias
        if config.fused:
            self.qkv = Linear(d, (heads + 2 * kv_heads) * width, bias=bias, rngs=rngs)
        else:
            self.q = Linear(d, heads * width, bias=bias, rngs=rngs)
            self.k = Linear(d, kv_heads * width, bias=bias, rngs=rngs)
            self.v = Linear(d, kv_heads * width, bias=bias, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(width, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.fused, self.qk_norm = config.fused, config.qk_norm
        self.out = Linear(heads * width, config.hidden_size, bias=config.out_bias, rngs=rngs)

    def _heads(self, x: jax.Array, queries, key) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q of the queries, k and v of all tokens, [R, T, heads, H] each."""
        shape = (*x.shape[:2], -1, self.width)
        if self.fused:
            qkv = self.qkv(x, key).reshape(shape)
            q, k, v = jnp.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
            if queries is not None:
                q = jnp.take_along_axis(q, queries[..., None, None], 1)
            return q, k, v
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        asking = x if queries is None else jnp.take_along_axis(x, queries[..., None], 1)
        q = self.q(asking, keys[0]).reshape(*asking.shape[:2], -1, self.width)
        return q, self.k(x, keys[1]).reshape(shape), self.v(x, keys[2]).reshape(shape)

    def __call__(self, x, places: Places, queries, compute: Compute, key) -> jax.Array:
        """Attend; x [R, T, D] gives keys; queries i32 [R, S], or None for all tokens."""
        qkv_key, out_key = (None, None) if key is None else jax.random.split(key)
        rows, tokens, _ = x.shape
        q, k, v = self._heads(x, queries, qkv_key)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        k = rotate(k, places.cos, places.sin)
        q_places = places if queries is None else places.take(queries)
        q = rotate(q, q_places.cos, q_places.sin)
        window = self.window if self.window is not None and self.window < tokens else None
        index = None if queries is None else q_places.index
        seen = Visibility(q_places.segments, places.segments, True, index, window)
        y = attend(q, k, v, seen, implementation=compute.attention)
        return self.out(y.reshape(rows, q.shape[1], -1), out_key)


class Mlp(nnx.Module):
    """down(up * silu(gate)); fused, gate comes first (HF: Phi3MLP, MistralMLP)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.mlp_size
        self.fused = config.fused
        if config.fused:
            self.gate_up = Linear(d, 2 * f, bias=False, rngs=rngs)
        else:
            self.gate = Linear(d, f, bias=False, rngs=rngs)
            self.up = Linear(d, f, bias=False, rngs=rngs)
        self.down = Linear(f, d, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply to x [..., D]."""
        up_key, down_key = (None, None) if key is None else jax.random.split(key)
        if self.fused:
            gate, up = jnp.split(self.gate_up(x, up_key), 2, axis=-1)
        else:
            first, second = (None, None) if up_key is None else jax.random.split(up_key)
            gate, up = self.gate(x, first), self.up(x, second)
        return self.down(up * jax.nn.silu(gate), down_key)


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.post_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x, places: Places, compute: Compute, *, queries=None, key=None) -> jax.Array:
        """Run on x [R, T, D]; with queries i32 [R, S] only those tokens come out."""
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        attended = self.attn(self.input_norm(x), places, queries, compute, attn_key)
        if queries is not None:
            x = jnp.take_along_axis(x, queries[..., None], 1)
        x = x + attended
        return x + self.mlp(self.post_norm(x), mlp_key)


class Decoder(nnx.Module):
    """All layers and the final norm.

    The layers are stacked as `DecoderConfig.stacks` says. `last` is a stack of one, kept apart
    because it runs for the pooled tokens only and slicing one big stack would copy it.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.stacks = tuple(config.stacks)
        for name, (start, end) in self.stacks:
            setattr(self, name, _stack(config, end - start, rngs))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x, places: Places, pool_index, compute: Compute, key=None, deep=None
    ) -> jax.Array:
        """Post-norm hidden states [R, S, D] of the tokens pool_index [R, S].

        Args:
          x: [R, T, D].
          places: of the same rows.
          pool_index: the tokens that are wanted.
          compute: how to compute.
          key: dropout key of adapters, or None.
          deep: [N, R, T, D], added to the outputs of the first N layers (DeepStack, Meng et al.,
            arXiv 2406.04334); None for nothing.
        """
        keys = (None,) * 2 if key is None else tuple(jax.random.split(key))

        def run(name):
            def body(x, layer, layer_key):
                layer, extra = layer
                layer = gathered(layer, f"decoder/{name}", RULES, stacked=True)
                x = constrain(layer(constrain(x, ROWS), places, compute, key=layer_key), ROWS)
                return x if extra is None else x + extra

            return body

        def last(x, layer, layer_key):
            layer = gathered(layer, "decoder/last", RULES, stacked=True)
            x = layer(constrain(x, ROWS), places, compute, queries=pool_index, key=layer_key)
            return constrain(x, ROWS)

        for name, (start, end) in self.stacks[:-1]:
            extra = deep[start:end] if deep is not None and name == "first" else None
            # Dropout draws of a model without `first` stay what they were.
            own = keys[0] if name == "layers" or keys[0] is None else jax.random.fold_in(keys[0], 1)
            stack = (getattr(self, name), extra)
            x = scan_layers(run(name), x, stack, compute=compute, key=own)
        if compute.remat != "none":
            last = jax.checkpoint(last, prevent_cse=False)
        x = last(x, layer_at(self.last, 0), keys[1])
        index = self.stacks[-1][1][0]
        if deep is not None and index < len(deep):
            x = x + jnp.take_along_axis(deep[index], pool_index[..., None], 1)
        return self.norm(x)

    def hidden_states(self, x, places: Places, compute: Compute, deep=None) -> list[jax.Array]:
        """The residual stream [R, T, D] after every layer, before `deep` is added: for tests."""
        states = []
        for name, (start, end) in self.stacks:
            for index in range(start, end):
                x = layer_at(getattr(self, name), index - start)(x, places, compute)
                states.append(x)
                if deep is not None and index < len(deep):
                    x = x + deep[index]
        return states


def _stack(config: DecoderConfig, depth: int, rngs: nnx.Rngs) -> Block:
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
