# SPDX-License-Identifier: Apache-2.0
"""First-fit-decreasing over a pool of items with two sizes, tokens and visual units.

The inner loop of `planning.plan`, in plain Python over classes of equal items. Numpy only.
"""

from __future__ import annotations

import bisect

import numpy as np

LOOKAHEAD_ITEMS = 12
"""Rows that can hold at most this many sequences are filled with lookahead."""


class Pool:
    """The items not yet placed, as classes of equal (tokens, units) with a count.

    First-fit-decreasing is worked out row by row: a row receives, again and again, the longest
    item that still fits; this gives the same rows as scanning all open rows for each item. As
    items of a class are alike, a whole pattern of classes is repeated as long as it stays
    valid, so the cost grows with the number of different lengths more than with that of items.
    """

    def __init__(self, lengths: np.ndarray, units: np.ndarray, items: np.ndarray):
        order = np.lexsort((items, units, lengths))
        pairs = np.stack([lengths[order], units[order]])
        starts = np.flatnonzero(np.r_[True, (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)])
        self.tokens_np, self.units_np = pairs[:, starts]
        self.tokens: list[int] = self.tokens_np.tolist()
        self.units: list[int] = self.units_np.tolist()
        bounds = [*starts.tolist(), len(items)]
        ordered = items[order].tolist()
        self.items = [ordered[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        self.left = [len(members) for members in self.items]
        # below[c + 1] leads to the largest class <= c that is not empty (0: none), by union-find;
        # classes only ever become empty. `chain_below` is the same among classes of equal units.
        self.below = list(range(len(self.tokens) + 1))
        self.chains: dict[int, list[int]] = {}
        for c, u in enumerate(self.units):
            self.chains.setdefault(u, []).append(c)
        self.chain_below = {u: list(range(len(c) + 1)) for u, c in self.chains.items()}
        self.least_units = min(self.chains)
        self.shortest = 0

    def fill_rows(self, seed: int, room: int, unit_room: int, places: int) -> list[list[int]]:
        """Fill one row that starts with class `seed`, and repeat it as often as it stays valid.

        Where rows hold few sequences, the longest item that fits is often a bad choice: two of
        1000 in a row of 2432 leave 432 tokens that nothing fills. There the pick is the longest
        that still leaves room for as many of the shortest items as could follow without it.

        Args:
          seed: a class that is not empty and fits.
          room: tokens of the row.
          unit_room: visual units of the row.
          places: sequences of the row.

        Returns:
          The rows, each a list of items; all consist of the same classes.
        """
        tokens, units, left = self.tokens, self.units, self.left
        while not left[self.shortest]:
            self.shortest += 1
        lookahead = room < (LOOKAHEAD_ITEMS + 1) * tokens[self.shortest]
        used: dict[int, int] = {}
        pick = seed
        while True:
            count = 1
            if not lookahead:
                count = min(left[pick], room // tokens[pick], places)
                if units[pick]:
                    count = min(count, unit_room // units[pick])
            room -= count * tokens[pick]
            unit_room -= count * units[pick]
            places -= count
            left[pick] -= count
            used[pick] = used.get(pick, 0) + count
            if not places:
                break
            while self.shortest < len(left) and not left[self.shortest]:
                self.shortest += 1
            if self.shortest == len(left) or room < tokens[self.shortest]:
                break
            limit = room
            if lookahead:
                least = tokens[self.shortest]
                limit -= (room // least - 1) * least
            pick = self._longest(bisect.bisect_right(tokens, limit), unit_room)
            if pick < 0 and limit < room:
                pick = self._longest(bisect.bisect_right(tokens, room), unit_room)
            if pick < 0:
                break
        if self.shortest == len(left):
            self.shortest -= 1
        repeats = 1 + min(left[c] // n for c, n in used.items())
        takes = []
        for c, n in used.items():
            end = left[c] + n
            left[c] = end - repeats * n
            taken = self.items[c][left[c] : end]
            takes.append([taken[i : i + n] for i in range(0, repeats * n, n)])
        return [[i for part in row for i in part] for row in zip(*takes, strict=True)]

    def _longest(self, upto: int, unit_room: int) -> int:
        """The longest non-empty class among the first `upto` with at most `unit_room` units."""
        pick = self._find(self.below, upto, None) - 1
        if pick < 0 or self.units[pick] <= unit_room:
            return pick
        if unit_room < self.least_units:
            return -1
        pick = -1
        for u, chain in self.chains.items():
            if u <= unit_room:
                k = self._find(self.chain_below[u], bisect.bisect_left(chain, upto), chain)
                pick = max(pick, chain[k - 1] if k else -1)
        return pick

    def _find(self, below: list[int], k: int, chain: list[int] | None) -> int:
        """Follow `below` from k to 0 or the first non-empty class, and shorten the way."""
        left = self.left
        end = k
        while end and not left[(end - 1) if chain is None else chain[end - 1]]:
            end = below[end] if below[end] != end else end - 1
        while k > end:
            k, below[k] = (below[k] if below[k] != k else k - 1), end
        return end
