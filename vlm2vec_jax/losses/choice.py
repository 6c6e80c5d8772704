# SPDX-License-Identifier: Apache-2.0
"""Which form of the loss a batch gets where the configuration leaves it open."""

from __future__ import annotations

from vlm2vec_jax.losses.options import Form

MATRIX_BYTES = 24
"""What the dense form holds per pair of query and target: similarity, logits, weights and their
gradients, in float32."""


def choose_form(rows: int, columns: int, width: int, shards: int, memory: int) -> Form:
    """The plainest form whose share of a device's memory is small.

    The dense form is computed by every device alike, which costs no communication but the
    gather of embeddings; its matrix may take a sixteenth of the memory. The tiled form still has
    all embeddings and their gradients on every device; they may take a quarter. Beyond that each
    device keeps its own share (`ring`), if there is more than one.

    Args:
      rows: queries of the global batch.
      columns: targets and hard negatives.
      width: of an embedding.
      shards: devices that share the rows of a batch.
      memory: bytes of a device.
    """
    if rows * columns * MATRIX_BYTES <= memory / 16:
        return "dense"
    held = 2 * 4 * width * (rows + columns)
    if shards > 1 and held > memory / 4:
        return "ring"
    return "tiled"
