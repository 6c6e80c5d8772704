# SPDX-License-Identifier: Apache-2.0
"""Narrow weights for inference: the kernels of linear layers in 8 bits, everything else as it is.

Symmetric, a scale per output column: W[:, j] is about Q[:, j] * s[j], with s[j] such that the
largest magnitude of the column is the type's largest. A product is x Q computed in x's type,
where Q is exact, then times s; activations are not rounded. So memory, and on an accelerator the
time to read the weights, is half of bfloat16's; the arithmetic stays what it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.nn.linear import KernelScale, linears

Quantization = Literal["int8", "fp8"]
TYPES: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""Name of the option -> type of the kernels."""


def check(kind: str | None) -> None:
    """Refuse what is no quantization.

    Raises:
      UserError: naming those that there are.
    """
    if kind is not None and kind not in TYPES:
        raise UserError(f"quantize {kind!r} is not known; known: {', '.join(TYPES)}")


def quantized(kernel: jax.Array, kind: Quantization) -> tuple[jax.Array, jax.Array]:
    """A kernel and its scales.

    Args:
      kernel: [..., in, out], any floating-point type.
      kind: see `TYPES`.

    Returns:
      [..., in, out] of the narrow type and f32 [..., out]. Each element is off by at most half a
      step: int8 half a scale, fp8 (e4m3) a sixteenth of its own magnitude.
    """
    dtype = TYPES[kind]
    largest = float(jnp.iinfo(dtype).max if kind == "int8" else jnp.finfo(dtype).max)
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2) / largest
    scale = jnp.where(scale > 0, scale, 1.0)  # a column of zeros
    ratio = wide / scale[..., None, :]
    if kind == "int8":
        ratio = jnp.round(ratio)
    # Division may round past the largest, which float8 would turn into NaN.
    return jnp.clip(ratio, -largest, largest).astype(dtype), scale


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes of the kernels of all linear layers, over all devices, before and after."""

    before: int
    after: int

    def words(self, kind: Quantization) -> str:
        """A sentence for the user."""
        told = (
            f"linear layers in {kind}: {self.before / 1e9:.3g} GB of weights became "
            f"{self.after / 1e9:.3g} GB"
        )
        if kind == "fp8" and not has_float8(jax.local_devices()[0]):
            told += "; this device computes nothing in float8, so it gains memory and no time"
        return told


def has_float8(device: jax.Device) -> bool:
    """Whether a device multiplies float8 (NVIDIA from compute capability 8.9, TPUs from v7)."""
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None:
        return float(capability) >= 8.9
    return device.platform == "tpu" and device.device_kind.lower().startswith("tpu7")


def quantize(model: nnx.Module, kind: Quantization) -> Saved:
    """Make the kernels of all linear layers narrow, in place and one after the other.

    Adapters on them stay as they are. DoRA's norms should be computed before (they are of the
    exact weights), and are then kept.

    Args:
      model: with adapters on, if it has any.
      kind: see `TYPES`.
    """
    check(kind)
    make = jax.jit(quantized, static_argnums=1)
    before = after = 0
    for module in linears(model).values():
        if module.kernel_scale is not None:
            continue
        kernel = module.kernel[...]
        narrow, scale = make(kernel, kind)
        before += kernel.nbytes
        after += narrow.nbytes + scale.nbytes
        module.kernel, module.kernel_scale = nnx.Param(narrow), KernelScale(scale)
    return Saved(before, after)


def is_quantized(model: nnx.Module) -> bool:
    """Whether any linear layer has a narrow kernel."""
    return any(module.kernel_scale is not None for module in linears(model).values())


def dequantize(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """The kernel that a narrow one stands for, float32."""
    return kernel.astype(jnp.float32) * scale[..., None, :]
