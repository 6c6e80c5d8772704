# SPDX-License-Identifier: Apache-2.0
"""Which rows make up which batch: a pure function of (sources, seed, step).

The reference's sampling (VLM2Vec v1): the capped subsets are laid end to end and the whole is
permuted anew each epoch, so subsets appear in proportion to their sizes. The stream of rows has no
end: a batch that reaches the end of an epoch goes on in the next one, and within an epoch every
row comes once.

With sub-batches (VLM2Vec-V2's interleaving) it is blocks of rows of one subset that are permuted:
a query then meets negatives of its own kind. Rows are permuted anew within their subset each
epoch, too; what is left of a subset after its last whole block waits for another epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from vlm2vec_jax.data.mmeb import TrainSource
from vlm2vec_jax.errors import UserError, raise_problems

MAX_SEED = 2**32 - 1
_ENDLESS = 2**62


class Mixture:
    """An endless stream of rows of several sources, readable at any position.

    Rows are numbered through all sources in order ("flat" numbers). `stream` maps a position in
    the run to a flat number; a mixture with weights is another `stream` over the same numbers.

    Attributes:
      sources: the subsets, in order.
      seed: from 0 to 2**32 - 1.
      sub_batch: rows of one subset that stand together; 0 or 1 mixes row by row.
      stream: `grain.MapDataset` of flat row numbers, of unlimited length.
    """

    def __init__(self, sources: Sequence[TrainSource], seed: int, *, sub_batch: int = 0):
        """Lay the sources end to end.

        Raises:
          UserError: if there is no row at all, a subset is named twice, or the seed is outside
            of 0 to 2**32 - 1.
        """
        names = [source.subset for source in sources]
        problems = [f"subset {n!r} comes twice" for n in sorted(set(names)) if names.count(n) > 1]
        if not 0 <= seed <= MAX_SEED:
            problems.append(f"seed {seed} is not within 0 and {MAX_SEED}")
        total = sum(len(source) for source in sources)
        if total == 0:
            problems.append(f"no rows to train on in {', '.join(names) or 'no subset'}")
        if total > MAX_SEED:
            problems.append(f"{total} rows are more than can be shuffled ({MAX_SEED})")
        raise_problems("Cannot mix the training data", problems)
        self.sources = tuple(sources)
        self.seed = int(seed)
        self._ends = np.cumsum([len(source) for source in sources], dtype=np.int64)
        self.sub_batch = sub_batch if sub_batch > 1 else 0
        if self.sub_batch:
            self.stream = self._blocks(self.sub_batch)
        else:
            self.stream = grain.MapDataset.range(total).seed(self.seed).shuffle().repeat()

    def _blocks(self, size: int) -> grain.MapDataset:
        """The stream of rows in blocks of `size` rows of one source."""
        rows = [len(source) for source in self.sources]
        # A source that cannot fill a block repeats its rows in one.
        ends = np.cumsum([max(1, n // size) if n else 0 for n in rows])
        per_epoch = int(ends[-1])
        order = grain.MapDataset.range(per_epoch).seed(self.seed).shuffle().repeat()
        within = [
            grain.MapDataset.range(max(n, 1))
            .seed((self.seed + 1 + s) % MAX_SEED)
            .shuffle()
            .repeat()
            for s, n in enumerate(rows)
        ]
        starts = np.concatenate([[0], self._ends[:-1]])

        def row(position: int) -> int:
            block, place = divmod(int(position), size)
            epoch, number = block // per_epoch, int(order[block])  # pyright: ignore[reportArgumentType]
            s = int(np.searchsorted(ends, number, side="right"))
            first = number - (int(ends[s - 1]) if s else 0)
            at = (first * size + place) % rows[s]
            own = within[s][epoch * rows[s] + at]
            return int(starts[s]) + int(own)  # pyright: ignore[reportArgumentType]

        return grain.MapDataset.range(_ENDLESS).map(row)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return int(self._ends[-1])

    def locate(self, flat: np.ndarray | int) -> np.ndarray:
        """Turn flat row numbers into (source, position in the source), int64 [..., 2]."""
        flat = np.asarray(flat, np.int64)
        source = np.searchsorted(self._ends, flat, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return np.stack([source, flat - starts[source]], axis=-1)

    def batch_indices(self, step: int, batch_size: int) -> np.ndarray:
        """The rows of global batch `step` (counted from 0), without reading any of them.

        Returns:
          int64 [batch_size, 2]: source and position in that source.
        """
        if step < 0 or batch_size < 1:
            raise UserError(f"no batch {step} of {batch_size} rows")
        first = step * batch_size
        return self.locate(np.array([self.stream[i] for i in range(first, first + batch_size)]))

    def epoch(self, step: int, batch_size: int) -> float:
        """How many epochs have been seen after `step` steps."""
        return step * batch_size / len(self)

    def fingerprint(self, batch_size: int) -> dict[str, Any]:
        """Everything the batches depend on, as JSON: equal fingerprints, equal batches.

        Times and folders are left out: the same data in another place is the same mixture.
        """
        return {
            "sampling": f"blocks of {self.sub_batch}" if self.sub_batch else "proportional",
            "seed": self.seed,
            "batch_size": int(batch_size),
            "rows": len(self),
            "sources": [
                {
                    "subset": source.subset,
                    "split": source.split,
                    "limit": source.limit,
                    "rows": len(source),
                    "rows_in_file": len(source.table),
                    "rows_sha256": hashlib.sha256(source.rows.astype("<i8").tobytes()).hexdigest(),
                }
                for source in self.sources
            ],
        }
