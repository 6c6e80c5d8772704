# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: saved in the background, kept N at a time, verified when read.

A thin layer over orbax's `CheckpointManager`. What it adds: a checksum of every array, so that a
damaged checkpoint is recognised whatever damaged it and the one before it is used; failures to
save that are reported and leave the good checkpoints alone; and errors in words when the folder
belongs to another run. Only arrays (orbax) and JSON are stored, nothing that runs code.

A checkpoint is `<folder>/<step>/`, written under another name and renamed when it is complete. It
has a folder for each key of the state (orbax) and `meta` (json): the caller's dictionary and, per
array, shape, dtype and checksum.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.parallel.peers import GivenUp, Peers
from vlm2vec_jax.training.checkpoint_files import (
    Damaged,
    as_abstract,
    check_folder,
    hush,
    parts_of,
    words,
)
from vlm2vec_jax.training.checkpoint_reading import FORMAT, read_arrays, read_document
from vlm2vec_jax.training.fingerprint import digest
from vlm2vec_jax.training.saving_together import Together

_LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Use as a context manager, or call `close`.

    Args:
      folder: made if missing; holds nothing but checkpoints.
      keep: how many to keep, newest first; None keeps all.
      every: `save` writes when the step is a multiple of it; 0 writes only when forced.
      read_only: for readers of a run that may still be training: nothing is written, moved
        aside or tidied up.
      report: gets one sentence per incident (a damaged checkpoint, a save that failed); by
        default the log, as a warning.
      peers: the processes that save together, to one folder that all see; what fails for one has
        failed for all.

    Raises:
      UserError: if `folder` is not a folder, holds other things than checkpoints, or (read-only)
        does not exist.
    """

    # After so many saves in a row that failed the run stops rather than train for nothing.
    FAILURES_BORNE = 5
    # Seconds before a save that failed is tried again, the first time, the second, ...
    RETRY_S = (5.0, 30.0, 120.0)

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int | None = 2,
        every: int = 0,
        *,
        read_only: bool = False,
        report: Callable[[str], None] | None = None,
        peers: Peers | None = None,
    ):
        if (keep is not None and keep < 1) or every < 0:
            raise UserError(f"checkpoint.keep ({keep}) must be at least 1, every ({every}) 0")
        self.folder = Path(os.path.abspath(folder))
        self.every = every
        self._keep = keep
        self._read_only = read_only
        self._report = report or _LOG.warning
        self._saving: int | None = None  # the step whose save has not been confirmed yet
        self._refused: str | None = None  # why this process could not even start that save
        self._failures: list[str] = []  # in a row, up to now
        self._retry_at = 0.0
        self._together = Together(peers or Peers(), self._report)
        check_folder(self.folder, read_only)
        hush()
        self._manager = self._open()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # While another error is on its way, a save that failed is reported but not raised.
        self.close(quiet=kind is not None)

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        return sorted(int(e.name) for e in self.folder.glob("*") if e.name.isdigit() and e.is_dir())

    def is_due(self, step: int) -> bool:
        """Whether `save` without `force` would write at this step.

        After a failure that is before the next regular step: as soon as the pause is over (with
        several processes, which would have to agree on the time, at the next regular step).
        """
        if self.every > 0 and step % self.every == 0:
            return True
        if not self._together.alone or self._read_only:
            return False
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._confirm()
        return bool(self._failures) and time.monotonic() >= self._retry_at

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, force: bool = False) -> bool:
        """Start to write a checkpoint; returns as soon as the arrays are copied.

        The arrays may be donated or changed afterwards. A save still running is waited for first;
        if it failed that is reported here, and training goes on to try again.

        Args:
          step: updates made so far.
          state: pytree of jax arrays (any sharding; typed random keys allowed). The values of a
            dict are stored apart, so that a reader may take some of them.
          meta: json-able: fingerprints of configuration and mixture, adapter, temperature, ...
          force: write although the step is not due (the last step of a run).

        Returns:
          Whether a save was started.

        Raises:
          UserError: after `FAILURES_BORNE` saves in a row that failed.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened read-only")
        if not (force or self.is_due(step)):
            return False
        self._confirm()
        if step in self.steps():
            return False
        return self._start(step, state, meta)

    def _start(
        self, step: int, state: Any, meta: Mapping[str, Any], *, final: bool = False
    ) -> bool:
        document = {"format": FORMAT, "step": step, "meta": dict(meta), "arrays": digest(state)}
        self._saving = step
        unable = self._together.begin(self.folder)
        if unable is not None:
            self._failed(unable, final=final)
            return False
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(document),
                    **{name: ocp.args.StandardSave(part) for name, part in parts_of(state).items()},
                ),
                force=True,
            )
        except Exception as error:  # orbax and tensorstore raise many kinds, none in common
            if not self._together.alone:  # the others have started, and find out in `_confirm`
                self._refused = words(error)
                return True
            self._failed(words(error), final=final)
            return False
        return True

    def save_at_once(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Write a checkpoint and wait until it is there; again, after a pause, where that fails.

        Raises:
          UserError: if it cannot be written; the ones before it are untouched.
        """
        self._confirm(final=True)
        for pause in (*self.RETRY_S, None):
            if step in self.steps():
                return
            self._start(step, state, meta, final=True)
            self._confirm(final=True)
            if step not in self.steps() and pause is not None:
                time.sleep(pause)
        self.wait()

    def wait(self) -> None:
        """Block until nothing is being written.

        Raises:
          UserError: if the last save failed: the newest checkpoint is older than it should be.
        """
        self._confirm()
        if self._failures:
            raise UserError(
                f"the last checkpoint could not be written: {self._failures[-1]}\n"
                + self._what_is_left()
            )

    def close(self, *, quiet: bool = False) -> None:
        """Wait and release. Raises as `wait` does, unless `quiet`."""
        try:
            self.wait()
        except UserError as error:
            if not quiet:
                raise
            _LOG.debug("not raised, as another error is on its way: %s", error)
        finally:
            self._shut()

    def read_meta(self, step: int | None = None) -> dict[str, Any] | None:
        """The caller's dictionary of a checkpoint, without reading any array.

        Args:
          step: by default the newest one whose meta can be read.

        Returns:
          None if there is no such checkpoint or its meta is damaged.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                return read_document(self.folder, candidate)["meta"]
            except Damaged:
                continue
        return None

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Read one checkpoint; see `restore_latest`.

        Raises:
          UserError: if it does not exist, is damaged, or holds other arrays than asked for.
        """
        try:
            return self._read(step, abstract)
        except Damaged as error:
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged: {error}") from error

    def restore_latest(
        self, abstract: Any, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Read the newest checkpoint that is whole.

        A damaged one is reported and, unless read-only, moved aside to `damaged-<step>` so that
        the run can write that step again.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct(shape, dtype, sharding=...)` leaves, or as
            arrays; shardings may belong to another mesh than the one that saved.
          partial: `abstract` is a dict with some of the saved one's keys; only these are read.

        Returns:
          (step, state, meta), or None if the folder holds no checkpoint at all.

        Raises:
          UserError: if there are checkpoints but none is whole, or the newest whole one holds
            other arrays than asked for (another model or adapter).
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                state, meta = self._read(step, abstract, partial)
            except Damaged as error:
                damaged.append((step, f"step {step}: {error}"))
                self._report(f"checkpoint {self.folder / str(step)} is damaged ({error})")
                continue
            for bad, _ in damaged:
                self._move_aside(bad)
            if damaged:
                self._report(f"the checkpoint of step {step} is whole and is used instead")
            return step, state, meta
        raise_problems(
            f"no checkpoint in {self.folder} can be read",
            [line for _, line in damaged],
            advice="Choose another output folder to start afresh, or bring back a good copy.",
        )
        return None

    # -- inside --------------------------------------------------------------------------------

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=0 if self._read_only else 1,  # `is_due` decides
            max_to_keep=None if self._read_only else self._keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            create=not self._read_only,
            async_options=ocp.AsyncOptions(
                barrier_sync_fn=None if self._together.alone else self._together.meet
            ),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _shut(self) -> None:
        try:
            self._manager.close()
        except Exception as error:  # the failure itself was reported before
            _LOG.debug("closing the checkpoint manager: %s", error)

    def _confirm(self, *, final: bool = False) -> None:
        """Wait for the save under way, if any, and note how it ended."""
        if self._saving is None:
            return
        problem, self._refused = self._refused, None
        try:
            if problem is None:
                self._manager.wait_until_finished()
                if self._saving not in self.steps():
                    problem = "it is not there after the save"
        except GivenUp:
            problem = None  # it is another one's, who tells
        except Exception as error:  # any failure of a background write
            problem = words(error)
        problem = self._together.end(problem)
        if problem is not None:
            self._failed(problem, final=final)
            return
        self._saving = None
        self._failures.clear()

    def _failed(self, problem: str, *, final: bool = False) -> None:
        step, self._saving = self._saving, None
        sentence = f"step {step}: {problem}"
        self._failures.append(sentence)
        pause = self.RETRY_S[min(len(self._failures), len(self.RETRY_S)) - 1]
        self._retry_at = time.monotonic() + pause
        # After an error orbax has already forgotten the checkpoints it meant to delete, and keeps
        # the unfinished folder: a new manager reads the truth from disk and tidies up.
        self._shut()
        self._manager = self._open()
        self._report(
            f"saving a checkpoint failed, {sentence}; {self._what_is_left()} It is tried again."
        )
        if len(self._failures) >= self.FAILURES_BORNE and not final:
            raise UserError(
                f"{len(self._failures)} saves in a row failed in {self.folder}:\n"
                + "\n".join(f"  - {line}" for line in self._failures)
                + f"\n{self._what_is_left()}"
            )

    def _what_is_left(self) -> str:
        steps = self.steps()
        if not steps:
            return f"there is no earlier checkpoint in {self.folder}."
        return f"the checkpoint of step {steps[-1]} in {self.folder} is untouched."

    def _read(self, step: int, abstract: Any, partial: bool = False) -> tuple[Any, dict[str, Any]]:
        if step not in self.steps():
            raise UserError(f"there is no checkpoint of step {step} in {self.folder}")
        abstract = jax.tree.map(as_abstract, abstract)
        problem, state, document = None, None, {}
        try:
            document = read_document(self.folder, step)
            state = read_arrays(self.folder / str(step), document, abstract, partial)
        except Damaged as error:
            problem = str(error)
        # Before the checksums, which all processes compute together.
        problem = self._together.read(problem)
        if problem is not None:
            raise Damaged(problem)
        arrays, found = document["arrays"], digest(state)
        wrong = [path for path, entry in found.items() if entry["sum"] != arrays[path]["sum"]]
        if wrong:
            raise Damaged(
                f"{len(wrong)} of {len(found)} arrays have other contents than were saved, "
                f"the first is {wrong[0]}"
            )
        return state, document["meta"]

    def _move_aside(self, step: int) -> None:
        if self._read_only:
            return
        source = self.folder / str(step)
        target = self.folder / f"damaged-{step}"
        if target.exists():
            target = self.folder / f"damaged-{step}-{int(time.time())}"
        if jax.process_index() == 0:
            os.replace(source, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step} moved aside")
        self._manager.reload()
