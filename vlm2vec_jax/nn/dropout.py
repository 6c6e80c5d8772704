# SPDX-License-Identifier: Apache-2.0
"""Which inputs an adapter drops: a hash of each number's place, cheap to compute and to compile.

`jax.random.bernoulli` runs threefry, some hundred operations per number, and XLA writes them into
every product that reads the mask: forward, recomputed and backward, for every adapted layer. On a
TPU that was most of the time that the train step took to compile. Dropout needs no
cryptography: two rounds of MurmurHash3's finalizer over the place and the key do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def keep_mask(key: jax.Array, drop: float, shape: tuple[int, ...]) -> jax.Array:
    """True with probability 1 - drop, bool `shape`.

    A number's fate depends on key and place alone, so it is the same however the array is cut.

    Args:
      key: a typed key of `jax.random`, fresh for each use.
      drop: 0 <= drop < 1.
      shape: at least one dimension.
    """
    words = jax.random.key_data(key)
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = _mix(_mix(place ^ words[0]) + words[-1])
    return bits >= np.uint32(round(drop * 2**32))


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer (Appleby, public domain): a bijection of u32 in which every bit
    of the input moves about half of the output's."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
