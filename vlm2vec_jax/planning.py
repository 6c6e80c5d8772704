# SPDX-License-Identifier: Apache-2.0
"""The planner: which sequences share a row, and what shapes the rows have. Numpy only.

A row is a fixed number of tokens, visual units (crops) and sequences. `plan` puts sequences into
rows by first-fit-decreasing; it needs only lengths and unit counts, so a plan is made before any
pixel is decoded, and it is a pure function of its arguments: every process of a run that sees the
same lengths makes the same plan. Texts and visual inputs never share a row, so text rows carry no
crops and a model skips its vision tower for them.

Everything that becomes an array dimension is rounded up to a short list, so that a run compiles a
handful of programs. The rows are filled in `packing.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.first_fit import Pool

TEXT_ROW_TOKENS = 512
"""Default row of texts: real share above 0.98 and attention no longer than most texts need."""

VISUAL_ROW_TOKENS = 3200
"""Default row of visual inputs: four photographs of 2 x 2 crops (757 tokens) with their texts;
`choose_row_tokens` finds the length for other mixtures."""

_UNLIMITED = 1 << 60


@dataclasses.dataclass(frozen=True, order=True)
class RowShape:
    """Static size of a row: tokens, visual units (0 for text rows), sequences."""

    tokens: int
    units: int
    sequences: int


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Rows of one shape.

    Attributes:
      shape: what every row of the group is padded to.
      rows: for each row the indices of its items, in the order in which they stand in it.
      tokens: real tokens of each row.
      units: real visual units of each row.
    """

    shape: RowShape
    rows: list[list[int]]
    tokens: list[int]
    units: list[int]

    @property
    def visual(self) -> bool:
        """Whether the group's rows carry visual units."""
        return self.shape.units > 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Text groups by row length, then visual groups; every item stands in exactly one row."""

    groups: tuple[GroupPlan, ...] = ()

    @property
    def real_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(sum(g.tokens) for g in self.groups)

    @property
    def run_tokens(self) -> int:
        """Tokens that the rows compute, padding included."""
        return sum(g.shape.tokens * len(g.rows) for g in self.groups)

    @property
    def real_units(self) -> int:
        """Visual units of all sequences."""
        return sum(sum(g.units) for g in self.groups)

    @property
    def run_units(self) -> int:
        """Visual units that the rows compute, padding included."""
        return sum(g.shape.units * len(g.rows) for g in self.groups)

    @property
    def token_share(self) -> float:
        """Real tokens among those computed; 1.0 for an empty plan."""
        return self.real_tokens / self.run_tokens if self.run_tokens else 1.0

    @property
    def unit_share(self) -> float:
        """Real visual units among those computed; 1.0 where there are none."""
        return self.real_units / self.run_units if self.run_units else 1.0


def round_units(n: int) -> int:
    """Round a number of units up to 0..20, then even numbers to 40, multiples of 4 to 80, ..."""
    step = 1
    while n > 20 * step:
        step *= 2
    return -(-n // step) * step


def round_sequences(n: int) -> int:
    """Round a number of sequences up to a power of two (at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def round_chunks(n: int, buckets: Sequence[int] | None = None) -> int:
    """Round a number of chunks up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., or to one of `buckets`.

    Beyond the last of `buckets`: to a multiple of it.
    """
    if buckets:
        last = max(buckets)
        return min((b for b in buckets if b >= n), default=-(-n // last) * last)
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def halved_rows(n: int, full: int, multiple: int) -> int:
    """The smallest of full, full/2, full/4, ... that holds `n`, rounded up to `multiple`."""
    size = full
    while size > multiple:
        half = -(-(size // 2) // multiple) * multiple
        if half < n or half >= size:
            break
        size = half
    return size


def round_rows(n: int, full: int, multiple: int = 1) -> int:
    """Rows of a chunk that holds `n`: `full`, 7/8, 6/8, 5/8, 4/8, 7/16, ... of it, and no fewer.

    At most a quarter more than `n`, and few numbers of rows, each a program; all of them are
    rounded up to `multiple`.
    """
    half = halved_rows(n, full, multiple)
    parts = (-(-half * k // 8 // multiple) * multiple for k in (5, 6, 7))
    return min((size for size in parts if size >= n), default=half)


def row_lengths(row_tokens: int, max_row_tokens: int, *, fine: bool = False) -> tuple[int, ...]:
    """List the row lengths of a plan: 1, 1.5, 2, 3, 4, 6, ... times `row_tokens`.

    Each is rounded up to a multiple of 128 (of 16 where `row_tokens` is below 128); the last is
    `max_row_tokens`, rounded up. With `fine` there are four to a doubling (1, 1.25, 1.5, 1.75,
    2, ...): visual inputs are all long, so nothing short fills up a row that is too long.
    """
    if row_tokens < 1 or max_row_tokens < 1:
        raise ValueError(f"row lengths must be positive, not {row_tokens} and {max_row_tokens}")
    step = 128 if row_tokens >= 128 else 16
    parts = 4 if fine else 2
    last = _round_up(max_row_tokens, step)
    lengths = [min(_round_up(row_tokens, step), last)]
    k = 1
    while lengths[-1] < last:
        scaled = (row_tokens << k // parts) * (parts + k % parts) // parts
        lengths.append(min(_round_up(scaled, step), last))
        k += 1
    return tuple(dict.fromkeys(lengths))


def plan(
    lengths,
    units=None,
    *,
    row_tokens: int = TEXT_ROW_TOKENS,
    max_row_tokens: int = 8192,
    visual_row_tokens: int = VISUAL_ROW_TOKENS,
    max_row_units: int | None = None,
    max_row_sequences: int | None = None,
    buckets: Sequence[int] | None = None,
    shrink: bool = False,
) -> Plan:
    """Put sequences into rows.

    Items that do not fit the ordinary row get longer ones (`row_lengths`), whose remaining room
    is filled with shorter items. With `max_row_units` and `max_row_sequences` given, the shape of
    a group depends only on its row length (what training wants: the same programs at every
    step); without them, shapes are what the data needs, rounded up.

    Args:
      lengths: i[N], tokens of each item.
      units: i[N], visual units of each item; None for texts only.
      row_tokens: ordinary row length of texts.
      max_row_tokens: longest row, and so the longest item.
      visual_row_tokens: ordinary row length of items with units (at most `max_row_tokens`).
      max_row_units: units of an ordinary visual row; longer rows hold proportionally more.
      max_row_sequences: sequences of an ordinary text row; longer rows hold proportionally more.
        A visual row holds at most as many sequences as units.
      buckets: row lengths to use instead of `row_lengths(...)`, for both kinds.
      shrink: take a half, quarter or eighth of the row where all items of a kind fit in one such
        row (a single query then does not pay for a full row; it adds programs).

    Returns:
      The plan; deterministic, `Plan(())` for no items.

    Raises:
      UserError: items longer than `max_row_tokens`, with more units than the longest row holds,
        or without tokens; all of them in one message with their indices.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1)
    units = np.zeros_like(lengths) if units is None else np.asarray(units, np.int64).reshape(-1)
    if len(units) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths but {len(units)} unit counts")
    text = _capacities(
        buckets or row_lengths(row_tokens, max_row_tokens), None, max_row_sequences, visual=False
    )
    visual = _capacities(
        buckets or row_lengths(visual_row_tokens, max_row_tokens, fine=True),
        max_row_units,
        max_row_sequences,
        visual=True,
    )
    most_units = max_row_units and visual[-1].units
    _check_items(lengths, units, min(max_row_tokens, visual[-1].tokens), most_units)
    groups: list[GroupPlan] = []
    for capacities, chosen, fixed in (
        (text, np.flatnonzero(units == 0), max_row_sequences is not None),
        (visual, np.flatnonzero(units), max_row_units is not None),
    ):
        if not len(chosen):
            continue
        if shrink:
            capacities = _with_smaller(capacities, lengths[chosen], units[chosen])
        for capacity, rows in _pack(lengths[chosen], units[chosen], chosen, capacities):
            tokens, crops = _row_sums(rows, lengths), _row_sums(rows, units)
            shape = capacity
            if not fixed:
                sequences = round_sequences(max(map(len, rows)))
                shape = RowShape(capacity.tokens, round_units(max(crops)), sequences)
            groups.append(GroupPlan(shape, rows, tokens, crops))
    return Plan(tuple(groups))


def choose_row_tokens(
    lengths,
    units,
    *,
    candidates: Sequence[int] = tuple(range(1024, 4097, 128)),
    sample: int = 2000,
    tolerance: float = 0.015,
    crowding: Callable[[float], float] = lambda units: 1.0,
) -> int:
    """Choose `visual_row_tokens` for data like this: the shortest row that is nearly the fullest.

    Longer rows pack better but cost more attention, so a shorter one may fall short of the best
    share by `tolerance`. A token of the decoder and a unit of the vision tower weigh as in
    Phi-3.5-V, where a quarter of the work is the vision tower's; where units look at each other,
    theirs grows by `crowding`.

    Args:
      lengths: i[N], tokens of each item.
      units: i[N], visual units; items without are ignored.
      candidates: row lengths to try, ascending.
      sample: at most this many items, evenly spread over the input, are planned.
      tolerance: how much of the share a shorter row may lose.
      crowding: units of a row -> cost of each, as a multiple of one alone.

    Returns:
      One of `candidates`; `VISUAL_ROW_TOKENS` if no item has units.
    """
    lengths, units = np.asarray(lengths, np.int64), np.asarray(units, np.int64)
    chosen = np.flatnonzero(units > 0)
    if not len(chosen):
        return VISUAL_ROW_TOKENS
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), sample)).astype(int)]
    lengths, units = lengths[chosen], units[chosen]
    longest = max(int(lengths.max()), max(candidates))
    shares = []
    for tokens in candidates:
        made = plan(lengths, units, visual_row_tokens=tokens, max_row_tokens=longest)
        rows = sum(len(group.rows) for group in made.groups)
        tower = 0.25 * crowding(sum(g.shape.units * len(g.rows) for g in made.groups) / rows)
        shares.append(1 / (0.75 / made.token_share + tower / made.unit_share))
    best = max(shares)
    return next(t for t, s in zip(candidates, shares, strict=True) if s >= best - tolerance)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _row_sums(rows: list[list[int]], values: np.ndarray) -> list[int]:
    starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
    flat = np.concatenate([np.asarray(row) for row in rows])
    return np.add.reduceat(values[flat], starts).tolist()


def _capacities(
    tokens: Sequence[int], units: int | None, sequences: int | None, *, visual: bool
) -> list[RowShape]:
    """What a row of each length may hold, shortest first."""
    capacities = []
    for length in sorted(tokens):
        # Longer rows hold proportionally more, so that all lengths are about equally full.
        most_units = 0
        if visual:
            scaled = None if units is None else -(-units * length // min(tokens))
            most_units = _UNLIMITED if scaled is None else round_units(scaled)
        scaled = length // 4 if sequences is None else -(-sequences * length // min(tokens))
        most_sequences = round_sequences(scaled)
        if visual and units is not None:
            most_sequences = min(most_sequences, round_sequences(most_units))
        capacities.append(RowShape(length, most_units, most_sequences))
    return capacities


def _with_smaller(
    capacities: list[RowShape], lengths: np.ndarray, units: np.ndarray
) -> list[RowShape]:
    """The smallest fraction of the ordinary row that holds everything, if one does."""
    base = capacities[0]
    step = 16
    for part in (8, 4, 2):
        small = RowShape(
            min(_round_up(-(-base.tokens // part), step), base.tokens),
            base.units if base.units == _UNLIMITED else round_units(-(-base.units // part)),
            round_sequences(-(-base.sequences // part)),
        )
        if (
            lengths.sum() <= small.tokens
            and units.sum() <= small.units
            and len(lengths) <= small.sequences
        ):
            return [small]
    return capacities


def _check_items(
    lengths: np.ndarray, units: np.ndarray, most_tokens: int, most_units: int | None
) -> None:
    """Refuse what no row can hold, every case in one message."""
    problems = []
    bad = (lengths > most_tokens) | (lengths < 1) | (units < 0)
    if most_units is not None:
        bad |= units > most_units
    for i in np.flatnonzero(bad).tolist():
        length, crops = int(lengths[i]), int(units[i])
        if length > most_tokens:
            problems.append(f"item {i} is {length} tokens long; the longest row has {most_tokens}")
        elif length < 1 or crops < 0:
            problems.append(f"item {i} has {length} tokens and {crops} visual units")
        else:
            problems.append(f"item {i} has {crops} visual units; a row has at most {most_units}")
    raise_problems(
        "items that fit no row",
        problems,
        advice="Raise max_row_tokens (and max_row_units if it is set), lower num_crops or "
        "max_pixels, or set max_len so that texts are cut.",
    )


def _pack(
    lengths: np.ndarray, units: np.ndarray, items: np.ndarray, capacities: list[RowShape]
) -> list[tuple[RowShape, list[list[int]]]]:
    """Pack the items of one kind; returns the rows of each capacity in use, shortest first."""
    pool = Pool(lengths, units, items)
    # The first row length that holds an item decides in which rows it may be the first.
    home = np.full(len(pool.tokens), len(capacities) - 1)
    for k, capacity in reversed(list(enumerate(capacities))):
        fits = (pool.tokens_np <= capacity.tokens) & (pool.units_np <= capacity.units)
        home[fits] = k
    groups = []
    # Longest first: what is left of the long rows is filled with shorter items.
    for k, capacity in reversed(list(enumerate(capacities))):
        rows: list[list[int]] = []
        for seed in reversed(np.flatnonzero(home == k).tolist()):
            while pool.left[seed]:
                rows += pool.fill_rows(seed, capacity.tokens, capacity.units, capacity.sequences)
        if rows:
            groups.append((capacity, rows))
    return groups[::-1]
