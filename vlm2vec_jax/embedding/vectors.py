# SPDX-License-Identifier: Apache-2.0
"""What is done to vectors behind the model: shorter ones, fewer bits, similarities. Numpy only.

The names and the packing are sentence-transformers' (`util.quantization.quantize_embeddings`);
two things are ours on purpose: a truncated vector is normalised again, and numbers outside of
the calibration ranges stop at the ends instead of wrapping around.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
CALIBRATED = ("int8", "uint8")
"""Precisions that need the smallest and largest value of every dimension."""


def check_precision(precision: str | None, quantize: str | None) -> str:
    """The one precision behind the two spellings of the question.

    Raises:
      UserError: if they differ, or are not known.
    """
    if precision and quantize and precision not in ("float32", quantize):
        raise UserError(f"precision={precision!r} and quantize={quantize!r} say different things")
    found = quantize or precision or "float32"
    if found not in PRECISIONS:
        raise UserError(f"precision {found!r} is not known; known: {', '.join(PRECISIONS)}")
    return found


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Unit length, float32 [..., D]; a vector of zeros stays one."""
    vectors = np.asarray(vectors, np.float32)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def check_dimension(truncate_dim: Any, dimension: int) -> int | None:
    """A number of leading coordinates to keep; None for all.

    Raises:
      UserError: if it is not within 1..`dimension`.
    """
    if truncate_dim is None:
        return None
    whole = isinstance(truncate_dim, (int, np.integer)) and not isinstance(truncate_dim, bool)
    if not whole or not 1 <= truncate_dim <= dimension:
        raise UserError(f"truncate_dim must be from 1 to {dimension}, not {truncate_dim!r}")
    return int(truncate_dim)


def truncate(vectors: np.ndarray, dim: int | None, *, renormalize: bool = True) -> np.ndarray:
    """The leading `dim` coordinates, of unit length again if `renormalize`."""
    if dim is None or dim >= vectors.shape[-1]:
        return vectors
    cut = np.ascontiguousarray(vectors[..., :dim])
    return normalize(cut) if renormalize else cut


def value_ranges(vectors: np.ndarray) -> np.ndarray:
    """Smallest and largest value of each dimension, float32 [2, D].

    Raises:
      UserError: for no vectors.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not len(vectors):
        raise UserError("int8 and uint8 are calibrated on vectors [N, D]; there are none")
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def quantize_embeddings(
    embeddings: np.ndarray,
    precision: str,
    ranges: np.ndarray | None = None,
    calibration_embeddings: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors of fewer bits.

    Args:
      embeddings: float32 [N, D].
      precision: `int8`, `uint8`: 256 steps between the smallest and the largest value of a
        dimension, as sentence-transformers 6 counts them (earlier ones cut int8 towards zero);
        `int8` is `uint8` - 128. `binary`, `ubinary`: the sign of each number, 8 of them packed in a
        byte, the first the most significant; `binary` is `ubinary` - 128. `float32`: nothing is
        done.
      ranges: float32 [2, D], for int8 and uint8.
      calibration_embeddings: float32 [M, D] to take the ranges from; by default `embeddings`.

    Returns:
      int8 or uint8 [N, D], or [N, ceil(D / 8)] of the packed precisions.

    Raises:
      UserError: for an unknown precision, or ranges of another width.
    """
    check_precision(precision, None)
    embeddings = np.asarray(embeddings, np.float32)
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        packed = np.packbits(embeddings > 0, axis=-1)
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        given = calibration_embeddings is not None
        if not given and not len(embeddings):
            return embeddings.astype(precision)
        ranges = value_ranges(calibration_embeddings if given else embeddings)
    ranges = np.asarray(ranges, np.float32)
    if ranges.shape != (2, embeddings.shape[-1]):
        raise UserError(
            f"ranges of shape {ranges.shape} do not fit vectors of {embeddings.shape[-1]} numbers"
        )
    start, step = ranges[0], _steps(ranges)
    level = np.clip(np.floor((embeddings - start) / step), 0, 255)
    return level.astype(np.uint8) if precision == "uint8" else (level - 128).astype(np.int8)


def dequantize_embeddings(
    quantized: np.ndarray, precision: str, dimension: int, ranges: np.ndarray | None = None
) -> np.ndarray:
    """Vectors to compare a float32 query with: the middle of each step, or +-1/sqrt(D).

    Args:
      quantized: as `quantize_embeddings` returns it.
      precision: of it.
      dimension: D.
      ranges: float32 [2, D], for int8 and uint8.

    Returns:
      float32 [N, D].
    """
    if precision == "float32":
        return np.asarray(quantized, np.float32)
    if precision in ("binary", "ubinary"):
        bits = quantized if precision == "ubinary" else quantized.astype(np.int16) + 128
        signs = np.unpackbits(bits.astype(np.uint8), axis=-1, count=dimension)
        return (signs.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(dimension))
    assert ranges is not None, "int8 and uint8 carry their ranges"
    middle = quantized.astype(np.float32) + (0.5 if precision == "uint8" else 128.5)
    return np.clip(ranges[0] + middle * _steps(ranges), ranges[0], ranges[1])


def _steps(ranges: np.ndarray) -> np.ndarray:
    """Width of a step; 1 where a dimension never varies, so that nothing divides by zero."""
    step = (ranges[1] - ranges[0]) / 255
    return np.where(step > 0, step, 1).astype(np.float32)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of each of `a` [N, D] (or [D]) with each of `b` [M, D]: float32 [N, M].

    Raises:
      UserError: if they are not of one width.
    """
    a, b = _matrix(a), _matrix(b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"vectors of {a.shape[1]} and of {b.shape[1]} numbers cannot be compared")
    return normalize(a) @ normalize(b).T


def similarity_pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of `a[i]` with `b[i]`: float32 [N].

    Raises:
      UserError: if they are not of one shape.
    """
    a, b = _matrix(a), _matrix(b)
    if a.shape != b.shape:
        raise UserError(f"pairs need as many vectors on both sides; got {a.shape} and {b.shape}")
    return np.sum(normalize(a) * normalize(b), axis=-1)


def _matrix(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors)
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2:
        raise UserError(f"vectors must be [N, D] or [D], not of shape {vectors.shape}")
    return vectors.astype(np.float32)
