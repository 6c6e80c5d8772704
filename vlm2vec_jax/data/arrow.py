# SPDX-License-Identifier: Apache-2.0
"""Tables as memory-mapped Arrow IPC: converted once, shared by processes, safe in threads.

A shared `pyarrow.parquet.ParquetFile` read from several threads crashes the process, and every
process would decode its own copy. An uncompressed Arrow file that is memory-mapped has neither
fault: reading a row copies that row, and the page cache is common to all processes of a host.
What is converted is up to a `Reader`: parquet columns as they are (`ParquetColumns`), or whatever
else can be brought to the same columns (`instructions.py`, `pairs.py`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec_jax.data import embedded
from vlm2vec_jax.data.embedded import CACHE_FOLDER, Keep
from vlm2vec_jax.errors import UserError, raise_problems

FORMAT_VERSION = 1
"""Part of the cache key: raised whenever the converted files change."""

# Small batches keep a list column (a thousand candidates a row) far below the 2 GiB that the
# 32-bit offsets of Arrow's plain strings can address.
BATCH_ROWS = 4096

IMAGES = ("image_path", "img_path")
"""How the names of columns end that hold images."""

STRING = pa.string()
STRINGS = pa.list_(pa.string())


def canonical_type(kind: pa.DataType) -> pa.DataType | None:
    """The type a parquet column is stored as: string, list of string, null (all absent).

    Args:
      kind: the type in the parquet file.

    Returns:
      `STRING`, `STRINGS` or `pa.null()`; None for anything that is not text.
    """
    if pa.types.is_null(kind):
        return pa.null()
    if pa.types.is_dictionary(kind):
        return canonical_type(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        return STRING
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = canonical_type(kind.value_type)
        return STRINGS if inner is not None and inner in (STRING, pa.null()) else None
    return None


def read_schema(path: Path) -> pa.Schema:
    """The columns of a parquet file, from its footer.

    Raises:
      UserError: if the file is not readable as parquet; the message names it.
    """
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({_first_line(error)}); download it again"
        ) from None


class ArrowTable:
    """Random access to a memory-mapped Arrow IPC file; reads are safe from any thread.

    Attributes:
      path: the file.
      columns: names of the columns stored.
      shards: the parquet files it came from, as (file, rows), in row order.
    """

    def __init__(self, path: str | os.PathLike):
        """Map the file; only its footer and batch headers are read."""
        self.path = Path(path)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.schema: pa.Schema = reader.schema
        self.columns: tuple[str, ...] = tuple(self.schema.names)
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        ends = np.cumsum([0] + [batch.num_rows for batch in self._batches], dtype=np.int64)
        self._starts = ends[:-1]
        self._rows = int(ends[-1])
        metadata = self.schema.metadata or {}
        self.shards: tuple[tuple[str, int], ...] = tuple(
            (name, int(rows)) for name, rows in json.loads(metadata.get(b"shards", b"[]"))
        )
        self._shard_ends = np.cumsum([rows for _, rows in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return self._rows

    def locate(self, row: int) -> tuple[str, int]:
        """The parquet file a row came from, and its row there, both counted from 0."""
        if not self.shards:
            return str(self.path), int(row)
        shard = int(np.searchsorted(self._shard_ends, row, side="right"))
        name, rows = self.shards[shard]
        return name, int(row - (self._shard_ends[shard] - rows))

    def row(self, row: int) -> dict[str, str | list | None]:
        """One row as Python values."""
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        k = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, at = self._batches[k], int(row - self._starts[k])
        return {name: batch.column(c)[at].as_py() for c, name in enumerate(self.columns)}

    def take(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, str | list | None]]:
        """Many rows in the order given; one gather per stored batch instead of one per row."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self._rows):
            raise IndexError(f"rows out of range for a table of {self._rows} rows")
        where = np.searchsorted(self._starts, rows, side="right") - 1
        out: list[dict] = [{} for _ in range(rows.size)]
        for k in np.unique(where):
            slots = np.flatnonzero(where == k)
            part = self._batches[k].take(pa.array(rows[slots] - self._starts[k]))
            for slot, values in zip(slots.tolist(), part.to_pylist(), strict=True):
                out[slot] = values
        return out

    def scan(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Go through the table (or the increasing `rows` of it) in batches of at most 4096 rows.

        Yields:
          The row numbers int64 [n], and the record batch that holds them.
        """
        for start, batch in zip(self._starts.tolist(), self._batches, strict=True):
            if rows is None:
                yield np.arange(start, start + batch.num_rows, dtype=np.int64), batch
                continue
            part = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(batch))]
            if len(part) == len(batch):
                yield part, batch
            elif part.size and part[-1] - part[0] + 1 == len(part):
                yield part, batch.slice(int(part[0] - start), len(part))
            elif part.size:
                yield part, batch.take(pa.array(part - start))


class Reader(Protocol):
    """What turns files of one kind into the columns that are stored."""

    @property
    def key(self) -> str:
        """All that the stored columns depend on besides the files."""
        ...

    def schema(self, files: Sequence[Path]) -> dict[str, pa.DataType]:
        """Name and type (`STRING` or `STRINGS`) of every stored column."""
        ...

    def count(self, file: Path) -> int:
        """Rows of a file."""
        ...

    def batches(self, file: Path, schema: pa.Schema, keep: Keep) -> Iterator[pa.RecordBatch]:
        """The rows of a file in order, at most `BATCH_ROWS` at a time; images by `keep`."""
        ...


class ParquetColumns:
    """Reads columns of text from parquet files as they are, and columns of images (`embedded`)."""

    def __init__(self, columns: Sequence[str]):
        """Keep these columns; those that the files lack are left out."""
        self.columns = tuple(columns)

    @property
    def key(self) -> str:
        """The columns."""
        return json.dumps(sorted(self.columns))

    def schema(self, files: Sequence[Path]) -> dict[str, pa.DataType]:
        """Their types; a column that is null everywhere is text that is absent everywhere."""
        return _stored_types(files, self.columns)

    def count(self, file: Path) -> int:
        """Rows by the file's footer."""
        return _num_rows(file)

    def batches(self, file: Path, schema: pa.Schema, keep: Keep) -> Iterator[pa.RecordBatch]:
        """The rows, absent columns as nulls.

        Raises:
          UserError: for damage anywhere in the file.
        """
        return _read_batches(file, schema, keep)


def open_parquet_set(
    files: Sequence[Path],
    columns: Sequence[str],
    name: str,
    *,
    data: Path,
    cache_dir: str | os.PathLike | None = None,
) -> ArrowTable:
    """`open_set` of parquet columns as they are; those that the set lacks are left out."""
    return open_set(files, ParquetColumns(columns), name, data=data, cache_dir=cache_dir)


def open_set(
    files: Sequence[Path],
    reader: Reader,
    name: str,
    *,
    data: Path,
    cache_dir: str | os.PathLike | None = None,
) -> ArrowTable:
    """Open a set of files as one memory-mapped table, converting it first if need be.

    The converted file is keyed by the names, sizes and modification times of the files and by
    the reader, so a changed set is converted anew and its old file removed. It appears under its
    final name only when complete, so processes may convert at the same time.

    Args:
      files: the shards in order.
      reader: what makes columns of them.
      name: what the set is called in the cache, e.g. "CIRR/original".
      data: the data folder; the cache is `<data>/.arrow_cache` if that can be written, otherwise
        a folder in the user's cache.
      cache_dir: where to keep converted files instead.

    Raises:
      UserError: a file that cannot be read, columns that are not text, a cache folder that cannot
        be written, a full disk.
    """
    key = _cache_key(files, reader)
    target = _cache_folder(data, cache_dir) / f"{name}-{key}.arrow"
    if target.exists():
        # A file that a crash of the machine left damaged is simply made again.
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):
            return ArrowTable(target)
    try:
        _convert(files, reader, target)
        _remove_stale(target)
        return ArrowTable(target)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else _first_line(error)
        raise UserError(
            f"{target}: cannot write the converted data ({reason}); "
            f"make room or give another cache folder"
        ) from None


def _cache_key(files: Sequence[Path], reader: Reader) -> str:
    facts: list = [FORMAT_VERSION, BATCH_ROWS, type(reader).__name__, reader.key]
    for file in files:
        stat = file.stat()
        facts.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _cache_folder(data: Path, cache_dir: str | os.PathLike | None) -> Path:
    # Outside the data folder two data sets may have subsets of one name: a folder for each.
    place = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:16]
    if cache_dir is not None:
        folder = Path(cache_dir) / place
        if not _writable(folder):
            raise UserError(f"{cache_dir}: the cache folder cannot be written")
        return folder
    if _writable(data / CACHE_FOLDER):
        with contextlib.suppress(OSError):  # data kept under git should not gain a cache there
            (data / CACHE_FOLDER / ".gitignore").write_text("*\n")
        return data / CACHE_FOLDER
    for root in (Path.home() / ".cache", Path(tempfile.gettempdir())):
        folder = root / "vlm2vec_jax" / "arrow" / place
        if _writable(folder):
            return folder
    raise UserError(f"{data}: no folder can be written for the converted data; give a cache folder")


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _convert(files: Sequence[Path], reader: Reader, target: Path) -> None:
    types = reader.schema(files)
    rows = [(str(file), reader.count(file)) for file in files]
    schema = pa.schema(list(types.items()), metadata={"shards": json.dumps(rows)})
    target.parent.mkdir(parents=True, exist_ok=True)
    keep = embedded.Store(target.parents[1]).keep
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for file in files:
                for batch in reader.batches(file, schema, keep):
                    writer.write_batch(batch)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared cache from other users
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _stored_types(files: Sequence[Path], columns: Sequence[str]) -> dict[str, pa.DataType]:
    types: dict[str, pa.DataType] = {}
    problems = []
    for file in files:
        schema = read_schema(file)
        for name in columns:
            if name not in schema.names:
                continue
            kind = canonical_type(schema.field(name).type)
            if kind is None and name.endswith(IMAGES):
                kind = embedded.image_type(schema.field(name).type)
            if kind is None:
                problems.append(f"{file}: column {name} is {schema.field(name).type}, not text")
                continue
            known = types.setdefault(name, kind)
            if pa.types.is_null(known):
                types[name] = kind
            elif known != kind and not pa.types.is_null(kind):
                problems.append(f"{file}: column {name} is {kind}, but {known} in {files[0].name}")
    raise_problems("Columns of an unexpected type", problems)
    # A column that is null everywhere is text that is absent everywhere.
    return {name: STRING if pa.types.is_null(kind) else kind for name, kind in types.items()}


def _num_rows(file: Path) -> int:
    try:
        return pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({_first_line(error)})") from None


def _read_batches(file: Path, schema: pa.Schema, keep: Keep) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file) as parquet:
            stored = parquet.schema_arrow
            there = [name for name in schema.names if name in stored.names]
            images = {name for name in there if embedded.image_type(stored.field(name).type)}
            size = embedded.ROWS if images else BATCH_ROWS
            for batch in parquet.iter_batches(batch_size=size, columns=there):
                arrays = []
                for field in schema:
                    if field.name in images:
                        array = embedded.paths_of(batch.column(field.name), keep)
                    elif field.name in there:
                        array = batch.column(field.name).cast(field.type)
                    else:
                        array = pa.nulls(len(batch), field.type)
                    array.validate(full=True)  # text that is not UTF-8 is found here, not later
                    arrays.append(array)
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)
    except (pa.ArrowException, OSError) as error:
        # Only reading stands inside this `try`: errors of writing are raised at the writer.
        raise UserError(
            f"{file}: damaged parquet file ({_first_line(error)}); download it again"
        ) from None


def _remove_stale(target: Path) -> None:
    stem = target.name[: -len("-0123456789abcdef.arrow")]
    pattern = re.compile(re.escape(stem) + r"-[0-9a-f]{16}\.arrow")
    for other in target.parent.iterdir():
        if other != target and pattern.fullmatch(other.name):
            # Processes that have it mapped keep reading it; the space is freed when they end.
            with contextlib.suppress(OSError):
                other.unlink()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
