# SPDX-License-Identifier: Apache-2.0
"""The loss with its whole matrix: the plainest form, which the others are held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm2vec_jax.losses.block import Columns, Rows, block, stats_of
from vlm2vec_jax.losses.options import LossOptions
from vlm2vec_jax.losses.tiled import RowLosses


def whole(
    options: LossOptions,
    q: jax.Array,
    rows: Rows,
    t: jax.Array,
    columns: Columns,
    temperature: jax.Array,
) -> RowLosses:
    """What the loss of each row q [B, D] is made of, against all columns t [M, D]."""
    found = block(q, rows, t, columns, temperature, options)
    positive = jnp.where(found.positives, found.logits, 0.0).sum(axis=1)
    count = found.positives.sum(axis=1).astype(jnp.float32)
    return RowLosses(
        jax.nn.logsumexp(found.logits, axis=1),
        positive / jnp.maximum(count, 1.0),
        jax.lax.stop_gradient(stats_of(found, rows, columns)),
    )
