# SPDX-License-Identifier: Apache-2.0
"""Losses over a global batch of embeddings."""

from vlm2vec_jax.losses.choice import choose_form
from vlm2vec_jax.losses.contrastive import contrastive_loss
from vlm2vec_jax.losses.options import LossOptions

__all__ = ["LossOptions", "choose_form", "contrastive_loss"]
