# SPDX-License-Identifier: Apache-2.0
"""The mixture: every row once per epoch, batches a pure function of (sources, seed, step)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from data_files import make_train
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import open_train
from vlm2vec_jax.errors import UserError


class Table:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def take(self, rows):
        return [{"qry": str(row)} for row in rows]


class Rows:
    """As much of a source as a mixture needs."""

    def __init__(self, subset, count):
        self.subset, self.split, self.limit, self.table = subset, "original", None, Table(count)
        self.rows = np.arange(count)

    def __len__(self):
        return len(self.rows)


sizes = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any)


def mixture(counts, seed):
    sources: Any = [Rows(f"S{i}", n) for i, n in enumerate(counts)]
    return Mixture(sources, seed)


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_every_row_comes_once_in_every_epoch(counts, seed, batch_size):
    mix = mixture(counts, seed)
    everything = sorted((s, r) for s, n in enumerate(counts) for r in range(n))
    steps = -(-3 * len(mix) // batch_size)
    drawn = np.concatenate([mix.batch_indices(step, batch_size) for step in range(steps)])
    for epoch in range(3):
        part = drawn[epoch * len(mix) : (epoch + 1) * len(mix)]
        assert sorted(map(tuple, part.tolist())) == everything


@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(1, 9))
def test_a_batch_needs_no_history(counts, seed, step, batch_size):
    batch = mixture(counts, seed).batch_indices(step, batch_size)
    other = mixture(counts, seed)
    other.batch_indices(0, 3)
    np.testing.assert_array_equal(batch, other.batch_indices(step, batch_size))
    # The stream of rows does not depend on the batch size, only its cutting does.
    ones = [other.batch_indices(step * batch_size + i, 1)[0] for i in range(batch_size)]
    np.testing.assert_array_equal(batch, ones)


def test_epochs_and_seeds_differ():
    mix = mixture([50], 0)
    epochs = [mix.batch_indices(e, 50)[:, 1].tolist() for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    assert epochs[0] != mixture([50], 1).batch_indices(0, 50)[:, 1].tolist()


def test_neighbouring_seeds_do_not_share_epochs():
    mixtures = [mixture([40], seed) for seed in range(4)]
    orders = {tuple(m.batch_indices(e, 40)[:, 1]) for m in mixtures for e in range(4)}
    assert len(orders) == 16


def test_batches_mix_subsets_in_proportion():
    drawn = mixture([900, 100], 3).batch_indices(0, 500)
    assert 0.84 < np.mean(drawn[:, 0] == 0) < 0.96


def test_what_cannot_be_mixed():
    with pytest.raises(UserError, match="no rows to train on in S0"):
        mixture([0], 0)
    with pytest.raises(UserError, match="seed -1"):
        mixture([3], -1)
    with pytest.raises(UserError, match="comes twice"):
        twice: Any = [Rows("A", 1), Rows("A", 1)]
        Mixture(twice, 0)
    with pytest.raises(UserError, match="no batch"):
        mixture([3], 0).batch_indices(-1, 2)


def test_the_fingerprint_tells_what_batches_depend_on(tmp_path):
    make_train(tmp_path / "one", {"A": 9, "B": 5})
    make_train(tmp_path / "two", {"A": 9, "B": 5})
    sources = open_train(tmp_path / "one")
    print_ = Mixture(sources, 1).fingerprint(4)
    assert json.loads(json.dumps(print_)) == print_
    assert print_ == Mixture(open_train(tmp_path / "two"), 1).fingerprint(4)
    others = [
        Mixture(sources, 2).fingerprint(4),
        Mixture(sources, 1).fingerprint(8),
        Mixture(sources[::-1], 1).fingerprint(4),
        Mixture(sources[:1], 1).fingerprint(4),
        Mixture(open_train(tmp_path / "one", limit=6), 1).fingerprint(4),
        Mixture([sources[0].select(np.arange(1, 9)), sources[1]], 1).fingerprint(4),
        Mixture([sources[0].select(np.arange(8)), sources[1]], 1).fingerprint(4),
    ]
    texts = {json.dumps(p, sort_keys=True) for p in [print_, *others]}
    assert len(texts) == 8


def blocks(counts, seed, size):
    return Mixture([Rows(f"S{i}", n) for i, n in enumerate(counts)], seed, sub_batch=size)


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(0, 10**6))
def test_sub_batches_hold_rows_of_one_subset(counts, seed, size, step):
    mix = blocks(counts, seed, size)
    drawn = mix.batch_indices(step, 3 * size)
    for part in np.split(drawn, 3):
        assert len(set(part[:, 0])) == 1
        rows = part[:, 1]
        assert rows.min() >= 0 and rows.max() < counts[part[0, 0]]
        if counts[part[0, 0]] >= size:
            assert len(set(rows)) == size
    np.testing.assert_array_equal(drawn, blocks(counts, seed, size).batch_indices(step, 3 * size))


def test_sub_batches_cover_an_epoch_and_differ_between_epochs():
    mix = blocks([40, 20], 5, 4)
    epochs = [mix.batch_indices(e, 60).tolist() for e in range(3)]
    everything = sorted([0, r] for r in range(40)) + [[1, r] for r in range(20)]
    assert all(sorted(rows) == everything for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # Subsets alternate at random and not in a fixed pattern.
    assert len({tuple(rows[i][0] for i in range(0, 60, 4)) for rows in epochs}) == 3


def test_what_does_not_fill_a_block_gets_its_turn():
    """Seven rows are one block of four each epoch; which four changes."""
    mix = blocks([7], 0, 4)
    seen = {r for e in range(20) for r in mix.batch_indices(e, 4)[:, 1].tolist()}
    assert seen == set(range(7))


def test_sub_batches_are_part_of_the_fingerprint():
    sources = [Rows("A", 9)]
    same = Mixture(sources, 0, sub_batch=1).fingerprint(4)
    assert same == Mixture(sources, 0).fingerprint(4)
    assert Mixture(sources, 0, sub_batch=2).fingerprint(4) != same
