# SPDX-License-Identifier: Apache-2.0
"""The rows of a step before anything is decoded: an image that several show is decoded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from vlm2vec_jax.images import share_images
from vlm2vec_jax.inputs import MultimodalInput

Place = tuple[int, int]
"""Source of the mixture, position in it."""


class _Step:
    def __init__(self, places: Sequence[Place]):
        self.lock = threading.Lock()
        self.places = places
        self.rows: list[list[MultimodalInput] | None] | None = None
        self.left = len(places)


class StepRows:
    """Hands out the inputs of each row of the steps under way, once each; thread-safe.

    Whoever asks first for a row of a step reads all of its rows (40 us each, no image is opened),
    so that each file's uses are known and its pixels go with the last of them.

    Args:
      draw: step -> the rows of this process in their order.
      read: the inputs of a row; None for one that cannot be read, or holds its images itself.
        None in its place if rows shall only be counted off.
    """

    def __init__(
        self,
        draw: Callable[[int], Sequence[Place]],
        read: Callable[[int, int], list[MultimodalInput] | None] | None,
    ):
        self._draw, self._read = draw, read
        self._steps: dict[int, _Step] = {}
        self._lock = threading.Lock()

    def take(self, step: int, number: int) -> tuple[Place, list[MultimodalInput] | None]:
        """A row's place and its inputs; None for what `read` could not read."""
        with self._lock:
            under_way = self._steps.get(step)
            if under_way is None:
                under_way = self._steps[step] = _Step(self._draw(step))
        with under_way.lock:
            inputs = None
            if self._read is not None:
                if under_way.rows is None:
                    under_way.rows = shared([self._read(*place) for place in under_way.places])
                inputs, under_way.rows[number] = under_way.rows[number], None
            under_way.left -= 1
            left = under_way.left
        if not left:
            with self._lock:
                del self._steps[step]
        return under_way.places[number], inputs


def shared(
    rows: Sequence[list[MultimodalInput] | None],
) -> list[list[MultimodalInput] | None]:
    """The same rows, with files that several of their inputs show decoded only once."""
    items = iter(share_images([item for row in rows if row is not None for item in row]))
    return [None if row is None else [next(items) for _ in row] for row in rows]
