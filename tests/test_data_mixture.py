# SPDX-License-Identifier: Apache-2.0
"""The mixture: every row once per epoch, batches a pure function of (sources, seed, step)."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_files import make_train, train_rows, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec_jax.config import Config, DataConfig, check
from vlm2vec_jax.data import membership
from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import open_train
from vlm2vec_jax.data.permute import keyed, permute
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import call
from vlm2vec_jax.training.data import open_mixture
from vlm2vec_jax.training.fingerprint import explain_difference


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

    def keys(self, row, values):
        return (values["qry"], ""), ("", ""), []


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


# Permutations


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one_and_has_a_way_back(count, key):
    index = np.arange(count)
    there = permute(index, count, np.uint64(key))
    assert sorted(there.tolist()) == index.tolist()
    np.testing.assert_array_equal(permute(there, count, np.uint64(key), inverse=True), index)


def test_permutations_are_elementwise_and_fixed_for_ever():
    """A batch must not change with a version: these numbers are part of the format."""
    counts = np.array([5, 1, 1000, 2**40])
    keys = keyed(7, np.arange(4), 3)
    together = permute(counts - 1, counts, keys)
    alone = [int(permute(c - 1, c, k)) for c, k in zip(counts, keys)]
    assert together.tolist() == alone
    assert permute(np.arange(8), 8, keyed(0, 0, 0)).tolist() == PERMUTED
    assert int(keyed(1, 2)) != int(keyed(2, 1))


PERMUTED = [1, 4, 3, 6, 7, 0, 2, 5]


def test_permutations_look_random():
    """Every place is as likely for the first element, and neighbours part."""
    firsts = permute(0, 10, keyed(np.arange(5000)))
    counts = np.bincount(firsts, minlength=10)
    assert (np.abs(counts - 500) < 100).all()
    moved = permute(np.arange(10_000), 10_000, keyed(3))
    assert abs(np.corrcoef(np.arange(10_000), moved)[0, 1]) < 0.05
    assert (np.abs(np.diff(moved)) == 1).mean() < 0.01


# Weights and stopping rules

weighted = st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 5)), min_size=1, max_size=4)


def weighted_mixture(pairs, seed, size=0):
    sources: Any = [Rows(f"S{i}", n) for i, (n, _) in enumerate(pairs)]
    weights = {f"S{i}": weight for i, (_, weight) in enumerate(pairs)}
    return Mixture(sources, seed, sub_batch=size, weights=weights)


@settings(max_examples=15, deadline=None)
@given(weighted, st.integers(0, 99), st.sampled_from([0, 3]))
def test_weights_are_kept_and_rows_come_in_rounds(pairs, seed, size):
    mix = weighted_mixture(pairs, seed, size)
    drawn = mix.batch_indices(0, 1000 * len(pairs) * max(size, 1))
    shares = np.bincount(drawn[:, 0], minlength=len(pairs)) / len(drawn)
    wanted = np.array([weight for _, weight in pairs])
    np.testing.assert_allclose(shares, wanted / wanted.sum(), atol=2e-3)
    for s, (count, _) in enumerate(pairs):
        times = np.bincount(drawn[drawn[:, 0] == s, 1], minlength=count)
        if not size:  # none comes again before all have been seen
            assert times.max() - times.min() <= 1


def test_equal_weights_are_not_proportional():
    mix = weighted_mixture([(900, 1), (100, 1)], 3)
    assert abs(np.mean(mix.batch_indices(0, 2000)[:, 0]) - 0.5) < 0.01


@settings(max_examples=15, deadline=None)
@given(weighted, st.integers(0, 99), st.sampled_from([0, 2]), st.integers(1, 40))
def test_stopping_rules_against_counting(pairs, seed, size, batch_size):
    """A rule's last batch is the first with which every row (of whole blocks) has been seen."""
    mix = weighted_mixture(pairs, seed, size)
    first, last = mix.steps("first_exhausted", batch_size), mix.steps("all_exhausted", batch_size)
    assert mix.steps("", batch_size) is None and 1 <= first <= last
    drawn = mix.rows_at(np.arange(last * batch_size))
    ends = []
    for s, (count, _) in enumerate(pairs):
        rows = max(size, 1) * max(1, count // max(size, 1))  # in blocks; a tiny one repeats itself
        mine = np.flatnonzero(drawn[:, 0] == s)
        _, seen = np.unique(drawn[mine, 1], return_index=True)
        assert len(seen) >= min(rows, count)
        # With `rows` different rows seen for the first time, it has been gone through once.
        ends.append(int(mine[np.sort(seen)[min(rows, count) - 1]]) // batch_size + 1)
    assert max(ends) <= last and min(ends) <= first
    if not size:
        assert (min(ends), max(ends)) == (first, last)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"S0": 1}, "no weight for subset 'S1'"),
        ({"S0": 1, "S1": 0}, "must be above 0"),
        ({"S0": 1, "S1": float("nan")}, "must be above 0"),
        ({"S0": 1, "S1": 1, "S9": 1}, "'S9', which is no subset"),
    ],
)
def test_weights_that_cannot_be(weights, said):
    sources: Any = [Rows("S0", 4), Rows("S1", 4)]
    with pytest.raises(UserError, match=said):
        Mixture(sources, 0, weights=weights)


def test_membership_tells_rows_and_their_order_apart():
    mix = mixture([40, 30], 0)
    hashes = [mix.membership(step, 8) for step in range(20)]
    assert len(set(hashes)) == 20 and all(len(h) == 64 for h in hashes)
    assert mixture([40, 30], 0).membership(3, 8) == hashes[3]
    assert mixture([40, 30], 1).membership(3, 8) != hashes[3]


def test_content_changed_in_place_changes_the_fingerprint(tmp_path):
    make_train(tmp_path / "one", {"A": 9})
    make_train(tmp_path / "two", {"A": 9})
    before = Mixture(open_train(tmp_path / "one"), 1).fingerprint(4)
    (path,) = (tmp_path / "two" / "A").glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[4]["qry"] += "!"
    write_parquet(tmp_path / "two" / "A", "original", rows)
    after = Mixture(open_train(tmp_path / "two"), 1).fingerprint(4)
    lines = explain_difference(before, after)
    assert [line.split(": ")[0] for line in lines] == [
        "subsets.A.content_sha256", "subsets.A.sample_sha256"
    ]  # fmt: skip


def test_a_million_rows_cost_no_more_per_step():
    """Nothing grows with the number of rows or the step: a late batch of a large set, at once."""
    mix = mixture([900_000, 100_000], 0)
    begin = time.perf_counter()
    mix.batch_indices(10**9, 1024)
    assert time.perf_counter() - begin < 1.0


# Settings of single subsets, by way of the configuration


def experiment(root, **data):
    return Config(
        data=DataConfig(path=str(root), **data), batch_size=4, seed=3, output=str(root / "out")
    )


def test_splits_limits_and_weights_of_single_subsets(tmp_path):
    make_train(tmp_path, {"A": 9, "B": 5, "C": 7})
    write_parquet(tmp_path / "B", "diverse_instruction", train_rows("B", 6))
    mix = open_mixture(
        experiment(
            tmp_path,
            splits="B=diverse_instruction",
            limits="A=4,B=3",
            weights="A=1,B=2,C=1",
            max_examples_per_subset=6,
        )
    )
    assert [(s.subset, s.split, len(s)) for s in mix.sources] == [
        ("A", "original", 4), ("B", "diverse_instruction", 3), ("C", "original", 6),
    ]  # fmt: skip
    assert mix.weights == {"A": 0.25, "B": 0.5, "C": 0.25}
    equal = open_mixture(experiment(tmp_path, weights="equal", subsets="C,A"))
    assert equal.weights == {"C": 0.5, "A": 0.5}


def test_settings_of_subsets_that_are_not_there(tmp_path):
    make_train(tmp_path, {"A": 9, "B": 5})
    with pytest.raises(UserError, match="data.limits names 'Z'"):
        open_mixture(experiment(tmp_path, subsets="A", limits="Z=3"))
    config = experiment(tmp_path, limits="A=x", weights="A", splits="B=a,B=b")
    config.model.path = "model"
    with pytest.raises(UserError) as caught:
        check(config)
    for part in ("data.limits: A must have a whole", "NAME=VALUE, not 'A'", "'B' comes twice"):
        assert part in str(caught.value)


def test_the_membership_command(tmp_path, repository, capsys):
    make_train(tmp_path, {"A": 9, "B": 5})
    flags = ["--config", str(repository / "configs/mmeb.py"), "--config.model.path=model"]
    flags += [f"--config.data.path={tmp_path}", "--config.data.subsets=A,B"]
    flags += [f"--config.output={tmp_path / 'out'}", "--config.batch_size=4", "--config.seed=3"]
    argv = ["membership", *flags, "--step", "2", "--count", "2", "--list"]
    assert call(membership.main, membership.define, argv) == 0
    told = capsys.readouterr().out.splitlines()
    mix = Mixture(open_train(tmp_path, ["A", "B"]), 3)
    assert [told[0], told[5]] == [f"{s} {mix.membership(s - 1, 4)}" for s in (2, 3)]
    assert len(told) == 10 and all(line.startswith(("  A ", "  B ")) for line in told[1:5])
    assert call(membership.main, membership.define, ["membership", *flags, "--step", "0"]) == 2
