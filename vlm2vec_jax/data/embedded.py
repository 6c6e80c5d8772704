# SPDX-License-Identifier: Apache-2.0
"""Images that lie inside a table, as `datasets` writes them: brought out into files, once.

A cell is the bytes of an image file, or a struct of `bytes` and `path` (either may be null), or a
list of these. The converted table names files as for any other data: an image goes to
`<cache>/images/<2 digits>/<hash>.<ending>` under the hash of its bytes, so that the same image
is there once, and a row names it as `.arrow_cache/images/...`. Whoever opens a path of this form
looks in the cache of the table, wherever that is (`place`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlm2vec_jax.errors import UserError

CACHE_FOLDER = ".arrow_cache"
"""Where converted files go inside a data folder that can be written."""

FOLDER = "images"
PREFIX = f"{CACHE_FOLDER}/{FOLDER}/"
"""How the path of a kept image begins."""

ROWS = 64
"""Rows read at a time where they carry images: some megabytes each at worst."""

Keep = Callable[[bytes], str]
"""Puts the bytes of an image file away; gives the path that names it."""


def unkept(content: bytes) -> str:
    """Stands for `Store.keep` where rows are only looked at: nothing is written."""
    del content
    return f"{PREFIX}image"


_ENDINGS = (
    (b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpg"), (b"GIF8", "gif"), (b"BM", "bmp"),
    (b"II*\0", "tif"), (b"MM\0*", "tif"),
)  # fmt: skip


class Store:
    """The files of a cache folder."""

    def __init__(self, cache: Path):
        """Nothing is written before the first image.

        Args:
          cache: the folder of converted tables.
        """
        self.folder = cache / FOLDER

    def keep(self, content: bytes) -> str:
        """Put an image file away, unless it is there."""
        digest = hashlib.sha256(content).hexdigest()[:40]
        name = f"{digest[:2]}/{digest}.{_ending(content)}"
        target = self.folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=target.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from other users
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        return PREFIX + name


def _ending(content: bytes) -> str:
    """By the first bytes, as servers and browsers go by it; whether it is whole shows later."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((ending for start, ending in _ENDINGS if content.startswith(start)), "img")


def place(path: str, root: str | os.PathLike, kept: str | os.PathLike | None) -> tuple[Path, str]:
    """The folder that an image path is relative to, and the path below it.

    Args:
      path: as the table has it.
      root: the image root.
      kept: the folder of kept images; None where there is none.
    """
    if kept is not None and path.startswith(PREFIX):
        return _as_path(kept), path[len(PREFIX) :]
    return _as_path(root), path


def _as_path(folder: str | os.PathLike) -> Path:
    return folder if isinstance(folder, Path) else Path(folder)


def image_type(kind: pa.DataType) -> pa.DataType | None:
    """What a column of images that lie in the table is stored as; None for any other type."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return pa.string() if "bytes" in names and names <= {"bytes", "path"} else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = image_type(kind.value_type)
        return pa.list_(pa.string()) if inner == pa.string() else None
    return None


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values of a type carry bytes anywhere in them."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def path_of(value: Any, keep: Keep) -> str | None:
    """The path of a cell's image; None where there is none.

    Raises:
      UserError: for a value of another form.
    """
    content = value
    if isinstance(value, Mapping):
        if not value.keys() <= {"bytes", "path"}:
            raise UserError(
                f"an image is a path, bytes, or an object of `bytes` and `path`, not one of "
                f"{', '.join(map(str, value))}"
            )
        content = value.get("bytes")
        value = value.get("path")
    if content is None or isinstance(value, str) and content is value:
        return value or None
    if not isinstance(content, bytes):
        raise UserError(
            f"the bytes of an image are of type {type(content).__name__}; give the path of a file"
        )
    return keep(content)


def paths_of(column: pa.Array, keep: Keep) -> pa.Array:
    """A column of `image_type` as paths; absent images of a list stay as empty texts."""
    kind = image_type(column.type)
    assert kind is not None
    if kind == pa.string():
        return pa.array([path_of(value, keep) for value in column.to_pylist()], kind)
    rows = [
        None if values is None else [path_of(value, keep) or "" for value in values]
        for values in column.to_pylist()
    ]
    return pa.array(rows, kind)
