# SPDX-License-Identifier: Apache-2.0
"""`embed` in processes of its own: two that share a corpus, one that is killed and goes on."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import simulated
from commands import tear
from embed_tools import TOLERANCE, argv, load, texts, wanted, write_lines
from small_models import picture
from test_multiprocess import free_port

from vlm2vec_jax.embedder import Embedder

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def model(base) -> Embedder:
    return Embedder.from_pretrained(path=str(base), adapter=None, dtype="float32")


WORKER = """
import sys
import jax
if len(sys.argv) > 2 and "--num_processes" in sys.argv:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
from vlm2vec_jax import embed, flags
from vlm2vec_jax.embedding import corpus
corpus.WINDOW = 5
flags.run(embed.main, embed.define, sys.argv)
"""


def start(repository, tmp_path, arguments, log):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(repository), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
           "XLA_FLAGS": simulated.flags(2)}  # fmt: skip
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, str(script), *arguments[1:]], stdout=out, stderr=out, env=env
        )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_embed_one_corpus(base, model, tmp_path, repository):
    lines = texts(23)
    source = write_lines(tmp_path / "i.jsonl", lines)

    def both(*more) -> list[int]:
        port = free_port()
        running = []
        for k in range(2):
            given = argv(base, source, tmp_path / "o.npz", "--coordinator", f"127.0.0.1:{port}",
                         "--num_processes", 2, "--process_id", k, *more)  # fmt: skip
            running.append(start(repository, tmp_path, given, tmp_path / f"log{k}.txt"))
        try:
            return [process.wait(timeout=300) for process in running]
        finally:
            for process in running:
                process.kill()

    codes = both()
    logs = [(tmp_path / f"log{k}.txt").read_text() for k in range(2)]
    assert codes == [0, 0], logs
    assert "23 embeddings" in logs[0] and "embeddings" not in logs[1]
    np.testing.assert_allclose(load(tmp_path / "o.npz"), wanted(model, lines), **TOLERANCE)
    # What one process meets, all report.
    picture(1).save(tmp_path / "torn.png")
    tear(tmp_path / "torn.png")
    lines[7] = {"images": ["torn.png"]}
    write_lines(source, lines)
    assert both() == [2, 2]
    for k in range(2):
        assert "line 8: " in (tmp_path / f"log{k}.txt").read_text()


@pytest.mark.slow
def test_a_killed_command_goes_on(base, model, tmp_path, repository):
    lines = texts(400)
    source = write_lines(tmp_path / "i.jsonl", lines)
    arguments = argv(base, source, tmp_path / "o.npz", "--batch_tokens", 64)
    process = start(repository, tmp_path, arguments, tmp_path / "log.txt")
    parts = tmp_path / ".o.npz.parts"
    until = time.monotonic() + 200
    while len(list(parts.glob("*.npz"))) < 10:
        assert process.poll() is None and time.monotonic() < until, (
            tmp_path / "log.txt"
        ).read_text()
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = len(list(parts.glob("*.npz")))
    assert 10 <= kept < 80 and not (tmp_path / "o.npz").exists()
    process = start(repository, tmp_path, arguments, tmp_path / "log.txt")
    assert process.wait(timeout=300) == 0
    assert f"{kept} of 80 windows are there" in (tmp_path / "log.txt").read_text()
    np.testing.assert_allclose(load(tmp_path / "o.npz"), wanted(model, lines), **TOLERANCE)
