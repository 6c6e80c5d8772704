# SPDX-License-Identifier: Apache-2.0
"""Small parts: token vectors, and the projector between vision tower and decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain, gathered

RULES: list[tuple[str, P]] = [
    (r".*/(lora_a|lora_b|magnitude)", P()),
    # Both tables that touch the vocabulary are cut on D only (embed), on D and V (head).
    (r"embed/table", P(None, "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"vision/projector/fc1/kernel", P("fsdp", "tensor")),
    (r"vision/projector/fc2/kernel", P("tensor", "fsdp")),
    (r"vision/projector/fc[12]/bias", P()),
]
"""Rules of these parts where they stand at `embed`, `lm_head` and `vision/projector`, and of
adapters, for `parallel.sharding`."""


class Embedding(nnx.Module):
    """Token vectors [V, D]; the padding token's row gets no gradient (torch: padding_idx)."""

    def __init__(self, size: int, width: int, *, pad: int | None, rngs: nnx.Rngs):
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (size, width)))
        self.pad = pad

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Vectors [R, T, D] of tokens i32 [R, T]."""
        x = constrain(gathered(self.table[...], "embed/table", RULES)[tokens], ROWS)
        if self.pad is None:
            return x
        return jnp.where((tokens == self.pad)[..., None], jax.lax.stop_gradient(x), x)


class Projector(nnx.Module):
    """Linear, exact GELU, Linear (HF: img_projection, multi_modal_projector)."""

    def __init__(self, din: int, dout: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.fc1 = Linear(din, dout, bias=bias, rngs=rngs)
        self.fc2 = Linear(dout, dout, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Project x [R, F, C] to [R, F, D]."""
        first, second = (None, None) if key is None else jax.random.split(key)
        own = gathered(self, "vision/projector", RULES)
        y = own.fc2(jax.nn.gelu(own.fc1(x, first), approximate=False), second)
        return constrain(y, ROWS)


def put_features(x: jax.Array, table: jax.Array, feature_index: jax.Array) -> jax.Array:
    """Token vectors with visual features in their places.

    Args:
      x: [R, T, D].
      table: [R, F, D], each row's visual feature table.
      feature_index: i32 [R, T]; -1 keeps the token's vector.
    """
    index = jnp.maximum(feature_index, 0)[..., None]
    features = jnp.take_along_axis(table, index, axis=1)
    return constrain(jnp.where((feature_index >= 0)[..., None], features, x), ROWS)
