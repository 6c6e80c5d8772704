# SPDX-License-Identifier: Apache-2.0
"""Filling rows: from a plan and encoded inputs to the fixed-shape arrays that a model reads.

The planner itself is `planning.py`; its names are re-exported here. Numpy only. The road is

    plan(lengths, units) -> Plan -> row_batches + fill        (embedding, evaluation)
                                 -> arrange -> fill_chunks    (training; `chunked` does both)
                                 -> unpack                    (embeddings back into input order)

Axes: R rows, T tokens in a row, S sequences in a row, C visual units in a row, K chunks,
A position axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.planning import (
    TEXT_ROW_TOKENS,
    VISUAL_ROW_TOKENS,
    GroupPlan,
    Plan,
    RowShape,
    choose_row_tokens,
    halved_rows,
    plan,
    round_chunks,
    round_rows,
    round_sequences,
    round_units,
    row_lengths,
)

__all__ = [
    "TEXT_ROW_TOKENS",
    "VISUAL_ROW_TOKENS",
    "ChunkPlan",
    "ChunkShape",
    "ChunkedGroup",
    "GroupPlan",
    "PackedBatch",
    "Plan",
    "RowBatch",
    "RowShape",
    "arrange",
    "choose_row_tokens",
    "chunked",
    "fill",
    "fill_chunks",
    "halved_rows",
    "plan",
    "round_chunks",
    "round_rows",
    "round_sequences",
    "round_units",
    "row_batches",
    "row_lengths",
    "unpack",
]

Rows = Sequence[Sequence[int]]


class PackedBatch(NamedTuple):
    """Rows of sequences laid end to end; a NamedTuple, so jax takes it as a pytree.

    Attributes:
      tokens: i32 [R, T]; 0 in padding and where a visual feature stands.
      feature_index: i32 [R, T]; -1 for text and padding, otherwise a row of the visual feature
        table of this row (`inputs.VisualLayout`).
      positions: i32 [R, T] or [R, T, A]; each sequence counts its own, 0 in padding.
      segment_ids: i32 [R, T]; 0 = padding, sequences 1, 2, ... in order.
      pool_index: i32 [R, S]; where in the row each sequence's last token stands, 0 if empty.
      slot: i32 [R, S]; which example each sequence is, -1 if empty.
      visual: name -> [R, C, ...], units in the order of the sequences, zeros behind the last;
        {} for text rows.
    """

    tokens: Any
    feature_index: Any
    positions: Any
    segment_ids: Any
    pool_index: Any
    slot: Any
    visual: dict[str, Any]


class RowBatch(NamedTuple):
    """Some rows of a group, and the number of rows to pad them to."""

    rows: list[list[int]]
    num_rows: int


class ChunkShape(NamedTuple):
    """What a compiled train step knows of a group: row shape, rows per chunk, chunk capacity."""

    row: RowShape
    rows: int
    chunks: int


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """A group's rows dealt into chunks.

    Attributes:
      shape: static sizes; `shape.chunks` is the capacity K.
      chunks: the real chunks, each a list of at most `shape.rows` rows of item indices.
    """

    shape: ChunkShape
    chunks: list[list[list[int]]]

    def rows_of(self, part: tuple[int, int] = (0, 1)) -> list[list[list[int]]]:
        """Rows of each chunk that process `part[0]` of `part[1]` holds: one block of every chunk.

        Raises:
          ValueError: if the rows of a chunk do not divide among the processes.
        """
        index, count = part
        if self.shape.rows % count or not 0 <= index < count:
            raise ValueError(f"part {part} of chunks with {self.shape.rows} rows")
        size = self.shape.rows // count
        return [chunk[index * size : (index + 1) * size] for chunk in self.chunks]

    def items(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """Indices of the examples that this process must encode."""
        return [i for chunk in self.rows_of(part) for row in chunk for i in row]


class ChunkedGroup(NamedTuple):
    """A group of rows for training, a pytree.

    Attributes:
      batch: every leaf has a leading axis K of chunks; those from `num_chunks` on are empty.
      num_chunks: i32 [], how many chunks are real.
    """

    batch: PackedBatch
    num_chunks: Any


def fill(
    rows: Rows,
    encoded: Mapping[int, EncodedInput] | Sequence[EncodedInput],
    shape: RowShape,
    layout: VisualLayout,
    *,
    num_rows: int | None = None,
    slots: Mapping[int, int] | Sequence[int] | None = None,
) -> PackedBatch:
    """Lay sequences end to end in rows.

    Args:
      rows: item indices of each row, in order.
      encoded: the item of each index that occurs in `rows`.
      shape: size of every row; `units` 0 makes a batch without visual arrays.
      layout: the backbone's visual feature table.
      num_rows: pad with empty rows to this number.
      slots: what to write into `slot` for an index; None writes the index.

    Returns:
      Numpy arrays, see `PackedBatch`.

    Raises:
      ValueError: if a row does not hold what it should, or an item's arrays are not the layout's.
    """
    count = len(rows) if num_rows is None else num_rows
    if len(rows) > count:
        raise ValueError(f"{len(rows)} rows do not fit in {count}")
    tokens = np.zeros((count, shape.tokens), np.int32)
    positions = np.zeros((*tokens.shape, *layout.position_shape), np.int32)
    segment_ids = np.zeros_like(tokens)
    feature_index = np.full_like(tokens, -1)
    pool_index = np.zeros((count, shape.sequences), np.int32)
    slot = np.full_like(pool_index, -1)
    visual = {}
    if shape.units:
        for name, (unit_shape, dtype) in layout.units.items():
            visual[name] = np.zeros((count, shape.units, *unit_shape), dtype)
    for r, row in enumerate(rows):
        start = unit = 0
        if len(row) > shape.sequences:
            raise ValueError(f"row {r} has {len(row)} sequences, more than {shape.sequences}")
        for s, index in enumerate(row):
            item = encoded[index]
            end, unit_end = start + len(item), unit + item.units
            if end > shape.tokens or unit_end > shape.units:
                raise ValueError(
                    f"row {r} overflows at item {index}: {end} tokens and {unit_end} units in a "
                    f"row of {shape.tokens} and {shape.units}"
                )
            tokens[r, start:end] = item.tokens
            if np.shape(item.positions) != (len(item), *layout.position_shape):
                raise ValueError(
                    f"item {index}: positions have shape {np.shape(item.positions)} for "
                    f"{len(item)} tokens with {layout.position_axes or 'no'} position axes"
                )
            positions[r, start:end] = item.positions
            segment_ids[r, start:end] = s + 1
            if item.units:
                # Rows of the table that all sequences share stay; those of units move along.
                shift = unit * layout.features_per_unit
                moved = np.where(item.feature_index >= layout.shared_features, shift, 0)
                feature_index[r, start:end] = item.feature_index + moved
                _copy_units(visual, item, index, r, unit)
            pool_index[r, s] = end - 1
            slot[r, s] = index if slots is None else slots[index]
            start, unit = end, unit_end
    return PackedBatch(tokens, feature_index, positions, segment_ids, pool_index, slot, visual)


def _copy_units(
    visual: dict[str, np.ndarray], item: EncodedInput, index: int, row: int, unit: int
) -> None:
    """Write an item's visual arrays into its row from `unit` on."""
    if item.visual.keys() != visual.keys():
        raise ValueError(
            f"item {index} has visual arrays {sorted(item.visual)}, the layout {sorted(visual)}"
        )
    for name, target in visual.items():
        source = np.asarray(item.visual[name])
        if source.shape != (item.units, *target.shape[2:]):
            raise ValueError(
                f"item {index}: {name} has shape {source.shape} for {item.units} units of "
                f"{target.shape[2:]}"
            )
        target[row, unit : unit + item.units] = source


def row_batches(group: GroupPlan, rows_per_batch: int, *, row_multiple: int = 1) -> list[RowBatch]:
    """Split a group into batches of equally many rows; the last may be a half, quarter, ...

    Args:
      group: rows of one shape.
      rows_per_batch: rows in a full batch; rounded down to a multiple of `row_multiple`.
      row_multiple: what a number of rows must divide by (devices that share the rows).

    Returns:
      Batches in the order of the group's rows, with the number of rows to give to `fill`.
    """
    full = max(rows_per_batch // row_multiple, 1) * row_multiple
    batches = []
    for start in range(0, len(group.rows), full):
        rows = group.rows[start : start + full]
        batches.append(RowBatch(rows, halved_rows(len(rows), full, row_multiple)))
    return batches


def arrange(
    planned: Plan,
    *,
    chunk_tokens: int,
    row_multiple: int = 1,
    chunk_buckets: Sequence[int] | None = None,
    at_least: Iterable[ChunkShape] = (),
    finely: bool = False,
) -> tuple[ChunkPlan, ...]:
    """Deal the rows of each group into chunks with about equally many real tokens.

    Pure and cheap: every process computes the same arrangement from the lengths of the global
    batch, then encodes and fills only its own part (`ChunkPlan.items`, `fill_chunks`).

    Args:
      planned: the plan of one global batch.
      chunk_tokens: tokens (padding included) that a chunk may have, over all devices.
      row_multiple: rows per chunk must divide by this (devices that share the rows).
      chunk_buckets: capacities K to round up to; None: `round_chunks`.
      at_least: shapes that are wanted anyway, for instance those of the step before: a group of
        that row shape gets no less, and an absent one is added empty. Surplus chunks are never
        run, so this costs memory, and saves compiling a program for every mixture of groups.
      finely: a chunk of few rows has as many as `round_rows` says, not a half, quarter, ... of a
        full one.

    Returns:
      Text groups by row length, then visual groups by row length.
    """
    wanted = {shape.row: shape for shape in at_least}
    rounded = round_rows if finely else halved_rows
    arranged = []
    for group in planned.groups:
        least = wanted.pop(group.shape, None)
        full = chunk_tokens // group.shape.tokens // row_multiple * row_multiple
        rows = rounded(len(group.rows), max(full, row_multiple), row_multiple)
        if least is not None:
            rows = max(rows, least.rows)
        count = -(-len(group.rows) // rows)
        capacity = max(round_chunks(count, chunk_buckets), least.chunks if least else 1)
        # Fullest rows first, dealt back and forth: no chunk gets all the full ones.
        order = sorted(range(len(group.rows)), key=lambda r, g=group: (-g.tokens[r], r))
        chunks: list[list[list[int]]] = [[] for _ in range(count)]
        for k, r in enumerate(order):
            turn, place = divmod(k, count)
            chunks[count - 1 - place if turn % 2 else place].append(group.rows[r])
        arranged.append(ChunkPlan(ChunkShape(group.shape, rows, capacity), chunks))
    arranged += [ChunkPlan(shape, []) for shape in wanted.values()]
    return tuple(sorted(arranged, key=lambda c: (c.shape.row.units > 0, c.shape.row)))


def fill_chunks(
    arranged: ChunkPlan,
    encoded: Mapping[int, EncodedInput] | Sequence[EncodedInput],
    layout: VisualLayout,
    *,
    slots: Mapping[int, int] | Sequence[int] | None = None,
    part: tuple[int, int] = (0, 1),
) -> ChunkedGroup:
    """Fill the chunks of one group (the rows of this process); see `chunked`."""
    row, rows, capacity = arranged.shape
    size = rows // part[1]
    flat: list[Sequence[int]] = []
    for chunk in arranged.rows_of(part):
        flat += [*chunk, *([[]] * (size - len(chunk)))]
    batch = fill(flat, encoded, row, layout, num_rows=capacity * size, slots=slots)

    def split(leaf):
        return leaf.reshape(capacity, size, *leaf.shape[1:])

    visual = {name: split(leaf) for name, leaf in batch.visual.items()}
    fields = {name: split(leaf) for name, leaf in batch._asdict().items() if name != "visual"}
    real = np.asarray(len(arranged.chunks), np.int32)
    return ChunkedGroup(PackedBatch(**fields, visual=visual), real)


def chunked(
    planned: Plan,
    encoded: Mapping[int, EncodedInput] | Sequence[EncodedInput],
    layout: VisualLayout,
    *,
    chunk_tokens: int,
    row_multiple: int = 1,
    chunk_buckets: Sequence[int] | None = None,
    at_least: Iterable[ChunkShape] = (),
    slots: Mapping[int, int] | Sequence[int] | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[ChunkedGroup, ...]:
    """Arrange a plan into chunks and fill them: the batch of one train step.

    Queries and targets go in one list (queries first), so slots are 0..2B-1.

    Args:
      planned: the plan of the global batch.
      encoded: the items of this process's part, by index.
      layout: the backbone's visual feature table.
      chunk_tokens: see `arrange`.
      row_multiple: see `arrange`.
      chunk_buckets: see `arrange`.
      at_least: see `arrange`.
      slots: see `fill`.
      part: (process index, process count): fill only this block of every chunk's rows.

    Returns:
      Text groups by row length, then visual groups by row length; leaves lead with [K, R].
    """
    arranged = arrange(
        planned,
        chunk_tokens=chunk_tokens,
        row_multiple=row_multiple,
        chunk_buckets=chunk_buckets,
        at_least=at_least,
    )
    return tuple(fill_chunks(a, encoded, layout, slots=slots, part=part) for a in arranged)


def unpack(embeddings: np.ndarray, slot: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write the embeddings of real sequences to their places.

    Args:
      embeddings: f32 [..., S, D], as the model returns them for rows (or chunks of rows).
      slot: i32 [..., S] of the same batch.
      out: [N, D], written in place.

    Returns:
      `out`.
    """
    slot = np.asarray(slot)
    real = slot >= 0
    out[slot[real]] = np.asarray(embeddings)[real]
    return out
