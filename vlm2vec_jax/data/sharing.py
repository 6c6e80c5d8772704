# SPDX-License-Identifier: Apache-2.0
"""One global batch over several processes: sizes are exchanged, pixels are read once.

Process p looks at the pairs p, p + P, ... of a batch (text and image headers) and tells the others
how large they are. Then every process knows the sizes of the whole batch, packs it alike, and
encodes only what stands in its own rows. A row that turns out to be bad only when it is decoded is
told to all, replaced, and the batch is packed anew: the outcome is that of a single process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple, Protocol

from vlm2vec_jax.data.reading import MAX_REPLACEMENTS, Example, Reader, Size
from vlm2vec_jax.data.step_rows import shared
from vlm2vec_jax.inputs import EncodedInput, MultimodalInput, content_hash


class Packer(Protocol):
    """What packs a batch that several processes share (`training.batching.BatchPacker`)."""

    def plan_step(self, sizes: Sequence[Size], negatives: Sequence[int] = ()) -> Any:
        """Where everything stands; the same on all processes that see the same sizes."""
        ...

    def items(self, planned: Any) -> list[int]:
        """Numbers of the inputs that this process encodes."""
        ...

    def fill(
        self,
        planned: Any,
        encoded: Mapping[int, EncodedInput],
        images: Sequence[Sequence[int]],
    ) -> Any:
        """The part of the batch that this process holds; `images` are the units of all inputs'."""
        ...


class Sharing(NamedTuple):
    """How the processes of a run share batches.

    Attributes:
      process: number of this one.
      processes: how many there are.
      exchange: (name, message, stop event) -> the messages of all, in order.
      measure: a processor's `length`.
      packer: packs them.
    """

    process: int
    processes: int
    exchange: Callable[[str, bytes, threading.Event], list[bytes]]
    measure: Callable[[MultimodalInput], Size]
    packer: Packer


class SharedBatch(NamedTuple):
    """A batch as this process has it: its part packed, and the examples of all."""

    packed: Any
    examples: list[Example]


class Assembly:
    """Makes shared batches, one step after the other, from what this process has measured.

    Args:
      sharing: with whom.
      measuring: reads sizes.
      encoding: reads pixels; one row at a time, so it never skips by itself.
      skip: replace bad rows.
      pool: threads to encode in; None for none.
      stop: set when no batch is wanted any more.
    """

    def __init__(
        self,
        sharing: Sharing,
        measuring: Reader,
        encoding: Reader,
        *,
        skip: bool,
        pool: Executor | None,
        stop: threading.Event,
    ):
        self._sharing, self._measuring, self._encoding = sharing, measuring, encoding
        self._skip, self._pool, self._stop = skip, pool, stop

    def batch(self, step: int, measured: Sequence[Example]) -> SharedBatch:
        """Put a batch together.

        Args:
          step: of the batch.
          measured: examples with sizes, of the positions process, process + processes, ...

        Returns:
          What this process holds. An example without items could not be had at all.
        """
        me, processes = self._sharing.process, self._sharing.processes
        mine = {me + i * processes: example for i, example in enumerate(measured)}
        examples: dict[int, Example] = {}
        problems: dict[int, tuple[str, ...]] = {}
        held: dict[tuple[int, int], EncodedInput] = {}  # (position, side) of rows still in use
        for attempt in range(MAX_REPLACEMENTS + 2):
            told = self._tell(f"batch/{step}/{attempt}/sizes", [(p, *e) for p, e in mine.items()])
            for position, *fields in told:
                example = _example(fields)
                examples[position] = example
                problems[position] = problems.get(position, ()) + example.problems
            complete = [
                examples[p]._replace(problems=problems[p]) for p in range(processes * len(measured))
            ]
            if not all(example.items for example in complete):
                return SharedBatch(None, complete)
            planned, places, own = self._plan(complete)
            bad = self._fetch(complete, [places[i] for i in own], held)
            encoded = {} if bad else {i: held[places[i]] for i in own}
            facts = [
                (*places[i], content_hash(item), item.image_units) for i, item in encoded.items()
            ]
            told = self._tell(f"batch/{step}/{attempt}/read", [[list(bad.items()), facts]])
            failed = {position: said for part, _ in told for position, said in part}
            if not failed:
                known = {(p, side): rest for _, part in told for p, side, *rest in part}
                complete = _with_ids(complete, known)
                images = [known[place][1] for place in places]
                return SharedBatch(self._sharing.packer.fill(planned, encoded, images), complete)
            mine = {}
            for position, message in failed.items():
                problems[position] += (message,)
                held = {key: value for key, value in held.items() if key[0] != position}
                if position % processes == me:
                    mine[position] = self._next(examples[position], len(problems[position]))
        raise AssertionError("a row was replaced more often than is allowed")

    def _next(self, example: Example, tried: int) -> Example:
        """What stands in for a row that could not be decoded."""
        if not self._skip:
            return example._replace(items=(), problems=())
        return self._measuring.first_good(example.source, example.at + 1, tried)

    def _plan(self, examples: Sequence[Example]) -> tuple[Any, list[tuple[int, int]], list[int]]:
        """The plan, (position, side) of all inputs, numbers of those that this process encodes."""
        places = [(p, side) for side in (0, 1) for p in range(len(examples))]
        places += [(p, 2 + k) for p, e in enumerate(examples) for k in range(len(e.items) - 2)]
        sizes = [tuple(examples[p].items[side]) for p, side in places]
        planned = self._sharing.packer.plan_step(sizes, [len(e.items) - 2 for e in examples])
        return planned, places, self._sharing.packer.items(planned)

    def _fetch(self, examples, wanted, held) -> dict[int, str]:
        """Encode what is wanted and not held yet; returns the bad positions with the reason."""
        missing: dict[int, list[int]] = {}
        for position, side in wanted:
            if (position, side) not in held:
                missing.setdefault(position, []).append(side)
        each = map if self._pool is None else self._pool.map

        def read(position: int) -> list[MultimodalInput] | str:
            example = examples[position]
            found = self._encoding.inputs(example.source, example.at)
            return found if isinstance(found, str) else [found[s] for s in missing[position]]

        def one(position: int, inputs: list[MultimodalInput] | str):
            example = examples[position]
            result: list[EncodedInput] | str
            if isinstance(inputs, str):
                result = inputs
            else:
                result = self._encoding.made_of(example.source, example.at, inputs)
            return position, missing[position], result

        positions = sorted(missing)
        rows = list(each(read, positions))
        there = iter(shared([None if isinstance(row, str) else row for row in rows]))
        rows = [row if made is None else made for row, made in zip(rows, there, strict=True)]
        results = list(each(one, positions, rows))
        bad = {}
        for position, sides, result in results:
            if isinstance(result, str):
                bad[position] = result
                continue
            for side, item in zip(sides, result, strict=True):
                size = tuple(examples[position].items[side])
                if (len(item), item.units) != size:
                    bad[position] = (
                        f"an input has {len(item)} tokens and {item.units} visual units, its "
                        f"header promised {size[0]} and {size[1]}"
                    )
                held[position, side] = item
        return bad

    def _tell(self, name: str, mine: list) -> list:
        """Everybody's list, one behind the other."""
        message = json.dumps(mine).encode()
        told = self._sharing.exchange(name, message, self._stop)
        return [entry for part in told for entry in json.loads(part)]


def _with_ids(
    examples: list[Example], known: Mapping[tuple[int, int], Sequence[Any]]
) -> list[Example]:
    """The examples with the content hash of each (position, side)."""
    return [
        e._replace(ids=tuple(known[position, side][0] for side in range(len(e.items))))
        for position, e in enumerate(examples)
    ]


def _example(fields: Sequence[Any]) -> Example:
    items, source, at, row, ids, problems = fields
    return Example(tuple(map(tuple, items)), source, at, row, tuple(ids), tuple(problems))
