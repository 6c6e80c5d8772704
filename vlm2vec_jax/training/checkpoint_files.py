# SPDX-License-Identifier: Apache-2.0
"""Around checkpoints: their folder, errors of the disk in words, orbax's own noise kept away."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from vlm2vec_jax.errors import UserError, raise_problems

WHOLE = "state"
"""Name of the only part of a state that is no dict."""

_DISK_ERRORS = [
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO".split()
]


def hush() -> None:
    """Keep orbax's tracebacks off the console: every incident is reported in a sentence."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(quiet_orbax)  # added once, however often asked
    if not isinstance(sys.unraisablehook, QuietHook):
        sys.unraisablehook = QuietHook(sys.unraisablehook)


def check_folder(folder: Path, read_only: bool) -> None:
    """Make the folder of a run's checkpoints, unless it is there and holds nothing else.

    Raises:
      UserError: saying what is wrong with it.
    """
    if not folder.exists():
        if read_only:
            raise UserError(f"there is no checkpoint folder {folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the checkpoint folder {folder}: {error}") from error
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a folder for checkpoints is needed")
    strange = sorted(
        entry.name
        for entry in folder.iterdir()
        if not (entry.name.isdigit() or entry.name.startswith("damaged-") or "tmp" in entry.name)
    )
    raise_problems(
        f"{folder} holds other things than checkpoints of this program",
        strange,
        advice="Choose another output folder.",
    )


def check_writable(folder: Path, process: int) -> str | None:
    """Why this process cannot write to the folder of checkpoints; None if it can.

    Args:
      folder: that all processes see.
      process: number of this one, so that none uses another's file.
    """
    probe = folder / f"probe-{process}.tmp"
    try:
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        return words(error)
    return None


class Damaged(Exception):
    """A checkpoint that is there but cannot be trusted."""


def words(error: BaseException) -> str:
    """An error in one line; tensorstore's go on for pages and name the cause last."""
    text = str(error).strip()
    for cause in map(os.strerror, _DISK_ERRORS):
        if cause.lower() in text.lower():
            return cause
    first = text.splitlines()[0][:200] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def quiet_orbax(record: logging.LogRecord) -> bool:
    """A logging filter: drop orbax's tracebacks (we report them in a sentence) and one notice."""
    if record.name == "asyncio":  # of reads that nobody waited for after another had failed
        return "orbax" not in record.getMessage()
    if "orbax" not in record.pathname:
        return True
    return not (record.exc_info or str(record.msg).startswith("Given directory is read only"))


class QuietHook:
    """Python's hook for errors that nobody can catch, without those of writes that came too late.

    When one array of a save fails (a full disk), orbax ends its event loop, and tensorstore still
    wants to tell it of the other arrays: a page of tracebacks beside the sentence that we print.
    """

    def __init__(self, before: Callable[[Any], Any]):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        """Tell of an error, unless it is one of those."""
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._before(unraisable)


def parts_of(state: Any) -> dict[str, Any]:
    """What is stored apart, by name; each in a dict, as orbax takes no bare arrays."""
    parts = state if isinstance(state, dict) else {WHOLE: state}
    return {name: {"value": part} for name, part in parts.items()}


def as_abstract(leaf: Any) -> Any:
    """The shape, type and place of an array."""
    # Without a sharding orbax would ask for the devices that saved it.
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
