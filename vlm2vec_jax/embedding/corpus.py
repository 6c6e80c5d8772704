# SPDX-License-Identifier: Apache-2.0
"""What is to be embedded, read a window at a time: a jsonl file, parquet files, a folder of images.

`scan` goes once through everything, checks it and cuts it into windows; `load` and `parse` then
get at any window again, in any order and on any machine that sees the files. Memory does not grow
with the corpus: of a window only its place and a digest of its content are kept.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import image_size
from vlm2vec_jax.inputs import MultimodalInput

WINDOW = 2048
"""Inputs of a window: enough to pack rows well; its vectors are a file of some 25 MB."""

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .tga".split()
)
"""Files that a folder of images is searched for."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One item of a corpus.

    Attributes:
      row: its number in the corpus, from 0.
      where: how it is called in messages: `line 7`, `a.parquet row 3`, `cats/1.jpg`.
      input: what to embed; None if it is not usable.
      problem: why not.
      id: what the corpus calls it, if it does.
    """

    row: int
    where: str
    input: MultimodalInput | None = None
    problem: str | None = None
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Window:
    """A run of entries.

    Attributes:
      number: from 0.
      first: row of its first entry.
      count: how many entries.
      digest: of the content, images by size and time of change: 16 hex digits.
      place: where the corpus finds it (JSON-able).
    """

    number: int
    first: int
    count: int
    digest: str
    place: Any


class Corpus(Protocol):
    """A source of entries; picklable, so that other processes can read it."""

    def scan(self) -> Iterator[tuple[Window, list[Entry]]]:
        """Every window with its entries, each checked as far as that needs no pixels.

        Raises:
          UserError: if the source as a whole cannot be read.
        """
        ...

    def cut(self) -> Iterator[Window]:
        """The windows alone, nothing checked and without digests: a quick way to known content."""
        ...

    def load(self, window: Window) -> bytes:
        """What is stored of a window."""
        ...

    def parse(self, window: Window, data: bytes) -> list[Entry]:
        """The entries in what `load` gave."""
        ...

    def describe(self) -> dict[str, Any]:
        """How to find the corpus again (JSON-able)."""
        ...


def read(corpus: Corpus, window: Window) -> list[Entry]:
    """The entries of a window."""
    return corpus.parse(window, corpus.load(window))


def checked(entries: Sequence[Entry], pool: concurrent.futures.Executor) -> list[Entry]:
    """The entries, with what is wrong with their markers and the headers of their image files."""
    return list(pool.map(_checked, entries))


def _checked(entry: Entry) -> Entry:
    if entry.input is None:
        return entry
    problem = entry.input.problem()
    if problem is None:
        try:
            for image in entry.input.images:
                image_size(image)
        except UserError as error:
            problem = str(error)
    return entry if problem is None else dataclasses.replace(entry, input=None, problem=problem)


def digest_of(content: bytes, entries: Sequence[Entry]) -> str:
    """What a window's vectors depend on besides the model."""
    digest = hashlib.blake2b(content, digest_size=8)
    for entry in entries:
        for image in entry.input.images if entry.input else ():
            if not isinstance(image, Image.Image):
                status = os.stat(image)
                digest.update(f"{status.st_size}:{status.st_mtime_ns};".encode())
    return digest.hexdigest()


class JsonlCorpus:
    """Lines of `{"text": ..., "images": [...], "id": ...}`, all optional; empty lines are none."""

    def __init__(self, path: str | os.PathLike, root: str | os.PathLike, *, lines: bool = True):
        """Nothing is read yet.

        Args:
          path: the file.
          root: what relative image paths are relative to.
          lines: whether messages name the line; otherwise they name the image.
        """
        self.path, self.root, self.lines = Path(path), Path(root), lines

    def describe(self) -> dict[str, Any]:
        """How to find the file again."""
        return {"kind": "jsonl", "path": str(self.path.absolute()), **stamp(self.path)}

    def scan(self) -> Iterator[tuple[Window, list[Entry]]]:
        """See `Corpus`."""
        with _threads() as pool:
            for window in self.cut():
                content = self.load(window)
                entries = checked(self.parse(window, content), pool)
                yield dataclasses.replace(window, digest=digest_of(content, entries)), entries

    def cut(self) -> Iterator[Window]:
        """See `Corpus`."""
        number = row = line = start = end = count = 0
        first_line = 1
        with open_input(self.path) as file:
            for text in file:
                line += 1
                end += len(text)
                count += bool(_without_mark(text, line).strip())
                if count == WINDOW:
                    yield Window(number, row, count, "", [start, end, first_line])
                    number, row, start = number + 1, row + count, end
                    count, first_line = 0, line + 1
            if count:
                yield Window(number, row, count, "", [start, end, first_line])

    def load(self, window: Window) -> bytes:
        """The bytes of its lines."""
        start, end, _ = window.place
        with open_input(self.path) as file:
            file.seek(start)
            return file.read(end - start)

    def parse(self, window: Window, data: bytes) -> list[Entry]:
        """See `Corpus`."""
        return self._entries(data, window.first, window.place[2])

    def _entries(self, content: bytes, row: int, first_line: int) -> list[Entry]:
        entries = []
        for line, encoded in enumerate(content.split(b"\n"), first_line):
            encoded = _without_mark(encoded, line)
            if not encoded.strip():
                continue
            where, name = f"line {line}", None
            item, problem = None, None
            try:
                value, name = read_line(encoded)
                if not self.lines:
                    where = value.images[0] if value.images else where
                item = value.relative_to(self.root)
            except UserError as error:
                problem = str(error)
            entries.append(Entry(row + len(entries), str(where), item, problem, name))
        return entries


def read_line(encoded: bytes) -> tuple[MultimodalInput, str | None]:
    """The input on a line of a jsonl file, and its `id`.

    Raises:
      UserError: if it is no JSON object with `text` and/or `images`, and perhaps `id`.
    """
    try:
        value = json.loads(encoded.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(
            f'must be a JSON object such as {{"text": "...", "images": ["..."]}}, '
            f"not {type(value).__name__}"
        )
    name = value.pop("id", None)
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise UserError(f"'id' must be a string or a whole number, not {type(name).__name__}")
    return MultimodalInput.of(value), None if name is None else str(name)


class FolderCorpus(JsonlCorpus):
    """All images below a folder, in the order of their paths.

    `scan` writes the list of them to a file, which is read from then on: images that come later
    change nothing.
    """

    def __init__(self, folder: str | os.PathLike, listing: str | os.PathLike):
        """Nothing is read yet.

        Args:
          folder: the images; files that are none and hidden ones are passed over.
          listing: the file to write.
        """
        super().__init__(listing, folder, lines=False)

    def describe(self) -> dict[str, Any]:
        """How to find the folder again."""
        return {"kind": "folder", "path": str(self.root.absolute())}

    def cut(self) -> Iterator[Window]:
        """See `Corpus`; writes the list.

        Raises:
          UserError: if a folder cannot be read, or there are no images.
        """
        found = 0
        with self.path.open("w", encoding="ascii") as file:
            for name in images_below(self.root):
                file.write(json.dumps({"images": [name]}) + "\n")
                found += 1
        if not found:
            raise UserError(f"--input {self.root}: there are no images in this folder")
        yield from super().cut()


def images_below(folder: Path) -> Iterator[str]:
    """Paths of all image files below a folder, relative to it; sorted, folder by folder.

    Raises:
      UserError: if a folder below cannot be read.
    """

    def complain(error: OSError) -> None:
        raise UserError(f"--input: the folder {error.filename} cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=complain):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def stamp(path: Path) -> dict[str, int]:
    """Size and time of change of a file, by which it is known again."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def open_input(path: Path):
    """The file, opened for reading.

    Raises:
      UserError: if that cannot be.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1)))


def _without_mark(line: bytes, number: int) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
