# SPDX-License-Identifier: Apache-2.0
"""Metrics from ranks, ranks in a corpus, and smaller vectors, against loops in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import compress, corpus, metrics, scoring


def by_definition(order: list[int], grades: dict[int, float], k: int) -> dict[str, float]:
    """The metrics of one ranked list of candidates, spelled out."""
    hits = [grades.get(c, 0.0) for c in order[:k]]
    found = sum(h > 0 for h in hits)
    precision, recall = found / k, found / len(grades) if grades else 1.0

    def dcg(values, gain):
        return sum(gain(v) / math.log2(i + 2) for i, v in enumerate(values))

    values = {
        "hit": float(found > 0),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "mrr": next((1 / (i + 1) for i, h in enumerate(hits) if h > 0), 0.0),
    }
    seen, total = 0, 0.0
    for i, h in enumerate(hits):
        if h > 0:
            seen += 1
            total += seen / (i + 1)
    values["map"] = total / min(len(grades), k) if grades else 0.0
    ideal = sorted(grades.values(), reverse=True)[:k]
    for name, gain in (("linear", lambda v: v), ("exponential", lambda v: 2**v - 1)):
        best = dcg(ideal, gain)
        values[f"ndcg_{name}"] = dcg(hits, gain) / best if best else 0.0
    return values


@given(
    lists=st.lists(
        st.dictionaries(st.integers(0, 14), st.sampled_from([1.0, 2.0, 3.0]), max_size=5),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_metrics_of_ranked_lists(lists):
    order = list(range(15))
    width = max(1, *map(len, lists))
    ranks = np.full((len(lists), width), metrics.NEVER)
    grades = np.zeros((len(lists), width))
    for n, one in enumerate(lists):
        for r, (c, g) in enumerate(one.items()):
            ranks[n, r], grades[n, r] = c + 1, g
    found = metrics.per_query(ranks, grades)
    assert len(found) == 24
    for n, one in enumerate(lists):
        for k in metrics.KS:
            for name, value in by_definition(order, one, k).items():
                assert found[f"{name}@{k}"][n] == pytest.approx(value), (name, k)
    assert metrics.mean(ranks, grades)["map@5"] == pytest.approx(found["map@5"].mean())


def test_one_truth_per_query_and_no_query():
    found = metrics.mean(np.array([1, 2, 7, metrics.NEVER]))
    assert found["hit@1"] == found["precision@1"] == found["recall@1"] == 0.25
    assert found["hit@5"] == 0.5 and found["precision@5"] == pytest.approx(0.1)
    assert found["mrr@10"] == pytest.approx((1 + 1 / 2 + 1 / 7) / 4) == found["map@10"]
    assert found["ndcg_linear@5"] == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert found["ndcg_linear@10"] == found["ndcg_exponential@10"]
    assert set(metrics.mean(np.zeros(0, int)).values()) == {0.0}


# ------------------------------------------------------------------------------------- the corpus

VALUE = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, np.nan, np.inf, -np.inf])


@given(
    values=st.lists(VALUE, min_size=1, max_size=12),
    relevant=st.lists(st.sets(st.integers(0, 11), max_size=4), min_size=1, max_size=5),
)
def test_ranks_against_a_loop_in_plain_python(values, relevant):
    values = np.array(values, np.float32)
    wanted = [sorted({c % len(values) for c in one}) for one in relevant]
    grades = [[1.0 + c % 3 for c in one] for one in wanted]
    found = corpus.rank(
        np.ones((len(wanted), 1)), values[:, None], wanted, grades, similarity="dot", top=4,
        queries_per_chunk=2, targets_per_block=128,
    )  # fmt: skip
    finite = np.isfinite(values)
    best = sorted((-v, c) for c, v in enumerate(values) if finite[c])[:4]
    for n, own in enumerate(wanted):
        others = [c for c in range(len(values)) if c not in own]
        for r, c in enumerate(own):
            if not finite[c]:
                assert found.ranks[n, r] == metrics.NEVER
            else:
                before = [d for d in own if finite[d] and values[d] > values[c]]
                equal = [d for d in own if values[d] == values[c]]
                lowest = 1 + len(before) + sum(not values[c] > values[o] for o in others)
                assert lowest <= found.ranks[n, r] < lowest + len(equal)
            ahead = [
                o for o in others
                if values[o] > values[c] or (np.isnan(values[o]) and not np.isnan(values[c]))
            ]  # fmt: skip
            assert found.ahead[n, r] == len(ahead)
        places = found.ranks[n][found.ranks[n] < metrics.NEVER]
        assert len(set(places.tolist())) == len(places)
        good = [values[o] for o in others if finite[o]]
        assert (found.rival[n] >= 0) == bool(good)
        if good:
            assert found.rival[n] in others and values[found.rival[n]] == max(good)
        assert found.tied[n] == any(values[o] == values[c] for o in others for c in own)
        shown = [values[c] for c in found.top[n] if c >= 0]
        assert shown == [-v for v, _ in best]
        assert len({c for c in found.top[n].tolist() if c >= 0}) == len(shown)


def test_a_corpus_in_blocks_agrees_with_lists_of_all_candidates():
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((700, 16)).astype(np.float32)
    targets[300] = targets[20]  # a double
    queries = rng.standard_normal((40, 16)).astype(np.float32)
    truth = rng.permutation(700)[:40]
    truth[3] = 20
    lists = [[t, *(c for c in range(700) if c != t)] for t in truth]
    judged = scoring.judge(queries, targets, range(40), lists)
    blocks = corpus.rank(
        queries, targets, [[t] for t in truth], queries_per_chunk=16, targets_per_block=128
    )
    whole = corpus.rank(queries, targets, [[t] for t in truth])
    np.testing.assert_array_equal(blocks.ranks[:, 0], judged.rank)
    np.testing.assert_array_equal(whole.ranks, blocks.ranks)
    np.testing.assert_array_equal(whole.top, blocks.top)
    np.testing.assert_array_equal(blocks.tied, judged.tied)
    assert blocks.tied[3] and blocks.ranks[3, 0] > 1
    np.testing.assert_allclose(blocks.scores[:, 0], judged.truth_score, atol=1e-6)


def test_what_cannot_be_ranked_is_told():
    q, c = np.ones((2, 3)), np.ones((4, 3))
    with pytest.raises(UserError, match="query 0: relevant rows outside(.|\n)*query 1: a relevant"):
        corpus.rank(q, c, [[4], [1, 1]])
    with pytest.raises(UserError, match="grade above 0"):
        corpus.rank(q, c, [[1], [2]], [[0.0], [1.0]])
    with pytest.raises(UserError, match="relevant candidates of 1"):
        corpus.rank(q, c, [[1]])
    with pytest.raises(UserError, match="not 'euclid'"):
        corpus.rank(q, c, [[1], [2]], similarity="euclid")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- smaller vectors


def test_variants_and_their_sizes():
    found = compress.variants([64, 128], ["int8", "binary"])
    assert [v.name for v in found] == [
        "int8", "binary", "dim64", "dim64-int8", "dim64-binary",
        "dim128", "dim128-int8", "dim128-binary",
    ]  # fmt: skip
    assert [v.bytes_of(512) for v in found[:4]] == [512, 64, 256, 64]
    with pytest.raises(UserError, match="0 dimensions(.|\n)*'int4'"):
        compress.variants([0], ["int4"])


def test_int8_and_binary():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 12)).astype(np.float32)
    x[7, 3] = np.nan
    x[:, 5] = 0.25  # a dimension that says nothing
    x[7, 5] = 0.25
    targets = np.arange(0, 40)
    eight = compress.compress(x, targets, compress.Variant(None, "int8"))
    step = np.nanmax(x[:40], axis=0) - np.nanmin(x[:40], axis=0)
    good = [n for n in range(40) if n != 7]
    assert np.abs(eight - x)[good].max() <= step.max() / 255
    assert np.isnan(eight[7]).all() and (eight[good, 5] == 0.25).all()
    # The codes are those of sentence-transformers: 256 steps from the lowest to the highest.
    assert all(len(np.unique(eight[good, d])) <= 256 for d in range(12))
    signs = compress.compress(x, targets, compress.Variant(4, "binary"))
    assert signs.shape == (50, 4) and np.isnan(signs[7]).all()
    same = (signs[0] == signs[1]).sum()
    assert signs[0] @ signs[1] == 2 * same - 4
    cut = compress.compress(x, targets, compress.Variant(4))
    np.testing.assert_array_equal(cut, x[:, :4])
    nothing = compress.compress(x * np.nan, targets, compress.Variant(None, "int8"))
    assert np.isnan(nothing).all()
