# SPDX-License-Identifier: Apache-2.0
"""Embeddings: packed rows on the Embedder's own road against the reference-shaped form.

Texts, photographs of 4 and of 16 crops, and a mixture. Both sides give the same embeddings, which
is checked. Single remedies are in `remedies.py`.
"""

from __future__ import annotations

import functools

import numpy as np

from benchmarks import common
from benchmarks.beds import Bed, NoProcessor
from benchmarks.common import How, Result, compared
from benchmarks.peak import useful

GRID = 16
"""What the lengths of right-padded batches are multiples of, so that few programs serve them."""


def texts(how: How) -> Result:
    """Texts of lognormal lengths, in batches of 64 in random order, and in sorted ones of 16."""
    count = how.pick(96, 12) if how.device == "cpu" else 4096
    bench = Bench(how)
    rng = np.random.default_rng(how.seed)
    items = bench.bed.texts(rng, count)
    cases = {
        "packed": lambda: bench.packed(items),
        "random 64": lambda: bench.shaped(items, 64, multiple=GRID),
        "sorted 16": lambda: bench.shaped(sorted(items, key=len), 16, multiple=GRID),
    }
    timing = bench.compare(cases, how.rounds, unordered=("sorted 16",))
    shapes = bench.shapes(items)
    rows = [
        compared(
            f"{count} texts",
            "reference-shaped, batches of 64 in random order",
            timing, "packed", "random 64", 3.0,
            {**shapes, "padded_tokens": padded_tokens(items, 64)},
        ),
        compared(
            f"{count} texts", "the same, sorted batches of 16",
            timing, "packed", "sorted 16", 1.2, shapes,
        ),
        useful(how, "texts, useful FLOPs", bench.bed.flops(items), timing.median("packed"), 0.45),
    ]  # fmt: skip
    rows[0].shapes["embeddings_per_s"] = count / timing.median("packed")
    return bench.result(rows, {"texts": timing})


def photos_4(how: How) -> Result:
    """Photographs at num_crops 4: 2 x 2 crops, where none is padding, and 1 x 2."""
    return _photos(how, 4, ((2, 2, 2, 1.3), (1, 2, 2, None)), 47)


def photos_16(how: How) -> Result:
    """Photographs at num_crops 16: 3 x 4 crops, 13 of 17 real."""
    return _photos(how, 16, ((3, 4, 1, 1.6),), 18)


def _photos(how: How, num_crops: int, kinds, rate: float) -> Result:
    bench = Bench(how)
    rng = np.random.default_rng(how.seed)
    rows, timings = [], {}
    for down, across, count, target in kinds:
        count = how.pick(count, 1) if how.device == "cpu" else 64
        items = [bench.bed.photo(rng, down, across, n) for n in rng.integers(16, 48, count)]
        size = max(count // 2, 1) if how.device == "cpu" else 16
        name = f"{down}x{across} crops"
        timings[name] = timing = bench.compare(
            {
                "packed": functools.partial(bench.packed, items),
                "shaped": functools.partial(bench.shaped, items, size, num_crops + 1, GRID),
            },
            how.rounds,
        )
        per_second = count / timing.median("packed")
        shapes = {**bench.shapes(items), "padded_crops": count * (num_crops + 1)}
        rows.append(
            compared(
                f"{count} photos of {name}", f"reference-shaped, batches of {size}",
                timing, "packed", "shaped", target, {**shapes, "images_per_s": per_second},
            )
        )  # fmt: skip
        seconds = timing.median("packed")
        rows.append(useful(how, f"{name}, useful FLOPs", bench.bed.flops(items), seconds, 0.45))
        if how.size == "real":
            row = common.Row(f"{name}, rate", per_second, "images/s", "H200", target=rate)
            rows.append(row)
    return bench.result(rows, timings)


def mixed(how: How) -> Result:
    """Three photographs of 2 x 2 crops and five short texts, in chance order."""
    bench = Bench(how)
    rng = np.random.default_rng(how.seed)
    many = 1 if how.device == "cpu" else 32
    items = bench.bed.texts(rng, 5 * many)
    items += [bench.bed.photo(rng, 2, 2, n) for n in rng.integers(8, 40, 3 * many)]
    items = [items[i] for i in rng.permutation(len(items))]
    sizes = {2: 1.7, 4: None, 8: 2.8}
    cases = {"packed": lambda: bench.packed(items)}
    for size in how.pick(sizes, {8: None}):
        cases[f"shaped {size}"] = lambda size=size: bench.shaped(items, size, 5, GRID)
    timing = bench.compare(cases, how.rounds)
    shapes = bench.shapes(items)
    rows = [
        compared(
            "texts and photos", f"reference-shaped, batches of {size}",
            timing, "packed", f"shaped {size}", target,
            {**shapes, "padded_tokens": padded_tokens(items, size)},
        )
        for size, target in sizes.items()
        if f"shaped {size}" in cases
    ]  # fmt: skip
    flops = bench.bed.flops(items)
    rows.append(useful(how, "mixture, useful FLOPs", flops, timing.median("packed"), 0.45))
    return bench.result(rows, {"mixed": timing})


class Bench:
    """A model behind an Embedder, and behind reference-shaped batches.

    Attributes:
      bed: the model's sizes.
      embedder: ours.
    """

    def __init__(self, how: How):
        from benchmarks.reference_shaped import Embedding, with_pixels
        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.nn.compute import Compute

        self.bed = Bed(how.size)
        model = self.bed.model(how.dtype)
        compute = Compute(how.dtype)
        self._shaped = Embedding(model.module, self.bed.layout, compute)
        self.embedder = Embedder(model, NoProcessor(self.bed.layout), compute, None)
        self._with_pixels, self._prepared = with_pixels, {}
        self._limit = 1e-5 if how.dtype == "float32" else 0.05
        self.largest_difference = 0.0

    def packed(self, items) -> np.ndarray:
        """Ours."""
        return self.embedder.encode_encoded(items)

    def shaped(self, items, size: int, most_crops: int = 0, multiple: int = 1) -> np.ndarray:
        """The baseline; what its processor makes of images is there before."""
        for item in items:
            if id(item) not in self._prepared:
                self._prepared[id(item)] = item, self._with_pixels(item)
        items = [self._prepared[id(item)][1] for item in items]
        return self._shaped(items, size, most_crops, multiple)

    def compare(self, cases, rounds: int, unordered=()) -> common.Timing:
        """Check that all cases find what the first finds, then time them.

        Args:
          cases: functions that embed.
          rounds: turns.
          unordered: cases that give the same vectors in another order.
        """
        found = {name: function() for name, function in cases.items()}
        first = next(iter(found.values()))
        for name, other in found.items():
            if name in unordered:
                other = other[np.argmax(first @ other.T, axis=1)]
            difference = float(np.abs(other - first).max())
            assert difference < self._limit, (name, difference)
            self.largest_difference = max(self.largest_difference, difference)
        return common.alternate(cases, rounds, warm=False)

    def result(self, rows, timings) -> Result:
        """With the largest difference between both sides."""
        return Result(rows, timings, {"largest_difference": self.largest_difference})

    def shapes(self, items) -> dict:
        """What the packed side computes."""
        sizes = [(len(item), item.units) for item in items]
        rows = [(n, shape) for _, n, shape in self.embedder._batches.rows(sizes, None)]
        return {
            "inputs": len(items),
            "tokens": sum(map(len, items)),
            "units": sum(item.units for item in items),
            "packed_tokens": sum(count * shape.tokens for count, shape in rows),
            "packed_units": sum(count * shape.units for count, shape in rows),
            "packed_rows": [f"{n} x {s.tokens} tokens, {s.units} units" for n, s in rows],
        }


def padded_tokens(items, size: int) -> int:
    """Tokens that right-padded batches compute."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return sum(len(part) * max(map(len, part)) for part in parts)
