# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a run say about its batches, while it runs: each warning once."""

from __future__ import annotations

from collections.abc import Mapping

from vlm2vec_jax.config import Config

MANY_DUPLICATES = 0.2
"""Share of repeated targets from which a batch counts as full of them."""

_STEPS = 10
"""Steps in a row that must show something before it is said."""


class LossWatch:
    """Looks at the loss's metrics step by step."""

    def __init__(self, config: Config):
        """What is said depends on what the configuration already does about it."""
        self._masked = config.loss.mask_duplicate_targets
        self._batch_size = config.batch_size
        self._seen = {"duplicates": 0, "solved": 0}

    def look(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Warnings that this step completes.

        Args:
          step: from 1.
          values: `duplicate_targets`, `accuracy` and `negative_cosine` are looked at.
        """
        share = values.get("duplicate_targets", 0.0)
        told = []
        if self._counts("duplicates", share >= MANY_DUPLICATES):
            effect = (
                "they are left out of the negatives, so a query has fewer than the batch size says"
                if self._masked
                else "a query's own target counts against it; consider loss.mask_duplicate_targets"
            )
            told.append(
                f"step {step}: {share:.0%} of the batch's targets are repetitions: {effect}"
            )
        if self._counts("solved", values.get("accuracy", 0.0) >= 0.999):
            told.append(
                f"step {step}: every query of the last {_STEPS} batches finds its target: batches "
                f"of {self._batch_size} are too small or too easy to learn from; raise batch_size, "
                f"or make them harder with data.sub_batch or loss.negatives"
            )
        return told

    def _counts(self, name: str, shown: bool) -> bool:
        """Whether something has now been shown so many times in a row, for the first time."""
        if self._seen[name] < 0:
            return False
        self._seen[name] = self._seen[name] + 1 if shown else 0
        if self._seen[name] < _STEPS:
            return False
        self._seen[name] = -1
        return True
