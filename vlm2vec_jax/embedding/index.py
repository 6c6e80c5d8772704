# SPDX-License-Identifier: Apache-2.0
"""Stored vectors: written from a stream, read a block at a time, and what says how they were made.

| form | holds |
|---|---|
| `.npz` | `embeddings` [N, D]; the rest is json in the comment of the zip archive |
| `.parquet` | columns `row`, `id`, `text`, `images`, `embedding`; the rest: the schema's metadata |
| `.lance` | the same as a LanceDB table |
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec_jax.embedding.parts import cannot_write
from vlm2vec_jax.embedding.vectors import PRECISIONS, dequantize_embeddings
from vlm2vec_jax.errors import UserError

FORMAT = "vlm2vec_jax vectors 1"
KEY = b"vlm2vec_jax"
"""Where the json lies in the metadata of a schema."""
SUFFIXES = (".npz", ".parquet", ".lance")
BLOCK = 65536
"""Vectors read at a time."""

Row = dict[str, Any]
"""`row` int, `id` str or None, `text` str, `images` list of str."""

Blocks = Callable[[], Iterator[tuple[list[Row], np.ndarray]]]
"""The rows and the vectors [n, D] of a corpus, in order; may be asked for more than once."""


def write_index(
    path: Path, blocks: Blocks, count: int, meta: dict[str, Any], *, with_rows: bool
) -> None:
    """Write stored vectors under a temporary name and rename them.

    Args:
      path: ends in one of `SUFFIXES`.
      blocks: what to write.
      count: N.
      meta: what goes with it; `width` and `dtype` of a vector among it, and `ranges` if any.
      with_rows: whether an npz gets the numbers of the rows, too (where some are left out).

    Raises:
      UserError: if the disk does not take it; an earlier file of the name stays as it was.
    """
    meta = {"format": FORMAT, "count": count, **meta}
    if path.suffix == ".lance":
        from vlm2vec_jax.embedding.lance import write_lance

        return write_lance(path, blocks, schema_of(meta))
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".npz":
            _write_npz(partial, blocks, count, meta, with_rows)
        else:
            _write_parquet(partial, blocks, meta)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_npz(path: Path, blocks: Blocks, count: int, meta: dict[str, Any], rows: bool) -> None:
    meta = dict(meta)
    ranges = meta.pop("ranges", None)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def array(name: str, dtype: Any, shape: tuple[int, ...], parts: Iterator[np.ndarray]):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
                for part in parts:
                    file.write(np.ascontiguousarray(part, dtype).tobytes())

        shape = (count, meta["width"])
        array("embeddings", meta["dtype"], shape, (vectors for _, vectors in blocks()))
        if rows:
            numbers = (np.array([r["row"] for r in part], np.int64) for part, _ in blocks())
            array("rows", np.int64, (count,), numbers)
        if ranges is not None:
            array("ranges", np.float32, (2, meta["width"]), iter([np.asarray(ranges)]))
        comment = json.dumps(meta).encode()
        if len(comment) > zipfile.ZIP_MAX_COMMENT:
            raise UserError(f"the prompt and settings are too long to be kept in {path.name}")
        archive.comment = comment


def schema_of(meta: dict[str, Any]) -> pa.Schema:
    """The columns of a table of vectors."""
    kind = pa.from_numpy_dtype(np.dtype(meta["dtype"]))
    return pa.schema(
        [
            pa.field("row", pa.int64()),
            pa.field("id", pa.string()),
            pa.field("text", pa.string()),
            pa.field("images", pa.list_(pa.string())),
            pa.field("embedding", pa.list_(kind, meta["width"])),
        ],
        metadata={KEY: json.dumps(meta).encode()},
    )


def record_batches(blocks: Blocks, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows and vectors as Arrow batches."""
    for rows, vectors in blocks():
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        width = schema.field("embedding").type.list_size
        columns = [
            pa.array([row[name] for row in rows], schema.field(name).type)
            for name in ("row", "id", "text", "images")
        ]
        columns.append(pa.FixedSizeListArray.from_arrays(flat, width))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _write_parquet(path: Path, blocks: Blocks, meta: dict[str, Any]) -> None:
    schema = schema_of(meta)
    with pq.ParquetWriter(path, schema) as writer:
        for batch in record_batches(blocks, schema):
            writer.write_batch(batch)


class Index(Protocol):
    """Stored vectors.

    Attributes:
      path: where they are.
      meta: how they were made.
    """

    path: Path
    meta: dict[str, Any]

    def __len__(self) -> int: ...

    def stored(self) -> Iterator[np.ndarray]:
        """Blocks [n, D] in order, as they are stored."""
        ...

    def rows(self, places: Sequence[int]) -> list[Row]:
        """What stands at these places, as far as the index itself says."""
        ...


def vectors_of(index: Index) -> Iterator[np.ndarray]:
    """Blocks float32 [n, D] to compare a query with."""
    meta = index.meta
    ranges = None if meta.get("ranges") is None else np.asarray(meta["ranges"], np.float32)
    for block in index.stored():
        yield dequantize_embeddings(block, meta["precision"], meta["dimension"], ranges)


def open_index(path: str | os.PathLike) -> Index:
    """Stored vectors, by their name.

    Raises:
      UserError: if they are not there, damaged, or do not say what model made them.
    """
    path = Path(path)
    if path.is_dir() and path.suffix != ".lance":
        found = []
        for inside in sorted(p for s in SUFFIXES for p in path.glob(f"*{s}")):
            with contextlib.suppress(UserError):  # a corpus, or vectors of something else
                found.append(open_index(inside))
        if len(found) != 1:
            names = ", ".join(index.path.name for index in found) or "none"
            raise UserError(f"--index {path} is a folder with these stored vectors: {names}")
        return found[0]
    if path.suffix not in SUFFIXES:
        raise UserError(f"--index {path}: stored vectors end in {', '.join(SUFFIXES)}")
    if not path.exists():
        raise UserError(f"--index {path}: there is no such file")
    if path.suffix == ".lance":
        from vlm2vec_jax.embedding.lance import LanceIndex

        return LanceIndex(path)
    return NpzIndex(path) if path.suffix == ".npz" else ParquetIndex(path)


def meta_of(text: bytes | None, path: Path) -> dict[str, Any]:
    """What an index says about itself.

    Raises:
      UserError: if it says nothing.
    """
    try:
        meta = json.loads(text or b"")
        known = meta["format"] == FORMAT and meta["precision"] in PRECISIONS
        assert known and meta["fingerprint"] and meta["dimension"]
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(
            f"{path} does not say what model made it; vectors to search are written by "
            f"`python -m vlm2vec_jax.embed`"
        ) from None
    return meta


class NpzIndex:
    """An npz whose vectors stay on disk."""

    def __init__(self, path: Path):
        """Map the vectors.

        Raises:
          UserError: if that cannot be done.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.meta = meta_of(archive.comment, path)
                self._vectors = _mapped(path, archive.getinfo("embeddings.npy"))
                names = archive.namelist()
            with np.load(path, allow_pickle=False) as file:
                self._rows = file["rows"] if "rows.npy" in names else None
                if "ranges.npy" in names:
                    self.meta["ranges"] = file["ranges"]
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read: {error}") from None

    def __len__(self) -> int:
        return len(self._vectors)

    def stored(self) -> Iterator[np.ndarray]:
        """See `Index`."""
        for start in range(0, len(self), BLOCK):
            yield np.array(self._vectors[start : start + BLOCK])

    def rows(self, places: Sequence[int]) -> list[Row]:
        """Only numbers: an npz holds nothing of its corpus."""
        return [{"row": int(p if self._rows is None else self._rows[p])} for p in places]


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """An uncompressed array of an npz, memory-mapped."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its vectors are compressed")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        name, extra = struct.unpack("<HH", header[26:30])
        file.seek(info.header_offset + 30 + name + extra)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"an array of version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if fortran or dtype.hasobject or len(shape) != 2:
        raise ValueError("its vectors are no plain matrix")
    if not shape[0]:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape)


class ParquetIndex:
    """A parquet file, read a row group at a time."""

    def __init__(self, path: Path):
        """Read the footer.

        Raises:
          UserError: if there is none.
        """
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        self.meta = meta_of((self._file.schema_arrow.metadata or {}).get(KEY), path)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def stored(self) -> Iterator[np.ndarray]:
        """See `Index`."""
        with self._speaking():
            for batch in self._file.iter_batches(BLOCK // 16, columns=["embedding"]):
                yield matrix(batch.column(0), self.meta["width"])

    def rows(self, places: Sequence[int]) -> list[Row]:
        """Rows in the order of `places`."""
        found: dict[int, Row] = {}
        start = 0
        with self._speaking():
            for group in range(self._file.num_row_groups):
                end = start + self._file.metadata.row_group(group).num_rows
                inside = sorted({p for p in places if start <= p < end})
                if inside:
                    columns = ["row", "id", "text", "images"]
                    table = self._file.read_row_group(group, columns)
                    picked = table.take([p - start for p in inside]).to_pylist()
                    found.update(zip(inside, picked, strict=True))
                start = end
        return [found[p] for p in places]

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{self.path} is damaged: {reason[:200]}") from None


def matrix(column: Any, width: int) -> np.ndarray:
    """A column of fixed-size lists as [n, width]."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)
