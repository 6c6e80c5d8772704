# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments, SIGTERM, damage and failing saves, by way of the command."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_train_command import ground as ground
from test_train_command import log, run
from test_train_command import whole as whole

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "elastic"), [(2, 1), pytest.param(20, 6, marks=pytest.mark.long)]
)
def test_a_run_that_is_killed_again_and_again(repository, kills, elastic):
    """Some kills on one mesh, and some after which another mesh goes on."""
    script = repository / "tests/tools/kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", str(kills), "--elastic", str(elastic), "--seed", "5"],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (
        f"same mesh: {kills} kills" in done.stdout and "no difference (bit for bit)" in done.stdout
    )
    assert "no difference (losses to 1e-6)" in done.stdout


def test_sigterm_saves_and_asks_to_be_started_again(ground, whole, tmp_path, monkeypatch, capfd):
    """In the middle of the run, between two regular checkpoints."""
    from vlm2vec_jax.training.metrics import MetricsWriter

    output = tmp_path / "stopped"
    write = MetricsWriter.write

    def terminate(self, step, values):
        write(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", terminate)
        assert run(*ground(output)) == 75
    assert "the same command goes on from here" in capfd.readouterr().err
    # The step that was under way was finished, and is saved although it is not due.
    saved = sorted(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == [3, 5] and log(output)[-1]["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(*ground(output)) == 0
    for one, two in zip(log(whole), log(output)):
        assert [one[n] for n in ("step", "loss", "grad_norm", "lr")] == [
            two[n] for n in ("step", "loss", "grad_norm", "lr")
        ]
    assert len(log(output)) == 12


def test_a_save_that_fails_while_stopping_is_tried_again(ground, tmp_path, monkeypatch, capfd):
    """The disk is full when SIGTERM comes, and has room a moment later."""
    from vlm2vec_jax.training.checkpoint import Checkpoints
    from vlm2vec_jax.training.metrics import MetricsWriter

    output = tmp_path / "full"
    write, start, failed = MetricsWriter.write, Checkpoints._start, []

    def terminate(self, step, values):
        write(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def full_once(self, step, state, meta, *, final=False):
        if final and len(failed) < 2:
            failed.append(step)
            self._saving = step
            self._failed("No space left on device", final=True)
            return False
        return start(self, step, state, meta, final=final)

    monkeypatch.setattr(MetricsWriter, "write", terminate)
    monkeypatch.setattr(Checkpoints, "_start", full_once)
    monkeypatch.setattr(Checkpoints, "RETRY_S", (0.01, 0.01, 0.01))
    began = time.monotonic()
    assert run(*ground(output)) == 75
    assert time.monotonic() - began < 60
    said = capfd.readouterr().err
    assert said.count("saving a checkpoint failed") == 2 and "is untouched" in said
    newest = max(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())
    assert newest == failed[0] == log(output)[-1]["step"]


def test_a_stopping_rule_ends_the_run(ground, tmp_path):
    """60 rows in batches of 16: all have been seen with the fourth batch."""
    output = tmp_path / "exhausted"
    assert run(*ground(output, {"data.stop": "all_exhausted"})) == 0
    assert [line["step"] for line in log(output)] == [1, 2, 3, 4]
    assert (output / "checkpoints" / "4").is_dir()
