# SPDX-License-Identifier: Apache-2.0
"""Which fixed shapes a run's batches are packed into, chosen once from a sample of its data."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.packing import (
    ChunkedGroup,
    ChunkShape,
    RowShape,
    arrange,
    choose_row_tokens,
    fill_chunks,
    plan,
)

Size = tuple[int, int]
"""Tokens and visual units of an input."""

_TEXT_ROWS = (32, 64, 128, 256, 512, 1024)
_VISUAL_ROWS = (64, 96, 128, 160, 192, 256, *range(384, 4097, 128))
_EVERYTHING = 1 << 40


@dataclasses.dataclass(frozen=True)
class RowSizes:
    """Row lengths of a run.

    Attributes:
      text: tokens of a row of texts.
      visual: tokens of a row of inputs with images.
      units: visual units of such a row.
      sequences: most sequences of a text row.
      longest: the longest input that is accepted.
      mean_tokens: tokens of an input on average.
    """

    text: int
    visual: int
    units: int
    sequences: int
    longest: int
    mean_tokens: float


def choose_rows(sample: Sequence[Size], *, longest: int, row_tokens: int = 0) -> RowSizes:
    """Choose row lengths that waste little on data like the sample.

    Args:
      sample: sizes of some inputs of the run, both sides.
      longest: the longest input that the model accepts.
      row_tokens: use this length for all rows instead; 0 for a choice.
    """
    lengths, units = (np.array(column, np.int64) for column in zip(*sample, strict=True))
    texts = lengths[units == 0]
    pictures = lengths[units > 0]
    text = visual = row_tokens
    if not row_tokens:
        # A few texts to a row fill it well; longer rows only cost attention.
        wanted = max(np.quantile(texts, 0.99), 4 * texts.mean()) if len(texts) else 0
        text = next((n for n in _TEXT_ROWS if n >= wanted), _TEXT_ROWS[-1])
        most = int(pictures.max()) if len(pictures) else _VISUAL_ROWS[0]
        # Beyond a few inputs to a row the share gains little and attention pays for all of it.
        rows = [n for n in _VISUAL_ROWS if most <= n <= max(4 * most, 64)]
        rows = rows or list(_VISUAL_ROWS[-1:])
        visual = choose_row_tokens(lengths, units, candidates=rows, tolerance=0.03)
    planned = plan(
        lengths, units, row_tokens=text, visual_row_tokens=visual, max_row_tokens=longest
    )
    groups = [group.shape for group in planned.groups]
    return RowSizes(
        text=text,
        visual=visual,
        units=max((s.units * visual // s.tokens for s in groups if s.units), default=1),
        sequences=max((s.sequences for s in groups if not s.units), default=1),
        longest=longest,
        mean_tokens=float(lengths.mean()),
    )


class PackedStep(NamedTuple):
    """A packed batch and how well it is filled (shares 0..1)."""

    groups: tuple[ChunkedGroup, ...]
    real_tokens: float
    real_units: float


class BatchPacker:
    """Packs the batches of a run into few shapes: one compiled step serves nearly all of them.

    Thread-safe. Shapes never shrink: a group keeps the largest capacity that it has had.
    """

    def __init__(
        self,
        rows: RowSizes,
        layout: VisualLayout,
        *,
        chunk_tokens: int | None,
        row_multiple: int = 1,
        negatives: int = 0,
    ):
        """Set up.

        Args:
          rows: row lengths.
          layout: of the backbone's visual feature table.
          chunk_tokens: tokens of a chunk over all devices; None: each group is one chunk.
          row_multiple: what the rows of a chunk divide by (devices that share the rows).
          negatives: places for hard negatives behind each positive.
        """
        self.rows = rows
        self.cached = chunk_tokens is not None
        self._layout = layout
        self.chunk_tokens = chunk_tokens or _EVERYTHING
        self._row_multiple = row_multiple
        self.negatives = negatives
        self._shapes: dict[RowShape, ChunkShape] = {}
        self._lock = threading.Lock()

    def arrange(self, sizes: Sequence[Size]) -> tuple[Any, Any]:
        """The plan and the chunks of a batch with inputs of these sizes."""
        rows = self.rows
        planned = plan(
            [tokens for tokens, _ in sizes],
            [units for _, units in sizes],
            row_tokens=rows.text,
            visual_row_tokens=rows.visual,
            max_row_tokens=rows.longest,
            max_row_units=rows.units,
            max_row_sequences=rows.sequences,
        )
        with self._lock:
            chunks = arrange(
                planned,
                chunk_tokens=self.chunk_tokens,
                row_multiple=self._row_multiple,
                at_least=self._shapes.values(),
            )
            self._shapes |= {chunk.shape.row: chunk.shape for chunk in chunks}
        return planned, chunks

    def __call__(
        self,
        queries: Sequence[EncodedInput],
        positives: Sequence[EncodedInput],
        negatives: Sequence[Sequence[EncodedInput]] = (),
    ) -> PackedStep:
        """Pack a batch of B pairs with k places for hard negatives each.

        Queries take slots 0..B-1, positive i takes B + i (1 + k) and its negatives the slots
        behind it; a place without one stays empty.
        """
        encoded = [*queries, *positives]
        pairs, each = len(queries), 1 + self.negatives
        slots = [*range(pairs), *(pairs + i * each for i in range(pairs))]
        for i, hard in enumerate(negatives):
            hard = hard[: self.negatives]
            encoded += hard
            slots += (pairs + i * each + 1 + k for k in range(len(hard)))
        planned, chunks = self.arrange([(len(item), item.units) for item in encoded])
        groups = tuple(fill_chunks(c, encoded, self._layout, slots=slots) for c in chunks)
        return PackedStep(groups, planned.token_share, planned.unit_share)
