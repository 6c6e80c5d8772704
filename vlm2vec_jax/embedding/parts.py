# SPDX-License-Identifier: Apache-2.0
"""What is already embedded of a corpus: a file per window beside the output, until all is there.

A part carries the digest of its window's content in its name, so a run that goes on uses exactly
the parts that still fit. Each is written under a temporary name and renamed: whole or not there.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.embedding.corpus import Window
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.evaluation.store import differences, plain

META = "made_with.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """The result of a window.

    Attributes:
      rows: i64 [n], the numbers of the entries in the corpus; bad ones are left out.
      embeddings: f32 [n, D].
      problems: `where: reason` of the entries that were left out.
    """

    rows: np.ndarray
    embeddings: np.ndarray
    problems: list[str] = dataclasses.field(default_factory=list)

    def to_bytes(self) -> bytes:
        """As an npz."""
        out = io.BytesIO()
        problems = np.frombuffer(json.dumps(self.problems).encode(), np.uint8)
        np.savez(out, rows=self.rows, embeddings=self.embeddings, problems=problems)
        return out.getvalue()

    @classmethod
    def of_bytes(cls, data: bytes) -> Part:
        """From what `to_bytes` gave.

        Raises:
          ValueError: if it is something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                problems = json.loads(file["problems"].tobytes().decode())
                return cls(file["rows"], file["embeddings"], problems)
        except (OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from error


class Parts:
    """The folder of parts of one output."""

    def __init__(self, output: Path):
        """Nothing is written yet.

        Args:
          output: what will be made of the parts.
        """
        self.output = output
        self.folder = output.with_name(f".{output.name}.parts")
        self.listing = self.folder / "listing.jsonl"

    def begin(self, made_with: Mapping[str, Any], *, restart: bool = False) -> None:
        """Make the folder, or go on with the one that an interrupted run has left.

        Args:
          made_with: everything that decides the vectors besides the corpus.
          restart: drop what an earlier run has left.

        Raises:
          UserError: if that run used another model or other options.
        """
        path = self.folder / META
        if restart:
            for old in (path, *self.folder.glob("*.npz")):
                old.unlink(missing_ok=True)
        wanted = plain(made_with)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None  # a run that had just begun
        if stored is not None and self._any():
            raise_problems(
                f"{self.folder} holds an unfinished run with another model or other options",
                differences(stored, wanted),
                advice="Give the flags of that run to go on with it, --restart to drop it, or "
                "another --output.",
            )
            return
        self._write(path, json.dumps(wanted, indent=1).encode())

    def make(self) -> None:
        """Make the folder, so that a listing can be written to it."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._cannot(error) from error

    def path(self, window: Window) -> Path:
        """Where the part of a window is kept."""
        return self.folder / f"{window.number:08d}-{window.digest}.npz"

    def has(self, window: Window) -> bool:
        """Whether it is there."""
        return self.path(window).exists()

    def missing(self, windows: Iterable[Window]) -> list[Window]:
        """The windows whose parts are not there."""
        return [window for window in windows if not self.has(window)]

    def write(self, window: Window, part: Part) -> None:
        """Keep a part.

        Raises:
          UserError: if the disk does not take it.
        """
        self._write(self.path(window), part.to_bytes())

    def read(self, window: Window) -> Part:
        """A part.

        Raises:
          UserError: if it is damaged; it is removed, so that the next run makes it again.
        """
        path = self.path(window)
        try:
            return Part.of_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            path.unlink(missing_ok=True)
            raise UserError(f"{path} is damaged ({error}); run the command again") from None

    def tidy(self) -> None:
        """Remove the folder if no part is in it: a run that achieved nothing leaves nothing."""
        if not self._any():
            self.remove()

    def _any(self) -> bool:
        return any(self.folder.glob("*.npz"))

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, path: Path, data: bytes) -> None:
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> UserError:
        return cannot_write(self.output, error)


def cannot_write(output: Path, error: OSError) -> UserError:
    """What to say when the disk does not take an output."""
    kept = "; the file that was there is unchanged" if output.exists() else ""
    return UserError(f"cannot write {output}: {error.strerror or error}{kept}")
