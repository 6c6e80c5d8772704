# SPDX-License-Identifier: Apache-2.0
"""What every file of a data set is: bytes, SHA-256, and for images format and size in pixels.

A manifest is a jsonl file: a head with counts and a hash over all lines, then a line per file. Two
data sets with one hash are the same files. Images are opened in processes of their own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import image_size, load_image

VERSION = 1
_CHUNK = 1 << 20
_AT_ONCE = 64


class ImageFacts(NamedTuple):
    """An image file.

    Attributes:
      path: below the image root.
      bytes: size of the file; -1 if it cannot be read.
      sha256: of the file, hex.
      width: pixels, 0 if unknown.
      height: pixels, 0 if unknown.
      problem: why it cannot be used, "" if it can.
    """

    path: str
    bytes: int
    sha256: str
    width: int
    height: int
    problem: str

    def line(self) -> dict[str, Any]:
        """Its line of the manifest."""
        return {"path": self.path, "kind": "image", "bytes": self.bytes, "sha256": self.sha256,
                "width": self.width, "height": self.height}  # fmt: skip


def examine(root: str, path: str, decode: bool) -> ImageFacts:
    """Look at one image file.

    Args:
      root: image root.
      path: below it.
      decode: decode the pixels, too; damage behind the header shows up only then.
    """
    file = os.path.join(root, path)
    try:
        size, digest = hash_file(file)
    except OSError as error:
        return ImageFacts(path, -1, "", 0, 0, f"{file}: cannot be read ({error.strerror})")
    try:
        width, height = load_image(file).size if decode else image_size(file)
    except UserError as error:
        return ImageFacts(path, size, digest, 0, 0, str(error))
    return ImageFacts(path, size, digest, width, height, "")


def _examine_some(root: str, paths: Sequence[str], decode: bool) -> list[ImageFacts]:
    return [examine(root, path, decode) for path in paths]


def examine_all(
    root: str | os.PathLike, paths: Sequence[str], *, decode: bool, workers: int
) -> Iterator[ImageFacts]:
    """Look at many image files, in order.

    Args:
      root: image root.
      paths: below it.
      decode: as for `examine`.
      workers: processes; 1 does it here.
    """
    root = os.fspath(root)
    parts = [paths[i : i + _AT_ONCE] for i in range(0, len(paths), _AT_ONCE)]
    if workers <= 1 or len(parts) <= 1:
        for part in parts:
            yield from _examine_some(root, part, decode)
        return
    # Spawned: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(parts)), mp_context=context) as pool:
        for facts in pool.map(_examine_some, [root] * len(parts), parts, [decode] * len(parts)):
            yield from facts


def hash_file(path: str | os.PathLike) -> tuple[int, str]:
    """Size in bytes and SHA-256 (hex) of a file.

    Raises:
      OSError: if it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def table_line(path: Path, data: Path) -> dict[str, Any]:
    """A data file's line of the manifest, its path below the data folder."""
    size, digest = hash_file(path)
    name = os.path.relpath(path, data)
    return {"path": name, "kind": "table", "bytes": size, "sha256": digest}


def write_manifest(path: Path, lines: Iterable[Mapping[str, Any]]) -> str:
    """Write a manifest under its name when it is complete.

    Returns:
      The hash over all lines.
    """
    written = sorted(json.dumps(line, sort_keys=True) for line in lines)
    digest = hashlib.sha256("\n".join(written).encode()).hexdigest()
    head = {"manifest": VERSION, "files": len(written), "sha256": digest}
    part = path.with_name(f".{path.name}.part")
    part.write_text("\n".join([json.dumps(head), *written]) + "\n", encoding="utf-8")
    os.replace(part, path)
    return digest


def read_manifest(path: str | os.PathLike) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of a manifest by kind and path.

    Raises:
      UserError: if it is none, or was cut short or changed.
    """
    try:
        head, *lines = Path(path).read_text(encoding="utf-8").splitlines()
        told = json.loads(head)
        entries = [json.loads(line) for line in lines]
        found = {(entry["kind"], entry["path"]): entry for entry in entries}
        whole = told["sha256"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable manifest ({error})") from None
    if not whole:
        raise UserError(f"{path}: the manifest is not whole: its lines have another hash")
    return found


def differences(
    before: Mapping[tuple[str, str], Mapping[str, Any]], now: Iterable[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """What is not as an earlier manifest says, as (path, in words)."""
    found, left = [], dict(before)
    for line in now:
        old = left.pop((line["kind"], line["path"]), None)
        if old is None:
            found.append((line["path"], "not in the earlier manifest"))
        elif old["bytes"] != line["bytes"]:
            found.append((line["path"], f"{line['bytes']:,} bytes, {old['bytes']:,} before"))
        elif old["sha256"] != line["sha256"]:
            found.append((line["path"], "other content than before"))
    found += [(path, "in the earlier manifest, but no row names it now") for _, path in left]
    return found
