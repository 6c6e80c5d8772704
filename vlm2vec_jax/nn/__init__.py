# SPDX-License-Identifier: Apache-2.0
"""Building blocks that every backbone shares. Knows only jax, flax and numpy.

Axis legend: R rows, T tokens (queries), S keys or sequences, N heads, K key/value heads,
G = N / K, H head width, D model width, F mlp width, L layers, C crops, P patches.
"""
