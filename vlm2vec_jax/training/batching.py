# SPDX-License-Identifier: Apache-2.0
"""Which fixed shapes a run's batches are packed into, chosen once from a sample of its data."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.packing import (
    ChunkedGroup,
    ChunkPlan,
    ChunkShape,
    Plan,
    RowShape,
    arrange,
    choose_row_tokens,
    fill_chunks,
    plan,
    round_chunks,
    round_rows,
)

Size = tuple[int, int]
"""Tokens and visual units of an input."""

_TEXT_ROWS = (32, 64, 128, 256, 512, 1024)
_VISUAL_ROWS = (64, 96, 128, 160, 192, 256, *range(384, 4097, 128))
_EVERYTHING = 1 << 40
_FORESEEN = 1 << 16
"""Inputs that are planned ahead, to see which shapes a run needs (about half a second)."""
_RARE, _FEW = 16, 8
"""What is foreseen gets room for more: groups of a so-many-th of all tokens, and so few chunks."""


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


def choose_rows(
    sample: Sequence[Size],
    *,
    longest: int,
    row_tokens: int = 0,
    crowding: Callable[[float], float] = lambda units: 1.0,
) -> RowSizes:
    """Choose row lengths that waste little on data like the sample.

    Args:
      sample: sizes of some inputs of the run, both sides.
      longest: the longest input that the model accepts.
      row_tokens: use this length for all rows instead; 0 for a choice.
      crowding: see `planning.choose_row_tokens`.
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
        visual = choose_row_tokens(
            lengths, units, candidates=rows, tolerance=0.03, crowding=crowding
        )
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
    """A packed batch, how well it is filled (shares 0..1), and the shapes in use from then on.

    `flops` are those of the forward passes of all its sequences, 0 where nobody asked.
    """

    groups: tuple[ChunkedGroup, ...]
    real_tokens: float
    real_units: float
    shapes: tuple[ChunkShape, ...] = ()
    flops: float = 0.0


class StepPlan(NamedTuple):
    """Where everything of a batch stands.

    Attributes:
      rows: which inputs share a row.
      chunks: which rows share a chunk, by group.
      slots: of each input, see `TrainBatch`.
      shapes: of all groups that the run has had so far.
      tokens: of each input.
    """

    rows: Plan
    chunks: tuple[ChunkPlan, ...]
    slots: list[int]
    shapes: tuple[ChunkShape, ...]
    tokens: list[int]


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
        part: tuple[int, int] = (0, 1),
        shapes: Iterable[ChunkShape] = (),
        flops: Callable[[int, Sequence[int]], float] = lambda tokens, images: 0.0,
        finely: bool = False,
    ):
        """Set up.

        Args:
          rows: row lengths.
          layout: of the backbone's visual feature table.
          chunk_tokens: tokens of a chunk over all devices; None: each group is one chunk.
          row_multiple: what the rows of a chunk divide by (devices that share the rows).
          negatives: places for hard negatives behind each positive.
          part: (which, of how many): the block of every chunk's rows that this process holds.
          shapes: that the run has had so far (`PackedStep.shapes`), so that a run that goes on
            packs, and so adds up, exactly as it would have.
          flops: (tokens, units of each image) -> FLOPs of a sequence's forward pass, to be told of
            each batch.
          finely: see `packing.arrange`; for a CPU, where a row costs more and a program less.
        """
        self.rows = rows
        self.cached = chunk_tokens is not None
        self._layout = layout
        self.chunk_tokens = chunk_tokens or _EVERYTHING
        self.row_multiple = row_multiple
        self.negatives = negatives
        self.part = part
        self._flops = flops
        self._finely = finely
        self._shapes: dict[RowShape, ChunkShape] = {}
        self.use_shapes(shapes)
        self._lock = threading.Lock()

    @property
    def shapes(self) -> tuple[ChunkShape, ...]:
        """Of all groups that the run has had so far."""
        return tuple(self._shapes.values())

    def use_shapes(self, shapes: Iterable[ChunkShape]) -> None:
        """Take over the shapes of an earlier part of the run; before anything is packed."""
        self._shapes = {shape.row: shape for shape in shapes}

    def foresee(self, sample: Sequence[Size], inputs: int) -> None:
        """Take the shapes that batches like the sample will need, before the first one comes.

        The step is compiled for the shapes in use; one that a rare long input adds later would
        have it compiled again. Batches drawn from the sample show which there are and how large
        they get. Nothing happens where the shapes of an earlier part of the run are known.

        Args:
          sample: sizes of inputs of the run.
          inputs: of a batch, both sides.
        """
        if self._shapes:
            return
        rng = np.random.default_rng(0)
        counts: dict[RowShape, list[int]] = {}
        for _ in range(int(np.clip(_FORESEEN // inputs, 4, 64))):
            planned, _ = self.arrange([sample[i] for i in rng.integers(0, len(sample), inputs)])
            for group in planned.groups:
                counts.setdefault(group.shape, []).append(len(group.rows))
        if not self.cached:
            if self._finely:
                self._leave_room(counts)
            return
        known = self._shapes.items()
        total = sum(shape.chunks * shape.rows * row.tokens for row, shape in known)
        for row, shape in list(known):
            most = self.chunk_tokens // row.tokens // self.row_multiple * self.row_multiple
            if shape.chunks == 1 and 2 * shape.rows <= most:
                if _RARE * shape.rows * row.tokens <= total:
                    # A few rows of rare long inputs: the next batch may have a few more.
                    self._shapes[row] = shape._replace(rows=2 * shape.rows)
            elif shape.chunks <= _FEW:
                # Chunks that are not needed are not run.
                self._shapes[row] = shape._replace(chunks=round_chunks(shape.chunks + 1))

    def _leave_room(self, counts: Mapping[RowShape, Sequence[int]]) -> None:
        """Beyond the most rows of some dozen batches, as many as one in thousands may need."""
        for row, found in counts.items():
            most = max(found) + round(float(np.std(found)))
            rows = round_rows(most, _EVERYTHING // row.tokens, self.row_multiple)
            shape = self._shapes[row]
            self._shapes[row] = shape._replace(rows=max(rows, shape.rows))

    def arrange(self, sizes: Sequence[Size]) -> tuple[Plan, tuple[ChunkPlan, ...]]:
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
                row_multiple=self.row_multiple,
                at_least=self._shapes.values(),
                finely=self._finely,
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
        for hard in negatives:
            encoded += hard[: self.negatives]
        counts = [min(len(hard), self.negatives) for hard in negatives]
        planned = self.plan_step([(len(item), item.units) for item in encoded], counts)
        images = [item.image_units for item in encoded]
        return self._fill(planned, encoded, images, (0, 1))

    def plan_step(self, sizes: Sequence[Size], negatives: Sequence[int] = ()) -> StepPlan:
        """Where everything of a batch stands; equal sizes, equal plan.

        Args:
          sizes: of the queries, the positives, then the hard negatives row by row.
          negatives: how many hard negatives each row has; () for none.
        """
        pairs, each = (len(sizes) - sum(negatives)) // 2, 1 + self.negatives
        slots = [*range(pairs), *(pairs + i * each for i in range(pairs))]
        for i, count in enumerate(negatives):
            slots += (pairs + i * each + 1 + k for k in range(count))
        tokens = [size[0] for size in sizes]
        return StepPlan(*self.arrange(sizes), slots, tuple(self._shapes.values()), tokens)

    def items(self, planned: StepPlan) -> list[int]:
        """Numbers of the inputs that stand in this process's rows."""
        return sorted({i for chunk in planned.chunks for i in chunk.items(self.part)})

    def fill(
        self,
        planned: StepPlan,
        encoded: Mapping[int, EncodedInput],
        images: Sequence[Sequence[int]],
    ) -> PackedStep:
        """Fill this process's rows.

        Args:
          planned: the batch.
          encoded: the inputs that `items` named.
          images: of all inputs of the batch, units of each image.
        """
        return self._fill(planned, encoded, images, self.part)

    def _fill(self, planned: StepPlan, encoded, images, part: tuple[int, int]) -> PackedStep:
        groups = tuple(
            fill_chunks(chunk, encoded, self._layout, slots=planned.slots, part=part)
            for chunk in planned.chunks
        )
        flops = sum(map(self._flops, planned.tokens, images))
        rows = planned.rows
        return PackedStep(groups, rows.token_share, rows.unit_share, planned.shapes, flops)
