# SPDX-License-Identifier: Apache-2.0
"""Shuffles that need no memory: a keyed permutation of 0..n-1, computed position by position.

A Feistel network over the next even number of bits, walked on until the value is below n (format-
preserving encryption by cycle walking, Black and Rogaway 2002). Written here, and not taken from a
data library, because which row comes when must not change with a version of that library.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values, one to one (the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed(*numbers: object) -> np.ndarray:
    """A uint64 key of several numbers (or arrays of them, elementwise); their order counts."""
    key = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            key = mix(key * np.uint64(3) + _GOLDEN + np.asarray(number).astype(np.uint64))
    return key


def permute(index, count, key, *, inverse: bool = False) -> np.ndarray:
    """Where `index` goes in the shuffle of 0..count-1 that `key` names; all elementwise.

    Args:
      index: int64, each from 0 to its `count` - 1.
      count: int64, at least 1.
      key: uint64; another key is another shuffle.
      inverse: the way back.

    Returns:
      int64, of the arguments' common shape; for a fixed count and key a permutation.
    """
    index, count, key = np.broadcast_arrays(
        np.asarray(index, np.int64), np.asarray(count, np.int64), np.asarray(key, np.uint64)
    )
    shape = index.shape
    value, limit = index.reshape(-1).astype(np.uint64), count.reshape(-1).astype(np.uint64)
    half = _half_bits(count.reshape(-1))
    with np.errstate(over="ignore"):
        base = key.reshape(-1)
        keys = [mix(base + np.uint64(r + 1) * _GOLDEN) for r in range(ROUNDS)]
    order = range(ROUNDS)[:: -1 if inverse else 1]
    value = _network(value, half, [keys[r] for r in order], inverse)
    outside = np.flatnonzero(value >= limit)
    while outside.size:
        walked = _network(value[outside], half[outside], [keys[r][outside] for r in order], inverse)
        value[outside] = walked
        outside = outside[walked >= limit[outside]]
    return value.astype(np.int64).reshape(shape)


def _half_bits(count: np.ndarray) -> np.ndarray:
    """Bits of a half: the smallest with 4 ** bits >= count, at least 1."""
    bits = np.ones(count.shape, np.uint64)
    for b in range(1, 31):
        bits[count > (1 << 2 * b)] = b + 1
    return bits


def _network(value, half, keys, inverse: bool) -> np.ndarray:
    mask = (_ONE << half) - _ONE
    left, right = value >> half, value & mask
    for key in keys:
        if inverse:
            left, right = right ^ (mix(left ^ key) & mask), left
        else:
            left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half) | right
