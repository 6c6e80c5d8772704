# SPDX-License-Identifier: Apache-2.0
"""The dense contrastive loss: every query against every target of the global batch.

The mean over the global batch *is* the loss. Under `jit` on a mesh the compiler gathers the
target embeddings, and the gradient comes out right without any world-size factor: the
reference (VLM2Vec, `DistributedContrastiveLoss`) multiplies by the world size only because DDP
averages gradients afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Stands for "not a candidate". Finite, so that a row in which nothing is left has no NaN in its
# gradient; far below any similarity / temperature, so that its exponential is exactly zero.
MASKED = -1e30


def contrastive_loss(
    q: jax.Array,
    t: jax.Array,
    *,
    temperature: float | jax.Array,
    positive: jax.Array | None = None,
    target_id: jax.Array | None = None,
    mask_duplicates: bool = False,
    valid: jax.Array | None = None,
    query_valid: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of `q @ t.T / temperature`, queries against targets.

    One direction, no label smoothing, as in VLM2Vec. Everything is computed in float32 at the
    highest matmul precision, whatever the inputs are.

    Args:
      q: f32 [B, D], query embeddings (L2-normalised by the model).
      t: f32 [M, D], target embeddings, M >= 1.
      temperature: divides the similarities; a number or a traced scalar.
      positive: i32 [B], row of `t` that is right for each query; by default `i * (M // B)`, the
        reference's rule (the first of each query's targets).
      target_id: i32 [M], equal where two targets are the same thing (the host ranks content
        hashes into small integers; jax has no 64-bit integers by default).
      mask_duplicates: leave targets with the id of a row's own positive (false negatives) out of
        that row's candidates. Needs `target_id`.
      valid: bool [M], False for padding rows of `t`: they are nobody's candidate.
      query_valid: bool [B], False for padding rows of `q`.

    A row counts if its query and its positive are valid; the mean is over the rows that count.
    Rows that do not count, even all of them, give zero loss and zero gradient, also when their
    embeddings are NaN.

    Returns:
      The loss, f32 [], and a dict of f32 scalars without gradient:
        accuracy: share of counted rows whose positive beats every other candidate; a tie is not
          a success, and targets known to be the same as the positive are not its rivals.
        positive_cosine, negative_cosine: mean over counted rows of the cosine with the positive,
          and over the remaining candidates of those rows.
        duplicate_targets: share of valid targets whose id stood earlier in the batch (0.0 without
          `target_id`).

    Raises:
      ValueError: if the shapes do not fit, or `mask_duplicates` is asked for without ids.
    """
    if q.ndim != 2 or t.ndim != 2 or q.shape[1] != t.shape[1]:
        raise ValueError(f"q [B, D] and t [M, D] expected, got {q.shape} and {t.shape}")
    rows, columns = q.shape[0], t.shape[0]
    if positive is None:
        if columns < rows:
            raise ValueError(f"{columns} targets for {rows} queries: give `positive`")
        positive = jnp.arange(rows, dtype=jnp.int32) * (columns // rows)
    if mask_duplicates and target_id is None:
        raise ValueError("mask_duplicates needs target_id")
    valid = jnp.ones(columns, bool) if valid is None else valid
    query_valid = jnp.ones(rows, bool) if query_valid is None else query_valid
    counts = query_valid & valid[positive]

    # Invalid rows may hold anything, NaN included: cut them off before they touch a product.
    q = jnp.where(query_valid[:, None], q.astype(jnp.float32), 0.0)
    t = jnp.where(valid[:, None], t.astype(jnp.float32), 0.0)
    similarity = jnp.matmul(
        q, t.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )

    is_positive = positive[:, None] == jnp.arange(columns)[None, :]
    same_target = is_positive
    if target_id is not None:
        same_target = same_target | (target_id[positive][:, None] == target_id[None, :])
    rivals = valid[None, :] & ~same_target
    negatives = rivals if mask_duplicates else valid[None, :] & ~is_positive

    logits = jnp.where(is_positive | negatives, similarity / temperature, MASKED)
    own = jnp.take_along_axis(logits, positive[:, None], axis=1)[:, 0]
    per_row = jnp.where(counts, jax.nn.logsumexp(logits, axis=1) - own, 0.0)
    loss = per_row.sum() / jnp.maximum(counts.sum(), 1)

    metrics = _metrics(q, t, similarity, positive, rivals, negatives, counts)
    metrics["duplicate_targets"] = (
        jnp.float32(0.0) if target_id is None else _duplicate_share(target_id, valid)
    )
    return loss, jax.lax.stop_gradient(metrics)


def _metrics(q, t, similarity, positive, rivals, negatives, counts) -> dict[str, jax.Array]:
    """The scalars that say how well the batch is told apart (see `contrastive_loss`)."""
    q, t, similarity = jax.lax.stop_gradient((q, t, similarity))
    norms = jnp.linalg.norm(q, axis=1)[:, None] * jnp.linalg.norm(t, axis=1)[None, :]
    cosine = similarity / jnp.maximum(norms, 1e-12)
    own = jnp.take_along_axis(similarity, positive[:, None], axis=1)[:, 0]
    own_cosine = jnp.take_along_axis(cosine, positive[:, None], axis=1)[:, 0]
    best_rival = jnp.where(rivals, similarity, -jnp.inf).max(axis=1)
    among = negatives & counts[:, None]
    counted = jnp.maximum(counts.sum(), 1)
    return {
        "accuracy": ((own > best_rival) & counts).sum() / counted,
        "positive_cosine": jnp.where(counts, own_cosine, 0.0).sum() / counted,
        "negative_cosine": jnp.where(among, cosine, 0.0).sum() / jnp.maximum(among.sum(), 1),
    }


def _duplicate_share(target_id: jax.Array, valid: jax.Array) -> jax.Array:
    """Share of the valid ids that are repetitions; sorts, so it stays cheap for large batches."""
    order = jnp.lexsort((target_id, ~valid))  # valid ones first, equal ids side by side
    ids, real = target_id[order], valid[order]
    repeated = (ids[1:] == ids[:-1]) & real[1:]
    return (repeated.sum() / jnp.maximum(valid.sum(), 1)).astype(jnp.float32)
