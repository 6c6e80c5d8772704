# SPDX-License-Identifier: Apache-2.0
"""The planner and the filling of rows: properties on random inputs, the targets, the edges."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import mmeb_mix, texts
from vlm2vec_jax import packing
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.packing import RowShape, arrange, chunked, fill, plan, row_batches, unpack

SHARED, PER_UNIT = 2, 3
LAYOUT = VisualLayout(SHARED, PER_UNIT, {"crops": ((2, 2), "uint8"), "crop_info": ((1,), "int32")})
SMALL = {"row_tokens": 64, "visual_row_tokens": 96, "max_row_tokens": 200}

ITEMS = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 30), st.just(0)),
        st.tuples(st.integers(1, 200), st.just(0)),
        st.integers(1, 8).flatmap(lambda u: st.tuples(st.integers(9 * u, 9 * u + 60), st.just(u))),
        st.tuples(st.integers(5, 30), st.integers(1, 8)),
    ),
    max_size=60,
)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_row_units": st.integers(8, 20),
        "max_row_sequences": st.integers(1, 9),
        "shrink": st.booleans(),
    },
)


def split(items):
    return np.array([n for n, _ in items], int), np.array([u for _, u in items], int)


def encode(items, seed=0):
    """Items whose every value says whose it is: token = 1000 * item + place."""
    rng = np.random.default_rng(seed)
    encoded = []
    for i, (length, units) in enumerate(items):
        features = np.full(length, -1, np.int32)
        if units:
            places = rng.permutation(length)[: min(length, units * PER_UNIT + SHARED)]
            features[places] = rng.integers(0, SHARED + units * PER_UNIT, len(places))
        visual = {}
        if units:
            info = (100 * i + np.arange(1, units + 1, dtype=np.int32))[:, None]
            visual = {"crops": rng.integers(1, 255, (units, 2, 2), np.uint8), "crop_info": info}
        tokens = (1000 * i + np.arange(length)).astype(np.int32)
        encoded.append(EncodedInput(tokens, features, 7 * tokens + 1, visual, units))
    return encoded


def check_rows(batch, encoded, seen):
    """Every sequence in the rows equals its item, and nothing else is there."""
    for r in range(len(batch.tokens)):
        present = [s for s in range(batch.slot.shape[1]) if batch.slot[r, s] >= 0]
        assert present == list(range(len(present))), "empty places come last"
        start = unit = 0
        for s in present:
            item = encoded[batch.slot[r, s]]
            seen.append(int(batch.slot[r, s]))
            part = slice(start, start + len(item))
            assert (batch.segment_ids[r, part] == s + 1).all()
            np.testing.assert_array_equal(batch.tokens[r, part], item.tokens)
            np.testing.assert_array_equal(batch.positions[r, part], item.positions)
            assert batch.pool_index[r, s] == start + len(item) - 1
            for ours, theirs in zip(batch.feature_index[r, part], item.feature_index):
                if theirs < SHARED:
                    assert ours == theirs
                else:
                    # The same cell of the same crop, found through the row's own arrays.
                    row_unit, cell = divmod(ours - SHARED, PER_UNIT)
                    own_unit, own_cell = divmod(theirs - SHARED, PER_UNIT)
                    assert cell == own_cell
                    for name, values in item.visual.items():
                        assert (batch.visual[name][r, row_unit] == values[own_unit]).all()
            for name, values in item.visual.items():
                assert (batch.visual[name][r, unit : unit + item.units] == values).all()
            start, unit = start + len(item), unit + item.units
        assert not batch.segment_ids[r, start:].any()
        assert not batch.tokens[r, start:].any()
        assert not batch.positions[r, start:].any()
        assert (batch.feature_index[r, start:] == -1).all()
        assert not batch.pool_index[r, len(present) :].any()
        for leaf in batch.visual.values():
            assert not leaf[r, unit:].any()


@settings(max_examples=150, deadline=None)
@given(ITEMS, LIMITS)
def test_plan_properties(items, limits):
    lengths, units = split(items)
    made = plan(lengths, units, **SMALL, **limits)
    assert made == plan(lengths.tolist(), units.tolist(), **SMALL, **limits)
    placed = [i for group in made.groups for row in group.rows for i in row]
    assert sorted(placed) == list(range(len(items)))
    keys = [(group.visual, group.shape.tokens) for group in made.groups]
    assert keys == sorted(set(keys)), "texts first, then by length, one group each"
    for group in made.groups:
        shape = group.shape
        assert shape.tokens % 16 == 0 and shape.tokens <= 208
        if not limits.get("shrink"):
            known = packing.row_lengths(96, 200, fine=True) if group.visual else (64, 96, 128, 192)
            assert shape.tokens in (*known, 208)
        assert shape.units == packing.round_units(shape.units)
        assert shape.sequences == packing.round_sequences(shape.sequences)
        for row, tokens, row_units in zip(group.rows, group.tokens, group.units):
            assert tokens == lengths[row].sum() <= shape.tokens
            assert row_units == units[row].sum() <= shape.units
            assert 1 <= len(row) <= shape.sequences
            assert all((units[i] > 0) == group.visual for i in row)
    assert made.real_tokens == lengths.sum() and made.real_units == units.sum()
    assert 0 < made.token_share <= 1 and 0 < made.unit_share <= 1


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(0, 9))
def test_filled_batches_hold_every_item_once(items, per_batch, multiple, seed):
    encoded, seen = encode(items, seed), []
    made = plan(*split(items), **SMALL)
    out = np.full((len(items), 2), np.nan, np.float32)
    for group in made.groups:
        for rows, num_rows in row_batches(group, per_batch, row_multiple=multiple):
            assert num_rows % multiple == 0 and len(rows) <= num_rows
            batch = fill(rows, encoded, group.shape, LAYOUT, num_rows=num_rows)
            assert batch.tokens.shape == (num_rows, group.shape.tokens)
            assert batch.slot.shape == (num_rows, group.shape.sequences)
            assert {k: v.shape[1] for k, v in batch.visual.items()} == (
                dict.fromkeys(LAYOUT.units, group.shape.units) if group.visual else {}
            )
            check_rows(batch, encoded, seen)
            ends = np.take_along_axis(batch.tokens, batch.pool_index, 1)
            unpack(np.stack([ends, -ends], -1).astype(np.float32), batch.slot, out)
    assert sorted(seen) == list(range(len(items)))
    last = np.array([item.tokens[-1] for item in encoded], np.float32)
    np.testing.assert_array_equal(out, np.stack([last, -last], -1) if items else out)


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.sampled_from([64, 200, 1000]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_chunks_hold_every_item_once(items, chunk_tokens, multiple, processes):
    multiple *= processes
    encoded, seen = encode(items), []
    made = plan(*split(items), **SMALL)
    arranged = arrange(made, chunk_tokens=chunk_tokens, row_multiple=multiple)
    for p in range(processes):
        part = (p, processes)
        mine = {i: encoded[i] for a in arranged for i in a.items(part)}
        groups = chunked(
            made, mine, LAYOUT, chunk_tokens=chunk_tokens, row_multiple=multiple, part=part
        )
        assert len(groups) == len(made.groups)
        for group, planned in zip(groups, arranged):
            shape = planned.shape
            count = int(group.num_chunks)
            assert group.num_chunks.dtype == np.int32 and 1 <= count <= shape.chunks
            assert shape.chunks == packing.round_chunks(shape.chunks)
            assert shape.rows % multiple == 0
            assert shape.rows == multiple or shape.rows * shape.row.tokens <= chunk_tokens
            for leaf in (*group.batch[:-1], *group.batch.visual.values()):
                assert leaf.shape[:2] == (shape.chunks, shape.rows // processes)
            assert (group.batch.slot[count:] == -1).all()
            for k in range(shape.chunks):
                visual = {name: leaf[k] for name, leaf in group.batch.visual.items()}
                leaves = [leaf[k] for leaf in group.batch[:-1]]
                check_rows(packing.PackedBatch(*leaves, visual), encoded, seen)
    assert sorted(seen) == list(range(len(items)))


def test_chunks_are_balanced():
    lengths = np.arange(33, 65)
    (chunks,) = arrange(plan(lengths, row_tokens=64, max_row_tokens=64), chunk_tokens=512)
    real = [sum(lengths[i] for row in chunk for i in row) for chunk in chunks.chunks]
    assert len(real) == 4 and max(real) - min(real) == 0


def test_chunks_keep_earlier_shapes():
    lengths = np.r_[np.full(8, 64), np.full(8, 33)]
    made = plan(lengths, row_tokens=64, max_row_tokens=64)
    (chunks,) = arrange(made, chunk_tokens=256)
    assert chunks.shape == (RowShape(64, 0, 1), 4, 4)
    other = packing.ChunkShape(RowShape(96, 5, 2), 2, 3)
    again = arrange(
        plan(lengths[:1], row_tokens=64, max_row_tokens=64),
        chunk_tokens=256,
        at_least=[other, chunks.shape],
    )
    assert [a.shape for a in again] == [chunks.shape, other]
    assert [len(a.chunks) for a in again] == [1, 0]
    empty = packing.fill_chunks(again[1], [], LAYOUT)
    assert empty.num_chunks == 0 and empty.batch.visual["crops"].shape == (3, 2, 5, 2, 2)


def test_fixed_limits_give_fixed_shapes():
    """What training relies on: the shape of a group follows from its row length alone."""
    shapes = set()
    for seed in range(4):
        lengths, units = mmeb_mix(seed, 128 * (seed + 1), 4)
        made = plan(lengths, units, max_row_units=20, max_row_sequences=128)
        shapes |= {group.shape for group in made.groups}
    assert shapes == {RowShape(512, 0, 128), RowShape(3200, 20, 32)}


@pytest.mark.parametrize(
    "lengths, units, options",
    [
        (*mmeb_mix(0, 20_000, 4), {}),
        (*mmeb_mix(0, 20_000, 16), {"visual_row_tokens": 2048}),
        (*mmeb_mix(1, 2048, 4), {"max_row_units": 20, "max_row_sequences": 128}),
        (texts(np.random.default_rng(0), 20_000, 24, 2, 250), None, {}),
    ],
    ids=["mix of 4 crops", "mix of 16 crops", "train batch", "texts"],
)
def test_share_targets(lengths, units, options):
    made = plan(lengths, units, **options)
    assert made.token_share >= 0.93 and made.unit_share >= 0.90
    assert len(made.groups) <= 5


def test_chosen_row_length_meets_the_targets():
    for crops in (4, 16):
        lengths, units = mmeb_mix(2, 5000, crops)
        row = packing.choose_row_tokens(lengths, units, candidates=(2048, 2560, 3200, 7808))
        assert row == {4: 3200, 16: 7808}[crops]
    assert packing.choose_row_tokens([5], [0]) == packing.VISUAL_ROW_TOKENS


def test_lookahead_and_long_rows_save_rows():
    # Plain first-fit-decreasing pairs 60 with 60 and ends with four rows.
    assert len(plan([60] * 3 + [50] * 6, row_tokens=160, buckets=[160]).groups[0].rows) == 3
    # The room beside a long item goes to short ones, not to padding.
    made = plan([70] + [26] + [64] * 2, row_tokens=64, max_row_tokens=128)
    assert [(g.shape.tokens, g.rows) for g in made.groups] == [(64, [[2], [3]]), (96, [[0, 1]])]


def test_capacities_bind_one_at_a_time():
    small = {"row_tokens": 64, "visual_row_tokens": 64, "max_row_tokens": 64}
    (group,) = plan([5, 6, 7, 8, 9], **small, max_row_sequences=2).groups
    assert sorted(map(len, group.rows)) == [1, 2, 2] and group.shape.sequences == 2
    (group,) = plan([5, 6, 7, 8], [3, 2, 3, 3], **small, max_row_units=6).groups
    assert sorted(group.units) == [5, 6] and group.shape == RowShape(64, 6, 8)
    # The longest that fits has too many units: the next shorter with few enough is taken.
    (group,) = plan([30, 20, 10, 4], [2, 3, 2, 2], **small, max_row_units=4).groups
    assert sorted(map(sorted, group.rows)) == [[0, 2], [1], [3]]


def test_planner_is_fast():
    """2 us an item is the aim; the bound leaves room for a busy machine."""
    lengths, units = mmeb_mix(3, 50_000, 4)
    start = time.process_time()
    plan(lengths, units)
    assert time.process_time() - start < 50_000 * 8e-6


def test_many_different_units_stay_fast():
    rng = np.random.default_rng(0)
    lengths, units = rng.integers(100, 1000, 20_000), rng.integers(1, 30, 20_000)
    start = time.process_time()
    made = plan(lengths, units, max_row_units=32)
    assert time.process_time() - start < 2
    assert made.unit_share > 0.9


def test_empty_and_single():
    assert plan([], []).groups == () and plan([]).token_share == 1.0
    assert chunked(plan([]), [], LAYOUT, chunk_tokens=64) == ()
    (group,) = plan([512]).groups
    assert (group.shape, group.rows) == (RowShape(512, 0, 1), [[0]])
    (group,) = plan([20], shrink=True).groups
    assert group.shape == RowShape(64, 0, 1)
    (group,) = plan([20] * 11, shrink=True).groups
    assert group.shape.tokens == 256
    (group,) = plan([800], [5], shrink=True).groups
    assert group.shape == RowShape(800, 5, 1)


def test_only_text_or_only_images():
    made = plan([5, 9, 12])
    assert len(made.groups) == 1 and not made.groups[0].visual
    made = plan([500, 900], [3, 5])
    assert len(made.groups) == 1 and made.groups[0].visual and made.groups[0].shape.units == 8


def test_misfits_are_listed_together():
    lengths, units = [10, 3000, 20, 2500, 0, 900], [0, 17, 0, 0, 0, 50]
    with pytest.raises(UserError) as caught:
        plan(lengths, units, max_row_tokens=2048, max_row_units=20, visual_row_tokens=1024)
    text = str(caught.value)
    assert "4 problems" in text
    assert "item 1 is 3000 tokens long; the longest row has 2048" in text
    assert "item 3 is 2500" in text and "item 4 has 0 tokens" in text
    assert "item 5 has 50 visual units; a row has at most 40" in text
    for way_out in ("max_row_tokens", "num_crops", "max_len"):
        assert way_out in text
    with pytest.raises(UserError, match="... and 80 more"):
        plan([600] * 100, max_row_tokens=512)


def test_fill_refuses_what_does_not_fit():
    encoded = encode([(10, 0), (20, 2), (30, 3)])
    with pytest.raises(ValueError, match="overflows at item 1"):
        fill([[0, 1]], encoded, RowShape(29, 2, 2), LAYOUT)
    with pytest.raises(ValueError, match="overflows at item 2: 50 tokens and 5 units"):
        fill([[1, 2]], encoded, RowShape(64, 4, 2), LAYOUT)
    with pytest.raises(ValueError, match="2 sequences"):
        fill([[0, 1]], encoded, RowShape(64, 4, 1), LAYOUT)
    with pytest.raises(ValueError, match="2 rows do not fit in 1"):
        fill([[0], [1]], encoded, RowShape(64, 4, 1), LAYOUT, num_rows=1)
    encoded[1].visual["crops"] = encoded[1].visual["crops"][:1]
    with pytest.raises(ValueError, match="item 1: crops has shape"):
        fill([[1]], encoded, RowShape(64, 4, 1), LAYOUT)
    del encoded[2].visual["crop_info"]
    with pytest.raises(ValueError, match="item 2 has visual arrays"):
        fill([[2]], encoded, RowShape(64, 4, 1), LAYOUT)


def test_fill_writes_given_slots_and_dtypes():
    encoded = {5: encode([(4, 1)])[0]}
    batch = fill([[5]], encoded, RowShape(16, 2, 2), LAYOUT, num_rows=2, slots={5: 0})
    assert batch.slot.tolist() == [[0, -1], [-1, -1]]
    assert all(leaf.dtype == np.int32 for leaf in batch[:-1])
    assert batch.visual["crops"].dtype == np.uint8 and batch.visual["crops"].shape == (2, 2, 2, 2)


def test_row_batches_end_with_a_fraction():
    (group,) = plan([64] * 21, row_tokens=64, max_row_tokens=64).groups
    assert [n for _, n in row_batches(group, 16)] == [16, 8]
    assert [n for _, n in row_batches(group, 16, row_multiple=8)] == [16, 8]
    assert [n for _, n in row_batches(group, 19, row_multiple=4)] == [16, 8]
    assert [n for _, n in row_batches(group, 64)] == [32]
    assert [n for _, n in row_batches(group, 3, row_multiple=8)] == [8, 8, 8]


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("full", [8, 24, 1 << 20])
def test_few_rows_are_rounded_finely(multiple, full):
    found = [packing.round_rows(n, full, multiple) for n in range(1, full % 600 + 600) if n <= full]
    for n, rows in enumerate(found, 1):
        assert rows % multiple == 0 and n <= rows <= packing.halved_rows(n, full, multiple)
        assert rows < 1.25 * n + multiple
    assert found == sorted(found)
    # Four numbers of rows to a doubling.
    assert len(set(found)) <= 4 * (len(found) // multiple).bit_length() + 1
    if full > 600:
        shape = RowShape(64, 0, 1)
        made = plan([64] * 5 * multiple, row_tokens=64, max_row_tokens=64)
        (chunks,) = arrange(made, chunk_tokens=64 * full, row_multiple=multiple, finely=True)
        assert chunks.shape == (shape, 5 * multiple, 1)


def test_rounding_lists():
    assert [n for n in range(60) if packing.round_units(n) == n][20:] == [
        *range(20, 40, 2),
        *range(40, 60, 4),
    ]
    assert [packing.round_sequences(n) for n in (0, 1, 3, 9)] == [1, 1, 4, 16]
    assert sorted({packing.round_chunks(n) for n in range(1, 25)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert [packing.round_chunks(n, [2, 5]) for n in (0, 2, 3, 6)] == [2, 2, 5, 10]
    assert packing.row_lengths(512, 2048) == (512, 768, 1024, 1536, 2048)
    assert packing.row_lengths(64, 200) == (64, 96, 128, 192, 208)
    assert packing.row_lengths(4096, 1000) == (1024,)
