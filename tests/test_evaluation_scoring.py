# SPDX-License-Identifier: Apache-2.0
"""Scoring: the reference's numbers, and what it gets wrong (ties, values that are not finite)."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import distinct, scoring


def dot(scores: list[list[float]], truth_again: bool = False) -> scoring.Verdicts:
    """Judge rows whose scores are given: one-dimensional vectors and a query of 1."""
    flat = [s for row in scores for s in row]
    ends = np.cumsum([len(row) for row in scores])
    lists = [list(range(e - len(r), e)) for e, r in zip(ends, scores)]
    if truth_again:
        lists = [[*row, row[0]] for row in lists]
    targets = np.array(flat, np.float32)[:, None]
    return scoring.judge(np.ones((1, 1)), targets, [0] * len(scores), lists, similarity="dot")


def golden(folder, subset):
    rows = json.loads((folder / f"{subset}_rows.json").read_text())
    index = json.loads((folder / f"{subset}_index.json").read_text())
    arrays = np.load(folder / f"{subset}_embeddings.npz")
    queries = {(k["text"], k["img_path"]): n for n, k in enumerate(index["qry"])}
    targets = {(k["text"], k["img_path"]): n for n, k in enumerate(index["tgt"])}
    keys = [list(zip(r["tgt_text"], r["tgt_img_path"])) for r in rows]
    query_index = [queries[r["qry_text"], r["qry_img_path"]] for r in rows]
    lists = [[targets[key] for key in row] for row in keys]
    return arrays["qry"], arrays["tgt"], query_index, lists, keys


@pytest.mark.parametrize("subset", ["ImgToText", "TextToImg", "Mixed"])
@pytest.mark.parametrize("normalized", [True, False])
def test_scores_and_predictions_of_the_reference(goldens, subset, normalized):
    folder = goldens / "evaluation"
    *arguments, keys = golden(folder, subset)
    expected = json.loads((folder / "expected.json").read_text())[subset]
    expected = expected[f"normalize_{normalized}"]
    similarity = "cosine" if normalized else "dot"
    found = scoring.judge(*arguments, similarity=similarity)
    score = {
        "acc": found.accuracy,
        "num_correct": int(found.correct.sum()),
        "num_pred": len(found.correct),
    }
    assert score == expected["score"]
    assert found.reference_accuracy == expected["score"]["acc"]
    for prediction in (found.prediction, found.reference_prediction):
        assert [str(row[p]) for row, p in zip(keys, prediction)] == expected["pred"]
    if normalized:
        written = folder / "reference_output_normalize_true"
        assert json.loads((written / f"{subset}_score.json").read_text()) == score
        lines = (written / f"{subset}_pred.txt").read_text().splitlines()
        assert [str(row[p]) for row, p in zip(keys, found.prediction)] == lines


@pytest.mark.parametrize(("rows", "block"), [(1, 8), (5, 16), (64, 4096)])
def test_chunks_change_nothing(goldens, rows, block):
    *arguments, _ = golden(goldens / "evaluation", "TextToImg")
    whole = scoring.judge(*arguments)
    parts = scoring.judge(*arguments, rows_per_chunk=rows, targets_per_block=block)
    for name in ("correct", "prediction", "reference_prediction", "rank", "top"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name), err_msg=name)
    np.testing.assert_allclose(whole.truth_score, parts.truth_score, atol=1e-6)


def test_a_tie_is_not_correct_and_names_the_rival():
    found = dot([[2, 2, 1], [2, 1, 1], [1, 2, 0]])
    assert found.correct.tolist() == [False, True, False]
    assert found.prediction.tolist() == [1, 0, 1]
    assert found.reference_prediction.tolist() == [0, 0, 1]
    assert found.rank.tolist() == [2, 1, 2]
    assert found.tied.tolist() == [True, False, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_a_collapsed_model_scores_nothing(value):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((4, 6)).astype(np.float32)
    targets = np.full((10, 6), value, np.float32)
    lists = [rng.permutation(10) for _ in range(4)]
    found = scoring.judge(queries, targets, range(4), lists)
    assert found.accuracy == 0.0
    assert found.reference_accuracy == 1.0  # the defect that the strict rule is there for


def test_the_same_vector_everywhere_scores_nothing():
    vector = np.random.default_rng(1).standard_normal(33).astype(np.float32)
    targets = np.tile(vector, (70, 1))
    found = scoring.judge(vector[None], targets, [0], [np.arange(70)], targets_per_block=8)
    assert found.accuracy == 0.0 and found.tied.all() and found.rank.tolist() == [70]


def test_values_that_are_not_finite():
    nan, inf = np.nan, np.inf
    found = dot([[nan, 1], [1, nan], [1, inf], [1, -inf], [-inf, -inf], [inf, 1], [nan, nan]])
    assert found.correct.tolist() == [False, False, False, True, False, False, False]
    assert found.prediction.tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert found.reference_prediction.tolist() == [0, 1, 1, 0, 0, 0, 0]


def test_a_second_mention_of_the_truth_is_the_truth():
    found = dot([[2, 1, 0], [1, 2, 0]], truth_again=True)
    assert found.correct.tolist() == [True, False]
    assert found.tied.tolist() == [False, False]
    # ... and is not shown twice
    assert found.top.tolist() == [[0, 1, 2, -1, -1], [1, 0, 2, -1, -1]]


def test_a_lone_truth_needs_a_finite_score():
    found = dot([[3.0], [np.nan]])
    assert found.correct.tolist() == [True, False]
    assert found.prediction.tolist() == [0, -1]


def test_equal_vectors_are_scored_once_also_with_a_minus_zero():
    targets = np.array([[0.0, 1.0], [2.0, 1.0], [-0.0, 1.0]], np.float32)
    ids, vectors = distinct.distinct_vectors(targets)
    assert ids.tolist() == [0, 1, 0] and len(vectors) == 2
    np.testing.assert_array_equal(vectors[ids], targets)
    assert dot([[0.0, -0.0]]).tied.tolist() == [True]


@pytest.mark.parametrize("alike", ["nothing", "first columns", "rows"])
def test_vectors_are_told_apart_by_all_their_columns(alike):
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((300, 70)).astype(np.float32)
    if alike == "first columns":  # those that are read at first
        targets[100:, ::3] = targets[0, ::3]
    if alike == "rows":
        targets[200:, ::3], targets[150:] = targets[0, ::3], targets[:150]
    ids, vectors = distinct.distinct_vectors(targets)
    _, first, inverse = np.unique(targets, axis=0, return_index=True, return_inverse=True)
    assert len(vectors) == len(first) == (150 if alike == "rows" else 300)
    np.testing.assert_array_equal(vectors[ids], targets)
    np.testing.assert_array_equal(vectors, targets[np.sort(first)])
    assert len(set(zip(ids.tolist(), inverse.reshape(-1).tolist(), strict=True))) == len(first)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_share_a_chunk_if_they_share_their_candidates(shared, monkeypatch):
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((9600, 5)).astype(np.float32)
    queries = rng.standard_normal((96, 5)).astype(np.float32)
    lists = [rng.permutation(100) + (0 if shared else 100 * n) for n in range(96)]
    sizes = []
    verdicts = scoring._verdicts
    monkeypatch.setattr(
        scoring, "_verdicts", lambda s, t, p: sizes.append(s.shape) or verdicts(s, t, p)
    )
    found = scoring.judge(queries, targets, range(96), lists)
    assert sizes == ([(128, 128)] if shared else [(32, 4096)] * 3)
    for n, row in enumerate(lists):
        cosine = targets[row] @ queries[n] / np.linalg.norm(targets[row], axis=1)
        assert found.rank[n] == 1 + (cosine[1:] >= cosine[0]).sum()
        assert found.top[n].tolist() == np.argsort(-cosine)[:5].tolist()


def test_no_rows():
    found = scoring.judge(np.ones((1, 2)), np.ones((1, 2)), [], [])
    assert found.correct.shape == (0,) and found.top.shape == (0, scoring.TOP)


def test_rows_that_cannot_be_scored_are_all_named():
    q, t = np.ones((2, 3)), np.ones((4, 3))
    with pytest.raises(UserError, match="row 0 has no candidates(.|\n)*row 1 names a target"):
        scoring.judge(q, t, [0, 1], [[], [0, 4]])
    with pytest.raises(UserError, match="row 1 names a query"):
        scoring.judge(q, t, [0, 2], [[0], [1]])
    with pytest.raises(UserError, match="1 queries for 2"):
        scoring.judge(q, t, [0], [[0], [1]])
    with pytest.raises(UserError, match="not 'euclid'"):
        scoring.judge(q, t, [0], [[0]], similarity="euclid")  # type: ignore[arg-type]


VALUE = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, np.nan, np.inf, -np.inf])


@given(
    values=st.lists(VALUE, min_size=1, max_size=7),
    lists=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=6),
)
def test_against_a_loop_in_plain_python(values, lists):
    values = np.array(values, np.float32)
    lists = [[n % len(values) for n in row] for row in lists]
    found = scoring.judge(
        np.ones((1, 1)), values[:, None], [0] * len(lists), lists,
        similarity="dot", rows_per_chunk=4,
    )  # fmt: skip
    for n, row in enumerate(lists):
        truth, others = values[row[0]], {c for c in row if c != row[0]}
        unbeaten = {c for c in others if not truth > values[c]}
        correct = bool(np.isfinite(truth)) and not unbeaten
        assert found.correct[n] == correct
        assert found.reference_prediction[n] == np.argmax(values[row])
        assert (found.prediction[n] == 0) == correct
        if not correct and others:
            assert row[found.prediction[n]] in (unbeaten if np.isfinite(truth) else others)
        expected_rank = 1 + len(unbeaten if np.isfinite(truth) else others)
        assert found.rank[n] == expected_rank
        finite = sorted({float(values[c]) for c in row if np.isfinite(values[c])}, reverse=True)
        shown = [s for s in found.top_scores[n].tolist() if not np.isnan(s)]
        assert shown == sorted(shown, reverse=True) and shown[:1] == finite[:1]


@given(seed=st.integers(0, 50))
def test_strict_never_exceeds_the_reference(seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(-1, 2, (9, 2)).astype(np.float32)  # many ties and zero vectors
    queries = rng.integers(-1, 2, (3, 2)).astype(np.float32)
    lists = [rng.integers(0, 9, rng.integers(1, 7)) for _ in range(8)]
    found = scoring.judge(queries, targets, rng.integers(0, 3, 8), lists)
    assert not np.any(found.correct & (found.reference_prediction != 0))
    assert not np.any(found.correct & found.tied)
