# SPDX-License-Identifier: Apache-2.0
"""Where the parameters of a Phi-3-Vision model live on a (data, fsdp, tensor) mesh.

Kernels are [in, out]. `fsdp` cuts the input dimension of those that widen (and of the projector
and CLIP likewise); `tensor` cuts their output, and the input of the kernels that lead back into
the residual stream (there `fsdp` takes the output, as one dimension is enough for each axis).
Vectors and the adapters are whole on every chip: adapters are small, and their gradients are then
the only thing to be reduced.
"""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

from vlm2vec_jax.models.shared import clip, decoder, parts

RULES: list[tuple[str, P]] = [
    *parts.RULES,
    *decoder.RULES,
    *clip.RULES,
    (r"vision/(newline|separator)", P()),
]
"""Rules for the tree of `models/phi3v`, for `vlm2vec_jax.parallel.sharding`."""
