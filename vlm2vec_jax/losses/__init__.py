# SPDX-License-Identifier: Apache-2.0
"""Losses over a global batch of embeddings."""

from vlm2vec_jax.losses.contrastive import contrastive_loss

__all__ = ["contrastive_loss"]
