# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: safetensors files read by slices, and written in shards.

`Checkpoint` opens a single file, a sharded folder or an adapter; only headers are read until a
tensor, or a part of one, is asked for. `write` streams tensors into one file or into shards with
an index, under temporary names until everything is on disk. Pickled checkpoints are refused:
loading one can run any code that its author put there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.weights.files import find, weight_map

DEFAULT_SHARD_BYTES = 5_000_000_000
"""The usual shard size of transformers 4 (neither GB nor GiB matter to a reader)."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""safetensors' names of the element types that are read and written here."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types a weight may have."""

_READ_BYTES = 1 << 26


class Checkpoint:
    """The tensors of a safetensors file or folder, by name; data is read when asked for.

    A context manager; closing it lets the files go.

    Args:
      path: a `.safetensors` file, an `*.index.json`, or a folder with `model.safetensors`, with
        `model.safetensors.index.json` and its shards, or with `adapter_model.safetensors`.

    Raises:
      UserError: if there are no such weights, only pickled ones, if a file is truncated or no
        safetensors file, if the index cannot be read, names a shard that is absent, or disagrees
        with what the shards hold, or if a tensor is in two shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
        self._plain: dict[Path, int] = {}
        self._start: dict[str, int] = {}
        self._file_of: dict[str, Path] = {}
        self._meta: dict[str, tuple[tuple[int, ...], str]] = {}
        index, files = find(self.path)
        try:
            if index is None:
                self._add(files[0], None)
            else:
                self._add_shards(index)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._meta

    def close(self) -> None:
        """Let the files go; reading afterwards fails."""
        self._open.clear()
        for descriptor in self._plain.values():
            os.close(descriptor)
        self._plain.clear()

    def __del__(self) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._meta)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors, sorted."""
        return sorted(set(self._file_of.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; nothing is read."""
        return self._meta[name][0]

    def dtype_name(self, name: str) -> str:
        """safetensors' name of the element type (`F32`, `BF16`, ...)."""
        return self._meta[name][1]

    def dtype(self, name: str) -> np.dtype:
        """Element type of a tensor as numpy's (bfloat16 is ml_dtypes').

        Raises:
          UserError: if the type is one that numpy cannot hold.
        """
        kind = self._meta[name][1]
        if kind not in DTYPES:
            raise UserError(f"{self._file_of[name]}: {name} has the unreadable type {kind}")
        return DTYPES[kind]

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * self.dtype(name).itemsize
            for name, (shape, _) in self._meta.items()
        )

    def read(
        self,
        name: str,
        index: tuple[slice, ...] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read a tensor, or the part of it that slices of step one select.

        Args:
          name: of the tensor.
          index: the part; all of it by default.
          out: u8 [bytes], memory that the result may lie in if it fits, instead of its own.

        Raises:
          UserError: if the file cannot be read, or the type is one that numpy cannot hold.
          KeyError: if there is no such tensor.
        """
        self.dtype(name)
        file = self._file_of[name]
        try:
            handle = self._open[file]
            shape = self.shape(name)
            index = (slice(None),) * len(shape) if index is None else index
            spans = [span.indices(size) for span, size in zip(index, shape, strict=True)]
            if all(span == (0, size, 1) for span, size in zip(spans[1:], shape[1:], strict=True)):
                return self._read_rows(name, spans[0][:2] if spans else (0, 1), out)
            return handle.get_slice(name)[tuple(slice(a, b) for a, b, _ in spans)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {name} cannot be read: {error}") from None

    def _read_rows(
        self, name: str, rows: tuple[int, int], place: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows of a tensor (or a scalar), which lie together in the file.

        Read plainly and not through a memory map: a page fault for every 4 KB costs more than
        the copy.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        row = math.prod(shape[1:]) * dtype.itemsize
        count = max(rows[1] - rows[0], 0)
        if place is None or len(place) < count * row:
            place = np.empty(count * row, np.uint8)
        view: Any = place[: count * row]
        file, start = self._file_of[name], self._start[name] + rows[0] * row
        done = 0
        while done < len(view):
            got = os.preadv(self._plain[file], [view[done : done + _READ_BYTES]], start + done)
            if got == 0:
                raise OSError("the file has become shorter")
            done += got
        return view.view(dtype).reshape((count, *shape[1:]) if shape else ())

    def _note_places(self, file: Path) -> None:
        """Where each tensor begins, from the header that safetensors has found to be sound."""
        descriptor = os.open(file, os.O_RDONLY)
        self._plain[file] = descriptor
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        for name, entry in json.loads(os.pread(descriptor, length, 8)).items():
            if name != "__metadata__" and self._file_of.get(name) == file:
                self._start[name] = 8 + length + entry["data_offsets"][0]

    def _add(self, file: Path, expected: set[str] | None) -> list[str]:
        """Open one file and take its names in; returns disagreements with the index."""
        try:
            handle = safe_open(str(file), framework="numpy")
            names = list(handle.keys())
            self._open[file] = handle
            problems = []
            for name in names:
                if name in self._file_of:
                    problems.append(f"{name} is in {self._file_of[name].name} and in {file.name}")
                    continue
                part = handle.get_slice(name)
                self._file_of[name] = file
                self._meta[name] = (tuple(part.get_shape()), str(part.get_dtype()))
            self._note_places(file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} cannot be read as safetensors: it is truncated, damaged or another kind "
                f"of file ({file.stat().st_size:,} bytes; {error})"
            ) from None
        if expected is not None:
            problems += [
                f"{name}: the index places it in {file.name}, which does not hold it"
                for name in sorted(expected - set(names))
            ]
            problems += [
                f"{name}: {file.name} holds it, the index does not place it there"
                for name in sorted(set(names) - expected)
                if not any(problem.startswith(f"{name} is in ") for problem in problems)
            ]
        return problems

    def _add_shards(self, index: Path) -> None:
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map(index).items():
            shards.setdefault(shard, set()).add(name)
        problems = [
            f"{shard} is absent; it should hold {len(names)} tensors, such as {min(names)}"
            for shard, names in sorted(shards.items())
            if not (index.parent / shard).is_file()
        ]
        raise_problems(f"{index} names shards that are not beside it", problems)
        for shard, names in sorted(shards.items()):
            problems += self._add(index.parent / shard, names)
        raise_problems(f"{index} disagrees with its shards", problems)


def write(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    stem: str = "model",
    shard_bytes: float = DEFAULT_SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """Write tensors as `<stem>.safetensors`, or as shards with `<stem>.safetensors.index.json`.

    Tensors are kept only until a shard is full. Files bear temporary names until all of them are
    on disk; when anything fails, none of them is left.

    Args:
      folder: created if need be.
      tensors: (name, array) in the order in which they are to be stored.
      stem: name of the file without its ending.
      shard_bytes: size at which a new shard begins; a larger tensor has a shard of its own.
      metadata: header of each file; by default `{"format": "pt"}`, which transformers 4 requires.

    Returns:
      The files written, the index last.

    Raises:
      UserError: if the folder holds such weights already, or the disk does not take them.
      ValueError: if a name comes twice, or an element type cannot be stored.
    """
    folder = Path(folder)
    metadata = {"format": "pt"} if metadata is None else metadata
    temporary: list[Path] = []
    places: list[list[str]] = []
    total = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(p.name for p in folder.glob(f"{stem}*.safetensors*"))
        if old:
            raise UserError(f"{folder} holds weights already: {', '.join(old[:3])}")
        for part in _parts(tensors, shard_bytes):
            path = folder / f".{stem}-{len(temporary) + 1:05d}.partial"
            temporary.append(path)
            total += _write_file(path, part, metadata)
            places.append([name for name, _ in part])
        count = len(temporary)
        names = (
            [f"{stem}.safetensors"]
            if count == 1
            else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        if count > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {
                    name: file
                    for file, held in zip(names, places, strict=True)
                    for name in sorted(held)
                },
            }
            temporary.append(folder / f".{stem}-index.partial")
            temporary[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            names.append(f"{stem}.safetensors.index.json")
        for i, name in enumerate(names):
            temporary[i] = temporary[i].replace(folder / name)
        return temporary
    except BaseException as error:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{folder}: the weights could not be written: {error}") from error
        raise


def _parts(
    tensors: Iterable[tuple[str, np.ndarray]], limit: float
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Cut the stream of tensors into shards of at most `limit` bytes."""
    part: list[tuple[str, np.ndarray]] = []
    size = 0
    seen: set[str] = set()
    for name, array in tensors:
        if name in seen:
            raise ValueError(f"{name} is to be written twice")
        if array.dtype not in _NAMES:
            raise ValueError(f"{name}: {array.dtype} cannot be stored in safetensors")
        seen.add(name)
        if part and size + array.nbytes > limit:
            yield part
            part, size = [], 0
        part.append((name, array))
        size += array.nbytes
    if part or not seen:
        yield part


def _write_file(path: Path, part: list[tuple[str, np.ndarray]], metadata: dict[str, str]) -> int:
    """Write one safetensors file; returns the bytes of its tensors.

    The format: the header's length (8 bytes, little endian), a JSON header padded with spaces so
    that the data is aligned, the data without gaps. Wider elements go first, as in the reference
    writer, so that each tensor lies aligned to its element.
    """
    part = sorted(part, key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, array in part:
        end = offset + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, array in part:
            # bfloat16 is no type of the buffer protocol: hand over its bytes.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    return offset
