# SPDX-License-Identifier: Apache-2.0
"""Which row lengths embed given inputs soonest. Numpy only.

A long row is better filled; a short one spends less on attention, which looks at the whole row.
The balance depends on the lengths and on the model's sizes, so some lengths are tried on the
planner with a simple price. Lengths that have been used before win near ties: each new one costs
a compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from vlm2vec_jax.packing import TEXT_ROW_TOKENS, GroupPlan, Plan, RowShape, plan

_TEXT_ROWS = (32, 64, 96, 128, 192, 256, 384, TEXT_ROW_TOKENS)
_SAMPLE = 1000
_NEAR = 1.1
"""A length that has been used may be so much dearer than the best."""
_SOFTMAX = 1.5
"""Time of attention in that of its products alone."""
_MANY = 1 << 20


@dataclasses.dataclass(frozen=True)
class Price:
    """What a row costs, in tokens of linear layers.

    Attributes:
      width: D. A layer has about 12 D^2 weights and spends 4 D operations per pair of query and
        key, and about half as much again on the softmax: attention equals the linear layers in a
        row of 4 D tokens. (Attention is dense: a kernel that skips what cannot be seen would
        change this.)
      unit: a visual unit in the vision tower, without attention to other units.
      token: FLOPs of a token in linear layers, the measure of the rest.
      crowd: units of a row at which the tower's attention costs as much as the rest of it;
        infinite where no unit looks at another (CLIP's crops).
    """

    width: int
    unit: float
    token: float
    crowd: float = math.inf

    @classmethod
    def from_flops(cls, width: int, flops: Callable[[int, int], float]) -> Price:
        """The price that a model's FLOPs say.

        Args:
          width: D.
          flops: (tokens, units) -> FLOPs of a sequence whose units are one image
            (`Backbone.flops`), which is what dense attention over a row computes.
        """
        token = flops(2, 0) - flops(1, 0)
        few, many = (flops(1, n) - flops(1, 0) for n in (_MANY, 2 * _MANY))
        squared = max((many - 2 * few) / (2 * _MANY**2), 0.0)
        linear = few / _MANY - squared * _MANY
        if squared * _MANY < 1e-6 * linear:  # rounding
            return cls(width, linear / token, token)
        return cls(width, linear / token, token, linear / (_SOFTMAX * squared))

    def crowding(self, units: float) -> float:
        """What a unit costs in a row of so many, as a multiple of one alone."""
        return 1 + units / self.crowd

    def row(self, shape: RowShape) -> float:
        """The price of a row, full or not."""
        text = shape.tokens * (1 + shape.tokens / (4 * self.width))
        return text + shape.units * self.unit * self.crowding(shape.units)

    def of(self, planned: Plan) -> float:
        """The price of a plan."""
        return sum(len(group.rows) * self.row(group.shape) for group in planned.groups)


def plan_rows(
    lengths: Sequence[int],
    units: Sequence[int],
    *,
    price: Price,
    most: int,
    longest: int,
    step: int,
    used: Collection[tuple[bool, int]] = (),
) -> tuple[Plan, set[tuple[bool, int]]]:
    """Plan with the row lengths that cost least.

    Args:
      lengths: tokens of each input.
      units: visual units of each input.
      price: what rows cost.
      most: longest ordinary row (what one device takes at a time); a longer input gets its own.
      longest: the longest input that is accepted.
      step: rows with images are a multiple of this.
      used: (visual, ordinary row length) of earlier plans.

    Returns:
      The plan, and the (visual, ordinary row length) that it took.

    Raises:
      UserError: listing the inputs that are too long.
    """
    sizes, crops = np.asarray(lengths, np.int64), np.asarray(units, np.int64)
    if not len(sizes) or sizes.max() > longest or sizes.min() < 1:
        return plan(sizes, crops, max_row_tokens=longest), set()  # nothing, or the error
    groups: list[GroupPlan] = []
    taken = set()
    for visual in (False, True):
        chosen = np.flatnonzero((crops > 0) == visual)
        if not len(chosen):
            continue
        own_sizes, own_crops = sizes[chosen], crops[chosen]
        known = {tokens for kind, tokens in used if kind == visual}
        tokens = _choose(own_sizes, own_crops, visual, price, most, step, known)
        taken.add((visual, tokens))
        part = _plan(own_sizes, own_crops, visual, tokens, step)
        for group in part.groups:
            rows = [[int(chosen[i]) for i in row] for row in group.rows]
            groups.append(dataclasses.replace(group, rows=rows))
    return Plan(tuple(groups)), taken


def batch_rows(rows: int, full: int, multiple: int = 1) -> int:
    """Rows of a call: `full`, or fewer where a few calls would leave the last one half empty.

    Args:
      rows: rows there are.
      full: most rows of a call.
      multiple: devices that share the rows of a call, which must divide it.
    """
    full = max(full // multiple, 1) * multiple
    calls = -(-rows // full)
    if calls > 3:
        return full
    even = -(-rows // calls)
    step = max(1 << max((even - 1).bit_length() - 3, 0), 1)
    even = min(-(-even // step) * step, full)
    return -(-even // multiple) * multiple


def _choose(sizes, crops, visual, price: Price, most: int, step: int, known: set[int]) -> int:
    pick = np.linspace(0, len(sizes) - 1, min(len(sizes), _SAMPLE)).astype(int)
    sizes, crops = sizes[pick], crops[pick]
    if visual:
        typical = np.quantile(sizes, (0.25, 0.5, 0.75, 1.0), method="higher")
        tried = {-(-int(n) * k // step) * step for n in typical for k in (1, 2, 3, 4)}
    else:
        tried = set(_TEXT_ROWS)
    tried = {n for n in tried | known if n <= most} or {min(tried)}
    costs = {n: price.of(_plan(sizes, crops, visual, n, step)) for n in sorted(tried)}
    best = min(costs.values())
    again = {n: cost for n, cost in costs.items() if n in known and cost <= _NEAR * best}
    return min(again or costs, key=lambda n: costs[n])


def _plan(sizes, crops, visual: bool, tokens: int, step: int) -> Plan:
    buckets = _ladder(tokens, int(sizes.max()), visual, step)
    return plan(sizes, crops, max_row_tokens=buckets[-1], buckets=buckets, shrink=True)


def _ladder(tokens: int, longest: int, visual: bool, step: int) -> list[int]:
    """Row lengths from the ordinary one to the longest input's: 2 to a doubling, 4 for images."""
    parts, step = (4, step) if visual else (2, 16)
    lengths, k = [tokens], 1
    while lengths[-1] < longest:
        scaled = (tokens << k // parts) * (parts + k % parts) // parts
        lengths.append(-(-scaled // step) * step)
        k += 1
    return lengths
