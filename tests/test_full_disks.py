# SPDX-License-Identifier: Apache-2.0
"""Full disks and kills through the real commands: said in words, nothing lost.

(Training that is killed and started again stands in `test_train_command.py`.)
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import simulated
from commands import (
    call,
    embed_argv,
    evaluate_argv,
    one_embedder,
    refused,
    snapshot,
    text_data,
    train_argv,
    write_lines,
)
from evaluation_data import labels, two_subsets, write_subset
from full_disk import small_disk

from vlm2vec_jax import embed, evaluate, train
from vlm2vec_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with one_embedder():
        yield


@pytest.fixture
def scored(tmp_path) -> Path:
    return two_subsets(tmp_path / "eval")


@pytest.fixture
def little_disk(tmp_path):
    """A file system of 256 kB."""
    with small_disk(tmp_path / "little", 256) as folder:
        yield folder


def fill_disk(folder: Path, leave: int = 0) -> None:
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - leave)


def test_embed_on_a_full_disk_keeps_the_earlier_file(base, tmp_path, little_disk, capsys):
    lines = write_lines(tmp_path, *({"text": f"number {n}"} for n in range(100)))
    output = little_disk / "o.npz"
    assert call(embed, *embed_argv(base, lines, output)) == 0
    before = output.read_bytes()
    for leave in (0, 4096):
        fill_disk(little_disk, leave)
        assert call(embed, *embed_argv(base, lines, output)) == 2
        refused(capsys, f"cannot write {output}: No space left", "is unchanged")
        assert output.read_bytes() == before
        assert sorted(p.name for p in little_disk.iterdir()) == ["filler", "o.npz"]


def test_evaluate_on_a_full_disk_goes_on_later(base, scored, tmp_path, little_disk, capsys):
    assert call(evaluate, *evaluate_argv(base, scored, tmp_path / "whole")) == 0
    argv = evaluate_argv(base, scored, little_disk / "out")
    for leave, there in ((0, 0), (8192, 1), (5 * 4096, 4)):
        fill_disk(little_disk, leave)
        assert call(evaluate, *argv) == 2
        refused(capsys, "cannot write", "No space left", "earlier results are unchanged")
        assert len(list((little_disk / "out").iterdir())) >= there
    (little_disk / "filler").unlink()
    assert call(evaluate, *argv) == 0
    ours, whole = snapshot(little_disk / "out"), snapshot(tmp_path / "whole")
    assert ours["scores.json"] == whole["scores.json"] and set(ours) == set(whole)


@pytest.mark.slow
def test_train_on_a_full_disk_says_so_and_keeps_the_checkpoints(
    base, tmp_path, little_disk, capfd, monkeypatch
):
    monkeypatch.setattr(Checkpoints, "RETRY_S", (0.01, 0.01, 0.01))
    data, output = text_data(tmp_path / "data"), little_disk / "run"
    argv = train_argv(base, data, output)
    for leave, words in ((0, "data_check.json: No space left"), (12288, "metrics.jsonl: ")):
        fill_disk(little_disk, leave)
        assert call(train, *argv) == 2
        refused(capfd, "cannot write", words, "No space left")
    fill_disk(little_disk, 100 * 1024)  # the records and the metrics, but no checkpoint
    assert call(train, *argv) == 2
    refused(
        capfd,
        "saving a checkpoint failed, step 2: No space left",
        "the last checkpoint could not be written",
    )
    assert not [p for p in (output / "checkpoints").iterdir() if p.name.isdigit()]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def command(module: str, argv, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "XLA_FLAGS": simulated.flags(1), **environment},
    )


def test_a_command_ends_without_a_traceback(tmp_path):
    lines = write_lines(tmp_path, "nonsense")
    process = command("vlm2vec_jax.embed", embed_argv(tmp_path, lines, tmp_path / "o.npz"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.startswith(f"error: {lines} has bad lines (1 problem):\n  - line 1: not JSON")
    assert "Traceback" not in said


def kill_when(process: subprocess.Popen, ready) -> None:
    until = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_scores(base, tmp_path):
    data = tmp_path / "data"
    for name in ("ImageNet-1K", "VOC2007", "SUN397"):
        write_subset(data, name, labels(name, 520))
    options = "--batch_tokens", "512"
    whole = command("vlm2vec_jax.evaluate", evaluate_argv(base, data, tmp_path / "a", *options))
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    argv = evaluate_argv(base, data, tmp_path / "b", *options)
    killed = command("vlm2vec_jax.evaluate", argv)
    kill_when(killed, lambda: len(list((tmp_path / "b").glob("*_score.json"))) > 0)
    assert not (tmp_path / "b" / "scores.json").exists(), "it was over before it could be killed"
    again = command("vlm2vec_jax.evaluate", argv)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "already evaluated" in said, said
    first, second = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert first["scores.json"] == second["scores.json"]
    assert {n for n in second if not n.startswith(".")} == set(first)
