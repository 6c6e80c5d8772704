# SPDX-License-Identifier: Apache-2.0
"""Two processes of four devices make the same train step as one process of eight."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_tools import check_gradients, mini_model

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def start(repository, folder, output, port, processes, process, log):
    path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    script = Path(__file__).with_name("multiprocess_step.py")
    argv = [sys.executable, script, folder, output, port, processes, process]
    with log.open("w") as out:
        return subprocess.Popen([str(a) for a in argv], stdout=out, stderr=out, env=env)


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
        running = [
            start(repository, folder, output, port, count, i, log) for i, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=400) for process in running]
        finally:
            for process in running:
                process.kill()
        assert codes == [0] * count, "\n".join(log.read_text()[-3000:] for log in logs)
        with np.load(output) as found:
            results.append(dict(found))
    one, two = results
    # One process of eight is held to one device in `test_curves.py`.
    np.testing.assert_allclose(two.pop("curve"), one.pop("curve"), rtol=1e-5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two.pop(name), one.pop(name), rtol=1e-6)
    check_gradients(two, one, relative=2e-5, absolute=1e-7)
