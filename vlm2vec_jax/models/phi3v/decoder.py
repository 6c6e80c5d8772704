# SPDX-License-Identifier: Apache-2.0
"""The Phi-3 decoder over packed rows: scanned layers, the last one for pooled tokens only."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.phi3v.sharding import whole_layer
from vlm2vec_jax.nn.attention import Visibility, attend
from vlm2vec_jax.nn.compute import Compute, layer_at, scan_layers
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import RMSNorm
from vlm2vec_jax.nn.rope import cos_sin, inverse_frequencies, rotate
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain

RopeTable = Literal["auto", "short", "long"]
"""`auto` chooses by each sequence's own length; the others force a table (tests of goldens)."""


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


class Attention(nnx.Module):
    """Self-attention with fused q, k, v and rotary positions (HF: Phi3Attention)."""

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_size
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.window = config.sliding_window
        self.qkv = Linear(config.hidden_size, (heads + 2 * kv_heads) * width, bias=False, rngs=rngs)
        self.out = Linear(heads * width, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x, places: Places, queries, compute: Compute, key) -> jax.Array:
        """Attend; x [R, T, D] gives keys; queries i32 [R, S], or None for all tokens."""
        qkv_key, out_key = (None, None) if key is None else jax.random.split(key)
        rows, tokens, _ = x.shape
        qkv = self.qkv(x, qkv_key)
        q, k, v = jnp.split(
            qkv.reshape(rows, tokens, -1, self.width),
            [self.heads, self.heads + self.kv_heads],
            axis=2,
        )
        k = rotate(k, places.cos, places.sin)
        q_places = places
        if queries is not None:
            q = jnp.take_along_axis(q, queries[..., None, None], 1)
            q_places = places.take(queries)
        q = rotate(q, q_places.cos, q_places.sin)
        window = self.window if self.window is not None and self.window < tokens else None
        seen = Visibility(q_places.segments, places.segments, q_places.index, window)
        y = attend(q, k, v, seen, implementation=compute.attention)
        return self.out(y.reshape(rows, q.shape[1], -1), out_key)


class Mlp(nnx.Module):
    """down(up * silu(gate)) with gate and up fused, gate first (HF: Phi3MLP)."""

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
        self.gate_up = Linear(config.hidden_size, 2 * config.mlp_size, bias=False, rngs=rngs)
        self.down = Linear(config.mlp_size, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply to x [..., D]."""
        up_key, down_key = (None, None) if key is None else jax.random.split(key)
        gate, up = jnp.split(self.gate_up(x, up_key), 2, axis=-1)
        return self.down(up * jax.nn.silu(gate), down_key)


class Block(nnx.Module):
    """One decoder layer (HF: Phi3DecoderLayer)."""

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
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

    `layers` stacks all but the last; `last` is a stack of one, kept apart because it runs for
    the pooled tokens only and slicing one big stack would copy it.
    """

    def __init__(self, config: Phi3VConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.num_layers > 1:
            self.layers = _stack(config, config.num_layers - 1, rngs)
        self.last = _stack(config, 1, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def places(self, batch, rope_table: RopeTable = "auto") -> Places:
        """Rotary angles and segments of a `PackedBatch`.

        The rope table follows each sequence's own length, not the longest of the batch as in
        the reference: an embedding must not depend on its neighbours.
        """
        config, rope = self.config, self.config.rope
        short = inverse_frequencies(config.head_size, rope.theta, rope.short_factor)
        long = inverse_frequencies(config.head_size, rope.theta, rope.long_factor)
        if rope_table == "auto":
            last = jnp.take_along_axis(batch.positions, batch.pool_index, 1)
            lengths = jnp.where(batch.slot >= 0, last + 1, 0)
            owner = jnp.maximum(batch.segment_ids - 1, 0)
            is_long = jnp.take_along_axis(lengths, owner, 1) > rope.original_max_position_embeddings
            frequencies = jnp.where(is_long[..., None], long, short)
        else:
            frequencies = jnp.asarray(long if rope_table == "long" else short)
        cos, sin = cos_sin(batch.positions, frequencies, rope.attention_scale)
        index = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
        return Places(cos, sin, batch.segment_ids, index)

    def __call__(self, x, places: Places, pool_index, compute: Compute, key=None) -> jax.Array:
        """Post-norm hidden states [R, S, D] of the tokens pool_index [R, S]; x [R, T, D]."""
        stack_key, last_key = (None, None) if key is None else jax.random.split(key)

        def body(x, layer, layer_key):
            layer = whole_layer(layer, "decoder/layers")
            return constrain(layer(constrain(x, ROWS), places, compute, key=layer_key), ROWS)

        def last(x, layer, layer_key):
            layer = whole_layer(layer, "decoder/last")
            x = layer(constrain(x, ROWS), places, compute, queries=pool_index, key=layer_key)
            return constrain(x, ROWS)

        if self.config.num_layers > 1:
            x = scan_layers(body, x, self.layers, compute=compute, key=stack_key)
        if compute.remat != "none":
            last = jax.checkpoint(last, prevent_cse=False)
        return self.norm(last(x, layer_at(self.last, 0), last_key))

    def hidden_states(self, x, places: Places, compute: Compute) -> list[jax.Array]:
        """The residual stream [R, T, D] after every layer (not the final norm): for tests."""
        states = []
        for index in range(self.config.num_layers):
            stack, at = self.layers, index
            if index == self.config.num_layers - 1:
                stack, at = self.last, 0
            x = layer_at(stack, at)(x, places, compute)
            states.append(x)
        return states


def _stack(config: Phi3VConfig, depth: int, rngs: nnx.Rngs) -> Block:
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
