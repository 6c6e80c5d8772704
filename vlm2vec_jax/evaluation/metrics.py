# SPDX-License-Identifier: Apache-2.0
"""Retrieval metrics from the ranks of the relevant candidates. Numpy only.

The names and definitions are those of MMEB-V2's score files (`hit@1`, `ndcg_linear@5`, ...), which
the leaderboard reads: precision divides by k also where a list is shorter, average precision by
the smaller of k and the number of relevant candidates, and a query without a relevant candidate
counts 0 everywhere but in recall, where it counts 1. A rank is never optimistic: ties and values
that are not finite have been decided against the relevant candidate before they come here.
"""

from __future__ import annotations

import numpy as np

KS = (1, 5, 10)
NAMES = (
    "hit",
    "ndcg_linear",
    "ndcg_exponential",
    "precision",
    "recall",
    "f1",
    "map",
    "mrr",
)
"""Metrics in the order of MMEB-V2's score files."""

NEVER = np.int64(np.iinfo(np.int64).max)
"""Rank of a relevant candidate that is not ranked at all: its score is not finite."""


def per_query(
    ranks: np.ndarray, grades: np.ndarray | None = None, ks: tuple[int, ...] = KS
) -> dict[str, np.ndarray]:
    """Every metric of every query.

    Args:
      ranks: int [N, R] or [N], the place of each relevant candidate in its query's ranking,
        counted from 1; `NEVER` for one that is not ranked.
      grades: float [N, R], how relevant each is; 0 marks padding. All 1 by default.
      ks: cut-offs.

    Returns:
      `name@k` -> float64 [N].
    """
    ranks = np.asarray(ranks, np.int64)
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    grades = np.ones(ranks.shape) if grades is None else np.asarray(grades, np.float64)
    real = grades > 0
    ranks = np.where(real, ranks, NEVER)
    number = real.sum(axis=1)
    # Relevant ones in the order of their places, for precision at each of them.
    ordered = np.sort(ranks, axis=1)
    place = np.arange(1, ranks.shape[1] + 1)
    ideal = -np.sort(-np.where(real, grades, 0.0), axis=1)
    found: dict[str, np.ndarray] = {}
    for k in ks:
        hits = (ranks <= k).sum(axis=1)
        precision = hits / k
        recall = np.where(number, hits / np.maximum(number, 1), 1.0)
        total = precision + recall
        within = ordered <= k
        summed = (within * place / np.where(within, ordered, 1)).sum(axis=1)
        first = ordered[:, 0] if ordered.shape[1] else np.full(len(ordered), NEVER)
        values = {
            "hit": (hits > 0).astype(np.float64),
            "ndcg_linear": _ndcg(ranks, grades, ideal, k),
            "ndcg_exponential": _ndcg(ranks, 2.0**grades - 1, 2.0**ideal - 1, k),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / np.where(total > 0, total, 1.0),
            "map": summed / np.maximum(np.minimum(number, k), 1),
            "mrr": np.where(first <= k, 1.0 / np.minimum(first, k), 0.0),
        }
        found |= {f"{name}@{k}": value for name, value in values.items()}
    return {f"{name}@{k}": found[f"{name}@{k}"] for name in NAMES for k in ks}


def mean(
    ranks: np.ndarray, grades: np.ndarray | None = None, ks: tuple[int, ...] = KS
) -> dict[str, float]:
    """Means of `per_query` over the queries, as fractions; 0 where there is no query."""
    values = per_query(ranks, grades, ks)
    return {name: float(v.mean()) if len(v) else 0.0 for name, v in values.items()}


def _ndcg(ranks: np.ndarray, gains: np.ndarray, ideal: np.ndarray, k: int) -> np.ndarray:
    within = ranks <= k
    discount = np.log2(np.where(within, ranks, 1) + 1.0)
    gained = (within * gains / discount).sum(axis=1)
    best = ideal[:, :k]
    possible = (best / np.log2(np.arange(2, best.shape[1] + 2))).sum(axis=1)
    return np.where(possible > 0, gained / np.where(possible > 0, possible, 1.0), 0.0)
