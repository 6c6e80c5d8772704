# SPDX-License-Identifier: Apache-2.0
"""Smaller vectors as options of scoring: the first dimensions only, int8, binary. Numpy only.

What a vector store would keep is scored beside the full vectors, so that the loss is known before
anything is stored. int8 and binary are those of `embedding.vectors`: 256 steps between the smallest
and the largest value of each dimension over the candidates (queries beyond them are clipped), or
the signs. int8 is scored on the values that the steps stand for, binary by the number of equal
signs (the Hamming distance).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlm2vec_jax.embedding import vectors
from vlm2vec_jax.errors import raise_problems

PRECISIONS = ("int8", "binary")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make vectors smaller.

    Attributes:
      dim: how many of the first dimensions are kept; None for all of them.
      precision: "float32", "int8" or "binary".
    """

    dim: int | None = None
    precision: str = "float32"

    @property
    def name(self) -> str:
        """As score files name it: `dim256`, `int8`, `dim256-binary`."""
        parts = [f"dim{self.dim}"] if self.dim is not None else []
        return "-".join([*parts, *([self.precision] if self.precision != "float32" else [])])

    def bytes_of(self, width: int) -> int:
        """Bytes of a stored vector whose full width is `width`."""
        dim = min(self.dim or width, width)
        return {"float32": 4 * dim, "int8": dim, "binary": -(-dim // 8)}[self.precision]


def variants(dims: Sequence[int] = (), precisions: Sequence[str] = ()) -> list[Variant]:
    """Every combination of the dimensions and the precisions, the full vectors left out.

    Raises:
      UserError: for a dimension below 1 or an unknown precision.
    """
    problems = [f"{d} dimensions: at least 1" for d in dims if d < 1]
    known = ", ".join(PRECISIONS)
    problems += [f"precision {p!r}: one of {known}" for p in precisions if p not in PRECISIONS]
    raise_problems("these vectors cannot be made", problems)
    found = [
        Variant(dim, precision)
        for dim in (None, *dict.fromkeys(dims))
        for precision in ("float32", *dict.fromkeys(precisions))
    ]
    return found[1:]


def compress(full: np.ndarray, targets: np.ndarray, variant: Variant) -> np.ndarray:
    """What is left of vectors in a variant, as float32 that any scorer takes.

    Args:
      full: float32 [N, D].
      targets: int [M], which of them are candidates: they calibrate int8.
      variant: what to make of them; more dimensions than D keep all.

    Returns:
      float32 [N, dim]. A vector that is not finite stays so. After truncation the vectors are no
      longer of unit length: a cosine does not mind.
    """
    kept = full[:, : variant.dim]
    if variant.precision == "float32":
        return np.ascontiguousarray(kept)
    finite = np.asarray(np.isfinite(kept).all(axis=1))
    if variant.precision == "binary":
        small = np.where(kept > 0, np.float32(1), np.float32(-1))
    else:
        known = kept[targets][finite[targets]]
        if not len(known):
            return np.full_like(kept, np.nan)
        # uint8 and int8 are the same steps, counted from another number.
        ranges = vectors.value_ranges(known)
        codes = vectors.quantize_embeddings(np.where(finite[:, None], kept, 0), "uint8", ranges)
        small = vectors.dequantize_embeddings(codes, "uint8", kept.shape[1], ranges)
    small[~finite] = np.nan
    return small
