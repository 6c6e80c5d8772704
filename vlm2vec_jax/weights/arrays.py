# SPDX-License-Identifier: Apache-2.0
"""What loading does to every number of a checkpoint: looked at, cast, turned; in numpy.

All of it works on the bits of the narrow types, which numpy and ml_dtypes otherwise go through
one by one, and on pieces that stay in a processor's cache.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np

_BITS = {
    "bfloat16": (np.uint16, np.int16, 0x7F80),
    "float16": (np.uint16, np.int16, 0x7C00),
    "float32": (np.uint32, np.int32, 0x7F800000),
}
"""Name of a type -> its bits as unsigned and signed integers, and the bits of infinity."""
_FINITE_BLOCK = 1 << 17
_TILE = 128
_MAPPED_BYTES = 1 << 20


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that jax on a CPU takes over as it is, without a copy: it begins at 64 bytes.

    Large ones are mapped, because numpy asks for huge pages: where memory is fragmented, making
    room for these takes longer than reading the weights.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= _MAPPED_BYTES and hasattr(mmap, "MAP_ANONYMOUS"):
        private = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(private, dtype).reshape(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def keeps_finite(source: np.dtype, target: np.dtype) -> bool:
    """Whether a cast makes no finite number infinite: the type stays, or is float32 or wider."""
    return source == target or (target.itemsize >= 4 and source.itemsize <= target.itemsize)


def all_finite(array: np.ndarray) -> bool:
    """Whether no element of a floating-point array is NaN or infinite.

    Read as integers, whatever is not finite lies above infinity's bits: as signed ones if its
    sign is plus, as unsigned ones if it is minus. Several times faster than `numpy.isfinite`,
    which does not know bfloat16.
    """
    kind = _BITS.get(array.dtype.name)
    if kind is None:
        return bool(np.isfinite(array.astype(np.float64)).all())
    unsigned, signed, infinity = kind
    minus = infinity + (np.iinfo(unsigned).max >> 1) + 1
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    for start in range(0, bits.size, _FINITE_BLOCK):
        block = bits[start : start + _FINITE_BLOCK]  # the second look finds it in the cache
        if block.view(signed).max() >= infinity or block.max() >= minus:
            return False
    return True


def copy_cast(target: np.ndarray, source: np.ndarray) -> None:
    """Copy into `target`, rounding to its element type; transposed sources tile by tile.

    A transposed copy of a large matrix touches a new cache line for every element. In tiles that
    were copied to a place of their own, where their rows do not push each other out of the
    cache, it is several times faster.
    """
    if source.ndim == 2 and not source.flags.c_contiguous and min(source.shape) > _TILE:
        _copy_turned(target, source)
    else:
        _cast(target, source)


def _cast(target: np.ndarray, source: np.ndarray) -> None:
    if source.dtype == target.dtype and source.dtype.itemsize == 2:
        # The same bits: spare ml_dtypes' element loop.
        np.copyto(target.view(np.uint16), source.view(np.uint16))
    elif source.dtype.name == "bfloat16" and target.dtype == np.float32:
        wide = target.view(np.uint32)
        np.copyto(wide, source.view(np.uint16))
        np.left_shift(wide, 16, out=wide)
    else:
        np.copyto(target, source, casting="unsafe")


def _copy_turned(target: np.ndarray, source: np.ndarray) -> None:
    rows, columns = source.shape
    # Its rows are no power of two apart, so that a column of them fits in the cache.
    place = np.empty((2 * _TILE, _TILE + 32), source.dtype)
    for j in range(0, columns, 2 * _TILE):
        for i in range(0, rows, _TILE):
            piece = source[i : i + _TILE, j : j + 2 * _TILE].T
            tile = place[: piece.shape[0], : piece.shape[1]]
            if tile.dtype.itemsize == 2:
                np.copyto(tile.view(np.uint16), piece.view(np.uint16))
            else:
                np.copyto(tile, piece)
            _cast(target[i : i + _TILE, j : j + 2 * _TILE], tile.T)
