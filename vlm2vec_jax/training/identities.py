# SPDX-License-Identifier: Apache-2.0
"""From content hashes to the small integers that the loss compares. Numpy only.

Hashes have 63 bits and jax has 32 by default, so equal hashes of a batch get equal numbers; what
they are says nothing from one batch to the next. Every process of a run must be given the hashes
of the whole batch, so that all come to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Identities(NamedTuple):
    """What the loss is told of a batch of B pairs with k places for hard negatives each.

    Attributes:
      target_id: i32 [B (1 + k)], target i at i (1 + k), its hard negatives behind it; equal for
        equal content, -1 where a negative is missing.
      known: i32 [B, P], ids of all targets right for a query: its own, then those of other rows
        with the very same query; -1 behind the last.
      valid: bool [B (1 + k)], False where a negative is missing.
    """

    target_id: np.ndarray
    known: np.ndarray
    valid: np.ndarray


def identities(
    target_id: np.ndarray,
    query_id: np.ndarray,
    negative_ids: Sequence[Sequence[int]] = (),
    *,
    negatives: int = 0,
    same_query: bool = False,
    at_least: int = 1,
) -> Identities:
    """Number the contents of a batch.

    Args:
      target_id: int64 [B], content hash of each target.
      query_id: int64 [B], content hash of each query.
      negative_ids: per row, content hashes of its hard negatives; those beyond k are left out.
      negatives: k.
      same_query: look for other targets of the very same query; otherwise P is 1.
      at_least: P is at least this; it is a power of two, so that few programs are compiled.
    """
    pairs = len(target_id)
    valid = np.zeros((pairs, 1 + negatives), bool)
    hashes = np.zeros((pairs, 1 + negatives), np.int64)
    valid[:, 0], hashes[:, 0] = True, target_id
    for i, found in enumerate(negative_ids):
        count = min(len(found), negatives)
        valid[i, 1 : 1 + count] = True
        hashes[i, 1 : 1 + count] = found[:count]
    ids = np.full(hashes.shape, -1, np.int32)
    ids[valid] = np.unique(hashes[valid], return_inverse=True)[1].reshape(-1)
    own = ids[:, 0]
    known = own[:, None]
    if same_query:
        by_query: dict[int, dict[int, None]] = {}
        for query, target in zip(query_id.tolist(), own.tolist(), strict=True):
            by_query.setdefault(query, {})[target] = None
        most = max(len(targets) for targets in by_query.values())
        width = max(1 << (most - 1).bit_length(), at_least)
        known = np.full((pairs, width), -1, np.int32)
        for i, (query, target) in enumerate(zip(query_id.tolist(), own.tolist(), strict=True)):
            others = [t for t in by_query[query] if t != target]
            known[i, : 1 + len(others)] = [target, *others]
    return Identities(ids.reshape(-1), known.astype(np.int32), valid.reshape(-1))
