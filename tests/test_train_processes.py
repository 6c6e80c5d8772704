# SPDX-License-Identifier: Apache-2.0
"""The `train` command over two processes of four devices: the run of one process of eight."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import simulated
from small_models import SIZES, write_train
from test_multiprocess import free_port

from vlm2vec_jax.models.phi3v.mini import write_mini_model

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    write_train(root / "data", count=16)
    write_train(root / "data", "VOC2007", count=12)
    write_mini_model(root / "data", root / "model", 0, SIZES)
    return root


def command(ground, repository, output, **overrides):
    settings = {
        "model.path": ground / "model",
        "model.dtype": "float32",
        "data.path": ground / "data",
        "data.subsets": "ImageNet_1K,VOC2007",
        "data.num_crops": 1,
        "data.max_len": 128,
        "data.workers": 2,
        "batch_size": 16,
        "steps": 6,
        "optim.warmup_steps": 1,
        "optim.lr": 1e-3,
        "adapter.type": "lora",
        "adapter.dropout": 0,
        "checkpoint.every": 3,
        "mesh.fsdp": 2,
        "grad_cache": "on",
        "packing.chunk_tokens": 256,
        "output": output,
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    config = repository / "configs/mmeb.py"
    return [sys.executable, "-m", "vlm2vec_jax.train", "--config", str(config), *flags]


def start(argv, repository, processes, log: Path, devices=8):
    """Start the processes of a run; returns them with their logs."""
    port = free_port()
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env["XLA_FLAGS"] = simulated.flags(devices // processes)
    found = []
    for process in range(processes):
        more = ["--start_timeout", "100"]
        if processes > 1:
            more += ["--coordinator", f"127.0.0.1:{port}"]
            more += ["--num_processes", str(processes), "--process_id", str(process)]
        path = log.with_suffix(f".{process}.txt")
        with path.open("w") as out:
            found.append((subprocess.Popen([*argv, *more], cwd=repository, stdout=out,
                                           stderr=subprocess.STDOUT, env=env), path))  # fmt: skip
    return found


def finish(started, timeout=300):
    """Exit codes and what was printed."""
    try:
        codes = [process.wait(timeout=timeout) for process, _ in started]
    finally:
        for process, _ in started:
            process.kill()
    return codes, [path.read_text() for _, path in started]


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(ground, repository):
    output = ground / "one"
    codes, texts = finish(start(command(ground, repository, output), repository, 1, ground / "one"))
    assert codes == [0], texts[0][-3000:]
    return lines(output)


def test_two_processes_train_as_one(ground, repository, one):
    output = ground / "two"
    started = start(command(ground, repository, output), repository, 2, ground / "two")
    codes, texts = finish(started)
    assert codes == [0, 0], "\n".join(text[-3000:] for text in texts)
    two = lines(output)
    assert [line["membership"] for line in two] == [line["membership"] for line in one]
    for name in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose(
            [line[name] for line in two], [line[name] for line in one], rtol=1e-5, err_msg=name
        )
    assert [line["real_tokens"] for line in two] == [line["real_tokens"] for line in one]
    assert "in 2 processes" in texts[0] and "step 6/6" in texts[0]
    assert "step 6/6" not in texts[1]


def test_a_signal_to_one_process_stops_both_and_one_goes_on(ground, repository, one):
    """SIGTERM to process 1 alone; both save the same step; a single process finishes the run."""
    output = ground / "stopped"
    argv = command(ground, repository, output, steps=400, checkpoint__every=300)
    started = start(argv, repository, 2, ground / "stopped")
    limit = time.monotonic() + 200
    while not (output / "metrics.jsonl").exists() or len(lines(output)) < 2:
        assert time.monotonic() < limit and all(p.poll() is None for p, _ in started)
        time.sleep(0.05)
    started[1][0].send_signal(signal.SIGTERM)
    codes, texts = finish(started)
    assert codes == [75, 75], "\n".join(text[-3000:] for text in texts)
    (saved,) = [int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == lines(output)[-1]["step"] >= 2


def test_a_process_that_dies_does_not_leave_the_other_waiting(ground, repository):
    """SIGKILL to process 1: process 0 ends as well, and what was saved is whole."""
    output = ground / "dead"
    argv = command(ground, repository, output, steps=400, checkpoint__every=1)
    started = start(argv, repository, 2, ground / "dead")
    limit = time.monotonic() + 200
    while not any(p.name.isdigit() for p in (output / "checkpoints").glob("*")):
        assert time.monotonic() < limit and all(p.poll() is None for p, _ in started)
        time.sleep(0.05)
    started[1][0].kill()
    codes, texts = finish(started, timeout=200)
    assert codes[0] not in (0, 75) and codes[1] == -signal.SIGKILL, texts[0][-3000:]


def test_the_process_that_does_not_come_is_named(ground, repository):
    argv = command(ground, repository, ground / "alone")
    argv += ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2"]
    argv += ["--process_id", "0", "--start_timeout", "2"]
    done = subprocess.run(argv, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "process 1 did not come" in done.stderr and "Traceback" not in done.stderr


def test_what_one_process_cannot_do_ends_both(ground, repository):
    argv = command(ground, repository, ground / "bad", data__subsets="Nowhere")
    codes, texts = finish(start(argv, repository, 2, ground / "bad"))
    assert codes == [2, 2]
    assert all("Nowhere" in text and "Traceback" not in text for text in texts)
