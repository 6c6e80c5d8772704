# SPDX-License-Identifier: Apache-2.0
"""launch/: the scripts against a stub `gcloud`, and two real processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import simulated
from data_files import make_train
from evaluation_data import captions, write_subset
from launch_stubs import LAUNCH, TRAIN, Stubs
from training_tools import mini_model

from vlm2vec_jax.embedder import Embedder

SCRIPTS = sorted(p for p in LAUNCH.rglob("*") if p.suffix in (".sh", ".sbatch"))


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


def gcloud(states: Path, train: str = "exit 0") -> str:
    """A gcloud whose slice is in the state named by the first line left in a file."""
    return f"""
state() {{ head -1 {states} 2>/dev/null; }}
case "$*" in
  *describe*) [[ -n $(state) ]] || {{ echo "NOT_FOUND" >&2; exit 1; }}; state ;;
  *" create "*) echo READY > {states} ;;
  *" delete "*) rm -f {states} ;;
  *"remote.sh follow"*) {train} ;;
  *"remote.sh code"*) cat {states}.code ;;
esac"""


# All of them


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(script):
    program = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run(
        [program, "-x", "-P", "SCRIPTDIR", script],
        capture_output=True,
        text=True,
        cwd=LAUNCH.parent,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_strict_and_say_how_they_are_used(script):
    text = script.read_text()
    assert "set -euo pipefail" in text or script.name == "common.sh"
    if script.name != "common.sh":
        done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"launch/{script.relative_to(LAUNCH)}" in done.stdout
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        ("local.sh", [], "nothing to train"),
        ("local.sh", ["--processes"], "--processes needs a value"),
        ("local.sh", ["--processes", "two", *TRAIN], "must be a whole number, not 'two'"),
        ("local.sh", ["--proceses", "2", *TRAIN], "unknown option --proceses"),
        ("local.sh", ["--python", "no-such-python", *TRAIN], "no-such-python is not on the PATH"),
        ("tpu_pod.sh", ["--zone", "z", "--type", "v6e-16", *TRAIN], "--name is missing"),
        ("tpu_pod.sh", ["--name", "n", "--type", "v6e-16", *TRAIN], "--zone is missing"),
        ("tpu_pod.sh", ["--name", "n", "--zone", "z", *TRAIN], "--type is missing"),
        ("tpu_pod.sh", ["--name", "n", "--zone", "z", "--type", "v6e-16"], "nothing to train"),
        ("slurm.sbatch", [], "nothing to train"),
        ("slurm.sbatch", ["--nodes", "x", *TRAIN], "must be a whole number"),
        ("gke/gke.sh", ["start"], "the first word must be"),
        ("gke/gke.sh", ["apply", "--values", "x"], "--kind must be tpu or gpu"),
        ("gke/gke.sh", ["apply", "--kind", "tpu", "--values", "no.env"], "there is no such file"),
        ("remote.sh", ["start", "../x"], "a run needs a name"),
        ("remote.sh", ["fly", "x"], "unknown action fly"),
    ],
)
def test_mistakes_are_said_in_words(stubs, script, args, said):
    done = stubs.run(script, *args)
    assert done.returncode == 2 and said in done.stderr
    assert not stubs.calls()


# On this machine


def test_a_dry_run_prints_the_commands_and_starts_nothing(stubs):
    stubs.add("python3.stub")
    done = stubs.run(
        "local.sh", "--processes", 2, "--devices", 4, "--python", stubs.folder / "python3.stub",
        "--dry_run", *TRAIN, JAX_PLATFORMS="cpu",
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert done.returncode == 0 and len(lines) == 2 and not stubs.calls()
    assert "--xla_force_host_platform_device_count=4" in lines[0]
    for rank, line in enumerate(lines):
        assert "-m vlm2vec_jax.train --config configs/mini.py '--config.output=a folder'" in line
        assert f"--num_processes 2 --process_id {rank}" in line


def counting(stubs, codes) -> Path:
    """A python that exits with the next of `codes` each time it is started."""
    left = stubs.folder / "codes"
    left.write_text("".join(f"{code}\n" for code in codes))
    stubs.add("fake", f"code=$(head -1 {left}); sed -i 1d {left}; exit $code")
    return stubs.folder / "fake"


@pytest.mark.parametrize(
    ("codes", "restarts", "ends", "started"),
    [
        ([0], 3, 0, 1),
        ([75, 75, 0], 3, 0, 3),
        ([75, 75, 75], 1, 75, 2),
        ([2], 3, 2, 1),
        ([1], 3, 1, 1),
    ],
)
def test_only_an_interruption_that_has_saved_is_restarted(stubs, codes, restarts, ends, started):
    fake = counting(stubs, codes)
    done = stubs.run("local.sh", "--python", fake, "--restarts", restarts, *TRAIN)
    assert done.returncode == ends and len(stubs.calls()) == started


def test_a_failing_process_ends_the_others(stubs):
    stubs.add("fake", '[[ "$*" == *"--process_id 1"* ]] && exit 3; exec sleep 60')
    begun = time.monotonic()
    done = stubs.run(
        "local.sh", "--processes", 2, "--python", stubs.folder / "fake", "--logs",
        stubs.folder / "logs", *TRAIN,
    )  # fmt: skip
    assert done.returncode == 3 and time.monotonic() - begun < 30
    assert "failed with code 3" in done.stderr and (stubs.folder / "logs/process-1.log").exists()


def test_sigterm_is_handed_on(stubs):
    stubs.add("fake", "trap 'exit 75' TERM; while :; do sleep 0.1; done")
    environment = {**os.environ, "PATH": f"{stubs.folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", LAUNCH / "local.sh", "--python", stubs.folder / "fake", "--restarts", "0", *TRAIN],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(100):
        if stubs.calls():
            break
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and "giving up" in said


# On a TPU slice


def pod(*more):
    return ["--name", "slice", "--zone", "z", "--type", "v5litepod-16", *more, *TRAIN]


def verbs(calls) -> list[str]:
    """What was asked of gcloud, without the questions about the state."""
    asked = [c.split(" tpu-vm ")[1] for c in calls if c.startswith("gcloud")]
    names = []
    for text in asked:
        verb = text.split()[0]
        if "remote.sh" in text:
            verb = text.split("remote.sh ")[1].split()[0]
        if verb != "describe":
            names.append(verb)
    return names


WHOLE = ["create", "scp", "ssh", "install", "start", "follow"]


def test_a_pod_is_made_filled_and_run(stubs):
    stubs.add("gcloud", gcloud(stubs.folder / "states"))
    done = stubs.run("tpu_pod.sh", *pod("--spot", "--setup", "mount it", "--delete"))
    assert done.returncode == 0, done.stderr
    assert verbs(stubs.calls()) == [*WHOLE[:4], "ssh", *WHOLE[4:], "delete"]
    create = next(c for c in stubs.calls() if " create " in c)
    assert "--spot" in create and "v2-alpha-tpuv5-lite" in create
    start = next(c for c in stubs.calls() if "remote.sh start" in c)
    flags = "--distributed --config configs/mini.py '--config.output=a folder'"
    assert f"start slice {flags}" in start and "--worker=all" in start


def test_a_pod_that_is_there_is_used_again(stubs):
    (stubs.folder / "states").write_text("READY\n")
    stubs.add("gcloud", gcloud(stubs.folder / "states"))
    done = stubs.run("tpu_pod.sh", *pod())
    assert done.returncode == 0 and verbs(stubs.calls()) == WHOLE[1:]


def test_a_preempted_pod_is_made_again_and_the_run_goes_on(stubs):
    states = stubs.folder / "states"
    once = (
        f"[[ -f {states}.done ]] || {{ touch {states}.done; echo PREEMPTED > {states}; exit 1; }}"
    )
    stubs.add("gcloud", gcloud(states, train=once))
    done = stubs.run("tpu_pod.sh", *pod())
    assert done.returncode == 0, done.stderr
    assert verbs(stubs.calls()) == [*WHOLE, "delete", *WHOLE]
    assert "slice is PREEMPTED" in done.stderr and "restart 1" in done.stderr


def test_a_lost_connection_follows_again_and_a_failure_is_handed_on(stubs):
    states = stubs.folder / "states"
    code = stubs.folder / "states.code"
    code.write_text("running\n")
    twice = f"[[ -f {states}.lost ]] && echo 2 > {code}; touch {states}.lost; exit 255"
    stubs.add("gcloud", gcloud(states, train=twice))
    done = stubs.run("tpu_pod.sh", *pod(), FOLLOW_SECONDS="0")
    assert done.returncode == 2
    follow_and_ask = ["follow", "code"]
    assert verbs(stubs.calls()) == [*WHOLE[:-1], *follow_and_ask, *follow_and_ask]


def test_gcloud_that_fails_stops_the_script(stubs):
    stubs.add("gcloud", 'echo "permission denied for project" >&2; exit 1')
    done = stubs.run("tpu_pod.sh", *pod())
    assert done.returncode == 2 and "permission denied" in done.stderr
    stubs.add("gcloud", gcloud(stubs.folder / "states") + '\n[[ "$*" != *" scp "* ]] || exit 7')
    done = stubs.run("tpu_pod.sh", *pod())
    assert done.returncode == 7
    assert "install" not in verbs(stubs.calls())
    assert not list(LAUNCH.glob(".*.tar.gz"))


def test_deleting_what_is_not_there_is_no_mistake(stubs):
    stubs.add("gcloud", gcloud(stubs.folder / "states"))
    done = stubs.run("tpu_pod.sh", "down", "--name", "slice", "--zone", "z")
    assert done.returncode == 0 and verbs(stubs.calls()) == []


def test_pod_dry_run_touches_nothing(stubs):
    stubs.add("gcloud", "exit 9")
    done = stubs.run("tpu_pod.sh", *pod("--dry_run"))
    assert done.returncode == 0 and not stubs.calls()
    assert sum(line.startswith("+ gcloud") for line in done.stderr.splitlines()) == 6


def test_what_a_host_does(stubs, tmp_path):
    # A copy of launch/ beside an interpreter of our own, as on a host.
    home = tmp_path / "host"
    shutil.copytree(LAUNCH, home / "launch")
    (home / ".venv/bin").mkdir(parents=True)
    python = home / ".venv/bin/python"
    python.write_text('#!/usr/bin/env bash\necho "args $*"\nsleep 0.5\nexit 75\n')
    python.chmod(0o755)

    def remote(*args):
        return subprocess.run(
            ["bash", home / "launch/remote.sh", *args], capture_output=True, text=True, timeout=60
        )

    assert remote("start", "r", "--config", "x y").returncode == 0
    assert "running already" in remote("start", "r", "--config", "x y").stderr
    assert remote("code", "r").stdout.strip() == "running"
    followed = remote("follow", "r")
    assert followed.returncode == 75
    assert "args -m vlm2vec_jax.train --config x y" in followed.stdout
    assert remote("code", "r").stdout.strip() == "75"
    assert remote("stop", "r").returncode == 0
    assert "no run q was started" in remote("follow", "q").stderr


# Really


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_together(tmp_path):
    make_train(tmp_path / "data", {"A": 16})
    write_subset(tmp_path / "eval", "MSCOCO_t2i", captions())
    flags = {
        "model.path": mini_model(tmp_path),
        "data.path": tmp_path / "data",
        "output": tmp_path / "out",
        "steps": 2,
        "batch_size": 8,
        "mesh.data": 4,
        "optim.warmup_steps": 1,
        "eval.every": 2,
        "eval.path": tmp_path / "eval",
    }
    done = subprocess.run(
        ["bash", LAUNCH / "local.sh", "--processes", "2", "--devices", "2", "--python",
         sys.executable, "--logs", tmp_path / "logs", "--port", "29571", "--restarts", "0",
         "--", "--config", "configs/mini.py", *(f"--config.{k}={v}" for k, v in flags.items())],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "XLA_FLAGS": simulated.flags(1)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "logs/process-1.log").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert "in 2 processes" in done.stderr
    assert set(lines[1]["eval"]) == {"MSCOCO_t2i"} and set(lines[1]["subset_loss"]) == {"A"}
    kept = Embedder.from_pretrained(tmp_path / "out/best", dtype="float32")
    assert kept.encode(["a"]).shape == (1, 32)
