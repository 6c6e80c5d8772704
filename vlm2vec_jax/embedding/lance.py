# SPDX-License-Identifier: Apache-2.0
"""Stored vectors as a LanceDB table (extra `lancedb`): `DIR/NAME.lance` is table NAME of DIR."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm2vec_jax.embedding.index import BLOCK, KEY, Blocks, Row, matrix, meta_of, record_batches
from vlm2vec_jax.errors import UserError


def library() -> Any:
    """The module `lancedb`.

    Raises:
      UserError: if it is not installed.
    """
    try:
        return importlib.import_module("lancedb")
    except ImportError:
        raise UserError(
            "a .lance table needs the package lancedb: pip install 'vlm2vec_jax[lancedb]'"
        ) from None


def write_lance(path: Path, blocks: Blocks, schema: pa.Schema) -> None:
    """Write a table; one that was there is replaced in one step.

    Raises:
      UserError: if the package is missing or the disk does not take it.
    """
    lancedb = library()
    reader = pa.RecordBatchReader.from_batches(schema, record_batches(blocks, schema))
    try:
        database = lancedb.connect(str(path.parent))
        database.create_table(path.stem, data=reader, schema=schema, mode="overwrite")
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"cannot write {path}: {reason}; an earlier table is unchanged") from error


class LanceIndex:
    """A LanceDB table written by `write_lance`."""

    def __init__(self, path: Path):
        """Open it.

        Raises:
          UserError: if it cannot be opened.
        """
        self.path = path
        lancedb = library()
        try:
            self._table = lancedb.connect(str(path.parent)).open_table(path.stem)
            metadata = self._table.schema.metadata or {}
            self._count = self._table.count_rows()
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} cannot be opened: {error}") from None
        self.meta = meta_of(metadata.get(KEY), path)

    def __len__(self) -> int:
        return self._count

    def stored(self) -> Iterator[np.ndarray]:
        """See `index.Index`."""
        for batch in self._batches(["embedding"]):
            yield matrix(batch.column("embedding"), self.meta["width"])

    def rows(self, places: Sequence[int]) -> list[Row]:
        """Rows in the order of `places`."""
        found: dict[int, Row] = {}
        start = 0
        for batch in self._batches(["row", "id", "text", "images"]):
            inside = [p for p in set(places) if start <= p < start + len(batch)]
            found |= {p: batch.slice(p - start, 1).to_pylist()[0] for p in inside}
            start += len(batch)
        return [found[p] for p in places]

    def nearest(self, query: np.ndarray, count: int) -> list[tuple[float, Row]]:
        """The table's own search, through its index where it has one: (cosine, row)."""
        search = self._table.search(query, vector_column_name="embedding")
        found = search.distance_type("cosine").limit(count).to_arrow().to_pylist()
        names = ("row", "id", "text", "images")
        return [(1 - r["_distance"], {name: r[name] for name in names}) for r in found]

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if self._count:
            query = self._table.search().select(columns).limit(self._count)
            yield from query.to_batches(BLOCK)
