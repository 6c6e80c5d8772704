# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss or gradient is not finite: not taken, counted, reported, in the end fatal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SKIPPED = "step_skipped"
"""Metric: 1 for a step that was not taken, else 0."""

_SHOWN = 8


def guarded(step: Callable[..., tuple[Any, dict[str, jax.Array]]]) -> Callable[..., Any]:
    """The same step, but without effect where its loss or gradient norm is not finite.

    Parameters, moments, and the schedule's position stay bit for bit as they were; only the step
    number goes on, since it is the position in the data. All inside the compiled program, so
    nothing waits for the host.

    Args:
      step: (..., state, frozen, batch, key) -> (state, metrics), metrics with `loss` and
        `grad_norm`.

    Returns:
      The same with one metric more, `step_skipped` (f32, 0 or 1).
    """

    @functools.wraps(step)  # the compiled program has the step's name
    def run(*args: Any) -> tuple[Any, dict[str, jax.Array]]:
        before = args[-4]
        after, metrics = step(*args)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        return kept._replace(step=after.step), {**metrics, SKIPPED: 1.0 - good.astype(jnp.float32)}

    return run


class SkippedSteps:
    """Counts the steps that were not taken.

    Args:
      limit: so many are borne in all; with one more the run stops.
      count: skipped before, when the run goes on from a checkpoint.
      names: name of each source of the mixture.
    """

    def __init__(self, limit: int, count: int, names: Sequence[str]):
        self.limit, self.count, self._names = limit, count, names

    @property
    def at_limit(self) -> bool:
        """Whether the next one is one too many, so that the host must not run ahead."""
        return self.count >= self.limit

    def look(self, step: int, values: Mapping[str, Any], rows: np.ndarray) -> str:
        """Take note of a step.

        Args:
          step: counted from 1.
          values: its metrics.
          rows: int64 [B, 2], source and row in its file of each example.

        Returns:
          A sentence with the ids of the examples if it was skipped, else "".
        """
        if not values.get(SKIPPED):
            return ""
        self.count += 1
        wrong = [n for n in ("loss", "grad_norm") if not np.isfinite(values.get(n, 0.0))]
        return (
            f"step {step} was skipped: {' and '.join(wrong)} not finite; parameters and optimizer "
            f"are unchanged ({self.count} so far, {self.limit} are borne). Its examples: "
            f"{self.examples(rows)}"
        )

    def examples(self, rows: np.ndarray, *, all_of_them: bool = False) -> str:
        """`ImageNet_1K 3, 17; VOC2007 4`: rows of the subsets' files."""
        told = []
        for number in np.unique(rows[:, 0]).tolist():
            mine = sorted(rows[rows[:, 0] == number, 1].tolist())
            shown = mine if all_of_them else mine[:_SHOWN]
            more = len(mine) - len(shown)
            text = ", ".join(map(str, shown)) + (f" and {more} more" if more else "")
            told.append(f"{self._names[number]} {text}")
        return "; ".join(told)
