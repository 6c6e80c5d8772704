# SPDX-License-Identifier: Apache-2.0
"""Batches that several processes share: together they hold what one process would have packed.

Processes are threads here that exchange messages through a dictionary; tests/test_train_processes
has real ones.
"""

import threading
import time

import numpy as np
import pytest
from data_files import make_train, train_rows, write_image, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_pipeline import assert_threads_end, encode, first

from vlm2vec_jax.data import reading
from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import open_train
from vlm2vec_jax.data.pipeline import Sharing, batches
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import image_size


def measure(item):
    """What `encode` would give, from headers."""
    for image in item.images:
        image_size(image)
    return len(item.text.encode()), len(item.images)


class Meeting:
    """Where the threads leave their messages."""

    def __init__(self, processes):
        self.processes, self.messages, self.read = processes, {}, []
        self.changed = threading.Condition()

    def exchange(self, process, name, message, stop):
        with self.changed:
            assert (name, process) not in self.messages
            self.messages[name, process] = message
            self.changed.notify_all()
            while any((name, p) not in self.messages for p in range(self.processes)):
                if stop.is_set():
                    raise RuntimeError("closed")
                self.changed.wait(0.05)
            return [self.messages[name, p] for p in range(self.processes)]


class Packer:
    """Gives every input to a process by its size, so not by its position."""

    def __init__(self, process, processes):
        self.process, self.processes = process, processes

    def plan_step(self, sizes, negatives=()):
        return sizes, list(negatives)

    def items(self, planned):
        return [
            i for i, (n, u) in enumerate(planned[0]) if (n + u + i) % self.processes == self.process
        ]

    def fill(self, planned, encoded, images):
        assert [sum(of) for of in images] == [units for _, units in planned[0]]
        assert sorted(encoded) == self.items(planned)
        return {i: item.tokens.tobytes() for i, item in encoded.items()}


def together(mixture, batch_size, count, processes, *, start=0, encode=encode, **keywords):
    """What each process gets: [(step, packed, stats), ...] or the error it ends with."""
    meeting, results = Meeting(processes), [None] * processes

    def run(process):
        sharing = Sharing(
            process,
            processes,
            lambda *args: meeting.exchange(process, *args),
            measure,
            Packer(process, processes),
        )
        try:
            with batches(mixture, batch_size, start_step=start, encode=encode, pack=None,
                         sharing=sharing, **keywords) as stream:  # fmt: skip
                results[process] = [next(stream) for _ in range(count)]
        except Exception as error:
            results[process] = error

    threads = [threading.Thread(target=run, args=(p,)) for p in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def whole(mixture, batch_size, count, *, start=0, **keywords):
    """The same from one process."""

    def pack(queries, positives, negatives):
        items = [*queries, *positives, *(item for row in negatives for item in row)]
        return {i: item.tokens.tobytes() for i, item in enumerate(items)}

    with batches(mixture, batch_size, start_step=start, encode=encode, pack=pack, workers=0,
                 **keywords) as stream:  # fmt: skip
        return [next(stream) for _ in range(count)]


def assert_same(parts, expected):
    for step in range(len(expected)):
        number, packed, stats = expected[step]
        joined = {}
        for part in parts:
            assert not isinstance(part, Exception), part
            other_number, held, other = part[step]
            assert number == other_number and not joined.keys() & held.keys()
            joined |= held
            for field in ("rows", "target_id", "query_id"):
                np.testing.assert_array_equal(getattr(other, field), getattr(stats, field))
            assert other.negative_ids == stats.negative_ids
            assert sorted(other.skipped) == sorted(stats.skipped)
        assert joined == packed


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    root = make_train(tmp_path_factory.mktemp("train"), {"A": 23, "B": 14}, images=5)
    return Mixture(open_train(root), 7)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([2, 3, 6]), st.integers(0, 10**6), st.sampled_from([0, 3]))
def test_processes_hold_together_what_one_would(mixture, processes, start, workers):
    parts = together(mixture, 6, 2, processes, start=start, workers=workers)
    assert_same(parts, whole(mixture, 6, 2, start=start))


def test_as_many_processes_as_a_pod_has_hosts(mixture):
    assert_same(together(mixture, 64, 1, 64, workers=0), whole(mixture, 64, 1))


def test_hard_negatives_are_shared_too(tmp_path):
    rows = train_rows("A", 6)
    for row, texts in zip(rows, (["x", "y", "z"], [], ["w"], ["x"], [], ["v", "u"]), strict=True):
        row |= {"neg_text": texts, "neg_image_path": [""] * len(texts)}
    write_parquet(tmp_path / "A", "original", rows)
    mix = Mixture(open_train(tmp_path), 0)
    expected = whole(mix, 6, 2, negatives=2)
    assert sum(map(len, expected[0][2].negative_ids)) == 6
    assert_same(together(mix, 6, 2, 3, negatives=2, workers=2), expected)


@pytest.fixture
def damaged(tmp_path):
    """Rows 2, 3 and 5 of ten have images whose header is good and whose pixels are cut off."""
    rows = train_rows("A", 10, images=10)
    for i in range(10):
        path = tmp_path / "images" / "A" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(path)
        if i in (2, 3, 5):
            path.write_bytes(path.read_bytes()[:900])
    rows[8]["pos_text"] = ""  # and one that is bad at first sight
    write_parquet(tmp_path / "A", "original", rows)
    return Mixture(open_train(tmp_path), 0)


def test_rows_that_are_bad_only_when_decoded_are_replaced_alike(damaged):
    expected = whole(damaged, 10, 3, on_bad_example="skip")
    assert len(expected[0][2].skipped) >= 4
    parts = together(damaged, 10, 3, 2, on_bad_example="skip", workers=2)
    assert_same(parts, expected)


def test_a_bad_row_ends_all_processes_in_the_same_words(damaged):
    results = together(damaged, 10, 1, 2, workers=2)
    assert all(isinstance(result, UserError) for result in results)
    assert str(results[0]) == str(results[1]) and "8" in str(results[0])
    assert_threads_end()


def test_pixels_are_read_once(mixture):
    seen, lock = [], threading.Lock()

    def counting(item):
        with lock:
            seen.append((item.text, item.images))
        return encode(item)

    together(mixture, 12, 1, 3, workers=0, encode=counting)
    assert len(seen) == 24  # every side of every pair, by one of the three


# Slow and failing storage


def test_slow_storage_is_told(mixture):
    told = []

    def slow(item):
        time.sleep(0.25)
        return encode(item)

    with batches(mixture, 3, encode=slow, pack=lambda *_: None, workers=2, prefetch=1,
                 report=told.append, slow_s=0.1) as stream:  # fmt: skip
        next(stream)
    assert told and "the data of step 1 has been waited for 0 s; being read: " in told[0]
    assert "original-00000-of-00001.parquet row" in told[0]
    count = len(told)
    time.sleep(0.5)
    assert len(told) == count  # nobody waits any more


@pytest.mark.parametrize(("number", "heals"), [(5, True), (116, True), (2, False)])
def test_a_read_that_storage_fails_is_tried_again(mixture, monkeypatch, number, heals):
    """EIO and ESTALE pass; ENOENT stays."""
    monkeypatch.setattr(reading, "RETRY_S", (0.0, 0.0))
    failed = set()

    def failing(item):
        if item.text not in failed:
            failed.add(item.text)
            try:
                raise OSError(number, "the storage")
            except OSError as error:
                raise UserError("cannot be opened") from error
        return encode(item)

    stream = batches(mixture, 3, encode=failing, pack=lambda *_: 0, workers=2)
    if heals:
        assert next(stream)[0] == 0
        stream.close()
    else:
        with pytest.raises(UserError, match="3 problems"):
            next(stream)


def test_one_process_needs_no_exchange(mixture):
    (result,) = together(mixture, 4, 2, 1, workers=2)
    assert_same([result], whole(mixture, 4, 2))
    assert first(mixture, 4, 2)[0][2] == result[0][2].rows.tolist()


def test_closing_while_another_process_is_late(tmp_path):
    write_parquet(tmp_path / "A", "original", train_rows("A", 8, images=2))
    for i in range(2):
        write_image(tmp_path / "images/A" / f"{i}.png", value=50 + i)
    mix = Mixture(open_train(tmp_path), 0)
    meeting = Meeting(2)
    sharing = Sharing(0, 2, lambda *a: meeting.exchange(0, *a), measure, Packer(0, 2))
    stream = batches(mix, 4, encode=encode, pack=None, sharing=sharing, workers=2)
    time.sleep(0.2)
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 5
    assert_threads_end()
