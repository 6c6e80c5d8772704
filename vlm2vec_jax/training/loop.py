# SPDX-License-Identifier: Apache-2.0
"""The training loop: batch, step, numbers, checkpoint; the same on all processes.

A step's numbers are fetched while the next one runs. Everything that decides whether to go on
(a signal, a step too many that was not finite) comes out alike on all processes, so none is left
waiting for another inside a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm2vec_jax.compilation import Programs
from vlm2vec_jax.data.pipeline import Batches, BatchStats
from vlm2vec_jax.training.batching import PackedStep
from vlm2vec_jax.training.checkpoint import Checkpoints
from vlm2vec_jax.training.guard import SkippedSteps
from vlm2vec_jax.training.metrics import MetricsWriter
from vlm2vec_jax.training.profiling import Profiler
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import TrainBatch
from vlm2vec_jax.training.stopping import Stopping
from vlm2vec_jax.training.validation import Validation

MANY_PROGRAMS = 10
"""Programs of a run's step beyond which something about its data keeps growing."""


class Finished(NamedTuple):
    """A step whose numbers have come.

    Attributes:
      step: counted from 1.
      values: what the step returned, floats (and arrays, where it returned any).
      extra: what the host knows: shares of real tokens, times.
      packed: the batch as it was packed.
      stats: which rows it had.
    """

    step: int
    values: dict[str, Any]
    extra: dict[str, Any]
    packed: PackedStep
    stats: BatchStats


class _Pending(NamedTuple):
    step: int
    values: Any
    extra: dict[str, Any]
    packed: PackedStep
    stats: BatchStats
    batch: TrainBatch


class Loop:
    """Trains from a step to a step.

    Args:
      trainer: holds the state.
      step_fn: the compiled step.
      key: base key of the run.
      batches: packed batches from the first step that is to do.
      make_batch: (packed, stats) -> what the step takes, as host arrays.
      checkpoints: where to save.
      meta: (step, packed) -> what a checkpoint says besides its arrays.
      metrics: where the numbers go.
      skipped: counts steps that were not finite.
      stopping: says when to stop early.
      dump: called with (step, host batch, finished) when a step too many was not finite; raises.
      watch: called with every finished step; it may add to `extra` what shall be written, and
        returns warnings.
      validation: scores the parameters now and then; None for never.
      profiler: traces chosen steps; None for none.
    """

    def __init__(
        self,
        *,
        trainer: Trainer,
        step_fn: Callable[..., Any],
        key: jax.Array,
        batches: Batches,
        make_batch: Callable[[PackedStep, BatchStats], TrainBatch],
        checkpoints: Checkpoints,
        meta: Callable[[int, PackedStep], Mapping[str, Any]],
        metrics: MetricsWriter,
        skipped: SkippedSteps,
        stopping: Stopping,
        dump: Callable[[TrainBatch, Finished], None],
        watch: Callable[[Finished], Sequence[str]] = lambda finished: (),
        validation: Validation | None = None,
        profiler: Profiler | None = None,
    ):
        self._trainer, self._step_fn, self._key = trainer, step_fn, key
        self._batches, self._make_batch = batches, make_batch
        self._checkpoints, self._meta, self._metrics = checkpoints, meta, metrics
        self._skipped, self._stopping = skipped, stopping
        self._dump, self._watch = dump, watch
        self._validation, self._profiler = validation, profiler
        self._programs = 0
        self._since = time.perf_counter()

    def run(self, done: int, last: int) -> bool:
        """Train.

        Args:
          done: steps already made.
          last: where to end.

        Returns:
          Whether it was asked to stop before `last`; the state is saved either way.

        Raises:
          UserError: for bad data, a full disk, too many steps that were not finite.
        """
        pending, stop = None, False
        self._since = time.perf_counter()
        while done < last and not stop:
            asked = time.perf_counter()
            _, packed, stats = next(self._batches)
            waited = time.perf_counter() - asked
            batch = self._make_batch(packed, stats)
            trainer = self._trainer
            if self._profiler is not None:
                self._profiler.before(done + 1)
            placed = trainer.put(batch)
            with Programs() as made:
                trainer.state, values = self._step_fn(
                    trainer.state, trainer.frozen, placed, self._key
                )
            del placed  # donated or not, it is not held for longer than the step
            done += 1
            self._say(self._compiled(done, made))
            if self._profiler is not None:
                self._say(self._profiler.after(done, values))
            if pending is not None:
                self._finish(pending)
            for message in stats.skipped:
                self._metrics.message(f"skipped: {message}")
            extra = {
                "real_tokens": packed.real_tokens,
                "real_units": packed.real_units,
                "data_wait_s": waited,
                "skipped": len(stats.skipped),
                **({"compile_s": made.seconds} if made.count else {}),
            }
            pending = _Pending(done, values, extra, packed, stats, batch)
            stop = self._stopping.asked(done)
            score = None if stop else self._validate(pending, last)
            save = stop or done == last or self._checkpoints.is_due(done)
            # With one more bad step the run ends with the state before it: do not run ahead.
            if save or self._skipped.at_limit:
                self._finish(pending)
                pending = None
            if save:
                self._save(done, packed, at_once=stop or done == last)
            if score is not None and self._validation is not None:
                meta = self._meta(done, packed)
                self._say(self._validation.keep_best(done, score, trainer.saved(), meta))
        if self._profiler is not None:
            self._say(self._profiler.close())
        return stop and done < last

    def _say(self, message: str | None) -> None:
        if message:
            self._metrics.message(message)

    def _compiled(self, step: int, made: Programs) -> str | None:
        """What to say of a step that had to be compiled; the first one always is."""
        self._programs += made.count > 0
        if not made.count or self._programs == 1:
            return None
        words = (
            f"warning: step {step}: the step was compiled again, which took {made.seconds:.1f} s "
            f"(program {self._programs} of this run): this batch needs more room than any before"
        )
        if self._programs > MANY_PROGRAMS:
            words += (
                "; with so many programs set packing.row_tokens, or data.max_len and the like, so "
                "that inputs are of like lengths"
            )
        return words

    def _validate(self, pending: _Pending, last: int) -> float | None:
        """Score the parameters behind a step if it is time; its time is not the step's."""
        if self._validation is None or not self._validation.is_due(pending.step, last):
            return None
        jax.block_until_ready(pending.values)
        begun = time.perf_counter()
        scores = self._validation.scores()
        took = time.perf_counter() - begun
        self._since += took
        pending.extra.update(scores, eval_s=took)
        return scores["eval_acc"]

    def _save(self, done: int, packed: PackedStep, *, at_once: bool) -> None:
        meta = self._meta(done, packed)
        state = self._trainer.saved()
        if at_once:
            self._checkpoints.save_at_once(done, state, meta)
        else:
            self._checkpoints.save(done, state, meta, force=True)

    def _finish(self, pending: _Pending) -> None:
        """Fetch and write a step's numbers."""
        values = {
            name: float(value) if np.ndim(value) == 0 else np.asarray(value)
            for name, value in jax.device_get(pending.values).items()
        }
        now = time.perf_counter()
        took, self._since = now - self._since, now
        pairs = len(pending.stats.rows)
        extra = {**pending.extra, "step_s": took, "pairs_per_s": pairs / took}
        finished = Finished(pending.step, values, extra, pending.packed, pending.stats)
        was_at_limit = self._skipped.at_limit
        message = self._skipped.look(pending.step, values, pending.stats.rows)
        warnings = self._watch(finished)
        numbers = {name: value for name, value in values.items() if np.ndim(value) == 0}
        self._metrics.write(pending.step, {**numbers, **finished.extra})
        for warning in warnings:
            self._metrics.message(f"warning: {warning}")
        if message:
            self._metrics.message(f"warning: {message}")
            if was_at_limit:
                self._dump(pending.batch, finished)
