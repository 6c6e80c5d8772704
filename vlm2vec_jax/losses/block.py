# SPDX-License-Identifier: Apache-2.0
"""One block of the matrix of similarities: who is whose positive, negative, or neither.

All forms of the loss go through here, so that an option means the same in each. What is masked
follows from integers alone (and, for the margin, from the block's own similarities), so it does
not depend on how rows and columns are cut or spread.

Axes: B rows (queries), M columns (targets), D width, P known targets of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm2vec_jax.losses.options import LossOptions

# Stands for "not a candidate". Finite, so that a row in which nothing is left has no NaN in its
# gradient; far below any similarity / temperature, so that its exponential is exactly zero.
MASKED = -1e30


class Rows(NamedTuple):
    """What the masks ask of a row.

    Attributes:
      column: i32 [B], number of the column that is right for it.
      content: i32 [B, P], contents that are right for it, its own first; -1 for none.
      number: i32 [B], its number among all rows.
      source: i32 [B], where it comes from.
      own: f32 [B], similarity with its own column, as a constant (for the margin).
      inverse_norm: f32 [B], 1 / |q|.
    """

    column: Any
    content: Any
    number: Any
    source: Any
    own: Any
    inverse_norm: Any


class Columns(NamedTuple):
    """What the masks ask of a column.

    Attributes:
      number: i32 [M], its number among all columns.
      content: i32 [M, P], what it is (in the other direction: what is right for it); -1: none.
      source: i32 [M], where it comes from; -1 for nowhere.
      owner: i32 [M], the row that a hard negative came with; -1 for a target.
      valid: bool [M], False for padding: it is nobody's candidate.
      inverse_norm: f32 [M], 1 / |t|.
    """

    number: Any
    content: Any
    source: Any
    owner: Any
    valid: Any
    inverse_norm: Any


class Block(NamedTuple):
    """A block [b, m] of the matrix.

    Attributes:
      similarity: f32.
      logits: f32, `MASKED` where a column is no candidate of a row.
      own: bool, the row's own column.
      positives: bool, all that are right for it, its own included.
      negatives: bool.
      rivals: bool, candidates that are not known to be right: what accuracy is about.
    """

    similarity: jax.Array
    logits: jax.Array
    own: jax.Array
    positives: jax.Array
    negatives: jax.Array
    rivals: jax.Array


def block(
    q: jax.Array,
    rows: Rows,
    t: jax.Array,
    columns: Columns,
    temperature: jax.Array,
    options: LossOptions,
) -> Block:
    """Look at rows q [b, D] and columns t [m, D]."""
    similarity = product(q, t.T)
    own = (rows.column[:, None] == columns.number[None, :]) & columns.valid[None, :]
    first = rows.content[:, :1] == columns.content[None, :, 0]
    known = first
    for a in range(rows.content.shape[1]):
        for b in range(columns.content.shape[1]):
            if a or b:
                known |= rows.content[:, a, None] == columns.content[None, :, b]
    seen = jnp.broadcast_to(columns.valid[None, :], similarity.shape)
    if options.private_negatives:
        shared = columns.owner < 0
        seen &= shared[None, :] | (columns.owner[None, :] == rows.number[:, None])
    if options.same_source:
        seen &= rows.source[:, None] == columns.source[None, :]
    rivals = seen & ~own & ~known
    more = known & ~first & ~own
    negatives = seen & ~own
    if options.mask_duplicates:
        negatives &= ~first
    if options.same_query != "negative":
        negatives &= ~more
    constant = jax.lax.stop_gradient(similarity)
    if options.margin is not None:
        negatives &= ~(constant > rows.own[:, None] + options.margin)
    positives = own
    if options.same_query == "positive":
        positives |= seen & more
    logits = similarity / temperature
    if options.hardness:
        logits += jnp.where(negatives, options.hardness * constant, 0.0)
    logits = jnp.where(positives | negatives, logits, MASKED)
    return Block(similarity, logits, own, positives, negatives, rivals)


class Stats(NamedTuple):
    """What is left of a row's candidates.

    Attributes:
      top: f32 [B], the largest logit.
      total: f32 [B], sum of exp(logit - top).
      positive: f32 [B], sum of the positives' logits; `positives` counts them.
      positives: f32 [B].
      own: f32 [B], similarity with its own column.
      rival: f32 [B], the largest similarity of a rival, -inf without any.
      cosine: f32 [B], sum of the negatives' cosines; `negatives` counts them.
      negatives: f32 [B].
    """

    top: Any
    total: Any
    positive: Any
    positives: Any
    own: Any
    rival: Any
    cosine: Any
    negatives: Any

    @property
    def log_total(self) -> jax.Array:
        """log of the sum of the candidates' exponentials, f32 [B]."""
        return self.top + jnp.log(jnp.maximum(self.total, 1e-37))


def no_stats(rows: int) -> Stats:
    """Of rows that have seen no column yet."""
    zero = jnp.zeros((rows,), jnp.float32)
    lowest = jnp.full((rows,), MASKED, jnp.float32)
    return Stats(lowest, zero, zero, zero, zero, zero - jnp.inf, zero, zero)


def stats_of(found: Block, rows: Rows, columns: Columns) -> Stats:
    """The stats of a block alone."""
    top = found.logits.max(axis=1)
    cosine = product(jnp.where(found.negatives, found.similarity, 0.0), columns.inverse_norm)
    return Stats(
        top=top,
        total=jnp.exp(found.logits - top[:, None]).sum(axis=1),
        positive=jnp.where(found.positives, found.logits, 0.0).sum(axis=1),
        positives=found.positives.sum(axis=1).astype(jnp.float32),
        own=jnp.where(found.own, found.similarity, 0.0).sum(axis=1),
        rival=jnp.where(found.rivals, found.similarity, -jnp.inf).max(axis=1),
        cosine=cosine * rows.inverse_norm,
        negatives=found.negatives.sum(axis=1).astype(jnp.float32),
    )


def merge(a: Stats, b: Stats) -> Stats:
    """The stats of both blocks' columns together: the online log-sum-exp."""
    top = jnp.maximum(a.top, b.top)
    total = a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top)
    return Stats(
        top,
        total,
        a.positive + b.positive,
        a.positives + b.positives,
        a.own + b.own,
        jnp.maximum(a.rival, b.rival),
        a.cosine + b.cosine,
        a.negatives + b.negatives,
    )


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A float32 product at the highest precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
