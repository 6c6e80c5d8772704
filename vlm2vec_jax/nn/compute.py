# SPDX-License-Identifier: Apache-2.0
"""How a model computes, as opposed to what: dtype, attention kernel, rematerialisation.

Also the scan over stacked layers, where two of the three take effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vlm2vec_jax.parallel.sharding import is_cut, save_all_but_gathered

AttentionKind = Literal["auto", "xla", "cudnn", "splash"]
RematKind = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Compute:
    """Static choices of a compiled program (hashable).

    Attributes:
      dtype: of activations and of the weights inside a product; norms, softmax, rope and
        pooled embeddings are float32 whatever it says.
      attention: the kernel behind `nn.attention.attend`.
      remat: what the backward pass of a layer recomputes: nothing, all but the products with
        weights, or everything.
    """

    dtype: str = "float32"
    attention: AttentionKind = "auto"
    remat: RematKind = "none"


def scan_layers(
    body: Callable[[jax.Array, Any, jax.Array | None], jax.Array],
    x: jax.Array,
    layers: Any,
    *,
    compute: Compute,
    key: jax.Array | None = None,
) -> jax.Array:
    """Run `x = body(x, layer, key)` over a stack of layers, compiled once for any depth.

    Args:
      body: one layer; gets a slice of `layers` without the leading axis.
      x: the residual stream.
      layers: a module whose leaves lead with L.
      compute: says what is rematerialised.
      key: dropout key, or None for none; each layer gets its own.
    """
    depth = jax.tree.leaves(layers)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def step(carry, scanned):
        layer, layer_key = scanned
        return body(carry, layer, layer_key), None

    if compute.remat != "none":
        policy = {
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            "full": jax.checkpoint_policies.nothing_saveable,
        }[compute.remat]
        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    elif is_cut("fsdp"):
        # Else the backward pass would keep every layer's gathered weights.
        step = jax.checkpoint(step, prevent_cse=False, policy=save_all_but_gathered)
    return jax.lax.scan(step, x, (layers, keys))[0]


def layer_at(layers: Any, index: int) -> Any:
    """One layer of a stack."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], layers)
