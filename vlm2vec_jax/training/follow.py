# SPDX-License-Identifier: Apache-2.0
"""What is worked out of a finished step on the host: loss by subset, useful FLOPs, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm2vec_jax.parallel import chips


def subset_losses(
    losses: np.ndarray, sources: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """Mean loss of the examples of each subset that a batch has, by name.

    Args:
      losses: f32 [B], of each pair's query.
      sources: int [B], which subset it came from.
      names: of the subsets.
    """
    there: list[int] = np.unique(sources).tolist()
    return {names[s]: float(np.mean(losses[sources == s])) for s in there}


class Follower:
    """Adds to a step's numbers what the host knows of it.

    Args:
      names: of the mixture's subsets, in its order.
      devices: of the mesh.
      full: every parameter is trained. Then a gradient needs three times the forward pass's FLOPs,
        with adapters twice (gradients of frozen weights are not needed).
    """

    def __init__(self, names: Sequence[str], devices: Sequence[Any], *, full: bool):
        self._names, self._devices = list(names), list(devices)
        self._passes = 3 if full else 2
        self._local = [d for d in devices if d.process_index == jax.process_index()]

    def numbers(
        self, values: Mapping[str, Any], sources: np.ndarray, forward_flops: float, seconds: float
    ) -> dict[str, Any]:
        """What to write besides the step's own scalars.

        Args:
          values: what the step returned, with `example_loss` f32 [B].
          sources: int [B], the subset of each pair of the global batch.
          forward_flops: of the forward passes of the whole batch, nothing computed twice, no
            padding.
          seconds: that the step took.

        Returns:
          `subset_loss`, `tflops_per_s` (useful, all devices together), and, where they are known,
          `mfu` (share of the devices' peak) and `memory_bytes` (most in use on a device of this
          process, so far).
        """
        flops = self._passes * forward_flops
        found: dict[str, Any] = {
            "subset_loss": subset_losses(np.asarray(values["example_loss"]), sources, self._names),
            "tflops_per_s": flops / max(seconds, 1e-9) / 1e12,
        }
        share = chips.mfu(flops, seconds, self._devices)
        memory = chips.peak_memory(self._local)
        found |= {} if share is None else {"mfu": share}
        found |= {} if memory is None else {"memory_bytes": memory}
        return found
