# SPDX-License-Identifier: Apache-2.0
"""The Arrow cache: fresh when the parquet changes, whole under concurrency, words when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import make_train, train_rows, write_parquet

from vlm2vec_jax.data import arrow
from vlm2vec_jax.data.mmeb import TrainSource
from vlm2vec_jax.errors import UserError


def cached(root):
    return sorted(root.rglob("*.arrow"))


def test_converted_once_and_again_when_the_parquet_changes(tmp_path):
    make_train(tmp_path, {"A": 5})
    assert len(TrainSource(tmp_path, "A")) == 5
    (first,) = cached(tmp_path / ".arrow_cache")
    stamp = first.stat().st_mtime_ns
    TrainSource(tmp_path, "A")
    assert cached(tmp_path / ".arrow_cache") == [first] and first.stat().st_mtime_ns == stamp
    make_train(tmp_path, {"A": 6})
    assert len(TrainSource(tmp_path, "A")) == 6
    (second,) = cached(tmp_path / ".arrow_cache")
    assert second != first


def test_same_size_but_another_time_is_another_file(tmp_path):
    make_train(tmp_path, {"A": 5})
    TrainSource(tmp_path, "A")
    rows = [{**row, "qry": row["qry"].upper()} for row in train_rows("A", 5)]
    (file,) = write_parquet(tmp_path / "A", "original", rows)
    os.utime(file, ns=(1, 1))
    assert TrainSource(tmp_path, "A")[0].query.text == "A QUERY 0 "


def test_a_damaged_cache_file_is_made_again(tmp_path):
    make_train(tmp_path, {"A": 5})
    TrainSource(tmp_path, "A")
    (file,) = cached(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    assert TrainSource(tmp_path, "A")[4].index == 4
    file.write_bytes(b"")
    assert TrainSource(tmp_path, "A")[4].index == 4


def test_splits_do_not_remove_each_other(tmp_path):
    make_train(tmp_path, {"A": 5})
    write_parquet(tmp_path / "A", "diverse_instruction", train_rows("A", 4))
    TrainSource(tmp_path, "A")
    TrainSource(tmp_path, "A", "diverse_instruction")
    assert len(cached(tmp_path)) == 2


def test_cache_dir_keeps_data_sets_apart(tmp_path):
    for name, size in (("one", 3), ("two", 4)):
        make_train(tmp_path / name, {"A": size})
        assert len(TrainSource(tmp_path / name, "A", cache_dir=tmp_path / "cache")) == size
    assert len(cached(tmp_path / "cache")) == 2
    assert not (tmp_path / "one" / ".arrow_cache").exists()


def test_a_read_only_data_folder_uses_the_users_cache(tmp_path, monkeypatch):
    make_train(tmp_path / "data", {"A": 3})
    real = arrow._writable  # the tests may run as root, whom permissions do not stop
    monkeypatch.setattr(arrow, "_writable", lambda f: ".arrow_cache" not in str(f) and real(f))
    monkeypatch.setattr(arrow.Path, "home", lambda: tmp_path / "home")
    assert len(TrainSource(tmp_path / "data", "A")) == 3
    assert len(cached(tmp_path / "home" / ".cache")) == 1


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    make_train(tmp_path, {"A": 3})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*cannot be written"):
        TrainSource(tmp_path, "A", cache_dir=tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    make_train(tmp_path, {"A": 3})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrow.os, "replace", full)
    with pytest.raises(UserError, match="the disk is full"):
        TrainSource(tmp_path, "A")
    assert [p for p in (tmp_path / ".arrow_cache" / "A").iterdir()] == []


@pytest.mark.parametrize("damage", ["not parquet", "half", "middle"])
def test_a_corrupt_parquet_file_is_named(tmp_path, damage):
    rows = [{**row, "qry": os.urandom(200).hex()} for row in train_rows("A", 400)]
    files = write_parquet(tmp_path / "A", "original", rows, shards=2)
    content = bytearray(files[1].read_bytes())
    if damage == "not parquet":
        content = bytearray(b"<html>404</html>")
    elif damage == "half":
        content = content[: len(content) // 2]
    else:
        content[4:400] = b"\xff" * 396
    files[1].write_bytes(content)
    with pytest.raises(UserError, match="original-00001-of-00002.parquet.*download it again"):
        TrainSource(tmp_path, "A")
    assert cached(tmp_path) == []


def test_text_that_is_not_utf8_is_refused(tmp_path):
    make_train(tmp_path, {"A": 2})
    table = pq.read_table(tmp_path / "A" / "original-00000-of-00001.parquet")
    bad = pa.array([b"ok", b"\xff\xfe"]).view(pa.string())
    table = table.set_column(0, "qry", bad)
    pq.write_table(table, tmp_path / "A" / "original-00000-of-00001.parquet")
    with pytest.raises(UserError, match="original-00000-of-00001.parquet"):
        TrainSource(tmp_path, "A")


SCRIPT = """
import sys, time
from vlm2vec_jax.data.mmeb import TrainSource
while time.time() < float(sys.argv[2]):
    time.sleep(0.001)
source = TrainSource(sys.argv[1], "A")
print(len(source), sum(len(row.query.text) for row in source.take(range(len(source)))))
"""


@pytest.mark.slow
def test_two_processes_may_convert_at_once(tmp_path):
    import time

    make_train(tmp_path, {"A": 5000}, shards=2)
    start = str(time.time() + 4)
    args = [sys.executable, "-c", SCRIPT, str(tmp_path), start]
    runs = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    expected = sum(len(row["qry"]) for row in train_rows("A", 5000))
    assert outputs == [f"5000 {expected}\n"] * 2
    assert len(list((tmp_path / ".arrow_cache" / "A").iterdir())) == 1
    assert (tmp_path / ".arrow_cache" / ".gitignore").read_text() == "*\n"


def test_threads_convert_and_read_the_same_rows(tmp_path):
    make_train(tmp_path, {"A": 4500})
    barrier = threading.Barrier(8)

    def read(seed):
        barrier.wait(timeout=30)
        source = TrainSource(tmp_path, "A")
        return [source[(seed * 997 + i * 61) % 4500].query.text for i in range(200)]

    with ThreadPoolExecutor(8) as pool:
        for seed, texts in enumerate(pool.map(read, range(8))):
            assert texts == [f"A query {(seed * 997 + i * 61) % 4500} " for i in range(200)]
