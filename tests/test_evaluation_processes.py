# SPDX-License-Identifier: Apache-2.0
"""Two processes that evaluate together give the files of one, and stop together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simulated
from evaluation_data import captions, labels, write_subset
from small_models import write_model, write_train
from test_multiprocess import free_port

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def start(repository, argv, log, **environment):
    path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
    env = {
        **os.environ, "PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": simulated.flags(2), **environment,
    }  # fmt: skip
    script = Path(__file__).with_name("multiprocess_evaluation.py")
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, argv)], stdout=out, stderr=out, env=env
        )


def together(repository, argv, logs, count=2, environments=({}, {})):
    """Run `count` processes; their exit codes and what they said."""
    port = free_port()
    running = []
    for k in range(count):
        more = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", count, "--process_id", k]
        more = more if count > 1 else []
        log = logs / f"{count}_{k}.txt"
        running.append(start(repository, [*argv, *more], log, **environments[k]))
    try:
        codes = [process.wait(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    return codes, [(logs / f"{count}_{k}.txt").read_text() for k in range(count)]


def test_two_processes_are_one(repository, tmp_path):
    write_train(tmp_path / "train", count=8)
    model = write_model(tmp_path / "train", tmp_path / "model")
    write_subset(tmp_path / "data", "ImageNet-1K", labels())
    write_subset(tmp_path / "data", "MSCOCO_t2i", captions())
    argv = ["--model", model, "--data", tmp_path / "data", "--dtype", "float32", "--devices", 2]
    for count in (1, 2):
        codes, said = together(
            repository, [*argv, "--output", tmp_path / f"{count}"], tmp_path, count
        )
        assert codes == [0] * count, said
    one, two = tmp_path / "1", tmp_path / "2"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for name in ("ImageNet-1K", "MSCOCO_t2i"):
        with (
            np.load(one / f"{name}_embeddings.npz") as a,
            np.load(two / f"{name}_embeddings.npz") as b,
        ):
            np.testing.assert_array_equal(a["keys"], b["keys"])
            np.testing.assert_array_equal(a["fingerprint"], b["fingerprint"])
            np.testing.assert_allclose(a["embeddings"], b["embeddings"], atol=2e-6)
    a, b = (json.loads((folder / "scores.json").read_text()) for folder in (one, two))
    assert a == b

    # Only the first process writes, and it says what it does; a second run embeds nothing.
    codes, said = together(repository, [*argv, "--output", two], tmp_path)
    assert codes == [0, 0] and "already evaluated" in said[0] and "ImageNet" not in said[1]

    # One of them reads another model: all stop, and say why.
    other = ({}, {"ANOTHER_MODEL": "1"})
    codes, said = together(
        repository, [*argv, "--output", tmp_path / "3"], tmp_path, environments=other
    )
    assert codes == [2, 2]
    assert all("do not have the same model, data or flags: process 1 differs" in s for s in said)

    # A picture that cannot be decoded lies in one process's share: both stop.
    picture = tmp_path / "data/img/ImageNet-1K_2.png"
    picture.write_bytes(picture.read_bytes()[:200])
    codes, said = together(repository, [*argv, "--output", tmp_path / "4"], tmp_path)
    assert codes == [2, 2] and all("ImageNet-1K_2.png" in s for s in said), said
