# SPDX-License-Identifier: Apache-2.0
"""Few compiled programs serve many windows, and nothing is lost on the way."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.embedding.calls import Calls
from vlm2vec_jax.packing import plan
from vlm2vec_jax.training.batching import BatchPacker, choose_rows

BUDGET = 2048


def made(compiling=16 * BUDGET, unit=0.0):
    return Calls(lambda shape: shape.tokens + unit * shape.units, compiling)


def calls_of(calls, rng, count, multiple=1):
    lengths = np.clip(rng.lognormal(3.2, 0.7, count).round(), 2, 250).astype(int)
    units = (rng.random(count) < 0.3).astype(int)
    planned = plan(lengths + 300 * units, units, row_tokens=64, visual_row_tokens=768)
    found = list(calls.of(planned.groups, BUDGET, multiple))
    assert sorted(i for rows, *_ in found for row in rows for i in row) == list(range(count))
    for rows, size, shape in found:
        assert len(rows) <= size and size % multiple == 0
        for row in rows:
            assert len(row) <= shape.sequences and units[row].sum() <= shape.units
            assert (lengths + 300 * units)[row].sum() <= shape.tokens
            assert bool(units[row].sum()) == (shape.units > 0)
    return found


@given(st.integers(0, 2**32), st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_every_input_stands_in_one_call_that_holds_it(seed, counts):
    calls, rng = made(), np.random.default_rng(seed)
    for count in counts:
        calls_of(calls, rng, count, multiple=1 + seed % 2)


def test_later_windows_need_no_new_programs():
    calls, rng = made(), np.random.default_rng(0)
    seen, new = set(), []
    for _ in range(40):
        own = {(size, shape) for _, size, shape in calls_of(calls, rng, 400)}
        new.append(len(own - seen))
        seen |= own
    assert len(seen) <= 14 and sum(new[6:]) <= 3, new


def test_a_few_inputs_alone_are_not_padded():
    found = calls_of(made(), np.random.default_rng(1), 1)
    assert [(len(rows), size) for rows, size, _ in found] == [(1, 1)]


def test_what_is_wasted_again_and_again_is_compiled_in_the_end():
    calls, rng = made(), np.random.default_rng(2)
    calls_of(calls, rng, 40)
    single = np.array([20]), np.array([0])
    sizes = []
    for _ in range(1200):
        groups = plan(*single, row_tokens=64).groups
        sizes += [size * shape.tokens for _, size, shape in calls.of(groups, BUDGET, 1)]
    assert sizes[0] == 96 and sizes[-1] == 64
    assert sum(sizes) - 64 * len(sizes) <= 17 * BUDGET


def test_a_model_that_computes_longer_than_it_compiles_wastes_nothing():
    calls, rng = made(compiling=20), np.random.default_rng(3)
    for count in (90, 40, 12, 3):
        for rows, size, shape in calls_of(calls, rng, count):
            assert size == len(rows) and shape.sequences < 16


def test_what_the_vision_tower_does_for_nothing_counts_too():
    def rows_of(images):
        groups = plan(np.full(images, 300), np.ones(images, int), visual_row_tokens=320).groups
        return [size for _, size, _ in calls.of(groups, BUDGET, 1)]

    for unit, expected in ((0.0, [3]), (5e4, [1])):
        calls = made(unit=unit)
        assert (rows_of(3), rows_of(1)) == ([3], expected)


def test_a_run_foresees_its_shapes():
    rng = np.random.default_rng(0)

    def sizes(count):
        lengths = np.clip(rng.lognormal(3.2, 0.7, count).round(), 2, 250).astype(int)
        units = 5 * (rng.random(count) < 0.5).astype(int)
        return list(zip((lengths + 150 * units).tolist(), units.tolist()))

    sample = sizes(600)
    packer = BatchPacker(choose_rows(sample, longest=4096), None, chunk_tokens=8192)
    packer.foresee(sample, 256)
    known = packer.plan_step(sample[:256]).shapes
    for _ in range(30):
        assert packer.plan_step(sizes(256)).shapes == known
    # Without GradCache every row is computed: nothing is added to what a batch needs.
    plain, other = (BatchPacker(packer.rows, None, chunk_tokens=None) for _ in range(2))
    plain.foresee(sample, 256)
    most = {c.shape.row: c.shape for c in plain.plan_step(sample[:256]).chunks}
    for _ in range(64):
        other.plan_step(sizes(256))
    drawn = {c.shape.row: c.shape for c in other.plan_step(sample[:256]).chunks}
    assert all(shape.rows <= 2 * drawn[row].rows for row, shape in most.items() if row in drawn)
    main = max(drawn, key=lambda row: drawn[row].rows * row.tokens)
    assert most[main] == drawn[main]
    # Finely: no more is computed of what most batches have, and what comes later fits all the same.
    fine = BatchPacker(packer.rows, None, chunk_tokens=None, finely=True)
    fine.foresee(sample, 256)
    fewer = {c.shape.row: c.shape for c in fine.plan_step(sample[:256]).chunks}
    assert fewer[main].rows <= most[main].rows
    before = fine.shapes
    for _ in range(200):
        fine.plan_step([sample[i] for i in rng.integers(0, len(sample), 256)])
    assert fine.shapes == before
    # A run that goes on keeps the shapes that it had.
    again = BatchPacker(packer.rows, None, chunk_tokens=8192, shapes=known[:1])
    again.foresee(sample, 256)
    assert len(again.plan_step([sample[0]]).shapes) <= 2
