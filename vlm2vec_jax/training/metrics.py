# SPDX-License-Identifier: Apache-2.0
"""What a run says while it goes: `metrics.jsonl`, the console, and TensorBoard when installed.

`metrics.jsonl` has one json object per step, `step` counted from 1, each step once, also after
interruptions. No value in it is NaN or infinite (json knows neither): such a value is null and
its name stands in the list `non_finite`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vlm2vec_jax.errors import UserError

FILE = "metrics.jsonl"

# What the console shows of a step, in this order: key, words before, format, words after.
_SHOWN = (
    ("loss", "loss ", "{:.4f}", ""),
    ("lr", "lr ", "{:.2e}", ""),
    ("grad_norm", "grad ", "{:.3g}", ""),
    ("accuracy", "acc ", "{:.1%}", ""),
    ("pairs_per_s", "", "{:.1f}", " pairs/s"),
    ("real_tokens", "real tokens ", "{:.0%}", ""),
    ("data_wait_s", "data wait ", "{:.2f}", " s"),
)


class MetricsWriter:
    """Writes the metrics of one run; a context manager.

    Args:
      output: the run's folder, made if missing; `metrics.jsonl` and `tensorboard/` go into it.
      total_steps: of the whole run, for the progress and the time left.
      resume_step: updates already made. Lines of later steps (from before an interruption) are
        cut off; with 0 the file starts anew.
      log_every: without a terminal, a plain line each so many steps (and for the first and last).
      console: a rich console; standard error by default. On a terminal it shows one live line.
      tensorboard: also write TensorBoard events if `tensorboardX` or `tensorboard` is installed.
      is_main: False on all but the first process of a run: then nothing is written or shown.

    Raises:
      UserError: if the file cannot be written.
    """

    def __init__(
        self,
        output: str | os.PathLike,
        total_steps: int,
        resume_step: int = 0,
        *,
        log_every: int = 10,
        console: Console | None = None,
        tensorboard: bool = True,
        is_main: bool = True,
    ):
        self.total_steps = total_steps
        self.resume_step = resume_step
        self.log_every = max(1, log_every)
        self._is_main = is_main
        self._started = time.monotonic()
        self._file = self._progress = self._task = self._board = None
        if not is_main:
            return
        self._console = console or Console(stderr=True)
        folder = Path(output)
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            cut_after(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error
        self._board = open_tensorboard(folder / "tensorboard", resume_step) if tensorboard else None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[words]}"),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "train", total=total_steps, completed=resume_step, words="", left=""
            )
            self._progress.start()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one step.

        Args:
          step: from 1, rising.
          values: name -> number (Python, numpy or a jax scalar), string, or None. Known to the
            console: loss, lr, grad_norm, accuracy (0..1), pairs_per_s, real_tokens (share, 0..1),
            data_wait_s.

        Raises:
          UserError: if the disk does not take the line.
        """
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        strange = [name for name, value in plain.items() if not _is_finite(value)]
        safe = {name: None if name in strange else value for name, value in plain.items()}
        line = {"step": step, **safe} | ({"non_finite": strange} if strange else {})
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error}") from error
        if self._board is not None:
            for name, value in safe.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, float(value), step)
        if strange:
            told = ", ".join(f"{name} is {plain[name]}" for name in strange)
            self.message(f"warning: step {step}: {told}")
        self._show(step, plain)

    def message(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self._is_main:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flush and close everything; harmless when called twice."""
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            # A line that a full disk did not take was reported when it was written.
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._progress = self._board = None

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        words = "  ".join(
            before + form.format(values[key]) + after
            for key, before, form, after in _SHOWN
            if isinstance(values.get(key), (int, float))
        )
        left = self._time_left(step)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, words=words, left=left)
        elif step % self.log_every == 0 or step in (self.resume_step + 1, self.total_steps):
            self.message(f"step {step}/{self.total_steps}  {words}  {left}".rstrip())

    def _time_left(self, step: int) -> str:
        """`eta 0:12:34` at the mean pace since the start of this process."""
        done, remaining = step - self.resume_step, self.total_steps - step
        if done < 1 or remaining < 1:
            return ""
        seconds = round((time.monotonic() - self._started) / done * remaining)
        return f"eta {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def cut_after(path: Path, step: int) -> None:
    """Bring a metrics file to the state it had after `step`: each step up to it once.

    The last of repeated lines counts; a torn last line (the process was killed while writing) and
    anything that is not a step's object goes. The file is replaced in one move, so that a second
    interruption cannot lose it. A missing file is left missing.
    """
    if not path.exists():
        return
    kept: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            number = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(number, int) and number <= step:
            kept[number] = line
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(kept[number] + "\n" for number in sorted(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The steps of a metrics file, in order; a torn last line is passed over.

    Raises:
      UserError: if there is no such file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def open_tensorboard(folder: Path, resume_step: int) -> Any | None:
    """Something with `add_scalar(tag, value, step)` and `close()`; None without TensorBoard.

    Events of steps after `resume_step` that an earlier process wrote are purged by the viewer.
    """
    purge = resume_step + 1 if resume_step else None
    if importlib.util.find_spec("tensorboardX"):
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(folder), purge_step=purge)
    if importlib.util.find_spec("tensorboard"):
        return _EventFile(folder, purge)
    return None


class _EventFile:
    """TensorBoard's own event writer, which needs neither TensorFlow nor torch."""

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(folder))
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=purge_step, session_log=start)

    def _add(self, **fields: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), **fields))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        point = self._summary.Summary.Value(tag=tag, simple_value=value)
        self._add(step=step, summary=self._summary.Summary(value=[point]))

    def close(self) -> None:
        self._writer.close()


def _plain(value: Any) -> Any:
    """A Python number of a numpy or jax scalar; other values as they are."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return np.asarray(value).item()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
