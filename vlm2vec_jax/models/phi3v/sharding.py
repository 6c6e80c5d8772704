# SPDX-License-Identifier: Apache-2.0
"""Where the parameters of a Phi-3-Vision model live on a (data, fsdp, tensor) mesh.

Kernels are [in, out]. `fsdp` cuts the input dimension of those that widen (and of the projector
and CLIP likewise); `tensor` cuts their output, and the input of the kernels that lead back into
the residual stream (there `fsdp` takes the output, as one dimension is enough for each axis).
Vectors and the adapters are whole on every chip: adapters are small, and their gradients are then
the only thing to be reduced.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec as P

from vlm2vec_jax.models.shared import clip
from vlm2vec_jax.parallel.sharding import gathered

# Leading None: the axis of stacked layers, which `lax.scan` walks along.
_WIDEN = P(None, "fsdp", "tensor")
_NARROW = P(None, "tensor", "fsdp")

RULES: list[tuple[str, P]] = [
    (r".*/(lora_a|lora_b|magnitude)", P()),
    # Both tables that touch the vocabulary are cut on D only (embed), on D and V (head).
    (r"embed/table", P(None, "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"decoder/(layers|last)/(attn/qkv|mlp/gate_up)/kernel", _WIDEN),
    (r"decoder/(layers|last)/(attn/out|mlp/down)/kernel", _NARROW),
    (r"decoder/(layers|last)/(input_norm|post_norm)/scale", P()),
    (r"decoder/norm/scale", P()),
    *clip.RULES,
    (r"vision/projector/fc1/kernel", P("fsdp", "tensor")),
    (r"vision/projector/fc2/kernel", P("tensor", "fsdp")),
    (r"vision/projector/fc[12]/bias", P()),
    (r"vision/(newline|separator)", P()),
]
"""Rules for the tree of `models/phi3v`, for `vlm2vec_jax.parallel.sharding`."""


def whole(module: Any, path: str) -> Any:
    """A part of the model (not of a stack) with its weights gathered over `fsdp`."""
    return gathered(module, path, RULES)


def whole_layer(layer: Any, stack: str) -> Any:
    """One layer out of a stack, with its weights gathered over `fsdp`."""
    return gathered(layer, stack, RULES, stacked=True)
