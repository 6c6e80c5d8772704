# SPDX-License-Identifier: Apache-2.0
"""Which vectors are equal bit for bit, found by hashes."""

from __future__ import annotations

import numpy as np

_COLUMNS = 32
"""Columns that are read to tell vectors apart, where they do."""
_HASHED = 1 << 17
"""Numbers hashed at a time."""


def distinct_vectors(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map each target to a distinct vector, in order of first mention: (i64 [Nt], f32 [Nv, D])."""
    if not len(targets):
        return np.zeros(0, np.int64), targets
    ids = _ids_by_hash(targets)
    if ids is None:  # two different vectors of one 64-bit hash
        seen: dict[bytes, int] = {}
        # + 0.0 turns -0.0 into 0.0, which is the same number with other bits.
        each = (seen.setdefault((row + 0.0).tobytes(), len(seen)) for row in targets)
        ids = np.fromiter(each, np.int64, len(targets))
    keep = np.unique(ids, return_index=True)[1]
    return ids, targets if len(keep) == len(targets) else targets[keep]


def _ids_by_hash(targets: np.ndarray) -> np.ndarray | None:
    """The same numbers by a hash of each row, which spares a copy of it; None if one collides.

    A few columns tell most rows apart; only those that they do not are read to the end.
    """
    some = targets[:, :: -(-max(targets.shape[1], 1) // _COLUMNS)]
    _, inverse, count = np.unique(_hashes(some), return_inverse=True, return_counts=True)
    alike = np.flatnonzero(count[inverse] > 1)
    ids = np.arange(len(targets))
    if not len(alike):
        return ids
    _, first, inverse = np.unique(_hashes(targets[alike]), return_index=True, return_inverse=True)
    ids[alike] = alike[first[inverse]]
    again = np.flatnonzero(ids != np.arange(len(targets)))
    step = max(_HASHED // max(targets.shape[1], 1), 1)
    for start in range(0, len(again), step):
        part = again[start : start + step]
        a, b = targets[part] + 0.0, targets[ids[part]] + 0.0
        if not np.array_equal(a.view(np.uint32), b.view(np.uint32)):
            return None
    new = ids == np.arange(len(targets))
    return (np.cumsum(new) - 1)[ids]


def _hashes(rows: np.ndarray) -> np.ndarray:
    """A number for each row, u64 [N], in pieces that fit in a cache."""
    width = rows.shape[1]
    odd = np.random.default_rng(0).integers(0, 1 << 63, width, np.uint64) * 2 + 1
    hashes = np.empty(len(rows), np.uint64)
    step = max(_HASHED // max(width, 1), 1)
    for start in range(0, len(rows), step):
        # + 0.0 turns -0.0 into 0.0, which is the same number with other bits.
        words = (rows[start : start + step] + 0.0).view(np.uint32)
        hashes[start : start + step] = (words * odd).sum(axis=1, dtype=np.uint64)
    return hashes
