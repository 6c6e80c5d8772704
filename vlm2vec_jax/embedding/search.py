# SPDX-License-Identifier: Apache-2.0
"""The nearest of stored vectors: exactly, block by block, or through an approximate index."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.embedding.corpus import FolderCorpus, JsonlCorpus, read, stamp
from vlm2vec_jax.embedding.corpus_parquet import Columns, ParquetCorpus
from vlm2vec_jax.embedding.index import Index, Row, vectors_of
from vlm2vec_jax.embedding.run import row_of
from vlm2vec_jax.embedding.vectors import normalize
from vlm2vec_jax.errors import UserError

FAISS_INDEX = "HNSW32"
"""What FAISS builds unless told otherwise (`faiss.index_factory`): no training, near exact."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """One of the nearest.

    Attributes:
      score: cosine similarity; approximate where the stored numbers are quantised.
      row: what was found.
    """

    score: float
    row: Row


def exact(index: Index, query: np.ndarray, count: int) -> list[Hit]:
    """The `count` nearest vectors; only a block of them is in memory at a time.

    Args:
      index: stored vectors.
      query: float32 [D], of unit length.
      count: how many to return, at most.
    """
    best_scores, best_places = np.zeros(0, np.float32), np.zeros(0, np.int64)
    start = 0
    for block in vectors_of(index):
        scores = normalize(block) @ query
        places = np.arange(start, start + len(block))
        start += len(block)
        scores = np.concatenate([best_scores, np.nan_to_num(scores, nan=-2.0)])
        places = np.concatenate([best_places, places])
        # Ties go to the earlier row, whatever the size of a block.
        order = np.lexsort((places, -scores))[:count]
        best_scores, best_places = scores[order], places[order]
    rows = index.rows(best_places.tolist())
    return [Hit(float(s), row) for s, row in zip(best_scores, rows, strict=True)]


def with_faiss(
    index: Index, query: np.ndarray, count: int, factory: str = FAISS_INDEX
) -> list[Hit]:
    """The nearest by a FAISS index, which is built once and kept beside the vectors.

    Args:
      index: stored vectors.
      query: float32 [D], of unit length.
      count: how many.
      factory: what to build, in the words of `faiss.index_factory`.

    Raises:
      UserError: if FAISS is not installed or does not know the factory.
    """
    try:
        faiss: Any = importlib.import_module("faiss")
    except ImportError:
        raise UserError("--engine faiss needs it: pip install 'vlm2vec_jax[faiss]'") from None
    built = _faiss_index(faiss, index, factory)
    scores, places = built.search(np.ascontiguousarray(query[None], np.float32), count)
    found = [(s, int(p)) for s, p in zip(scores[0], places[0], strict=True) if p >= 0]
    rows = index.rows([place for _, place in found])
    return [Hit(float(s), row) for (s, _), row in zip(found, rows, strict=True)]


def _faiss_index(faiss: Any, index: Index, factory: str) -> Any:
    path = index.path.with_name(f"{index.path.name}.faiss")
    note = index.path.with_name(f"{index.path.name}.faiss.json")
    made_of = {"factory": factory, "count": len(index), **stamp(index.path)}
    try:
        if json.loads(note.read_text()) == made_of:
            return faiss.read_index(str(path))
    except (OSError, ValueError, RuntimeError):
        pass  # there is none, or it is of other vectors
    try:
        built = faiss.index_factory(index.meta["dimension"], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"FAISS does not know the index {factory!r}: {error}") from None
    try:
        if not built.is_trained:
            built.train(np.concatenate([normalize(block) for block in vectors_of(index)]))
        for block in vectors_of(index):
            built.add(np.ascontiguousarray(normalize(block)))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"FAISS cannot build {factory!r} of {len(index)} vectors: {reason}"
        ) from None
    try:
        partial = path.with_suffix(".partial")
        faiss.write_index(built, str(partial))
        os.replace(partial, path)
        note.write_text(json.dumps(made_of))
    except (OSError, RuntimeError):
        pass  # a folder that cannot be written: it is built again next time
    return built


def with_lance(index: Index, query: np.ndarray, count: int) -> list[Hit]:
    """The nearest by LanceDB's own search.

    Raises:
      UserError: if the vectors are no LanceDB table, or are quantised.
    """
    nearest = getattr(index, "nearest", None)
    if nearest is None:
        raise UserError(f"--engine lancedb searches .lance tables, not {index.path.name}")
    if index.meta["precision"] != "float32":
        raise UserError(
            f"LanceDB does not search {index.meta['precision']} numbers; leave --engine"
        )
    return [Hit(float(score), row) for score, row in nearest(query, count)]


def fill_in(index: Index, hits: Sequence[Hit]) -> list[Hit]:
    """Look texts and images up in the corpus where the index holds only numbers of rows.

    A corpus that is gone or was changed since is not read: the hits stay as they are.
    """
    if all("text" in hit.row for hit in hits):
        return list(hits)
    try:
        found = _look_up(index.meta.get("input") or {}, {hit.row["row"] for hit in hits}, index)
    except (UserError, OSError, KeyError, TypeError, ValueError):
        found = {}
    return [dataclasses.replace(hit, row=found.get(hit.row["row"], hit.row)) for hit in hits]


def _look_up(source: dict[str, Any], wanted: set[int], index: Index) -> dict[int, Row]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        if source["kind"] == "folder":
            corpus: Any = FolderCorpus(source["path"], Path(folder) / "listing")
        elif source["kind"] == "jsonl":
            path = Path(source["path"])
            if {k: source[k] for k in ("size", "mtime_ns")} != stamp(path):
                return {}
            corpus = JsonlCorpus(path, path.parent)
        else:
            for file in source["files"]:
                if {k: file[k] for k in ("size", "mtime_ns")} != stamp(Path(file["path"])):
                    return {}
            files = [file["path"] for file in source["files"]]
            corpus = ParquetCorpus(files, Columns(**source["columns"]))
        found: dict[int, Row] = {}
        total = 0
        for window in corpus.cut():
            total += window.count
            if not any(window.first <= row < window.first + window.count for row in wanted):
                continue
            for entry in read(corpus, window):
                if entry.row in wanted and entry.input is not None:
                    found[entry.row] = row_of(entry)
        skipped = index.meta.get("skip") or source["kind"] != "folder"
        return found if skipped or total == len(index) else {}
