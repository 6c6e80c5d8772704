# SPDX-License-Identifier: Apache-2.0
"""Ranks in one global corpus, on the device, for any number of candidates.

The corpus passes through the device in blocks, each once; what is kept per query is counts and the
best few, so memory does not grow with the corpus. The rules are those of `scoring`: a relevant
candidate stands behind every other candidate that it does not strictly beat, a score that is not
finite beats nothing, and candidates whose vectors are equal bit for bit tie exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.evaluation import metrics
from vlm2vec_jax.evaluation.distinct import distinct_vectors
from vlm2vec_jax.evaluation.scoring import SIMILARITIES, Similarity, scores_of

QUERIES_PER_CHUNK = 128
TARGETS_PER_BLOCK = 16384
TOP = 10


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Where the relevant candidates of N queries stand; -1 and NaN are padding.

    Attributes:
      ranks: i64 [N, R], place of each relevant candidate from 1 on, ties against it;
        `metrics.NEVER` for padding and for one whose score is not finite.
      grades: f32 [N, R], 0 for padding.
      scores: f32 [N, R], of the relevant candidates.
      ahead: i64 [N, R], other candidates that a plain argmax would put before it (the reference's
        rule: ties go to the relevant one, NaN counts as the greatest).
      tied: bool [N], some candidate that is not relevant has exactly the score of one that is.
      rival: i64 [N], the best candidate that is not relevant; -1 if none has a finite score.
      rival_score: f32 [N].
      top: i64 [N, K], the best candidates with finite scores, best first.
      top_scores: f32 [N, K].
    """

    ranks: np.ndarray
    grades: np.ndarray
    scores: np.ndarray
    ahead: np.ndarray
    tied: np.ndarray
    rival: np.ndarray
    rival_score: np.ndarray
    top: np.ndarray
    top_scores: np.ndarray

    def metrics(self, ks: tuple[int, ...] = metrics.KS) -> dict[str, float]:
        """Mean metrics over the queries, `name@k` -> fraction."""
        return metrics.mean(self.ranks, self.grades, ks)


def rank(
    queries: np.ndarray,
    corpus: np.ndarray,
    relevant: Sequence[Sequence[int] | np.ndarray],
    grades: Sequence[Sequence[float] | np.ndarray] | None = None,
    *,
    similarity: Similarity = "cosine",
    top: int = TOP,
    queries_per_chunk: int = QUERIES_PER_CHUNK,
    targets_per_block: int = TARGETS_PER_BLOCK,
) -> Ranking:
    """Rank every query's relevant candidates among the whole corpus.

    Args:
      queries: float32 [N, D].
      corpus: float32 [M, D]; a row is a candidate, whatever its vector.
      relevant: for each query the rows of `corpus` that are relevant, distinct; may be empty.
      grades: how relevant each of them is (> 0); 1 by default.
      similarity: "cosine" or "dot", see `scoring.judge`.
      top: how many of the best candidates to give back.
      queries_per_chunk: queries scored at a time.
      targets_per_block: candidates on the device at a time.

    Raises:
      UserError: shapes that do not agree, rows outside the corpus.
    """
    queries, corpus = np.asarray(queries, np.float32), np.asarray(corpus, np.float32)
    wanted = [np.asarray(r, np.int64).reshape(-1) for r in relevant]
    given = [
        np.ones(len(w), np.float32) if grades is None else np.asarray(grades[n], np.float32)
        for n, w in enumerate(wanted)
    ]
    _check(queries, corpus, wanted, given, similarity)
    count, width = len(queries), max([1, *map(len, wanted)])
    rows = np.full((count, width), -1, np.int64)
    grade = np.zeros((count, width), np.float32)
    for n, (w, g) in enumerate(zip(wanted, given, strict=True)):
        rows[n, : len(w)], grade[n, : len(w)] = w, g

    vector_of, vectors = distinct_vectors(corpus)
    many = np.bincount(vector_of, minlength=len(vectors)).astype(np.int32)
    ids = np.where(rows >= 0, vector_of[rows], -1) if len(corpus) else rows
    truth = _relevant_scores(queries, vectors, ids, similarity, queries_per_chunk)
    best = min(top, len(vectors)) or 1
    found = _through(
        queries, vectors, many, ids, truth, similarity, best, queries_per_chunk, targets_per_block
    )
    return _ranking(rows, grade, ids, truth, many, vector_of, found, top)


def _relevant_scores(queries, vectors, ids, similarity, step) -> np.ndarray:
    """Scores of the relevant candidates, f32 [N, R]; NaN for padding."""
    out = np.full(ids.shape, np.nan, np.float32)
    for start in range(0, len(queries), step):
        chunk = ids[start : start + step]
        union, local = np.unique(chunk[chunk >= 0], return_inverse=True)
        if not len(union):
            continue
        q = _padded(queries[start : start + step], step)
        scores = np.asarray(scores_of(q, vectors, union, similarity, TARGETS_PER_BLOCK))
        n, r = np.nonzero(chunk >= 0)
        out[start + n, r] = scores[n, local]
    return out


def _through(queries, vectors, many, ids, truth, similarity, best, step, block) -> dict:
    """Let the corpus pass through the device; the carries of all queries as numpy arrays."""
    block = min(block, max(128, 1 << (max(len(vectors), 1) - 1).bit_length()))
    starts = range(0, len(queries), step)
    chunks, carries = [], []
    for start in starts:
        q = jnp.asarray(_padded(queries[start : start + step], step))
        t = jnp.asarray(_padded(truth[start : start + step], step, np.nan))
        r = jnp.asarray(_padded(ids[start : start + step], step, -1).astype(np.int32))
        chunks.append((q, t, r))
        carries.append(
            {
                **{k: jnp.zeros(t.shape, jnp.int32) for k in ("unbeaten", "ahead", "equal")},
                "rival": jnp.full(step, -1, jnp.int32),
                "rival_score": jnp.full(step, -jnp.inf, jnp.float32),
                "top": jnp.full((step, best), -1, jnp.int32),
                "top_scores": jnp.full((step, best), -jnp.inf, jnp.float32),
            }
        )  # fmt: skip
    for first in range(0, len(vectors), block):
        part = jnp.asarray(_padded(vectors[first : first + block], block))
        weight = jnp.asarray(_padded(many[first : first + block], block))
        for c, (q, t, r) in enumerate(chunks):
            carries[c] = _step(
                carries[c], q, t, r, part, weight, first, cosine=similarity == "cosine"
            )
    parts = [jax.device_get(carry) for carry in carries]
    return {k: np.concatenate([p[k] for p in parts])[: len(queries)] for k in parts[0]}


@functools.partial(jax.jit, static_argnames="cosine", donate_argnums=0)
def _step(carry, q, truth, relevant, targets, weight, first, *, cosine: bool):
    """One block of the corpus for one chunk of queries.

    Args:
      carry: what `_through` keeps.
      q: f32 [Q, D].
      truth: f32 [Q, R], scores of the relevant candidates.
      relevant: i32 [Q, R], their vectors, -1 = padding.
      targets: f32 [B, D], distinct vectors.
      weight: i32 [B], how many candidates have each; 0 = padding.
      first: number of the block's first vector.
    """
    if cosine:
        q = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
        targets = targets / jnp.linalg.norm(targets, axis=-1, keepdims=True)
    s = jnp.matmul(q, targets.T, precision=jax.lax.Precision.HIGHEST)
    column = first + jnp.arange(len(weight), dtype=jnp.int32)
    # The relevant ones are compared with each other on the host, by scores computed once.
    local = jnp.where(relevant >= first, relevant - first, len(weight))
    rows = jnp.arange(len(q))[:, None]
    w = jnp.broadcast_to(weight, s.shape).at[rows, local].set(0, mode="drop")

    def against(t):
        t = t[:, None]
        unbeaten = ~((t > s) & jnp.isfinite(t))
        ahead = (s > t) | (jnp.isnan(s) & ~jnp.isnan(t))
        return [jnp.sum(jnp.where(x, w, 0), axis=1) for x in (unbeaten, ahead, s == t)]

    counts = [jnp.moveaxis(c, 0, 1) for c in jax.lax.map(against, truth.T)]
    finite = jnp.isfinite(s) & (weight > 0)
    others = jnp.where(finite & (w > 0), s, -jnp.inf)
    rival = jnp.argmax(others, axis=1)
    score = jnp.take_along_axis(others, rival[:, None], axis=1)[:, 0]
    better = score > carry["rival_score"]
    k = carry["top"].shape[1]
    here, at = jax.lax.top_k(jnp.where(finite, s, -jnp.inf), min(k, s.shape[1]))
    both = jnp.concatenate([carry["top_scores"], here], axis=1)
    names = jnp.concatenate([carry["top"], jnp.where(jnp.isfinite(here), column[at], -1)], axis=1)
    top_scores, place = jax.lax.top_k(both, k)
    return {
        "unbeaten": carry["unbeaten"] + counts[0],
        "ahead": carry["ahead"] + counts[1],
        "equal": carry["equal"] + counts[2],
        "rival": jnp.where(better, column[rival], carry["rival"]),
        "rival_score": jnp.maximum(score, carry["rival_score"]),
        "top": jnp.take_along_axis(names, place, axis=1),
        "top_scores": top_scores,
    }


def _ranking(rows, grade, ids, truth, many, vector_of, found, top) -> Ranking:
    """Add what the relevant candidates and their doubles do to each other, on the host."""
    real = rows >= 0
    finite = real & np.isfinite(truth)
    unbeaten, ahead = found["unbeaten"].astype(np.int64), found["ahead"].astype(np.int64)
    tied = ((found["equal"] > 0) & real).any(axis=1)
    rival, rival_score = found["rival"].astype(np.int64), found["rival_score"].copy()
    members = np.argsort(vector_of, kind="stable")
    ends = np.cumsum(many)
    rival = np.where(rival >= 0, members[(ends - many)[rival]], -1)
    for n in range(len(rows)):
        own = np.flatnonzero(real[n])
        if not len(own):
            continue
        s, g = truth[n, own], grade[n, own]
        # Doubles: candidates that are not relevant but have a relevant one's vector.
        kinds, index, inside = np.unique(ids[n, own], return_index=True, return_counts=True)
        doubles = many[kinds] - inside
        if doubles.any():
            values = s[index]
            for k, value in enumerate(s):
                beaten = (value > values) & np.isfinite(value)
                unbeaten[n, own[k]] += doubles[~beaten].sum()
                before = (values > value) | (np.isnan(values) & ~np.isnan(value))
                ahead[n, own[k]] += doubles[before].sum()
            tied[n] = True
            for kind, value, extra in zip(kinds, values, doubles, strict=True):
                if extra and np.isfinite(value) and value > rival_score[n]:
                    inside_rows = members[ends[kind] - many[kind] : ends[kind]]
                    rival[n] = inside_rows[~np.isin(inside_rows, rows[n, own])][0]
                    rival_score[n] = value
        # Among each other: by score, in a tie the less relevant first.
        order = np.lexsort((g, -np.where(np.isfinite(s), s, -np.inf)))
        place = np.empty(len(own), np.int64)
        place[order] = np.arange(len(own))
        unbeaten[n, own] += place
    ranks = np.where(finite, 1 + unbeaten, metrics.NEVER)
    best, best_scores = _expand(found["top"], found["top_scores"], members, ends, many, top)
    rival_score[rival < 0] = np.nan
    return Ranking(ranks, grade, truth, ahead, tied, rival, rival_score, best, best_scores)


def _expand(top, top_scores, members, ends, many, wanted) -> tuple[np.ndarray, np.ndarray]:
    """From the best vectors to the best candidates: those of one vector in order of the corpus."""
    out = np.full((len(top), wanted), -1, np.int64)
    scores = np.full((len(top), wanted), np.nan, np.float32)
    for n, (names, values) in enumerate(zip(top, top_scores, strict=True)):
        k = 0
        for name, value in zip(names.tolist(), values.tolist(), strict=True):
            if name < 0 or not np.isfinite(value) or k == wanted:
                break
            one = members[ends[name] - many[name] : ends[name]][: wanted - k]
            out[n, k : k + len(one)], scores[n, k : k + len(one)] = one, value
            k += len(one)
    return out, scores


def _padded(array: np.ndarray, count: int, value: float = 0) -> np.ndarray:
    if len(array) == count:
        return array
    out = np.full((count, *array.shape[1:]), value, array.dtype)
    out[: len(array)] = array
    return out


def _check(queries, corpus, wanted, given, similarity) -> None:
    problems = []
    if similarity not in SIMILARITIES:
        problems.append(f"similarity must be one of {', '.join(SIMILARITIES)}, not {similarity!r}")
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[-1] != corpus.shape[-1]:
        problems.append(f"queries {queries.shape} and corpus {corpus.shape} are not [N, D]")
    elif len(wanted) != len(queries):
        problems.append(f"{len(queries)} queries but relevant candidates of {len(wanted)}")
    else:
        for n, (rows, grades) in enumerate(zip(wanted, given, strict=True)):
            if len(rows) and (rows.min() < 0 or rows.max() >= len(corpus)):
                problems.append(f"query {n}: relevant rows outside 0..{len(corpus) - 1}")
            if len(np.unique(rows)) != len(rows):
                problems.append(f"query {n}: a relevant row is named twice")
            if len(grades) != len(rows) or not (grades > 0).all():
                problems.append(f"query {n}: needs a grade above 0 for each relevant row")
    raise_problems("this corpus cannot be ranked", problems)
