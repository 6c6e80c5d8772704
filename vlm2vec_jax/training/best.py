# SPDX-License-Identifier: Apache-2.0
"""The parameters of the best evaluation during training, kept in `output/best`.

That folder is a model folder like `output` itself: `vlm2vec.json` and a checkpoint of the trained
parameters, without the optimizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2vec_jax.record import NAME, write_json
from vlm2vec_jax.training.checkpoint import Checkpoints

BEST = "best"
"""The folder, in the run's output."""


class Best:
    """Keeps the best; every process of a run calls it alike."""

    def __init__(
        self,
        output: Path,
        record: Mapping[str, Any],
        done: int,
        *,
        is_main: bool = True,
        **options: Any,
    ):
        """Look what an earlier process of this run has kept.

        Args:
          output: the run's folder.
          record: `vlm2vec.json` of the run; what it holds when a model is kept is written.
          done: steps already made; with 0 the run is a new one, and what is there goes away.
          is_main: False on all but the first process: then the record is not written.
          **options: further arguments of `Checkpoints`.
        """
        self.folder, self.score = output / BEST, -1.0
        self._record, self._is_main, self._options = record, is_main, options
        if not self.folder.is_dir():
            return
        if not done:
            if is_main:
                shutil.rmtree(self.folder)
            return
        with self._open(read_only=True) as checkpoints:
            meta = checkpoints.read_meta()
        self.score = float((meta or {}).get("eval_acc", -1.0))

    def _open(self, **more: Any) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", 1, **self._options, **more)

    def offer(
        self, step: int, score: float, state: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> bool:
        """Save the parameters if they are better than the best so far; whether they were.

        Args:
          step: counted from 1.
          score: larger is better; one that is not finite never is.
          state: what the trainer saves; only the parameters are kept.
          meta: what a checkpoint says besides its arrays.
        """
        if not score > self.score:
            return False
        self.score = score
        if self._is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / NAME, dict(self._record))
        kept = {"step": state["step"], "params": state["params"]}
        with self._open() as checkpoints:
            checkpoints.save(step, kept, {**meta, "step": step, "eval_acc": score}, force=True)
        return True
