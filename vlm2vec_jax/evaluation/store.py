# SPDX-License-Identifier: Apache-2.0
"""What an evaluation keeps on disk, and when it may be used again.

An output folder holds, per subset, `<subset>_embeddings.npz`, `<subset>_score.json` and
`<subset>_pred.jsonl`; a shard holds embeddings of its share and `<subset>_rows.npz` (`rows`).
Each carries the fingerprint of what it was made from: model, adapter and
processor settings (the encoder's own fingerprint) and the data (keys, candidate lists, the bytes
of the images). A file with another fingerprint is never reused. Every file is written beside its
name and moved there when complete, so an interruption leaves the earlier file or none. Paths
enter a fingerprint as the data spells them, relative to the image root, so that both folders may
be moved.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from vlm2vec_jax.errors import UserError

FORMAT = 1
"""Version of these files; a file of another version is computed again."""

_FILES = 64

Key = tuple[str, ...]
"""An input as MMEB names it: (text, image path), either may be empty. Where an encoder tells
queries from targets, its role (`QUERY` or `TARGET`) is the third."""

QUERY, TARGET = "query", "target"


def embeddings_path(output: str | os.PathLike, subset: str) -> Path:
    """Where the embeddings of a subset are kept."""
    return Path(output) / f"{subset}_embeddings.npz"


def rows_path(output: str | os.PathLike, subset: str) -> Path:
    """Where a shard keeps the rows of a subset."""
    return Path(output) / f"{subset}_rows.npz"


def score_path(output: str | os.PathLike, subset: str) -> Path:
    """Where the score of a subset is kept."""
    return Path(output) / f"{subset}_score.json"


def predictions_path(output: str | os.PathLike, subset: str) -> Path:
    """Where the verdicts on a subset's rows are kept."""
    return Path(output) / f"{subset}_pred.jsonl"


# ---------------------------------------------------------------------------------- fingerprints


def hash_rows(rows: Iterable[Any]) -> str:
    """Hash of json-able rows, in order: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=True, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def hash_images(files: Mapping[str, str], known: dict[str, str] | None = None) -> str:
    """Hash of the names and the bytes of image files: 32 hex digits.

    Args:
      files: name as the data spells it -> where the file is.
      known: hashes of files already read in this run, added to.

    Raises:
      UserError: a file cannot be read.
    """
    known = {} if known is None else known
    missing = sorted({path for path in files.values() if path not in known})
    # Some files at a time: handing a small one to a thread takes longer than to read it.
    parts = [missing[k : k + _FILES] for k in range(0, len(missing), _FILES)]
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for part, found in zip(parts, pool.map(_hash_files, parts), strict=True):
                known.update(zip(part, found, strict=True))
    except OSError as error:
        raise UserError(f"cannot read image {error.filename}: {error.strerror}") from error
    return hash_rows([name, known[path]] for name, path in sorted(files.items()))


def _hash_files(paths: Sequence[str]) -> list[str]:
    return [_hash_file(path) for path in paths]


def _hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs between two fingerprints, as `path: stored -> wanted`; empty if nothing."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        found = []
        for key in sorted({*stored, *wanted}, key=str):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(stored.get(key), wanted.get(key), inner)
        return found
    return (
        [] if stored == wanted else [f"{name or 'all of it'}: {_short(stored)} -> {_short(wanted)}"]
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(value: Any) -> Any:
    """The value as json gives it back (tuples become lists), so that comparisons hold."""
    return json.loads(json.dumps(value, default=str))


# -------------------------------------------------------------------------------- atomic writing


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that either the whole of it or the earlier one stands under its name.

    Raises:
      UserError: the file cannot be written (a full disk, no permission); the earlier one stays.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "wb", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            write(cast(BinaryIO, file))
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private (0600); a result is as readable as any other new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; earlier results are unchanged"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_folder(folder: str | os.PathLike) -> None:
    """Make an output folder, and find out before hours of work that nothing can be written to it.

    Raises:
      UserError: saying why.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise UserError(f"the output {folder} is a file; a folder is needed") from None
    except OSError as error:
        raise UserError(f"cannot write to the output folder {folder}: {error.strerror}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode("utf-8", "surrogatepass"))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file of these bytes atomically."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, write)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a json file atomically; NaN is refused, so that every reader can read it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Write a file of one json object a line atomically."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def hash_file(path: str | os.PathLike) -> str | None:
    """Hash of a file's bytes, 32 hex digits; None if it cannot be read."""
    try:
        return _hash_file(os.fspath(path))
    except OSError:
        return None


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """A json object from a file; None if there is none, or it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8", errors="surrogatepass"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# ------------------------------------------------------------------------------------ embeddings


def save_embeddings(
    path: str | os.PathLike, keys: Sequence[Key], vectors: np.ndarray, fingerprint: Mapping
) -> None:
    """Keep embeddings with their keys.

    The npz holds `embeddings` float32 [N, D], and `keys` and `fingerprint` as UTF-8 json in uint8
    arrays; nothing in it is pickled.

    Raises:
      UserError: the file cannot be written.
    """
    if len(keys) != len(vectors):
        raise ValueError(f"{len(keys)} keys for {len(vectors)} embeddings")
    arrays = {
        "embeddings": np.asarray(vectors, np.float32),
        "keys": as_bytes([list(key) for key in keys]),
        "fingerprint": as_bytes(fingerprint),
    }
    write_npz(path, arrays)


def load_embeddings(
    path: str | os.PathLike, wanted: Mapping
) -> tuple[dict[Key, np.ndarray] | None, str]:
    """Embeddings kept under a fingerprint; not all of the subset's where a run was interrupted.

    Returns:
      ({key: float32 [D]}, "") if the file was made from what `wanted` names; otherwise
      (None, why not in words), with "" where there is simply no file.
    """
    path = Path(path)
    if not path.exists():
        return None, ""
    arrays = read_npz(path, ("fingerprint", "keys", "embeddings"))
    if arrays is None:
        return None, f"{path.name} cannot be read"
    try:
        different = differences(from_bytes(arrays["fingerprint"]), plain(wanted))
        keys = keys_of(arrays["keys"])
    except (ValueError, TypeError):
        return None, f"{path.name} cannot be read"
    if different:
        return None, f"{path.name} was made from something else ({'; '.join(different)})"
    vectors = arrays["embeddings"]
    if vectors.ndim != 2 or len(vectors) != len(keys) or vectors.dtype != np.float32:
        return None, f"{path.name} is not complete"
    return dict(zip(keys, vectors, strict=True)), ""


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays atomically; nothing in the file is pickled."""

    def write(file: BinaryIO) -> None:
        np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)


def read_npz(path: str | os.PathLike, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Arrays of an npz file, nothing unpickled; None if it is damaged or lacks one of them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def as_bytes(value: Any) -> np.ndarray:
    """A json-able value as UTF-8 in an array of bytes."""
    return np.frombuffer(json.dumps(value, default=str).encode(), np.uint8)


def keys_of(array: np.ndarray) -> list[Key]:
    """Keys that were kept by `as_bytes`.

    Raises:
      ValueError: if they are none.
    """
    found = [tuple(map(str, key)) for key in from_bytes(array)]
    if any(len(key) not in (2, 3) for key in found):
        raise ValueError("keys are (text, image), or (text, image, role)")
    return found


def from_bytes(array: np.ndarray) -> Any:
    """What `as_bytes` was given."""
    return json.loads(array.tobytes().decode())
