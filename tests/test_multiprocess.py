# SPDX-License-Identifier: Apache-2.0
"""Two processes make the same train step as one, and agree about saves that one cannot make."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from multiprocess_saves import batch_of
from training_tools import check_gradients, mini_model

from vlm2vec_jax.training.dump import flat, read_batch

HOST = socket.gethostname()
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def start(repository, script, log, *argv):
    path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, Path(__file__).with_name(script), *argv]
    with log.open("w") as out:
        return subprocess.Popen([str(a) for a in command], stdout=out, stderr=out, env=env)


def end(running, logs) -> None:
    """Wait for processes that must end well."""
    try:
        codes = [process.wait(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-3000:] for log in logs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_are_one(repository, tmp_path):
    folder = mini_model(tmp_path)
    results = []
    for count in (1, 2):
        output, port = tmp_path / f"{count}.npz", free_port()
        logs = [tmp_path / f"{count}_{i}.txt" for i in range(count)]
        script = "multiprocess_step.py"
        running = [
            start(repository, script, log, folder, output, port, count, i)
            for i, log in enumerate(logs)
        ]
        end(running, logs)
        with np.load(output) as found:
            results.append(dict(found))
    one, two = results
    # One process of eight is held to one device in `test_curves.py`.
    np.testing.assert_allclose(two.pop("curve"), one.pop("curve"), rtol=1e-5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two.pop(name), one.pop(name), rtol=1e-6)
    check_gradients(two, one, relative=2e-5, absolute=1e-7)


@pytest.fixture(scope="module")
def told(repository, tmp_path_factory):
    """What two processes saw of `multiprocess_saves.py`, and the folder that they left."""
    folder, port = tmp_path_factory.mktemp("saves"), free_port()
    logs = [folder / f"{i}.txt" for i in range(2)]
    script = "multiprocess_saves.py"
    end([start(repository, script, log, folder, port, i) for i, log in enumerate(logs)], logs)
    return folder, [json.loads((folder / f"told-{i}.json").read_text()) for i in range(2)]


def test_a_save_that_fails_on_one_process_has_failed_for_both(told):
    """It cannot write its arrays, then nothing at all; nobody waits for it either time."""
    for seen in told[1]:
        assert seen["seconds 2"] < 30 and seen["seconds 3"] < 30
        assert [s.split(";")[0] for s in seen["told"][:2]] == [
            f"saving a checkpoint failed, step {step}: process 1 ({HOST}): File too large"
            for step in (2, 3)
        ]
        assert all("the checkpoint of step 1" in error for error in seen["errors"])
        assert len(seen["errors"]) == 2
        # The next one works again, and holds what both have.
        assert seen["steps"] == [1, 4] and seen["restored"] == [4, True]


def test_what_one_process_cannot_read_is_damaged_for_both(told):
    for seen in told[1]:
        assert f"is damaged (process 1 ({HOST}): its arrays cannot be read" in seen["told"][2]
        assert seen["told"][3] == "the checkpoint of step 1 is whole and is used instead"
        assert seen["before the damage"] == 1 and seen["seconds damaged"] < 30
    assert (told[0] / "checkpoints" / "damaged-4").is_dir()


def test_a_dump_of_two_processes_is_the_batch_of_one(told):
    folder, seen = told
    assert all("step 5" in one["dumped"] for one in seen)
    batch, said = read_batch(folder / "non_finite" / "step-5")
    _, whole = batch_of((0, 1))
    assert said["parts"] == 2 and (folder / "non_finite/step-5/checkpoints/4").is_dir()
    found, wanted = flat(batch), flat(whole)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
