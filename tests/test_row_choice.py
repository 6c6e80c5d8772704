# SPDX-License-Identifier: Apache-2.0
"""The Embedder's row lengths: every input once, near the cheapest, few shapes, errors kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.planning import plan
from vlm2vec_jax.row_choice import Price, batch_rows, plan_rows

OPTIONS = {"most": 4096, "longest": 10_000, "step": 32}
SMALL, REAL = Price(384, 48.0, 1e8), Price(3072, 48.0, 8e9)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 17)), max_size=40),
    st.sampled_from([128, 4096]),
    st.sampled_from([32, 128]),
)
def test_every_input_stands_in_one_row_that_holds_it(sizes, most, step):
    lengths, units = [n for n, _ in sizes], [u for _, u in sizes]
    planned, taken = plan_rows(lengths, units, price=SMALL, most=most, longest=10_000, step=step)
    rows = [(group, row) for group in planned.groups for row in group.rows]
    assert sorted(i for _, row in rows for i in row) == list(range(len(sizes)))
    for group, row in rows:
        assert sum(lengths[i] for i in row) <= group.shape.tokens
        assert sum(units[i] for i in row) <= group.shape.units
        assert len({units[i] > 0 for i in row}) == 1
    assert len(taken) == len({u > 0 for u in units})


def test_small_models_take_short_rows_and_wide_ones_fill_them():
    photos, units = [783] * 64, [5] * 64
    small, _ = plan_rows(photos, units, price=SMALL, **OPTIONS)
    assert [group.shape.tokens for group in small.groups] == [800]
    real, _ = plan_rows(photos, units, price=REAL, **{**OPTIONS, "step": 128})
    assert [group.shape.tokens for group in real.groups] == [1664]


def test_towers_that_look_at_the_whole_row_take_fewer_images_to_a_row():
    def flops(pairs):
        return lambda tokens, units: 2.0 * tokens * 12 * 384**2 + units * 1e8 + pairs * units**2

    alone, crowded = (Price.from_flops(384, flops(pairs)) for pairs in (0.0, 1e6))
    assert alone.unit == crowded.unit == pytest.approx(1e8 / (24 * 384**2))
    assert alone.crowding(1000) == 1 and crowded.crowding(100) == pytest.approx(2.5)
    photos, units = [100] * 64, [88] * 64
    few, many = (plan_rows(photos, units, price=p, **OPTIONS)[0] for p in (crowded, alone))
    assert max(len(row) for group in few.groups for row in group.rows) == 1
    assert max(len(row) for group in many.groups for row in group.rows) > 1


def test_it_is_no_dearer_than_the_planner_s_defaults():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(24), 0.7, 500), 2, 250).astype(int)
    units = np.zeros(500, int)
    planned, _ = plan_rows(lengths, units, price=SMALL, **OPTIONS)
    assert SMALL.of(planned) < 0.9 * SMALL.of(plan(lengths, units, shrink=True))
    assert planned.token_share > 0.85


def test_a_length_in_use_wins_a_near_tie_only():
    photos, units = [783] * 20, [5] * 20
    _, taken = plan_rows(photos, units, price=SMALL, used={(True, 832)}, **OPTIONS)
    assert taken == {(True, 832)}
    _, taken = plan_rows(photos, units, price=SMALL, used={(True, 3200), (False, 832)}, **OPTIONS)
    assert taken == {(True, 800)}


def test_inputs_that_are_too_long_are_named_by_their_own_number():
    with pytest.raises(UserError, match=r"item 2 is 10001 tokens long"):
        plan_rows([5, 800, 10_001], [0, 5, 0], price=SMALL, **OPTIONS)


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([1, 2, 8]))
def test_rows_of_a_call(rows, full, multiple):
    size = batch_rows(rows, full, multiple)
    assert size % multiple == 0 and 1 <= size < full + multiple
    calls = -(-rows // size)
    assert calls <= -(-rows // full) or multiple > 1
    # Few sizes, so few programs; little is computed for nothing.
    if multiple == 1 and calls <= 3:
        assert calls * size <= 1.25 * rows + calls
