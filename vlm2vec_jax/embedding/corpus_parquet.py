# SPDX-License-Identifier: Apache-2.0
"""A corpus in parquet files: texts, and images as paths or as the bytes that `datasets` stores."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2vec_jax.embedding.corpus import (
    WINDOW,
    Entry,
    FolderCorpus,
    JsonlCorpus,
    Window,
    checked,
    digest_of,
    images_below,
    stamp,
)
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import MultimodalInput

MAGIC = b"PAR1"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None takes the usual ones where they are there."""

    text: str | None = None
    image: str | None = None
    id: str | None = None


class ParquetCorpus:
    """Rows of parquet files.

    The image column holds paths (relative to the file), encoded images, structs of `bytes` and
    `path` (the Image feature of `datasets`), or lists of any of these.
    """

    def __init__(self, files: Sequence[str | os.PathLike], columns: Columns):
        """Open the files as far as their footers.

        Raises:
          UserError: if one is no parquet file, or has no column to embed.
        """
        self.files = [Path(f) for f in files]
        self.columns = [self._choose(_schema(f), f, columns) for f in self.files]
        self._cursor: tuple[Any, ...] | None = None
        self._starts: dict[int, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None}

    def describe(self) -> dict[str, Any]:
        """How to find the files again."""
        named = dataclasses.asdict(self.columns[0])
        files = [{"path": str(f.absolute()), **stamp(f)} for f in self.files]
        return {"kind": "parquet", "files": files, "columns": named}

    def scan(self) -> Iterator[tuple[Window, list[Entry]]]:
        """See `Corpus`. Rows with encoded images are checked only when they are embedded."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for window in self.cut():
                yield self._scanned(window, pool)

    def cut(self) -> Iterator[Window]:
        """See `Corpus`."""
        places: list[list[int]] = []
        number = first = count = 0
        for k, file in enumerate(self.files):
            metadata = _opened(file).metadata
            for group in range(metadata.num_row_groups):
                start, rows = 0, metadata.row_group(group).num_rows
                while start < rows:
                    take = min(rows - start, WINDOW - count)
                    places.append([k, group, start, take])
                    start, count = start + take, count + take
                    if count == WINDOW:
                        yield Window(number, first, count, "", places)
                        number, first, count, places = number + 1, first + count, 0, []
        if count:
            yield Window(number, first, count, "", places)

    def _scanned(
        self, window: Window, pool: concurrent.futures.Executor
    ) -> tuple[Window, list[Entry]]:
        used = sorted({place[0] for place in window.place})
        about = repr((window.place, [stamp(self.files[k]) for k in used], self.columns)).encode()
        if any(self._encoded(k) for k in used):
            return dataclasses.replace(window, digest=digest_of(about, [])), []
        entries = checked(self.parse(window, self.load(window)), pool)
        return dataclasses.replace(window, digest=digest_of(about, entries)), entries

    def load(self, window: Window) -> bytes:
        """Its rows as an Arrow stream per segment, each with its length in front."""
        out = io.BytesIO()
        for k, group, start, count in window.place:
            sink = pa.BufferOutputStream()
            batches = list(self._rows(k, group, start, count))
            with pa.ipc.new_stream(sink, batches[0].schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            data = sink.getvalue().to_pybytes()
            out.write(len(data).to_bytes(8, "little") + data)
        return out.getvalue()

    def parse(self, window: Window, data: bytes) -> list[Entry]:
        """See `Corpus`."""
        entries: list[Entry] = []
        at = 0
        for k, group, start, _ in window.place:
            size = int.from_bytes(data[at : at + 8], "little")
            rows = pa.ipc.open_stream(data[at + 8 : at + 8 + size]).read_all().to_pylist()
            at += 8 + size
            for n, row in enumerate(rows, self._group_start(k, group) + start):
                where = f"{self.files[k].name} row {n}"
                entries.append(self._entry(row, k, window.first + len(entries), where))
        return entries

    def _group_start(self, k: int, group: int) -> int:
        if k not in self._starts:
            metadata = _opened(self.files[k]).metadata
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            self._starts[k] = [0, *itertools.accumulate(sizes)]
        return self._starts[k][group]

    def _entry(self, row: dict[str, Any], k: int, number: int, where: str) -> Entry:
        item, problem, columns = None, None, self.columns[k]
        name = row.get(columns.id) if columns.id else None
        try:
            value = row.get(columns.image) if columns.image else None
            many = value if isinstance(value, list) else [] if value is None else [value]
            images = [i for i in (_image(v, self.files[k].parent) for v in many) if i is not None]
            text = row.get(columns.text) if columns.text else None
            item = MultimodalInput.of({"text": text, "images": images})
            problem = item.problem()
        except UserError as error:
            problem = str(error)
        item = item if problem is None else None
        return Entry(number, where, item, problem, None if name is None else str(name))

    def _rows(self, k: int, group: int, start: int, count: int) -> Iterator[pa.RecordBatch]:
        """Rows of a row group; going on where the last call ended costs no second look."""
        named = dataclasses.asdict(self.columns[k])
        names = [name for name in named.values() if name]
        key = (k, group)
        if self._cursor is None or self._cursor[0] != key or self._cursor[1] > start:
            batches = _opened(self.files[k]).iter_batches(
                batch_size=256, row_groups=[group], columns=names, use_threads=False
            )
            self._cursor = (key, 0, None, batches)
        _, at, held, batches = self._cursor
        try:
            while count:
                if held is None or not len(held):
                    held = next(batches)
                if at < start:
                    skipped = min(start - at, len(held))
                    held, at = held.slice(skipped), at + skipped
                    continue
                part = held.slice(0, count)
                held, at = held.slice(len(part)), at + len(part)
                start, count = at, count - len(part)
                yield part
        except (pa.ArrowException, OSError, StopIteration) as error:
            self._cursor = None
            reason = str(error).strip().splitlines() or ["it ends early"]
            raise UserError(
                f"{self.files[k]}: damaged parquet file ({reason[0][:200]}); download it again"
            ) from None
        self._cursor = (key, at, held, batches)

    def _encoded(self, k: int) -> bool:
        """Whether a file's images are in it, so that looking at a row means reading pixels."""
        name = self.columns[k].image
        if name is None:
            return False
        kind = _schema(self.files[k]).field(name).type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        return not (pa.types.is_string(kind) or pa.types.is_large_string(kind))

    @staticmethod
    def _choose(schema: pa.Schema, file: str | os.PathLike, asked: Columns) -> Columns:
        there = set(schema.names)
        problems = [
            f"{file} has no column {name!r}; it has {', '.join(schema.names)}"
            for name in dataclasses.astuple(asked)
            if name is not None and name not in there
        ]
        if problems:
            raise UserError("\n".join(problems))

        def usual(*names: str) -> str | None:
            return next((name for name in names if name in there), None)

        found = Columns(
            asked.text or usual("text"),
            asked.image or usual("images", "image"),
            asked.id or usual("id"),
        )
        if found.text is None and found.image is None:
            raise UserError(
                f"{file} has neither a column `text` nor `image`; it has "
                f"{', '.join(schema.names)}: name them with --text_column and --image_column"
            )
        return found


def _image(value: Any, root: Path) -> Any:
    """An image of a row: a path, or the opened bytes of one."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return root / value
    if not isinstance(value, bytes):
        raise UserError(f"an image must be a path or encoded bytes, not {type(value).__name__}")
    try:
        return Image.open(io.BytesIO(value))
    except Exception as error:  # Pillow's readers raise almost anything for damaged data
        raise UserError(f"the image of {len(value)} bytes cannot be read: {error}") from None


def _opened(file: str | os.PathLike) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"--input {file} is not a readable parquet file ({reason})") from None


def _schema(file: str | os.PathLike) -> pa.Schema:
    return _opened(file).schema_arrow


def open_corpus(
    path: str | os.PathLike, listing: Path, columns: Columns = Columns()
) -> JsonlCorpus | ParquetCorpus:
    """The corpus that a user means.

    Args:
      path: a jsonl file, a parquet file, a folder of parquet files, or a folder of images.
      listing: where the list of a folder's images is written.
      columns: names of parquet columns.

    Raises:
      UserError: if it is none of these.
    """
    path = Path(path)
    named = any(name is not None for name in dataclasses.astuple(columns))
    if path.is_dir():
        try:
            files = sorted(path.glob("*.parquet"))
        except OSError as error:
            raise UserError(f"--input {path} cannot be read: {error.strerror}") from None
        picture = next(images_below(path), None)
        if files and picture is not None:
            raise UserError(
                f"--input {path} holds parquet files and images such as {picture}; give a folder "
                f"of one kind"
            )
        if files:
            return ParquetCorpus(files, columns)
        if picture is None:
            raise UserError(
                f"--input {path} cannot be read: Is a directory without images and parquet files"
            )
        if named:
            raise UserError(f"columns are named, but --input {path} is a folder of images")
        return FolderCorpus(path, listing)
    try:
        with path.open("rb") as file:
            parquet = file.read(4) == MAGIC or path.suffix == ".parquet"
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None
    if parquet:
        return ParquetCorpus([path], columns)
    if named:
        raise UserError(f"columns are named, but --input {path} is no parquet file")
    return JsonlCorpus(path, path.parent)
