# SPDX-License-Identifier: Apache-2.0
"""How many rows each call of an embedder computes, so that a few compiled programs serve it.

A program is compiled for a number of rows of one shape. Windows of inputs need ever new numbers.
A program that is there is taken instead of one that would fit better, until what has been computed
for nothing is as much work as compiling the better one (the rule of who rents skis until the rent
has come to their price). What is compiled for one window of many, or once more for rows of the same
length, is made with room for twice as much where that costs little beside compiling: the next will
need a little more; the few rows of texts longer than most get rows twice as long, too, as the next
may be longer still. So a large model on a slow device gets a program for every call, and a small
one on a fast device only a few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from vlm2vec_jax.packing import GroupPlan, RowBatch, RowShape, row_batches
from vlm2vec_jax.row_choice import batch_rows

_SPARE = 1
"""A call may waste a so-many-th of a full call on existing programs."""
_SPARE_AT_FIRST = 8
"""The same in the first window, which compiles anyway: later ones live on what it leaves."""
_ROOM = 16
"""A so-many-th of a program's price may be spent on each call's room for more."""

_TEXT = 32
"""Tokens of a text, as far as room for sequences is concerned."""


class Calls:
    """Deals rows among calls, and remembers what has been compiled."""

    def __init__(self, price: Callable[[RowShape], float], compiling: float) -> None:
        """Say what things cost.

        Args:
          price: of a row.
          compiling: price of a program.
        """
        self._price, self._compiling = price, compiling
        self._programs: dict[RowShape, set[int]] = {}
        self._wasted: dict[tuple[RowShape, int], float] = {}

    def of(
        self,
        groups: Sequence[GroupPlan],
        budget: int,
        multiple: int,
        visual_budget: int | None = None,
    ) -> Iterator[tuple[list[list[int]], int, RowShape]]:
        """Rows of each call, the number to fill up to, and their shape.

        Args:
          groups: planned rows of a window.
          budget: tokens of a call.
          multiple: devices that share the rows of a call.
          visual_budget: tokens of a call of rows with images, if not as many.
        """
        tokens = sum(len(group.rows) * group.shape.tokens for group in groups)
        few = tokens <= 3 * budget  # perhaps always the same few
        spare = _SPARE if self._programs else _SPARE_AT_FIRST
        texts = [group for group in groups if not group.visual]
        usual = max(texts, key=lambda g: len(g.rows)).shape.tokens if texts else 0
        # The longest first: what is compiled for them serves shorter ones.
        for group in sorted(groups, key=lambda g: (g.visual, -g.shape.tokens)):
            rare = not group.visual and group.shape.tokens > usual
            most = visual_budget if group.visual and visual_budget else budget
            full = max(most // group.shape.tokens, 1)
            count = batch_rows(len(group.rows), full, multiple)
            for part in row_batches(group, count, row_multiple=multiple):
                yield from self._calls(part, group.shape, full, spare, few, rare)

    def _calls(
        self, part: RowBatch, shape: RowShape, full: int, spare: int, few: bool, rare: bool
    ) -> Iterator[tuple[list[list[int]], int, RowShape]]:
        """The rows in one call, or in some of a program for fewer rows."""
        size, shape = self._program(part, shape, full, spare, few, rare)
        for start in range(0, len(part.rows), size):
            yield part.rows[start : start + size], size, shape

    def _program(
        self, part: RowBatch, shape: RowShape, full: int, spare: int, few: bool, rare: bool
    ) -> tuple[int, RowShape]:
        count, row = part.num_rows, self._price(shape)
        if count in self._programs.get(shape, ()):
            return count, shape
        others = [
            (-(-len(part.rows) // size) * size * self._price(known), size, known)
            for known, counts in self._programs.items()
            if _holds(known, shape)
            for size in counts
        ]
        pays = False
        if others:
            price, size, known = min(others, key=lambda other: other[0])
            waste = max(price - count * row, 0.0)
            wanted = (shape, count)
            total = self._wasted.get(wanted, 0.0) + waste
            pays = total > self._compiling
            if waste <= full * row / spare and not pays:
                self._wasted[wanted] = total
                return size, known
        little = count * row <= self._compiling / _ROOM and 2 * count <= full
        again = any((k.tokens, k.units) == (shape.tokens, shape.units) for k in self._programs)
        if little and not pays and (again or not few):
            count, tokens = 2 * count, shape.tokens
            sequences = 2 * shape.sequences
            if rare and not few:
                tokens *= 2
                sequences = max(sequences, tokens // _TEXT)
            shape = dataclasses.replace(shape, tokens=tokens, sequences=sequences)
        self._programs.setdefault(shape, set()).add(count)
        return count, shape


def _holds(known: RowShape, shape: RowShape) -> bool:
    """Whether rows of one shape can be run as rows of the other; texts never with crops."""
    return (
        (known.units > 0) == (shape.units > 0)
        and known.tokens >= shape.tokens
        and known.units >= shape.units
        and known.sequences >= shape.sequences
    )
