# SPDX-License-Identifier: Apache-2.0
"""What each remedy is worth: the reference-shaped step with its habits turned off one by one.

DoRA with the recipe's dropout, GradCache in chunks of 2, every other query a photograph. Each row
stands against the one before it; the last is our step, one compiled program, against the first:
the product. The baseline of `Form` and what it costs are described in `reference_shaped.py`.
"""

from __future__ import annotations

import dataclasses

from benchmarks import common
from benchmarks.beds import Bed
from benchmarks.common import How, Result, Row
from benchmarks.train_step import GRID, Bench


def train(how: How) -> Result:
    """The step of the paper's recipe."""
    import jax

    from benchmarks.reference_shaped import PLAIN, REFERENCE, REMEDIES

    bed = Bed(how.size)
    sides = few_shapes(bed, how, how.pick(4, 2) if how.device == "cpu" else 64)
    key = jax.random.key(5)
    peft = Bench(bed, how, "peft", *sides, dropout=0.1)
    fused = Bench(bed, how, "dora", *sides, dropout=0.1)
    form, cases = REFERENCE, {"reference-shaped": peft.shaped(REFERENCE, chunk=2, key=key)}
    for switches, words in REMEDIES:
        off = dict.fromkeys(switches, False)
        form = dataclasses.replace(form, **off)
        cases[words] = fused.shaped(form, chunk=2, key=key)
    assert form == PLAIN
    cases["one compiled program"] = fused.ours(cached=True, key=key)
    timing = common.alternate(cases, how.rounds)
    names = list(cases)
    rows = [
        Row(
            name,
            timing.median(name),
            "s",
            before or "-",
            None if before is None else timing.median(before),
            None if before is None else timing.ratio(before, name),
        )
        for before, name in zip([None, *names], names)
    ]
    last, first = names[-1], names[0]
    product = timing.ratio(first, last)
    told = {
        **fused.shapes(cached=True),
        "run_tokens": {n: c.run_tokens for n, c in cases.items() if hasattr(c, "run_tokens")},
        "run_crops": {n: c.run_units for n, c in cases.items() if hasattr(c, "run_units")},
    }
    rows.append(
        Row("all remedies", timing.median(last), "s", first, timing.median(first), product, 1.6)
    )
    rows[-1].shapes = told
    return Result(rows, {"remedies": timing})


def few_shapes(bed: Bed, how: How, pairs: int):
    """Pairs whose chunks of 2 all have one of two shapes: programs take long to compile.

    In each chunk of queries a photograph with a question stands beside a short text, in each
    chunk of targets a longer text beside a shorter one.
    """
    import numpy as np

    rng = np.random.default_rng(how.seed)
    queries, targets = [], []
    for n in range(pairs):
        long = n % 2 == 0
        words = int(rng.integers(8, 3 * GRID))
        queries.append(bed.photo(rng, 1, 2, 2 * GRID) if long else bed.text(rng, words))
        targets.append(bed.text(rng, 3 * GRID if long else int(rng.integers(4, 2 * GRID))))
    return queries, targets
