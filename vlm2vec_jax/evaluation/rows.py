# SPDX-License-Identifier: Apache-2.0
"""The rows of a subset as indices into its distinct inputs: all that scoring needs of the data.

A shard keeps them beside its embeddings, so that `merge` can score without the data.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.evaluation import compress, mmeb, store
from vlm2vec_jax.evaluation.scoring import Similarity
from vlm2vec_jax.evaluation.store import Key

SCORING = 2
"""Version of what a score file holds; a file of another version is scored again."""

CANDIDATES = ("own", "corpus")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How rows are scored.

    Attributes:
      similarity: "cosine" or "dot".
      candidates: "own", each row's list, as MMEB does it; "corpus", every candidate of the subset.
      dims: numbers of first dimensions to score beside the full vectors.
      precisions: of `compress.PRECISIONS`, to score beside float32.
      target_instruction: what stands in front of targets that are text alone, a rule of
        `data.target_instruction`.
    """

    similarity: Similarity = "cosine"
    candidates: str = "own"
    dims: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    target_instruction: str = ""

    @property
    def variants(self) -> list[compress.Variant]:
        """The smaller vectors to score."""
        return compress.variants(self.dims, self.precisions)

    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on besides the embeddings and the rows."""
        named: dict[str, Any] = {"similarity": self.similarity, "scoring": SCORING}
        if self.candidates != "own":
            named["candidates"] = self.candidates
        if self.variants:
            named["variants"] = [v.name for v in self.variants]
        if self.target_instruction:
            named["target_instruction"] = self.target_instruction
        return named


@dataclasses.dataclass(frozen=True)
class Rows:
    """A subset's rows.

    Attributes:
      subset: its name.
      keys: distinct inputs of queries and candidates, in order of first mention.
      query_index: i32 [rows], into `keys`.
      candidates: for each row i32 [its candidates], into `keys`, the truth first.
      embedded_from: fingerprint of the embeddings; the order of rows does not matter to it.
      scored_from: fingerprint of the score: the same, with the rows and how they are scored.
    """

    subset: str
    keys: list[Key]
    query_index: np.ndarray
    candidates: list[np.ndarray]
    embedded_from: dict[str, Any]
    scored_from: dict[str, Any]


def scored_from(
    embedded_from: Mapping[str, Any],
    keys: list[Key],
    query_index: np.ndarray,
    candidates: list[np.ndarray],
    settings: Settings,
) -> dict[str, Any]:
    """The fingerprint of a score."""
    rows = (keys, *(row.tolist() for row in (query_index, *candidates)))
    return {
        **embedded_from,
        "rows": store.hash_rows(rows),
        **settings.fingerprint(),
        "benchmark": mmeb.BENCHMARK_VERSION,
    }


def save(output: str | os.PathLike, rows: Rows, settings: Settings) -> None:
    """Write `<subset>_rows.npz`."""
    lengths = [len(row) for row in rows.candidates]
    store.write_npz(
        store.rows_path(output, rows.subset),
        {
            "keys": store.as_bytes([list(key) for key in rows.keys]),
            "query_index": rows.query_index.astype(np.int32),
            "candidates": np.concatenate(rows.candidates).astype(np.int32),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "embedded_from": store.as_bytes(rows.embedded_from),
            "settings": store.as_bytes(dataclasses.asdict(settings)),
        },
    )


def load(path: Path) -> tuple[Rows, Settings] | None:
    """Read it back; None if the file is damaged or does not hold together."""
    names = ("keys", "query_index", "candidates", "offsets", "embedded_from", "settings")
    arrays = store.read_npz(path, names)
    if arrays is None:
        return None
    try:
        keys = store.keys_of(arrays["keys"])
        embedded_from = store.from_bytes(arrays["embedded_from"])
        saved = store.from_bytes(arrays["settings"])
        settings = Settings(
            saved["similarity"],
            saved["candidates"],
            tuple(saved["dims"]),
            tuple(saved["precisions"]),
            saved.get("target_instruction", ""),
        )
        offsets, flat = arrays["offsets"], arrays["candidates"]
        query = arrays["query_index"]
        sound = (
            offsets.ndim == flat.ndim == query.ndim == 1
            and len(offsets) == len(query) + 1
            and offsets[-1] == len(flat)
            and (np.diff(offsets) > 0).all()
            and all(0 <= x.min() and x.max() < len(keys) for x in (flat, query))
        )
        if not sound or not isinstance(embedded_from, dict):
            return None
    except (ValueError, TypeError, KeyError):
        return None
    candidates = [flat[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    subset = path.name.removesuffix("_rows.npz")
    made_from = scored_from(embedded_from, keys, query, candidates, settings)
    return Rows(subset, keys, query, candidates, embedded_from, made_from), settings
