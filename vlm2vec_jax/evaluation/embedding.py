# SPDX-License-Identifier: Apache-2.0
"""From rows to vectors: a subset read once into indices, and its distinct inputs embedded once."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec_jax.data.mmeb import to_input
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.evaluation import mmeb, store
from vlm2vec_jax.evaluation.store import Key
from vlm2vec_jax.inputs import BadInputs, MultimodalInput

INPUTS_AT_ONCE = 512
"""A dataset of MMEB has more, and is embedded by itself; smaller ones share a call."""


class Encoder(Protocol):
    """What turns inputs into vectors: `vlm2vec_jax.Embedder`, or anything that does the same."""

    @property
    def encode(self) -> Callable[..., np.ndarray]:
        """Takes a list of N `MultimodalInput` and options, gives embeddings float32 [N, D]."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """What an embedding depends on: model, adapter, processor settings, type. Json-able."""
        ...


class Source(Protocol):
    """One subset of MMEB-eval (`vlm2vec_jax.data.mmeb.EvalSource`).

    A row has `query_key` and `target_keys`, each key (text, image path), the truth first.
    """

    subset: str
    image_root: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Identity = tuple[str, tuple[str, ...]]
"""What an input is across subsets: its text, and the absolute paths of its images."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A subset read once: its distinct inputs, and its rows as indices into them.

    Attributes:
      source: where it was read from.
      keys: distinct inputs of queries and candidates, in order of first mention.
      identities: what each key is across subsets.
      query_index: i32 [rows], into `keys`.
      candidates: for each row i32 [its candidates], into `keys`, the truth first.
      embedded_from: fingerprint of the embeddings; the order of rows does not matter to it.
      scored_from: fingerprint of the score: the same, with the rows and how they are scored.
    """

    source: Source
    keys: list[Key]
    identities: list[Identity]
    query_index: np.ndarray
    candidates: list[np.ndarray]
    embedded_from: dict[str, Any]
    scored_from: dict[str, Any]

    @property
    def subset(self) -> str:
        """The subset's name."""
        return self.source.subset


def plan_subset(
    source: Source, images: dict[Path, str], made_with: Mapping[str, Any], similarity: str
) -> Plan:
    """Read a subset's rows; a candidate of a row stays as four bytes.

    Args:
      source: the subset.
      images: hashes of image files that were read already, added to.
      made_with: fingerprint of the encoder.
      similarity: how it will be scored.

    Raises:
      UserError: no rows, or an image that cannot be read.
    """
    if not len(source):
        raise UserError(f"subset {source.subset} has no rows")
    index: dict[Key, int] = {}
    query_index = np.zeros(len(source), np.int32)
    candidates = []
    for n in range(len(source)):
        row = source[n]
        query_index[n] = index.setdefault(row.query_key, len(index))
        candidates.append(
            np.array([index.setdefault(key, len(index)) for key in row.target_keys], np.int32)
        )
    keys = list(index)
    identities, files = [], {}
    for key in keys:
        paths = []
        for image in to_input(key, source.image_root).images:
            if not isinstance(image, (str, os.PathLike)):
                raise TypeError("an evaluation source names images by path")
            path = Path(os.path.abspath(image))
            paths.append(str(path))
            # Named by what the row says, so that moving the folder changes nothing.
            files[key[1]] = path
        identities.append((key[0], tuple(paths)))
    embedded_from = {
        **made_with,
        "inputs": store.hash_rows(sorted(keys)),
        "images": store.hash_images(files, images),
    }
    rows = (keys, *(row.tolist() for row in (query_index, *candidates)))
    scored_from = {
        **embedded_from,
        "rows": store.hash_rows(rows),
        "similarity": similarity,
        "benchmark": mmeb.BENCHMARK_VERSION,
    }
    return Plan(source, keys, identities, query_index, candidates, embedded_from, scored_from)


class Embedding:
    """Embeds the inputs of the pending subsets, each distinct one once."""

    def __init__(
        self,
        encoder: Encoder,
        plans: Sequence[Plan],
        output: Path,
        options: Mapping[str, Any],
        inputs_at_once: int,
        say: Callable[[str], None],
    ):
        self.encoder, self.output, self.options, self.say = encoder, output, options, say
        self.plans, self.inputs_at_once = plans, inputs_at_once
        # How many pending subsets still want an input; only shared ones are held in memory.
        self.wanted = collections.Counter(i for plan in plans for i in set(plan.identities))
        self.held: dict[Identity, np.ndarray] = {}

    def run(self, done: Callable[[Plan, Mapping[Key, np.ndarray]], None]) -> None:
        """Call `done(plan, vectors)` for each pending subset as soon as it is embedded.

        Small subsets are embedded together: packing wastes the least with many inputs at once.
        """
        waiting: list[Plan] = []
        fresh: dict[Identity, MultimodalInput] = {}
        for number, plan in enumerate(self.plans, 1):
            path = store.embeddings_path(self.output, plan.subset)
            vectors, why_not = store.load_embeddings(path, plan.embedded_from)
            where = f"[{number}/{len(self.plans)}] {plan.subset}: {len(plan.query_index)} rows"
            if vectors is not None:
                self.say(f"{where}, embeddings taken from {path.name}")
                self._finish(plan, vectors, done)
                continue
            if why_not:
                self.say(f"{plan.subset}: {why_not}; embedded again")
            before = len(fresh)
            for identity, key in zip(plan.identities, plan.keys, strict=True):
                if identity not in self.held and identity not in fresh:
                    fresh[identity] = to_input(key, plan.source.image_root)
            new = len(fresh) - before
            shared = len(plan.keys) - new
            self.say(
                f"{where}, {new} inputs to embed"
                + (f" ({shared} more are shared with subsets before it)" if shared else "")
            )
            waiting.append(plan)
            if len(fresh) >= self.inputs_at_once:
                self._flush(waiting, fresh, done)
                waiting, fresh = [], {}
        self._flush(waiting, fresh, done)

    def _flush(self, waiting: list[Plan], fresh: dict[Identity, MultimodalInput], done) -> None:
        vectors = dict(self.held)
        if fresh:
            try:
                matrix = np.asarray(self.encoder.encode(list(fresh.values()), **self.options))
            except BadInputs as error:  # what only decoding shows, such as truncated images
                names = list(fresh)
                problems = [f"{_where(waiting, names[n])}: {p}" for n, p in error.problems.items()]
                raise_problems("The data has bad rows", problems, advice=error.advice)
                raise
            if matrix.ndim != 2 or len(matrix) != len(fresh):
                raise ValueError(f"{len(fresh)} inputs gave embeddings of shape {matrix.shape}")
            bad = int(np.sum(~np.isfinite(matrix).all(axis=1)))
            if bad:
                names = ", ".join(plan.subset for plan in waiting)
                self.say(
                    f"{bad} of {len(fresh)} embeddings for {names} are not finite; rows that "
                    f"need them count as wrong"
                )
            vectors.update(zip(fresh, matrix.astype(np.float32), strict=True))
        for plan in waiting:
            matrix = np.stack([vectors[identity] for identity in plan.identities])
            path = store.embeddings_path(self.output, plan.subset)
            store.save_embeddings(path, plan.keys, matrix, plan.embedded_from)
            self._finish(plan, dict(zip(plan.keys, matrix, strict=True)), done)

    def _finish(self, plan: Plan, vectors: Mapping[Key, np.ndarray], done) -> None:
        self._hold(plan, vectors)
        done(plan, vectors)

    def _hold(self, plan: Plan, vectors: Mapping[Key, np.ndarray]) -> None:
        for identity, key in dict(zip(plan.identities, plan.keys, strict=True)).items():
            self.wanted[identity] -= 1
            if self.wanted[identity] > 0:
                # A copy, lest a shared input keep the whole matrix of its subset alive.
                self.held.setdefault(identity, np.array(vectors[key]))
            else:
                self.held.pop(identity, None)


def _where(plans: Sequence[Plan], identity: Identity) -> str:
    """The first row that needs an input, in words."""
    for plan in plans:
        if identity not in plan.identities:
            continue
        key = plan.identities.index(identity)
        row = next(
            n
            for n, query in enumerate(plan.query_index)
            if query == key or key in plan.candidates[n]
        )
        at = getattr(plan.source, "at", None)
        return at(row) if at else f"{plan.subset} row {row}"
    raise ValueError("an input that no row has")
