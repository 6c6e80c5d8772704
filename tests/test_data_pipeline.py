# SPDX-License-Identifier: Apache-2.0
"""The pipeline: the same batches for any number of threads, from any step, with bad rows or not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_files import make_train, train_rows, write_image, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import TrainSource, open_train
from vlm2vec_jax.data.pipeline import batches
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import load_image
from vlm2vec_jax.inputs import EncodedInput

GOLDEN = Path(__file__).parent / "goldens" / "end_to_end" / "train"


def encode(item):
    """A processor in small: bytes as tokens, one visual unit per image."""
    tokens = np.frombuffer(item.text.encode(), np.uint8).astype(np.int32)
    pixels = [np.asarray(load_image(image))[:2, :2] for image in item.images]
    visual = {"crops": np.stack(pixels)} if pixels else {}
    return EncodedInput(tokens, np.full(len(tokens), -1, np.int32),
                        np.arange(len(tokens), dtype=np.int32), visual, len(pixels))  # fmt: skip


def pack(queries, positives, negatives):
    """Something comparable that holds everything."""
    return [
        (q.tokens.tobytes(), q.visual["crops"].tobytes() if q.units else b"", p.tokens.tobytes())
        for q, p in zip(queries, positives, strict=True)
    ]


def first(mixture, batch_size, count, **keywords):
    keywords = {"encode": encode, "pack": pack, **keywords}
    with batches(mixture, batch_size, **keywords) as stream:
        out = [next(stream) for _ in range(count)]
    return [(s, p, st.rows.tolist(), st.target_id.tolist(), st.skipped) for s, p, st in out]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    root = make_train(tmp_path_factory.mktemp("train"), {"A": 23, "B": 14}, images=5)
    return Mixture(open_train(root), 7)


def pipeline_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


def assert_threads_end():
    deadline = time.monotonic() + 20
    while pipeline_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pipeline_threads() == []


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 2), (4, 3), (4, 0), (0, 2), (32, 2)])
def test_batches_do_not_depend_on_threads(mixture, workers, prefetch):
    expected = first(mixture, 6, 9, workers=0)
    assert first(mixture, 6, 9, workers=workers, prefetch=prefetch) == expected
    for step, _, rows, _, _ in expected:
        np.testing.assert_array_equal(rows, mixture.batch_indices(step, 6))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.sampled_from([0, 2, 4]))
def test_a_run_resumes_at_any_step(mixture, start, batch_size, workers):
    whole = first(mixture, batch_size, start + 3, workers=0)[start:]
    assert first(mixture, batch_size, 3, workers=workers, start_step=start) == whole
    assert [step for step, *_ in whole] == [start, start + 1, start + 2]


def test_a_late_step_starts_at_once(mixture):
    start = time.monotonic()
    ((step, _, rows, _, _),) = first(mixture, 4, 1, workers=2, start_step=10**9)
    assert step == 10**9 and rows == mixture.batch_indices(10**9, 4).tolist()
    assert time.monotonic() - start < 5


def test_the_golden_set_in_one_batch(tmp_path):
    mix = Mixture([TrainSource(GOLDEN, "Pairs8", cache_dir=tmp_path)], 0)
    for _, packed, rows, ids, _ in first(mix, 8, 3, workers=2):
        assert sorted(r for _, r in rows) == list(range(8)) and len(set(ids)) == 8
        assert len(set(packed)) == 8


def test_equal_targets_share_an_id(mixture):
    for _, _, rows, ids, _ in first(mixture, 20, 3, workers=2):
        keys = [mixture.sources[s][r].positive_key for s, r in rows]
        for a, b, same in [(a, b, keys[a] == keys[b]) for a in range(20) for b in range(20)]:
            assert (ids[a] == ids[b]) == same
    _, _, stats = next(batches(mixture, 20, encode=encode, pack=pack, workers=0))
    assert stats.duplicate_targets == 20 - len({*stats.target_id.tolist()}) > 0
    assert stats.target_id.dtype == np.int64


def test_hard_negatives_are_read_up_to_their_cap_and_never_made_up(tmp_path):
    rows = train_rows("A", 4)
    for row, texts in zip(rows, (["x", "y", "z"], [], ["", "w"], ["x"]), strict=True):
        row |= {"neg_text": texts, "neg_image_path": [""] * len(texts)}
    write_parquet(tmp_path / "A", "original", rows)
    mix = Mixture([TrainSource(tmp_path, "A", cache_dir=tmp_path / "cache")], 0)

    def seen(queries, positives, negatives):
        return [[bytes(item.tokens.astype(np.uint8)) for item in row] for row in negatives]

    for most in (0, 2):
        with batches(mix, 4, encode=encode, pack=seen, negatives=most, workers=0) as stream:
            _, found, stats = next(stream)
        by_row = dict(zip(stats.rows[:, 1].tolist(), found, strict=True))
        ids = dict(zip(stats.rows[:, 1].tolist(), stats.negative_ids, strict=True))
        if not most:
            assert not any(by_row.values())
            continue
        assert by_row == {0: [b"x", b"y"], 1: [], 2: [b"w"], 3: [b"x"]}
        assert ids[0][0] == ids[3][0] != ids[0][1] and [len(ids[k]) for k in range(4)] == [
            2,
            0,
            1,
            1,
        ]


@pytest.fixture
def damaged(tmp_path):
    """Subset A with a truncated, a missing and an empty row among ten; B is good."""
    write_parquet(tmp_path / "B", "original", train_rows("B", 5))
    rows = train_rows("A", 10, images=6)
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        path = tmp_path / "images" / "A" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    path = tmp_path / "images" / "A" / "2.png"
    path.write_bytes(path.read_bytes()[:900])
    (tmp_path / "images" / "A" / "3.png").unlink()
    rows[9]["pos_text"] = ""
    write_parquet(tmp_path / "A", "original", rows)
    return Mixture(open_train(tmp_path), 0)


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_examples_end_the_run_in_words(damaged, workers):
    stream = batches(damaged, 15, encode=encode, pack=pack, workers=workers)
    with pytest.raises(UserError) as caught:
        next(stream)
    message = str(caught.value)
    assert "3 problems" in message and "on_bad_example=skip" in message
    for part in ("parquet row 2: ", "2.png: truncated", "row 3: ", "3.png: no such image file",
                 "row 9: positive: neither text nor image"):  # fmt: skip
        assert part in message
    assert message.count("original-00000-of-00001.parquet") == 3 and "A: " in message
    assert list(stream) == []
    assert_threads_end()


def test_good_batches_before_a_bad_one_are_delivered(damaged):
    bad = {(0, 2), (0, 3), (0, 9)}
    clean = 0
    while not bad & set(map(tuple, damaged.batch_indices(clean, 1).tolist())):
        clean += 1
    stream = batches(damaged, 1, encode=encode, pack=pack, workers=2)
    for _ in range(clean):
        next(stream)
    with pytest.raises(UserError):
        next(stream)


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_skip_puts_the_next_row_of_the_subset(damaged, workers):
    got = first(damaged, 15, 4, workers=workers, on_bad_example="skip")
    replaced = {2: 4, 3: 4, 9: 0}
    for step, _, rows, _, skipped in got:
        drawn = damaged.batch_indices(step, 15).tolist()
        assert rows == [[s, replaced.get(r, r) if s == 0 else r] for s, r in drawn]
        assert len(skipped) == 4  # row 2 meets the bad row 3 on its way
    assert got == first(damaged, 15, 4, workers=0, on_bad_example="skip")


def test_skip_gives_up_when_nothing_is_good(tmp_path):
    rows = [{**row, "pos_text": ""} for row in train_rows("A", 4)]
    write_parquet(tmp_path / "A", "original", rows)
    mix = Mixture(open_train(tmp_path), 0)
    stream = batches(mix, 2, encode=encode, pack=pack, workers=2, on_bad_example="skip")
    with pytest.raises(UserError, match="rows after it failed as well"):
        next(stream)


@pytest.mark.parametrize("where", ["encode", "pack"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_faults_of_the_program_reach_the_caller(mixture, where, workers, policy):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    keywords = {"encode": encode, "pack": pack, where: broken, "workers": workers}
    stream = batches(mixture, 3, on_bad_example=policy, **keywords)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        next(stream)
    assert_threads_end()


def test_closing_stops_the_threads_soon(mixture):
    def slow(item):
        time.sleep(0.02)
        return encode(item)

    stream = batches(mixture, 300, encode=slow, pack=pack, workers=2, prefetch=2)
    assert pipeline_threads()
    time.sleep(0.2)
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 2  # a whole batch would take six seconds
    assert list(stream) == []
    stream.close()
    assert_threads_end()


def test_an_iterator_that_is_dropped_leaves_no_threads(mixture):
    stream = batches(mixture, 4, encode=encode, pack=pack, workers=3)
    next(stream)
    del stream
    assert_threads_end()


def test_a_program_that_forgets_to_close_ends_quietly(tmp_path):
    make_train(tmp_path, {"A": 9})
    script = """
import sys
from test_data_pipeline import *
stream = batches(Mixture(open_train(sys.argv[1]), 0), 4, encode=encode, pack=pack, workers=2)
print(next(stream)[0])
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "0\n", "")


def test_work_goes_on_while_the_batch_is_in_use(mixture):
    packed = []

    def note(queries, positives, negatives):
        packed.append(time.monotonic())
        return None

    with batches(mixture, 4, encode=encode, pack=note, workers=2, prefetch=2) as stream:
        next(stream)
        deadline = time.monotonic() + 10
        while len(packed) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(packed) == 3  # one in use and two ahead, no more


def test_rows_are_encoded_in_parallel(mixture):
    barrier = threading.Barrier(3)

    def meet(item):
        if "query" in item.text:
            barrier.wait(timeout=20)  # passes only if three rows are in work at the same time
        return encode(item)

    with batches(mixture, 3, encode=meet, pack=pack, workers=3) as stream:
        assert len(next(stream)[1]) == 3
        barrier.abort()


@pytest.mark.parametrize(
    "wrong",
    [
        {"on_bad_example": "ignore"},
        {"negatives": -1},
        {"start_step": -1},
        {"workers": -1},
        {"batch_size": 0},
    ],
)
def test_impossible_arguments(mixture, wrong):
    with pytest.raises(UserError):
        batches(mixture, **{"batch_size": 6, "encode": encode, "pack": pack, **wrong})


def test_verified_rows_make_a_clean_mixture(damaged):
    from vlm2vec_jax.data.verify import good_rows

    good = good_rows(damaged.sources)
    assert good.rows["A"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]  # 2.png breaks only when decoded
    mix = Mixture(good.sources, 0)
    ((_, _, rows, _, skipped),) = first(mix, 13, 1, workers=2, on_bad_example="skip")
    assert len(skipped) == 1 and [0, 2] not in rows and rows.count([0, 4]) == 2


def test_image_inputs_reach_the_processor(tmp_path):
    write_parquet(tmp_path / "A", "original", train_rows("A", 2, images=2))
    for i in range(2):
        write_image(tmp_path / "images/A" / f"{i}.png", value=50 + i)
    mix = Mixture(open_train(tmp_path), 0)
    ((_, packed, rows, _, _),) = first(mix, 2, 1, workers=2)
    for (_, crop, _), (_, row) in zip(packed, rows, strict=True):
        assert crop[:3] == bytes([50 + row, 20, 30])
