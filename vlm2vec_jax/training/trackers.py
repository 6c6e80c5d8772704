# SPDX-License-Identifier: Apache-2.0
"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard and Weights & Biases.

Both are optional extras, imported only when a run asks for them. A tracker is a convenience: what
it cannot write is in `metrics.jsonl` all the same.
"""

from __future__ import annotations

import importlib.util
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vlm2vec_jax.errors import UserError

WANDB_MODES = ("off", "offline", "online")


class Tracker(Protocol):
    """Something that takes the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take a step's numbers, by name; steps rise from 1."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_trackers(
    output: str | Path,
    resume_step: int,
    *,
    tensorboard: bool = True,
    wandb: str = "off",
    project: str = "vlm2vec_jax",
    config: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """The trackers that a run asks for.

    Args:
      output: the run's folder; `tensorboard/` and `wandb/` go into it.
      resume_step: updates made before.
      tensorboard: write TensorBoard events if `tensorboardX` or `tensorboard` is installed.
      wandb: "off"; "offline" writes into `output/wandb`, to be sent later with `wandb sync`;
        "online" sends, which needs a network and a login.
      project: Weights & Biases' project.
      config: what the run's page shall show of its configuration.

    Raises:
      UserError: if Weights & Biases is asked for and not installed, or refuses.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        board = open_tensorboard(Path(output) / "tensorboard", resume_step)
        trackers += [board] if board is not None else []
    if wandb != "off":
        trackers.append(WeightsAndBiases(Path(output), wandb, project, config or {}))
    return trackers


def open_tensorboard(folder: Path, resume_step: int) -> Tracker | None:
    """A writer of TensorBoard events; None without TensorBoard.

    Events of steps after `resume_step` that an earlier process wrote are purged by the viewer.
    """
    purge = resume_step + 1 if resume_step else None
    if importlib.util.find_spec("tensorboardX"):
        return _TensorboardX(folder, purge)
    if importlib.util.find_spec("tensorboard"):
        return _EventFile(folder, purge)
    return None


class _TensorboardX:
    """The writer of the package tensorboardX."""

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


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

    def write(self, step: int, values: Mapping[str, float]) -> None:
        points = [
            self._summary.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        self._add(step=step, summary=self._summary.Summary(value=points))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; a resumed training goes on in the same run.

    Steps that were logged before an interruption and are trained again are not logged twice
    (Weights & Biases takes rising steps only).
    """

    def __init__(self, output: Path, mode: str, project: str, config: Mapping[str, Any]):
        """Start or go on.

        Raises:
          UserError: if the package is missing or the service refuses.
        """
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                "tracking.wandb asks for Weights & Biases, which is not installed: "
                "pip install 'vlm2vec_jax[wandb]', or --config.tracking.wandb=off"
            )
        import wandb

        folder = output / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(folder / "run_id"),
                name=output.name,
                dir=str(output),
                mode=mode,  # type: ignore[arg-type]
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(f"Weights & Biases cannot be started ({mode}): {error}") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _run_id(path: Path) -> str:
    """The run's id, kept beside its files, so that a resumed training finds its run."""
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = secrets.token_hex(4)
    path.write_text(name + "\n", encoding="utf-8")
    return name
