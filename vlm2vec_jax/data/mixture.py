# SPDX-License-Identifier: Apache-2.0
"""Which rows make up which batch: a pure function of (sources, weights, seed, step).

The unit is a block of rows of one subset: one row where subsets mix row by row (the reference's
sampling, VLM2Vec v1), more where a query shall meet negatives of its own kind (VLM2Vec-V2's
interleaving). An epoch holds a fixed number of blocks of each subset, in an order that is shuffled
anew each epoch: without weights as many as the subset fills, so that every row comes once; with
weights, that share. A subset's own rows are shuffled anew each time that it has been gone through;
what is left after its last whole block waits for another round. The stream has no end.

Nothing here is remembered from one batch to the next, so any step costs the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm2vec_jax.data.mmeb import TrainSource
from vlm2vec_jax.data.permute import keyed, permute
from vlm2vec_jax.errors import UserError, raise_problems

MAX_SEED = 2**32 - 1
STOPPING = ("", "first_exhausted", "all_exhausted")
"""When a run ends before its last step: never, or as HF's `interleave_datasets` does."""

_FINENESS = 1000
"""Blocks in an epoch per subset, where weights decide: shares are exact to a thousandth."""

_ORDER = 0  # what a key is for: the order of blocks, or the rows of subset s as s + 1
_SAMPLED_ROWS = 64


class Mixture:
    """An endless stream of rows of several sources, readable at any position.

    Attributes:
      sources: the subsets, in order.
      seed: from 0 to 2**32 - 1.
      sub_batch: rows of one subset that stand together; 0 mixes row by row.
      weights: share of each subset, summing to 1; None in proportion to their sizes.
    """

    def __init__(
        self,
        sources: Sequence[TrainSource],
        seed: int,
        *,
        sub_batch: int = 0,
        weights: Mapping[str, float] | None = None,
    ):
        """Lay out an epoch.

        Args:
          sources: the subsets, each at most once.
          seed: another seed, another order.
          sub_batch: see `Mixture.sub_batch`; 1 is 0.
          weights: how much of the stream each subset makes up, in any unit; all or none are named.

        Raises:
          UserError: if there is no row at all, a subset is named twice, the seed is outside of 0
            to 2**32 - 1, or weights are missing, strange or not positive.
        """
        names = [source.subset for source in sources]
        problems = [f"subset {n!r} comes twice" for n in sorted(set(names)) if names.count(n) > 1]
        if not 0 <= seed <= MAX_SEED:
            problems.append(f"seed {seed} is not within 0 and {MAX_SEED}")
        if sub_batch < 0:
            problems.append(f"sub-batches of {sub_batch} rows")
        rows = np.array([len(source) for source in sources], np.int64)
        if not rows.sum():
            problems.append(f"no rows to train on in {', '.join(names) or 'no subset'}")
        problems += _weight_problems(names, rows, weights)
        raise_problems("Cannot mix the training data", problems)
        self.sources = tuple(sources)
        self.seed = int(seed)
        self.sub_batch = sub_batch if sub_batch > 1 else 0
        self._size = max(1, sub_batch)
        self._rows = rows
        # A source that cannot fill a block repeats its rows in one.
        self._blocks = np.where(rows, np.maximum(1, rows // self._size), 0)
        self.weights = None
        self._counts = self._blocks
        if weights is not None:
            shares = np.array([weights[name] for name in names], np.float64)
            self.weights = dict(zip(names, (shares / shares.sum()).tolist(), strict=True))
            self._counts = _in_proportion(shares, _FINENESS * len(rows))
        self._ends = np.cumsum(self._counts)
        self._starts = self._ends - self._counts
        self._weighted_epoch = functools.lru_cache(maxsize=4)(self._make_weighted_epoch)

    def __len__(self) -> int:
        """Rows of all sources."""
        return int(self._rows.sum())

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """The rows at positions of the stream, without reading any of them.

        Args:
          positions: int64 [N], from 0.

        Returns:
          int64 [N, 2]: source, and position in that source.
        """
        block, place = np.divmod(np.asarray(positions, np.int64), self._size)
        epoch, at = np.divmod(block, int(self._ends[-1]))
        source, rank = self._in_epoch(epoch, at)
        # How many blocks of this subset come before this one, since the beginning.
        nth = epoch * self._counts[source] + rank
        own_epoch, own_block = np.divmod(nth, self._blocks[source])
        count = self._rows[source]
        index = (own_block * self._size + place) % count
        row = permute(index, count, keyed(self.seed, source + 1, own_epoch))
        return np.stack([source, row], axis=-1)

    def batch_indices(self, step: int, batch_size: int) -> np.ndarray:
        """The rows of global batch `step` (counted from 0), int64 [batch_size, 2]; see `rows_at`.

        Raises:
          UserError: for a negative step or an empty batch.
        """
        if step < 0 or batch_size < 1:
            raise UserError(f"no batch {step} of {batch_size} rows")
        first = step * batch_size
        return self.rows_at(np.arange(first, first + batch_size, dtype=np.int64))

    def membership(self, step: int, batch_size: int) -> str:
        """A SHA-256 (hex) of which rows, of which files, stand in global batch `step`, in order."""
        drawn = self.batch_indices(step, batch_size)
        digest = hashlib.sha256()
        for number in np.unique(drawn[:, 0]).tolist():
            source = self.sources[number]
            mine = drawn[:, 0] == number
            digest.update(json.dumps([source.subset, source.split]).encode())
            digest.update(np.flatnonzero(mine).astype("<i8").tobytes())
            digest.update(source.rows[drawn[mine, 1]].astype("<i8").tobytes())
        return digest.hexdigest()

    def epoch(self, step: int, batch_size: int) -> float:
        """How often as many rows as there are have been seen after `step` steps."""
        return step * batch_size / len(self)

    def steps(self, stop: str, batch_size: int) -> int | None:
        """After how many steps a stopping rule ends the run.

        Args:
          stop: one of `STOPPING`: when the first subset, or the last, has given all its rows
            once (whole blocks of them). The batch in which that happens is the run's last.
          batch_size: pairs in the global batch.

        Returns:
          None where the rule never does.
        """
        if stop not in STOPPING:
            raise UserError(f"data.stop must be one of {', '.join(STOPPING[1:])} or empty")
        if not stop:
            return None
        lasts = [self._last_block(s) for s in np.flatnonzero(self._blocks).tolist()]
        last = min(lasts) if stop == "first_exhausted" else max(lasts)
        return ((last + 1) * self._size - 1) // batch_size + 1

    def _in_epoch(self, epoch: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and number among that source's blocks of the epoch, of blocks of the stream."""
        if self.weights is None:
            # Every block comes once per epoch, so their numbers may as well be shuffled.
            number = permute(at, int(self._ends[-1]), keyed(self.seed, _ORDER, epoch))
            source = np.searchsorted(self._ends, number, side="right")
            return source, number - self._starts[source]
        source, rank = np.empty_like(at), np.empty_like(at)
        for one in np.unique(epoch).tolist():
            mine = epoch == one
            sources, ranks = self._weighted_epoch(one)
            source[mine], rank[mine] = sources[at[mine]], ranks[at[mine]]
        return source, rank

    def _make_weighted_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of subsets in an epoch, and each block's number among its own, in turn.

        Weighted epochs are short, whatever the number of rows, so they are laid out whole: a
        subset's rows then come round by round, none again before all have been seen.
        """
        count = int(self._ends[-1])
        number = permute(np.arange(count), count, keyed(self.seed, _ORDER, epoch))
        source = np.searchsorted(self._ends, number, side="right")
        order = np.argsort(source, kind="stable")
        rank = np.empty_like(source)
        rank[order] = np.arange(count) - self._starts[source[order]]
        return source, rank

    def _last_block(self, s: int) -> int:
        """The block of the stream with which subset `s` has been gone through once."""
        per_epoch, count = int(self._ends[-1]), int(self._counts[s])
        epoch, rank = divmod(int(self._blocks[s]) - 1, count)
        if self.weights is not None:
            source, _ = self._weighted_epoch(epoch)
            return epoch * per_epoch + int(np.flatnonzero(source == s)[rank])
        numbers = self._starts[s] + np.arange(count, dtype=np.int64)
        at = permute(numbers, per_epoch, keyed(self.seed, _ORDER, 0), inverse=True)
        return int(at.max())

    def fingerprint(self, batch_size: int) -> dict[str, Any]:
        """Everything the batches depend on, as JSON: equal fingerprints, equal batches.

        Times and folders are left out: the same data in another place is the same mixture.
        """
        return {
            "sampling": "permuted blocks 1",
            "sub_batch": self.sub_batch,
            "seed": self.seed,
            "batch_size": int(batch_size),
            "order": [source.subset for source in self.sources],
            "subsets": {
                source.subset: {
                    "split": source.split,
                    "limit": source.limit,
                    "weight": None if self.weights is None else self.weights[source.subset],
                    "rows": len(source),
                    "rows_in_file": len(source.table),
                    "rows_sha256": hashlib.sha256(source.rows.astype("<i8").tobytes()).hexdigest(),
                    **_sample(source),
                }
                for source in self.sources
            },
        }


def _weight_problems(names, rows, weights: Mapping[str, float] | None) -> list[str]:
    if weights is None:
        return []
    problems = [f"no weight for subset {name!r}" for name in names if name not in weights]
    problems += [f"a weight for {name!r}, which is no subset" for name in set(weights) - set(names)]
    problems += [
        f"the weight of {name!r} must be above 0, not {value}; leave the subset out instead"
        for name, value in weights.items()
        if not 0 < value < float("inf")
    ]
    problems += [
        f"subset {name!r} has a weight but no rows"
        for name, count in zip(names, rows, strict=True)
        if not count and name in weights
    ]
    return problems


def _in_proportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `shares`, each at least 1, by largest remainders."""
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return np.maximum(counts, 1)


def _sample(source: TrainSource) -> dict[str, str]:
    """Hashes of some of a source's rows: tell data apart that has been changed in place.

    That of the contents is the same in every layout; that of the columns is what older checkpoints
    are compared by.
    """
    count = len(source)
    chosen = np.unique(np.linspace(0, max(count - 1, 0), min(count, _SAMPLED_ROWS)).astype(int))
    rows = source.rows[chosen] if count else []
    stored = source.table.take(rows) if count else []
    content = [_content(source, int(row), one) for row, one in zip(rows, stored, strict=True)]
    return {"sample_sha256": _hash(list(stored)), "content_sha256": _hash(content)}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _content(source: TrainSource, row: int, stored: dict[str, Any]) -> Any:
    """What a row says, in whatever columns: the same from each layout of the same data."""
    try:
        return source.keys(row, stored)
    except UserError:  # lists that do not go together; such a row is told or left out elsewhere
        return stored
