# SPDX-License-Identifier: Apache-2.0
"""Linear layers with LoRA and DoRA as fields, and DoRA's norms; narrow kernels for inference.

Kernels are [in, out]; a stack of layers leads every leaf with L. Adapters are float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax.nn.dropout import keep_mask


class DoraNorm(nnx.Variable):
    """Column norms of W + s A B: recomputed once per step, never trained, never saved."""


class AdapterScale(nnx.Variable):
    """s of each layer of a stack, f32 [L], where they differ; never trained."""


class KernelScale(nnx.Variable):
    """What each column of a narrow kernel is multiplied by, f32 [out]; see `nn.quantization`."""


class Linear(nnx.Module):
    """y = x W + b, adapted or not.

    LoRA: y = x W + s x' A B + b. DoRA (m magnitude, n norm, both per output; PEFT 0.11's form,
    `LoraLayer` with `use_dora`): y = x W + (m/n - 1) x' W + (m/n) s x' A B + b, where n is a
    constant in the backward pass. x' is x with dropout; without dropout both products with W
    are one. With `fused_dropout` they are one in training, too: y = (m/n) (x W + s x' A B) + b,
    which drops nothing of the second term and so is the same in the mean over draws.

    For inference the kernel may be narrow (int8 or float8) with a scale per column; products are
    computed in x's type all the same, in which such numbers are exact.
    """

    def __init__(self, din: int, dout: int, *, bias: bool, rngs: nnx.Rngs):
        scale = din**-0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (din, dout)))
        self.kernel_scale: KernelScale | None = nnx.data(None)
        self.bias = nnx.Param(jnp.zeros((dout,))) if bias else None
        # `nnx.data` because an adapter may come later.
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.magnitude: nnx.LoRAParam | None = nnx.data(None)
        self.column_norm: DoraNorm | None = nnx.data(None)
        self.adapter_scale: AdapterScale | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0
        self.fused_dropout = False

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Apply to x [..., in]; `key` turns the adapter's dropout on."""
        kernel = self.kernel[...].astype(x.dtype)
        y = x @ kernel
        if self.kernel_scale is not None:
            y = (y * self.kernel_scale[...]).astype(x.dtype)
        if self.lora_a is not None:
            y = self._adapt(x, y, kernel, key)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y

    def _adapt(self, x, y, kernel, key):
        dropped = x
        drops = self.lora_dropout > 0 and key is not None
        if key is not None and drops:
            keep = keep_mask(key, self.lora_dropout, x.shape)
            dropped = jnp.where(keep, x / (1 - self.lora_dropout), 0).astype(x.dtype)
        low = (dropped @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
        low = (
            self._scale().astype(x.dtype) * low
            if self.adapter_scale is not None
            else self.lora_scale * low
        )
        if self.magnitude is None:
            return y + low
        norm = self.column_norm[...] if self.column_norm is not None else self.dora_norm()
        gain = (self.magnitude[...] / norm).astype(y.dtype)
        if drops and not self.fused_dropout:
            return y + (gain - 1) * (dropped @ kernel) + gain * low
        return gain * (y + low)

    def dora_norm(self) -> jax.Array:
        """Norm [..., out] of the columns of W + s A B, float32, constant for the gradient.

        By the low-rank identity |W|^2 + 2 s <W, A B> + s^2 |A B|^2, all per column: the only
        product with W is of rank r, and nothing of W's size is written.
        """
        return _dora_norm(*self._norm_inputs())

    def _norm_inputs(self) -> tuple[Any, ...]:
        scale = self._scale()[..., None] if self.adapter_scale is not None else self.lora_scale
        kernel_scale = None if self.kernel_scale is None else self.kernel_scale[...]
        return self.kernel[...], kernel_scale, self.lora_a[...], self.lora_b[...], scale

    def _scale(self) -> jax.Array:
        assert self.adapter_scale is not None
        return self.adapter_scale[...]

    def set_adapter(
        self,
        leaves: dict[str, jax.Array],
        *,
        scale: float | jax.Array,
        dropout: float,
        fused_dropout: bool = False,
    ) -> None:
        """Put an adapter on, in place of any before.

        Args:
          leaves: `lora_a` [..., in, r], `lora_b` [..., r, out] and, for DoRA, `magnitude`
            [..., out]; float32.
          scale: s, as alpha / r; or f32 [L], one for each layer of a stack.
          dropout: share of the adapter's input that is dropped in training.
          fused_dropout: of DoRA, see the class.
        """
        self.lora_a = nnx.LoRAParam(leaves["lora_a"])
        self.lora_b = nnx.LoRAParam(leaves["lora_b"])
        magnitude = leaves.get("magnitude")
        self.magnitude = None if magnitude is None else nnx.LoRAParam(magnitude)
        self.lora_dropout, self.fused_dropout = dropout, fused_dropout
        if isinstance(scale, (int, float)):
            self.lora_scale, self.adapter_scale = float(scale), None
        else:
            self.lora_scale, self.adapter_scale = 0.0, AdapterScale(scale)


def linears(model: nnx.Module) -> dict[str, Linear]:
    """All `Linear` modules of a model by path, such as `decoder/layers/attn/qkv`."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def refresh_dora_norms(model: nnx.Module) -> None:
    """Compute every DoRA norm from the weights as they are now and keep it on the module.

    Called once per step, outside the chunk loop: the norm depends on weights alone.
    """
    chosen = [module for module in linears(model).values() if module.magnitude is not None]
    norms = _dora_norms([module._norm_inputs() for module in chosen])
    for module, norm in zip(chosen, norms, strict=True):
        module.column_norm = DoraNorm(norm)


def _dora_norm(kernel, kernel_scale, lora_a, lora_b, scale) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST
    w, a, b = (x.astype(jnp.float32) for x in (kernel, lora_a, lora_b))
    if kernel_scale is not None:
        w = w * kernel_scale[..., None, :]
    own = jnp.sum(w * w, axis=-2)
    cross = jnp.sum(jnp.matmul(a.swapaxes(-1, -2), w, precision=exact) * b, axis=-2)
    gram = jnp.matmul(a.swapaxes(-1, -2), a, precision=exact)
    low = jnp.sum(jnp.matmul(gram, b, precision=exact) * b, axis=-2)
    squared = own + 2 * scale * cross + scale**2 * low
    # Rounding may leave a tiny negative number where W + s A B vanishes.
    return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(squared, 0.0)))


@functools.partial(jax.jit, inline=True)
def _dora_norms(inputs: list[tuple[Any, ...]]) -> list[jax.Array]:
    """All norms in one program; inside of another it leaves no trace."""
    return [_dora_norm(*each) for each in inputs]
