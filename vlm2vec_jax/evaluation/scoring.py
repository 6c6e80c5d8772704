# SPDX-License-Identifier: Apache-2.0
"""Which rows are right: hit@1 over each row's own candidates, judged on the device.

A row is right only if the truth's score is finite and strictly greater than that of every other
candidate. The reference (VLM2Vec `eval.py`) takes the argmax over the list, which returns the
first maximum, and the truth always stands first: there a tie counts as right, and so does a row
of NaN, so that a collapsed model scores 100 %. Its verdict is kept beside ours.

The work is done in chunks of rows against the union of their candidates, in blocks of targets of
bounded size, so memory does not grow with the number of queries or of targets. Rows that share
their candidates go into large chunks (a candidate is fetched once for all of them), others into
small ones (a row need not be multiplied with what it does not ask for). Targets that fit stay on
the device for all chunks. `corpus` ranks against one corpus instead of lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.evaluation.distinct import distinct_vectors

Similarity = Literal["cosine", "dot"]
SIMILARITIES: tuple[Similarity, ...] = ("cosine", "dot")

ROWS_PER_CHUNK = 1024
FEWEST_ROWS = 32
"""A chunk of so many rows is not split further: a product of fewer is not faster."""
SCORES_PER_CHUNK = 1 << 24
"""More scores than that (64 MB) have a chunk split."""
FETCHING = 256
"""Fetching a vector costs as much as so many of its products (measured on a CPU: 15 and 0.06 us
at width 3072; what memory and arithmetic of an accelerator give is near it)."""
TARGETS_PER_BLOCK = 4096
TOP = 5
BLOCK_BYTES = 1 << 24
"""Of vectors that come from the host block by block: larger ones are new memory each time."""
RESIDENT_BYTES = 1 << 30
"""Targets of no more bytes that are needed more than once are gathered on the device."""


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """The verdict on every row; positions count in the row's candidate list as it was given.

    Attributes:
      correct: bool [N], our strict verdict.
      prediction: i32 [N], 0 if correct; otherwise the best candidate that the truth does not
        beat (in a tie never the truth); -1 if there is none (a lone truth without a finite score).
      reference_prediction: i32 [N], argmax as the reference takes it; 0 counts as right there.
      truth_score: f32 [N].
      prediction_score: f32 [N], NaN where `prediction` is -1.
      rank: i32 [N], 1 + the number of other distinct candidates that the truth does not beat.
      tied: bool [N], another candidate has exactly the truth's score.
      top: i32 [N, TOP], positions of the best distinct candidates, best first, -1 = no more.
      top_scores: f32 [N, TOP].
    """

    correct: np.ndarray
    prediction: np.ndarray
    reference_prediction: np.ndarray
    truth_score: np.ndarray
    prediction_score: np.ndarray
    rank: np.ndarray
    tied: np.ndarray
    top: np.ndarray
    top_scores: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of rows that are right."""
        return float(np.mean(self.correct))

    @property
    def reference_accuracy(self) -> float:
        """Share of rows that the reference would call right."""
        return float(np.mean(self.reference_prediction == 0))


def judge(
    queries: np.ndarray,
    targets: np.ndarray,
    query_index: Sequence[int] | np.ndarray,
    candidates: Sequence[Sequence[int] | np.ndarray],
    *,
    similarity: Similarity = "cosine",
    rows_per_chunk: int = ROWS_PER_CHUNK,
    targets_per_block: int = TARGETS_PER_BLOCK,
) -> Verdicts:
    """Judge rows of MMEB's kind: a query and its candidates, the truth first.

    Args:
      queries: float32 [Nq, D].
      targets: float32 [Nt, D], one row per distinct (text, image path): the same index is the
        same candidate, so a second mention of the truth in a list is the truth too.
      query_index: for each of N rows its index into `queries`.
      candidates: for each row its indices into `targets`, the truth first; lengths may differ.
      similarity: "cosine" (the reference's choice for normalised models) or "dot". A vector of
        length zero has no cosine (NaN) and never counts as right.
      rows_per_chunk: rows judged at a time, at most.
      targets_per_block: targets scored at a time; with `rows_per_chunk` it bounds the memory.

    Returns:
      `Verdicts` over the N rows.

    Raises:
      UserError: rows without candidates, indices out of range, shapes that do not agree.
    """
    queries, targets = np.asarray(queries, np.float32), np.asarray(targets, np.float32)
    query_index = np.asarray(query_index, np.int64).reshape(-1)
    rows = [np.asarray(row, np.int64).reshape(-1) for row in candidates]
    _check(queries, targets, query_index, rows, similarity)
    if not rows:
        return _gather([], 0)

    # A repeated candidate is judged once, at its first position. Different candidates whose
    # vectors are equal bit for bit share one scored vector, so that a tie is exactly a tie
    # wherever in a matrix product the two would have stood.
    first = _first_mentions(rows, len(targets))
    vector_of, vectors = distinct_vectors(targets)
    ids = [
        vector_of[row[at] if len(at) < len(row) else row]
        for row, at in zip(rows, first, strict=True)
    ]
    width = _power_of_two(max(map(len, first)))
    numbering = _Union(len(vectors))
    chunks = list(_chunks(ids, numbering, rows_per_chunk))
    fetched = sum(union for _, union in chunks)
    held = _resident(vectors, cosine=similarity == "cosine") if fetched > len(vectors) else vectors
    parts = []
    for chunk, _ in chunks:
        union, columns = numbering.of([ids[n] for n in chunk])
        size = min(_power_of_two(len(chunk), FEWEST_ROWS), rows_per_chunk)
        table = np.full((size, width), -1, np.int32)
        positions = np.full((size, width), -1, np.int32)
        for r, n in enumerate(chunk):
            table[r, : len(ids[n])] = columns[ids[n]]
            positions[r, : len(ids[n])] = first[n]
        q = np.zeros((size, queries.shape[1]), np.float32)
        q[: len(chunk)] = queries[query_index[chunk.start : chunk.stop]]
        if isinstance(held, np.ndarray):
            scores = scores_of(q, held, union, similarity, targets_per_block)
        else:
            unit = _unit(q) if similarity == "cosine" else q
            scores = scores_of(unit, held, union, "dot", targets_per_block)
        part = jax.device_get(_verdicts(scores, table, positions))
        parts.append({name: value[: len(chunk)] for name, value in part.items()})
    return _gather(parts, len(rows))


class _Union:
    """Numbers the vectors that some rows name, without sorting them."""

    def __init__(self, vectors: int) -> None:
        self._named = np.zeros(vectors, bool)
        self._column = np.empty(vectors, np.int32)

    def of(self, ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Them in order, int64 [U], and the place in it of each, i32 [vectors] until called again.

        Places of vectors that are not named mean nothing.
        """
        for row in ids:
            self._named[row] = True
        union = np.flatnonzero(self._named)
        self._named[union] = False
        self._column[union] = np.arange(len(union), dtype=np.int32)
        return union, self._column


def _chunks(ids: Sequence[np.ndarray], numbering: _Union, most: int) -> Iterator[tuple[range, int]]:
    """Split the rows into chunks of `most` or fewer, and halve these for as long as it pays.

    Yields:
      A chunk, and how many vectors it needs.
    """

    def union(chunk: range) -> int:
        return len(numbering.of([ids[n] for n in chunk])[0])

    def halves(chunk: range, size: int) -> Iterator[tuple[range, int]]:
        middle = -(-len(chunk) // 2 // FEWEST_ROWS) * FEWEST_ROWS
        if middle < len(chunk):
            both = [(half, union(half)) for half in (chunk[:middle], chunk[middle:])]
            split = sum(own * (FETCHING + len(half)) for half, own in both)
            if size * len(chunk) > SCORES_PER_CHUNK or split < size * (FETCHING + len(chunk)):
                for half in both:
                    yield from halves(*half)
                return
        yield chunk, size

    for start in range(0, len(ids), most):
        chunk = range(start, min(start + most, len(ids)))
        yield from halves(chunk, union(chunk))


@jax.jit
def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors of length one; no epsilon: one of length zero gives NaN, as in the reference."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _resident(vectors: np.ndarray, *, cosine: bool) -> np.ndarray | jax.Array:
    """The vectors on the device if they fit, in one of few shapes; otherwise as they are.

    On the device they have length one if cosines are wanted.
    """
    rows = _power_of_two(len(vectors))
    if 4 * rows * vectors.shape[1] > RESIDENT_BYTES:
        return vectors
    padded = np.zeros((rows, vectors.shape[1]), np.float32)
    padded[: len(vectors)] = vectors
    return _unit(padded) if cosine else jnp.asarray(padded)


def scores_of(
    q: np.ndarray,
    vectors: np.ndarray | jax.Array,
    union: np.ndarray,
    similarity: Similarity,
    block: int,
) -> jax.Array:
    """Scores of queries against some of the vectors.

    Args:
      q: f32 [R, D].
      vectors: f32 [V, D]; on the host they are moved block by block.
      union: int [U], which of them.
      similarity: "cosine" or "dot".
      block: how many of them at a time.

    Returns:
      f32 [R, at least U]; columns behind U mean nothing.
    """
    block = min(block, _power_of_two(len(union)))
    if isinstance(vectors, np.ndarray):
        fit = max(BLOCK_BYTES // (4 * max(vectors.shape[1], 1)), 128)
        block = min(block, 1 << (fit.bit_length() - 1))
    cosine = similarity == "cosine"
    columns = []
    for start in range(0, len(union), block):
        ids = union[start : start + block]
        if isinstance(vectors, np.ndarray):
            part = np.zeros((block, vectors.shape[1]), np.float32)
            part[: len(ids)] = vectors[ids]
            columns.append(_block_scores(q, part, cosine=cosine))
        else:
            padded = np.zeros(block, np.int32)
            padded[: len(ids)] = ids
            columns.append(_gathered_scores(q, vectors, padded, cosine=cosine))
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)


@functools.partial(jax.jit, static_argnames="cosine")
def _gathered_scores(q: jax.Array, vectors: jax.Array, ids: jax.Array, *, cosine: bool):
    return _block_scores(q, vectors[ids], cosine=cosine)


@functools.partial(jax.jit, static_argnames="cosine")
def _block_scores(q: jax.Array, t: jax.Array, *, cosine: bool) -> jax.Array:
    """Scores [R, U] of queries [R, D] against targets [U, D], both float32."""
    if cosine:
        q, t = _unit(q), _unit(t)
    # TPUs multiply float32 in bfloat16 unless told otherwise, which would make ties.
    return jnp.matmul(q, t.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _verdicts(scores: jax.Array, table: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
    """Verdicts of R rows.

    Args:
      scores: f32 [R, U].
      table: i32 [R, C], column of each distinct candidate in `scores`, truth first, -1 = padding.
      positions: i32 [R, C], where each of them stands in the list as it was given.
    """
    valid = table >= 0
    s = jnp.take_along_axis(scores, jnp.maximum(table, 0), axis=1)
    s = jnp.where(valid, s, -jnp.inf)
    truth = s[:, :1]
    other = valid.at[:, 0].set(False)
    unbeaten = other & ~((truth > s) & jnp.isfinite(truth))
    others_unbeaten = jnp.sum(unbeaten, axis=1, dtype=jnp.int32)
    correct = (others_unbeaten == 0) & jnp.isfinite(truth[:, 0])

    # argmax treats NaN as the greatest, as numpy's does, and takes the first of equals. Padding
    # stands last at -inf, so it never precedes a candidate; candidates at -inf that do not beat
    # it are raised above it for our own prediction.
    rival = jnp.argmax(jnp.where(unbeaten, jnp.maximum(s, jnp.finfo(s.dtype).min), -jnp.inf), 1)
    prediction = jnp.where(correct, 0, rival)
    none = ~correct & (others_unbeaten == 0)

    def at(array, index):
        return jnp.take_along_axis(array, index[:, None], axis=1)[:, 0]

    kept = jnp.where(jnp.isfinite(s), s, -jnp.inf)
    k = min(TOP, s.shape[1])
    _, top = jax.lax.top_k(kept, k)
    top_valid = jnp.take_along_axis(jnp.isfinite(s) & valid, top, axis=1)
    pad = ((0, 0), (0, TOP - k))
    return {
        "correct": correct,
        "prediction": jnp.where(none, -1, at(positions, prediction)),
        "reference_prediction": at(positions, jnp.argmax(s, axis=1)),
        "truth_score": truth[:, 0],
        "prediction_score": jnp.where(none, jnp.nan, at(s, prediction)),
        "rank": 1 + others_unbeaten,
        "tied": jnp.any(other & (s == truth), axis=1),
        "top": jnp.pad(
            jnp.where(top_valid, jnp.take_along_axis(positions, top, axis=1), -1),
            pad,
            constant_values=-1,
        ),
        "top_scores": jnp.pad(
            jnp.where(top_valid, jnp.take_along_axis(s, top, axis=1), jnp.nan),
            pad,
            constant_values=jnp.nan,
        ),
    }


def _first_mentions(rows: Sequence[np.ndarray], targets: int) -> list[np.ndarray]:
    """For each row the positions at which each distinct candidate stands first, in order."""
    place = np.empty(targets, np.int32)
    counting = np.arange(max(map(len, rows)), dtype=np.int32)
    found = []
    for row in rows:
        count = counting[: len(row)]
        place[row[::-1]] = count[::-1]  # of several the last is kept: the first mention
        same = place[row] == count
        found.append(count if same.all() else np.flatnonzero(same))
    return found


def _power_of_two(n: int, least: int = 128) -> int:
    """The least power of two that is at least n and `least`: few shapes, few compilations."""
    return max(least, 1 << (n - 1).bit_length())


def _check(queries, targets, query_index, rows, similarity) -> None:
    problems = []
    if similarity not in SIMILARITIES:
        problems.append(f"similarity must be one of {', '.join(SIMILARITIES)}, not {similarity!r}")
    if queries.ndim != 2 or targets.ndim != 2 or queries.shape[-1] != targets.shape[-1]:
        problems.append(f"queries {queries.shape} and targets {targets.shape} are not [N, D]")
    elif len(query_index) != len(rows):
        problems.append(f"{len(query_index)} queries for {len(rows)} candidate lists")
    else:
        for n, row in enumerate(rows):
            if not len(row):
                problems.append(f"row {n} has no candidates")
            elif row.min() < 0 or row.max() >= len(targets):
                problems.append(f"row {n} names a target outside 0..{len(targets) - 1}")
            if not 0 <= query_index[n] < len(queries):
                problems.append(f"row {n} names a query outside 0..{len(queries) - 1}")
    raise_problems("these rows cannot be scored", problems)


def _gather(parts: list[dict[str, np.ndarray]], n: int) -> Verdicts:
    if not n:
        i, f, b = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, bool)
        empty = {"top": np.zeros((0, TOP), np.int32), "top_scores": np.zeros((0, TOP), np.float32)}
        return Verdicts(b, i, i, f, f, i, b, **empty)
    return Verdicts(**{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
