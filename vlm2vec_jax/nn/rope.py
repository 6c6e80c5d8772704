# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: angles from positions, and the rotation of heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(head_size: int, theta: float, factors: tuple[float, ...]) -> np.ndarray:
    """1 / (factor * theta^(2 i / H)), float32 [H/2] (HF: Phi3SuScaledRotaryEmbedding).

    Rounded to float32 where torch rounds: an angle at position 400 magnifies one wrong bit to
    1e-5. Numpy's own float32 power is not always correctly rounded, so it is taken in float64.
    """
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    powers = np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / (np.asarray(factors, np.float32) * powers)


def cos_sin(
    positions: jax.Array, frequencies: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [..., H], of positions [...] and frequencies [H/2] or [..., H/2].

    The half of angles is repeated, as HF's `rotate_half` wants it; `scale` multiplies both.
    """
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads x [R, T, N, H] by cos, sin [R, T, H]; float32 inside."""
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)
