# SPDX-License-Identifier: Apache-2.0
"""How many rows each call of an embedder computes, so that a few compiled programs serve it.

A program is compiled for a number of rows of one shape. Windows of inputs need ever new numbers;
compiling takes seconds to minutes, while a few rows of padding cost milliseconds. So a program
that is there is taken instead of one that would fit better, until what that has wasted would have
paid for the better one. What is compiled for one window of many is made with room for twice as
much: the next will need a little more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from vlm2vec_jax.packing import GroupPlan, RowBatch, RowShape, row_batches
from vlm2vec_jax.row_choice import batch_rows

_SPARE = 2
"""A call may waste a so-many-th of a full call on an existing program ..."""
_WORTH = 16
"""... until so many full calls have been wasted for want of one and the same program."""


class Calls:
    """Deals rows among calls, and remembers what has been compiled."""

    def __init__(self) -> None:
        self._programs: dict[RowShape, set[int]] = {}
        self._wasted: dict[tuple[RowShape, int], int] = {}

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
        alone = not self._programs and tokens <= 3 * budget  # a few inputs, perhaps the only ones
        for group in groups:
            most = visual_budget if group.visual and visual_budget else budget
            full = max(most // group.shape.tokens, 1)
            count = batch_rows(len(group.rows), full, multiple)
            for part in row_batches(group, count, row_multiple=multiple):
                room = 1 if alone or 2 * part.num_rows > full else 2
                yield self._call(part, group.shape, most, room)

    def _call(
        self, part: RowBatch, shape: RowShape, budget: int, room: int
    ) -> tuple[list[list[int]], int, RowShape]:
        if part.num_rows in self._programs.get(shape, ()):
            return part.rows, part.num_rows, shape
        others = [
            (count * known.tokens, count, known)
            for known, counts in self._programs.items()
            if _holds(known, shape)
            for count in counts
            if count >= len(part.rows)
        ]
        if others:
            cost, count, known = min(others)
            waste = max(cost - part.num_rows * shape.tokens, 0)
            wanted = (shape, part.num_rows)
            total = self._wasted.get(wanted, 0) + waste
            if waste <= budget // _SPARE and total <= _WORTH * budget:
                self._wasted[wanted] = total
                return part.rows, count, known
            if total > _WORTH * budget:
                room = 1  # often wanted just so
        count = room * part.num_rows
        shape = dataclasses.replace(shape, sequences=room * shape.sequences)
        self._programs.setdefault(shape, set()).add(count)
        return part.rows, count, shape


def _holds(known: RowShape, shape: RowShape) -> bool:
    """Whether rows of one shape can be run as rows of the other; texts never with crops."""
    return (
        (known.units > 0) == (shape.units > 0)
        and known.tokens >= shape.tokens
        and known.units >= shape.units
        and known.sequences >= shape.sequences
    )
