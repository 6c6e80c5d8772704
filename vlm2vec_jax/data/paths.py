# SPDX-License-Identifier: Apache-2.0
"""Which files an image path of the data may open: those below the image root, and no others.

A data set is somebody else's text. An absolute path, `..` above the root and a symbolic link that
points out of the root are refused; the last may be allowed by whoever runs the program, for image
stores that are built of links.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

SEPARATOR = "\x1e"
"""Stands between the image paths of one side, where a side has several (own pairs only).

ASCII's record separator, which no sane path holds; NUL would do, too, but is refused as such.
"""

IMAGE_FOLDERS = ("eval_images", "images", "image", "MMEB")
"""Folders of a data folder that image paths may be relative to: `eval_images` is MMEB-eval's."""


def unsafe_path(path: str) -> str | None:
    """Why an image path may not be opened, judged by its text; None if it may."""
    if "\0" in path:
        return "image path with a NUL character"
    if os.path.isabs(path) or re.match(r"[A-Za-z]:[\\/]|\\\\", path):
        return "absolute image path; paths are relative to the image root"
    normal = os.path.normpath(path)
    if normal == ".." or normal.startswith("../"):
        return "image path leaves the image root"
    return None


def leaves_by_link(root: str | os.PathLike, path: str) -> str | None:
    """Why the file may not be opened, judged by where symbolic links lead; None if it may."""
    top = _real(os.fspath(root))
    # Most images share a folder, so only the last step is looked at for each.
    folder, name = os.path.split(os.path.join(top, path))
    real = os.path.join(_real(folder), name)
    if name in ("", ".", "..") or os.path.islink(real):
        real = os.path.realpath(real)
    if real == top or real.startswith(top.rstrip(os.sep) + os.sep):
        return None
    return f"a symbolic link leads out of the image root, to {real}"


@functools.lru_cache(maxsize=4096)
def _real(root: str) -> str:
    return os.path.realpath(root)


def find_image_root(data: Path, samples: Iterable[str]) -> Path:
    """The folder that image paths are relative to, where nobody said.

    Args:
      data: the data folder, or the folder of a data file.
      samples: some image paths of the data.

    Returns:
      Of `data` and its folders `IMAGE_FOLDERS` the first that holds most of the samples; `data`
      if none holds any.
    """
    wanted = [path for path in samples if path and not unsafe_path(path)]
    best, most = data, 0
    for root in (data, *(data / name for name in IMAGE_FOLDERS)):
        there = sum((root / path).is_file() for path in wanted)
        if there > most:
            best, most = root, there
    return best
