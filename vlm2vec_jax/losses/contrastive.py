# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss of a global batch: one signature for all options and all three forms.

The mean over the global batch *is* the loss. Under `jit` on a mesh the gradient comes out right
without any world-size factor: the reference (VLM2Vec, `DistributedContrastiveLoss`) multiplies by
the world size only because DDP averages gradients afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm2vec_jax.losses.block import Columns, Rows
from vlm2vec_jax.losses.dense import whole
from vlm2vec_jax.losses.options import LossOptions
from vlm2vec_jax.losses.tiled import RowLosses, streamed


def contrastive_loss(
    q: jax.Array,
    t: jax.Array,
    *,
    temperature: float | jax.Array,
    positive: jax.Array | None = None,
    target_id: jax.Array | None = None,
    known: jax.Array | None = None,
    source: jax.Array | None = None,
    owner: jax.Array | None = None,
    valid: jax.Array | None = None,
    query_valid: jax.Array | None = None,
    options: LossOptions | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of `q @ t.T / temperature`, queries against targets.

    By default one direction, no label smoothing, every target of the batch a candidate, as in
    VLM2Vec; `LossOptions` says what else there is. Everything is computed in float32 at the
    highest matmul precision, whatever the inputs are. Ids are small integers that the host made of
    content hashes, as jax has no 64-bit integers by default.

    Args:
      q: f32 [B, D], query embeddings (L2-normalised by the model).
      t: f32 [M, D], target embeddings and hard negatives, M >= 1.
      temperature: divides the similarities; a number or a traced scalar.
      positive: i32 [B], row of `t` that is right for each query; by default `i * (M // B)`, the
        reference's rule (the first of each query's targets).
      target_id: i32 [M], equal where two targets are the same thing.
      known: i32 [B, P], ids of all targets that are known to be right for a query, its own first,
        -1 behind the last; by default its own alone. Needed for `same_query`.
      source: i32 [B], the subset that each query (with its targets) is from, at least 0.
      owner: i32 [M], the query that a hard negative came with, -1 for targets; by default nothing
        is a hard negative.
      valid: bool [M], False for padding rows of `t`: they are nobody's candidate.
      query_valid: bool [B], False for padding rows of `q`.
      options: see there.

    A row counts if its query and its positive are valid; the mean is over the rows that count.
    Rows that do not count, even all of them, give zero loss and zero gradient, also when their
    embeddings are NaN.

    Returns:
      The loss, f32 [], and a dict without gradient (of the full width), f32 scalars but for the
      last:
        accuracy: share of counted rows whose positive beats every other candidate; a tie is not
          a success, and targets known to be right are not its rivals.
        positive_cosine, negative_cosine: mean over counted rows of the cosine with the positive,
          and over the remaining candidates of those rows.
        duplicate_targets: share of valid targets whose id stood earlier in the batch (0.0 without
          `target_id`; hard negatives are not looked at).
        example_loss: f32 [B], each query's own loss (queries to targets); 0 where it does not
          count.

    Raises:
      ValueError: if the shapes do not fit, or an option lacks the ids that it needs.
    """
    options = options or LossOptions()
    if q.ndim != 2 or t.ndim != 2 or q.shape[1] != t.shape[1]:
        raise ValueError(f"q [B, D] and t [M, D] expected, got {q.shape} and {t.shape}")
    rows, columns = q.shape[0], t.shape[0]
    if positive is None and columns < rows:
        raise ValueError(f"{columns} targets for {rows} queries: give `positive`")
    if target_id is None and (options.mask_duplicates or options.same_query != "negative"):
        raise ValueError("mask_duplicates and same_query need target_id")
    if source is None and options.same_source:
        raise ValueError("same_source needs source")
    wrong = [w for w in options.widths if not 0 < w <= q.shape[1]]
    if wrong:
        raise ValueError(f"widths {wrong} are not within 1..{q.shape[1]}")

    facts = (positive, target_id, known, source, owner, valid, query_valid)
    batch = _Batch(rows, columns, *(None if fact is None else jnp.asarray(fact) for fact in facts))
    # Invalid rows may hold anything, NaN included: cut them off before they touch a product.
    q = jnp.where(batch.query_valid[:, None], q.astype(jnp.float32), 0.0)
    t = jnp.where(batch.valid[:, None], t.astype(jnp.float32), 0.0)
    temperature = jnp.asarray(temperature, jnp.float32)

    loss, found = _both(batch, q, t, temperature, options)
    for width in options.widths:
        if width < q.shape[1]:
            loss += _both(batch, _prefix(q, width), _prefix(t, width), temperature, options)[0]
    loss /= 1 + sum(width < q.shape[1] for width in options.widths)

    metrics = _metrics(batch, q, t, found)
    return loss, jax.lax.stop_gradient(metrics)


class _Batch:
    """The integers of a batch, with what was left out filled in."""

    def __init__(
        self, rows, columns, positive, target_id, known, source, owner, valid, query_valid
    ):
        self.per_row = columns // rows if positive is None else 0
        if positive is None:
            positive = jnp.arange(rows, dtype=jnp.int32) * self.per_row
        self.rows, self.columns, self.positive = rows, columns, positive
        self.target_id = target_id
        self.valid = jnp.ones(columns, bool) if valid is None else valid
        self.query_valid = jnp.ones(rows, bool) if query_valid is None else query_valid
        self.counts = self.query_valid & self.valid[positive]
        self.owner = jnp.full(columns, -1, jnp.int32) if owner is None else owner
        self.number = jnp.arange(rows, dtype=jnp.int32)
        # Without ids every target is a thing of its own.
        self.content = jnp.arange(columns, dtype=jnp.int32) if target_id is None else target_id
        own = self.content[positive][:, None]
        self.known = own if known is None else known
        self.source = jnp.zeros(rows, jnp.int32) if source is None else source
        row = jnp.full(columns, -1, jnp.int32).at[positive].set(self.number)
        row = jnp.where(self.owner >= 0, self.owner, row)
        self.column_source = jnp.where(row >= 0, self.source[row], -1)

    def of_positive(self, t: jax.Array) -> jax.Array:
        """What `t` [M, ...] has for each query's positive: [B, ...]."""
        if self.per_row:
            # The same as the gather below, without asking a mesh to look anything up.
            used = t[: self.rows * self.per_row]
            return used.reshape(self.rows, self.per_row, *t.shape[1:])[:, 0]
        return t[self.positive]


def _both(batch: _Batch, q, t, temperature, options: LossOptions) -> tuple[jax.Array, RowLosses]:
    """The loss in one direction or the mean of both, and what the first was made of."""
    fixed_q, fixed_t = jax.lax.stop_gradient((q, t))
    own = jnp.sum(fixed_q * batch.of_positive(fixed_t), axis=1)
    q_norm, t_norm = _inverse_norm(fixed_q), _inverse_norm(fixed_t)
    rows = Rows(batch.positive, batch.known, batch.number, batch.source, own, q_norm)
    columns = Columns(
        jnp.arange(batch.columns, dtype=jnp.int32),
        batch.content[:, None],
        batch.column_source,
        batch.owner,
        batch.valid,
        t_norm,
    )
    form: Callable[..., RowLosses] = whole if options.form == "dense" else streamed  # type: ignore
    found = form(options, q, rows, t, columns, temperature)
    loss = _mean(found, batch.counts)
    if options.symmetric:
        back = rows._replace(
            column=batch.number,
            content=batch.content[batch.positive][:, None],
            inverse_norm=batch.of_positive(t_norm),
        )
        queries = Columns(
            batch.number,
            batch.known,
            batch.source,
            jnp.full(batch.rows, -1, jnp.int32),
            batch.query_valid,
            q_norm,
        )
        other = form(options, batch.of_positive(t), back, q, queries, temperature)
        loss = (loss + _mean(other, batch.counts)) / 2
    return loss, found


def _per_row(found: RowLosses, counts: jax.Array) -> jax.Array:
    return jnp.where(counts, found.log_total - found.positive, 0.0)


def _mean(found: RowLosses, counts: jax.Array) -> jax.Array:
    return _per_row(found, counts).sum() / jnp.maximum(counts.sum(), 1)


def _inverse_norm(x: jax.Array) -> jax.Array:
    return 1.0 / jnp.maximum(jnp.linalg.norm(x, axis=1), 1e-12)


def _prefix(x: jax.Array, width: int) -> jax.Array:
    """The first numbers of each vector, as long as the whole was; a zero vector stays zero."""
    part = x[:, :width]
    squared = jnp.sum(part * part, axis=1, keepdims=True)
    return part / jnp.sqrt(jnp.maximum(squared, 1e-24))


def _metrics(batch: _Batch, q, t, found: RowLosses) -> dict[str, Any]:
    """The scalars that say how well the batch is told apart (see `contrastive_loss`)."""
    stats, counts = found.stats, batch.counts
    counted = jnp.maximum(counts.sum(), 1)
    cosine = stats.own * _inverse_norm(q) * batch.of_positive(_inverse_norm(t))
    among = jnp.where(counts, stats.negatives, 0.0).sum()
    duplicates = jnp.float32(0.0)
    if batch.target_id is not None:
        duplicates = _duplicate_share(batch.target_id, batch.valid & (batch.owner < 0))
    return {
        "accuracy": ((stats.own > stats.rival) & counts).sum() / counted,
        "positive_cosine": jnp.where(counts, cosine, 0.0).sum() / counted,
        "negative_cosine": jnp.where(counts, stats.cosine, 0.0).sum() / jnp.maximum(among, 1),
        "duplicate_targets": duplicates,
        "example_loss": _per_row(found, counts),
    }


def _duplicate_share(target_id: jax.Array, valid: jax.Array) -> jax.Array:
    """Share of the valid ids that are repetitions; sorts, so it stays cheap for large batches."""
    order = jnp.lexsort((target_id, ~valid))  # valid ones first, equal ids side by side
    ids, real = target_id[order], valid[order]
    repeated = (ids[1:] == ids[:-1]) & real[1:]
    return (repeated.sum() / jnp.maximum(valid.sum(), 1)).astype(jnp.float32)
