# SPDX-License-Identifier: Apache-2.0
"""Normalisations, computed in float32 and returned in the input's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (HF: Phi3RMSNorm)."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [..., D] over its last axis."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * x32.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias (torch.nn.LayerNorm)."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [..., D] over its last axis."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis in float32 (torch.nn.functional.normalize).

    The square root is taken of at least 1e-24, so that the gradient of an all-zero vector (an
    empty slot of a batch) is zero and not NaN.
    """
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squared, 1e-24))
