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
from vlm2vec_jax.nn.exact import platform


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
        low = low_rank(dropped, self.lora_a[...], self.lora_b[...], self._scale())
        if self.magnitude is None:
            return y + low
        norm = self.column_norm[...] if self.column_norm is not None else self.dora_norm()
        gain = (self.magnitude[...] / norm).astype(y.dtype)
        if drops and not self.fused_dropout:
            return y + (gain - 1) * (dropped @ kernel) + gain * low
        return columns_scaled(y + low, gain)

    def dora_norm(self) -> jax.Array:
        """Norm [..., out] of the columns of W + s A B, float32, constant for the gradient.

        By the low-rank identity |W|^2 + 2 s <W, A B> + s^2 |A B|^2, all per column: the only
        product with W is of rank r, and nothing of W's size is written.
        """
        return _dora_norm(*self._norm_inputs())

    def _norm_inputs(self) -> tuple[Any, ...]:
        scale = self.lora_scale if self.adapter_scale is None else self._scale()[..., None]
        kernel_scale = None if self.kernel_scale is None else self.kernel_scale[...]
        return self.kernel[...], kernel_scale, self.lora_a[...], self.lora_b[...], scale

    def _scale(self) -> jax.Array:
        """s, f32 [] or, of a stack of layers, [L]."""
        if self.adapter_scale is None:
            return jnp.float32(self.lora_scale)
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


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """s x A B, with a gradient that leaves large arrays as they are.

    Differentiated as it stands, the gradient of B is made by turning the whole cotangent around,
    and s is multiplied into it, while both could be had on the narrow side.

    Args:
      x: [..., in].
      a: f32 [in, r].
      b: f32 [r, out].
      scale: f32 [].

    Returns:
      [..., out] in x's dtype.
    """
    return _low_rank(x, a, b, scale)[0]


def _low_rank(x, a, b, scale):
    narrow = scale.astype(x.dtype) * (x @ a.astype(x.dtype))
    return narrow @ b.astype(x.dtype), (x, narrow, a, b, scale)


def _low_rank_gradient(kept, cotangent):
    x, narrow, a, b, scale = kept
    flat, inner, outer = (y.reshape(-1, y.shape[-1]) for y in (x, narrow, cotangent))
    db = _product(inner, outer, 0, 0)
    inner = scale.astype(x.dtype) * _product(outer, b.astype(x.dtype), 1, 1)
    da = _product(flat, inner, 0, 0)
    dx = _product(inner, a.astype(x.dtype), 1, 1).reshape(x.shape)
    return dx, da.astype(a.dtype), db.astype(b.dtype), jnp.zeros_like(scale)


low_rank.defvjp(_low_rank, _low_rank_gradient)


def _product(a, b, i: int, j: int):
    """Of matrices, summed over axis i of one and j of the other."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())))


@jax.custom_vjp
def columns_scaled(x: jax.Array, gain: jax.Array) -> jax.Array:
    """gain x, with a gradient that multiplies once what several products read.

    Args:
      x: [..., out].
      gain: [out] in x's dtype.
    """
    return gain * x


def _columns_scaled_gradient(kept, cotangent):
    x, gain = kept
    dx = gain * cotangent
    if platform() == "cpu":  # elsewhere products multiply as they read
        dx = jax.lax.optimization_barrier(dx)
    both = cotangent.astype(jnp.float32) * x.astype(jnp.float32)
    return dx, jnp.sum(both, axis=tuple(range(x.ndim - 1))).astype(gain.dtype)


columns_scaled.defvjp(lambda x, gain: (gain * x, (x, gain)), _columns_scaled_gradient)


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
