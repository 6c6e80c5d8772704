# SPDX-License-Identifier: Apache-2.0
"""What the contrastive loss may be asked for, as static choices of a compiled program."""

from __future__ import annotations

import dataclasses
from typing import Literal

Form = Literal["dense", "tiled", "ring"]
"""How the matrix of similarities is gone through; value and gradient are the same."""

SameQuery = Literal["negative", "mask", "positive"]
"""What another target of the very same query is to it."""


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Variations of the contrastive loss (hashable). The defaults are VLM2Vec's loss.

    Attributes:
      form: `dense` holds the whole matrix; `tiled` a block of it at a time, computed again for
        the gradient; `ring` also leaves every device only its own share of the embeddings, which
        travel around (on a mesh; elsewhere it is `tiled`).
      tile: rows and columns of a block.
      symmetric: also targets against queries; the mean of both directions.
      mask_duplicates: leave targets that equal a query's own out of its negatives.
      same_query: the targets of other rows with the very same query: ordinary negatives, left
        out, or further positives (the mean of their logits stands for the positive's).
      margin: leave out negatives that are more similar than the positive by more than this
        (cosine); None for never.
      same_source: only targets of the query's own subset are its negatives.
      private_negatives: a hard negative counts for the query that it came with, not for all.
      hardness: a; a negative's logit grows by a times its cosine, which gets no gradient of its
        own (LLaVE, arXiv 2503.04812).
      widths: prefixes of the vectors that must do on their own (Matryoshka, arXiv 2205.13147),
        normalised again; the loss is the mean over them and the full width.
      negatives: columns for hard negatives behind each target.
    """

    form: Form = "dense"
    tile: int = 2048
    symmetric: bool = False
    mask_duplicates: bool = False
    same_query: SameQuery = "negative"
    margin: float | None = None
    same_source: bool = False
    private_negatives: bool = False
    hardness: float = 0.0
    widths: tuple[int, ...] = ()
    negatives: int = 0
