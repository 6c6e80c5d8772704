# SPDX-License-Identifier: Apache-2.0
"""Embeds a corpus: scan, embed what is missing, put the parts together. Memory stays constant.

Whoever embeds (this process, several of them, Ray's actors), a window's result is a `Part`, or
what is wrong with the window. Windows with mistakes do not stop the others: at the end all
mistakes are told together, and the next run embeds those windows only.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.embedding import vectors as vector
from vlm2vec_jax.embedding.corpus import Corpus, Entry, Window, read
from vlm2vec_jax.embedding.index import Row, write_index
from vlm2vec_jax.embedding.parts import Part, Parts
from vlm2vec_jax.embedding.team import Team
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import BadInputs

MOST_PROBLEMS = 1000
"""A scan that has found so many stops."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is wrong with a window: `where: reason` for each bad entry, and what to do."""

    problems: list[str]
    advice: str = ""


Result = Part | Failure


@dataclasses.dataclass(frozen=True)
class Task:
    """What to make of which corpus.

    Attributes:
      corpus: what to embed.
      named: the corpus as the user calls it.
      output: the file or table to write.
      skip: leave bad entries out instead of failing.
      precision: of the stored numbers.
    """

    corpus: Corpus
    named: str
    output: Path
    skip: bool = False
    precision: str = "float32"

    def complain(self, problems: list[str], advice: str = "") -> None:
        """Raise for bad entries, if there are any."""
        kind = self.corpus.describe()["kind"]
        word = {"jsonl": "lines", "parquet": "rows", "folder": "images"}[kind]
        raise_problems(f"{self.named} has bad {word}", problems, advice=advice)


def scan(task: Task) -> list[Window]:
    """All windows of a corpus, after looking at every entry.

    Raises:
      UserError: listing the bad entries, unless they are skipped.
    """
    windows, problems = [], []
    for window, entries in task.corpus.scan():
        windows.append(window)
        problems += [f"{e.where}: {e.problem}" for e in entries if e.problem is not None]
        if len(problems) >= MOST_PROBLEMS and not task.skip:
            break
        if task.skip:
            problems.clear()
    task.complain(problems)
    return windows


def embed(
    embedder: Any, items: Iterable[tuple[Window, list[Entry]]], *, skip: bool, **options: Any
) -> Iterator[tuple[Window, Result]]:
    """Embed windows with an `Embedder`, in order.

    Args:
      embedder: its `encode_windows` is used.
      items: windows with their entries, taken when they are needed.
      skip: leave bad entries out.
      options: of `encode_windows`.
    """
    pending: collections.deque[tuple[Window, list[Entry]]] = collections.deque()

    def inputs() -> Iterator[list[Any]]:
        for window, entries in items:
            pending.append((window, entries))
            yield [entry.input for entry in entries if entry.input is not None]

    for found in embedder.encode_windows(inputs(), **options):
        window, entries = pending.popleft()
        good = [entry for entry in entries if entry.input is not None]
        problems = {e.row: f"{e.where}: {e.problem}" for e in entries if e.input is None}
        advice = ""
        if isinstance(found, BadInputs):
            advice = found.advice
            for n, reason in found.problems.items():
                problems[good[n].row] = f"{good[n].where}: {reason}"
            if skip:
                good = [entry for n, entry in enumerate(good) if n not in found.problems]
                (found,) = embedder.encode_windows([[entry.input for entry in good]], **options)
        listed = [problem for _, problem in sorted(problems.items())]
        if isinstance(found, BadInputs) or (listed and not skip):
            yield window, Failure(listed, advice)
        else:
            yield window, Part(np.array([e.row for e in good], np.int64), found, listed)


def embed_corpus(
    task: Task,
    windows: list[Window],
    parts: Parts,
    results: Callable[[list[Window]], Iterator[tuple[Window, Result]]],
    made_with: dict[str, Any],
    team: Team,
    *,
    restart: bool = False,
    say: Callable[[str], Any] = print,
) -> int:
    """Embed the windows that are missing, and write the output.

    Args:
      task: what to do.
      windows: from `scan`, the same on every process.
      parts: what is kept until all is there; only process 0 touches it.
      results: embeds the windows it is given (this process's share).
      made_with: `fingerprint`, `dimension`, `prompt`, `truncate_dim`, ...
      team: the processes that do it together.
      restart: drop what an interrupted run has left.
      say: for one line to the user.

    Returns:
      The number of vectors written.

    Raises:
      UserError: for bad entries, all of them; a full disk; parts of another model.
    """
    failures: list[Failure] = []
    try:
        missing = _begin(parts, windows, made_with, task, team, restart, say)
        mine = missing[team.index :: team.count]
        stream = results(mine)
        for _ in range(-(-len(missing) // team.count)):
            window, result, error = _next(stream)
            team.settle(error)
            for text in team.gather(packed(window, result)):
                if text:
                    number, made = unpacked(text)
                    if isinstance(made, Failure):
                        failures.append(made)
                    elif team.leads:
                        error = _attempt(parts.write, windows[number], made)
            team.settle(error)
        advice = next((f.advice for f in failures if f.advice), "")
        task.complain([p for failure in failures for p in failure.problems], advice)
        count, error = 0, None
        if team.leads:
            try:
                count = assemble(task, windows, parts, made_with, say)
            except UserError as problem:
                error = problem
        team.settle(error)
    except UserError:
        if team.leads:
            parts.tidy()
        raise
    if team.leads:
        parts.remove()
    return team.agree(count)


def _begin(parts, windows, made_with, task, team, restart, say) -> list[Window]:
    seen = json.dumps([window.digest for window in windows]).encode()
    if len(set(team.gather(seen))) > 1:
        raise UserError(f"the processes do not see the same corpus {task.named}")
    error, missing = None, []
    if team.leads:
        error = _attempt(lambda: parts.begin({**made_with, "skip": task.skip}, restart=restart))
        if error is None:
            missing = [window.number for window in parts.missing(windows)]
    team.settle(error)
    missing = team.agree(missing)
    done = len(windows) - len(missing)
    if done and team.leads:
        say(f"{done} of {len(windows)} windows are there from an earlier run")
    return [windows[number] for number in missing]


def _next(stream) -> tuple[Window | None, Result | None, UserError | None]:
    """The next result; none where this process has no more; a mistake is told, not raised."""
    try:
        window, result = next(stream, (None, None))
        return window, result, None
    except UserError as error:
        return None, None, error


def _attempt(function: Callable[..., Any], *args: Any) -> UserError | None:
    try:
        function(*args)
    except UserError as error:
        return error
    return None


def packed(window: Window | None, result: Result | None) -> bytes:
    """A result on its way to another process; empty for none."""
    if window is None or result is None:
        return b""
    number = window.number.to_bytes(8, "little")
    if isinstance(result, Part):
        return number + b"P" + result.to_bytes()
    return number + b"F" + json.dumps(dataclasses.asdict(result)).encode()


def unpacked(data: bytes) -> tuple[int, Result]:
    """The window's number and its result, from `packed`."""
    number, kind, rest = int.from_bytes(data[:8], "little"), data[8:9], data[9:]
    return number, Part.of_bytes(rest) if kind == b"P" else Failure(**json.loads(rest))


def assemble(
    task: Task,
    windows: list[Window],
    parts: Parts,
    made_with: dict[str, Any],
    say: Callable[[str], Any],
) -> int:
    """Write the output from the parts of all windows; returns the number of vectors."""
    count, ranges, skipped = 0, None, []
    for window in windows:
        part = parts.read(window)
        count += len(part.rows)
        skipped += part.problems[: MOST_PROBLEMS - len(skipped)]
        if task.precision in vector.CALIBRATED and len(part.rows):
            new = vector.value_ranges(part.embeddings)
            if ranges is not None:
                new = np.stack([np.minimum(new[0], ranges[0]), np.maximum(new[1], ranges[1])])
            ranges = new
    if skipped:
        say(f"left out of {task.named}:\n" + "\n".join(f"  - {problem}" for problem in skipped))
    with_rows = task.output.suffix != ".npz"

    def blocks() -> Iterator[tuple[list[Row], np.ndarray]]:
        for window in windows:
            part = parts.read(window)
            if with_rows:
                kept = set(part.rows.tolist())
                rows = [row_of(e) for e in read(task.corpus, window) if e.row in kept]
            else:
                rows = [{"row": int(row)} for row in part.rows]
            yield rows, vector.quantize_embeddings(part.embeddings, task.precision, ranges)

    dimension = made_with["dimension"]
    example = vector.quantize_embeddings(
        np.zeros((1, dimension), np.float32), task.precision, np.zeros((2, dimension))
    )
    meta = {
        **made_with,
        "precision": task.precision,
        "width": example.shape[1],
        "dtype": example.dtype.name,
        "input": task.corpus.describe(),
        "ranges": None if ranges is None else ranges.tolist(),
    }
    write_index(task.output, blocks, count, meta, with_rows=task.skip)
    return count


def row_of(entry: Entry) -> Row:
    """What is stored of an entry beside its vector."""
    item = entry.input
    assert item is not None
    images = [os.fspath(i) for i in item.images if isinstance(i, str | os.PathLike)]
    return {
        "row": entry.row,
        "id": _sound(entry.id),
        "text": _sound(item.text),
        "images": [_sound(os.path.abspath(image)) for image in images],
    }


def _sound(text: str | None) -> str | None:
    """Text that UTF-8 can say: lone surrogates become question marks."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")
