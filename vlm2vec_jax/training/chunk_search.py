# SPDX-License-Identifier: Apache-2.0
"""The largest chunk that fits, measured: programs of several chunk sizes are compiled.

A program's memory is close to a fixed part and a part that grows with the tokens of a chunk. Two
compiled programs give that line, the line gives the size that should just fit, and that size is
compiled, too: what is returned has been compiled and fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

CLOSE = 0.05
"""A search ends where the size that fits is so close to the one that should just fit."""


class Trial(NamedTuple):
    """A compiled chunk size.

    Attributes:
      chunk_tokens: tokens per chip (`packing.chunk_tokens`).
      peak: bytes per chip.
    """

    chunk_tokens: int
    peak: int


def search(
    measure: Callable[[int], int],
    first: Trial,
    *,
    limit: int,
    most: int,
    step: int = 128,
    trials: int = 4,
) -> list[Trial]:
    """Compile other chunk sizes until the largest that fits is known well enough.

    Args:
      measure: tokens of a chunk -> bytes per chip; minutes of a compiler's time.
      first: the size that has been compiled anyway.
      limit: bytes that a program may need.
      most: a chunk of so many tokens holds the whole batch; a larger one would not be filled.
      step: sizes are multiples of it; the longest row, as chunks are made of whole rows.
      trials: how often `measure` may be called, at least 2: one gives the line, one confirms.

    Returns:
      All that were compiled, the first one in front; see `largest`.
    """
    found = [first]
    for _ in range(trials):
        wanted = _next(found, limit, most, step)
        if wanted is None:
            break
        found.append(Trial(wanted, measure(wanted)))
    return found


def largest(found: list[Trial], limit: int) -> int | None:
    """The largest size that was compiled and fits; None if none did."""
    return max((t.chunk_tokens for t in found if t.peak <= limit), default=None)


def _next(found: list[Trial], limit: int, most: int, step: int) -> int | None:
    """The size to compile next; None if there is nothing left to learn."""
    fitting = largest(found, limit)
    if fitting is not None and fitting >= most:
        return None
    below = fitting or 0
    above = min((t.chunk_tokens for t in found if t.peak > limit), default=most + 1)
    sizes = {t.chunk_tokens for t in found}
    if len(sizes) == 1:
        (size,) = sizes
        wanted = 2 * size if fitting is not None else size // 2
    else:
        wanted = _where_it_meets(found, limit)
        if wanted is None:  # no slope: memory does not depend on the size
            wanted = 2 * below if below else above // 2
        if fitting is not None and 0 <= wanted - fitting <= CLOSE * fitting:
            return None
    # Between what fits and what does not, but not all the way down in one go: the line may be off.
    least = below // step * step + step
    wanted = min(max(wanted, least, above // 4), above - 1, most) // step * step
    if fitting is not None and most <= wanted + step and most < above:
        wanted = most
    return wanted if wanted > below and wanted not in sizes else None


def _where_it_meets(found: list[Trial], limit: int) -> int | None:
    """Where the line through the programs on both sides of the limit, or the next two, is at it."""
    fits = sorted(t for t in found if t.peak <= limit)
    fails = sorted(t for t in found if t.peak > limit)
    one, other = (fits[-1], fails[0]) if fits and fails else (fits[-2:] or fails[:2])
    slope = (other.peak - one.peak) / (other.chunk_tokens - one.chunk_tokens)
    if slope <= 0:
        return None
    return max(int(one.chunk_tokens + (limit - one.peak) / slope), 0)
