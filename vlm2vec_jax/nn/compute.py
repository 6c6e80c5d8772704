# SPDX-License-Identifier: Apache-2.0
"""How a model computes, as opposed to what: dtype, attention kernel, rematerialisation.

Also the scan over stacked layers, where two of the three take effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm2vec_jax.parallel.sharding import is_cut, save_all_but_gathered

AttentionKind = Literal["auto", "xla", "dense", "cudnn", "triton", "splash"]
RematKind = Literal["none", "dots", "offload", "full"]

_Result = TypeVar("_Result")

ATTENTION = "attention"
"""Name of what an attention kernel's backward pass needs besides q, k and v."""
RESIDUAL = "residual"
"""Name of the residual stream in front of a layer."""


@dataclasses.dataclass(frozen=True)
class Compute:
    """Static choices of a compiled program (hashable).

    Attributes:
      dtype: of activations and of the weights inside a product; norms, softmax, rope and
        pooled embeddings are float32 whatever it says.
      attention: the kernel behind `nn.attention.attend`.
      remat: what the backward pass of a layer recomputes: `none`, nothing; `dots`, all but the
        products with weights and attention kernels; `full`, everything from the residual stream
        in front of the layer; `offload` too, but the stream waits in the host's memory.
      remat_vision: the same for the layers of the vision tower; None for `remat`.
    """

    dtype: str = "float32"
    attention: AttentionKind = "auto"
    remat: RematKind = "none"
    remat_vision: RematKind | None = None

    @property
    def vision(self) -> Compute:
        """How the vision tower computes."""
        return dataclasses.replace(self, remat=self.remat_vision or self.remat)


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
        if compute.remat == "offload":
            carry = checkpoint_name(carry, RESIDUAL)
        return body(carry, layer, layer_key), None

    if compute.remat != "none":
        step = jax.checkpoint(step, prevent_cse=False, policy=_policy(compute.remat))
    elif is_cut("fsdp"):
        # Else the backward pass would keep every layer's gathered weights.
        step = jax.checkpoint(step, prevent_cse=False, policy=save_all_but_gathered)
    return jax.lax.scan(step, x, (layers, keys))[0]


def _policy(remat: RematKind) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if remat == "full":
        return policies.nothing_saveable
    if remat == "dots":
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
        )
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    )


def apart(function: Callable[[], _Result]) -> _Result:
    """Run a function outside of any trace and ambient mesh that the caller is in."""
    with ThreadPoolExecutor(1) as pool:  # both belong to a thread
        return pool.submit(function).result()


def layer_at(layers: Any, index: int) -> Any:
    """One layer of a stack."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], layers)
