# SPDX-License-Identifier: Apache-2.0
"""What a run says while it goes: `metrics.jsonl`, the console, and trackers (`trackers.py`).

`metrics.jsonl` has one json object per step, `step` counted from 1, each step once, also after
interruptions. No value in it is NaN or infinite (json knows neither): such a value is null and
its name stands in the list `non_finite`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.training.trackers import Tracker

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
    ("mfu", "MFU ", "{:.1%}", ""),
)


class MetricsWriter:
    """Writes the metrics of one run; a context manager.

    Args:
      output: the run's folder, made if missing; `metrics.jsonl` goes into it.
      total_steps: of the whole run, for the progress and the time left.
      resume_step: updates already made. Lines of later steps (from before an interruption) are
        cut off; with 0 the file starts anew.
      log_every: without a terminal, a plain line each so many steps (and for the first and last).
      console: a rich console; standard error by default. On a terminal it shows one live line.
      trackers: receive the numbers as well; closed with this.
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
        trackers: Sequence[Tracker] = (),
        is_main: bool = True,
    ):
        self.total_steps = total_steps
        self.resume_step = resume_step
        self.log_every = max(1, log_every)
        self._is_main = is_main
        self._started = time.monotonic()
        self._file = self._progress = self._task = None
        self._trackers = list(trackers) if is_main else []
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
          values: name -> number (Python, numpy or a jax scalar), string, None, or a dict of such
            (`subset_loss`), which trackers see as `subset_loss/NAME`. Known to the console: loss,
            lr, grad_norm, accuracy (0..1), pairs_per_s, real_tokens (share, 0..1), data_wait_s,
            mfu (0..1).

        Raises:
          UserError: if the disk does not take the line.
        """
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        strange = [name for name, value in flat(plain).items() if not _is_finite(value)]
        safe = {name: _finite(value) for name, value in plain.items()}
        line = {"step": step, **safe} | ({"non_finite": strange} if strange else {})
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error}") from error
        numbers = {n: float(v) for n, v in flat(safe).items() if isinstance(v, (int, float))}
        for tracker in self._trackers:
            tracker.write(step, numbers)
        if strange:
            told = ", ".join(f"{name} is {flat(plain)[name]}" for name in strange)
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
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            # A line that a full disk did not take was reported when it was written.
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._progress = None
        self._trackers = []

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


def _plain(value: Any) -> Any:
    """A Python number of a numpy or jax scalar; other values as they are."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return np.asarray(value).item()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _finite(value: Any) -> Any:
    """The value with None for what json cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return value if _is_finite(value) else None


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by names joined with slashes."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": v for inner, v in flat(value).items()}
        else:
            found[name] = value
    return found
