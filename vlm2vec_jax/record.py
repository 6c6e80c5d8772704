# SPDX-License-Identifier: Apache-2.0
"""`vlm2vec.json`: what a user would otherwise have to remember about a trained model.

It lies in training output folders and exports; `Embedder.from_pretrained` needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError

NAME = "vlm2vec.json"
FORMAT = "vlm2vec_jax model 1"
_SAMPLE = 1 << 16


def make_record(
    *,
    backbone: str,
    base: str | os.PathLike,
    processor: dict[str, Any],
    temperature: float | None,
    adapter: dict[str, Any] | None,
) -> dict[str, Any]:
    """The record of a model that is about to be trained.

    Args:
      backbone: HF's `model_type`.
      base: folder or hub id of the base model, as the user gave it.
      processor: the processor's settings (crops, max_len, ...).
      temperature: of the contrastive loss; None where it is not known.
      adapter: type, rank, alpha, dropout, targets; None where every parameter is trained.
    """
    local = Path(base)
    return {
        "format": FORMAT,
        "backbone": backbone,
        "pooling": "last",
        "normalize": True,
        "temperature": temperature,
        "processor": processor,
        "adapter": adapter,
        "base": {
            "path": str(base),
            "absolute": str(local.resolve()) if local.exists() else None,
            "identity": identity(local) if local.exists() else None,
        },
    }


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a folder, or None if it has none.

    Raises:
      UserError: if there is one that cannot be read.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from None
    if not known:
        raise UserError(f"{path} has the format {record['format']!r}; this code reads {FORMAT!r}")
    return record


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it: whole or not at all.

    Raises:
      UserError: if the disk does not take it; an earlier file of the name stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def identity(folder: str | Path) -> str:
    """A hash of a model folder's weights that a copy of the folder shares (hex, 16 digits).

    Of every safetensors file the name, the size, the first and last 64 KB and 64 samples in
    between: enough to tell models apart without reading 8 GB.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        places = {0, max(size - _SAMPLE, 0), *range(0, size, max(size // 64, _SAMPLE))}
        with path.open("rb") as file:
            for place in sorted(places):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
