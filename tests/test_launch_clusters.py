# SPDX-License-Identifier: Apache-2.0
"""launch/ on GKE and SLURM: the scripts against stub `kubectl`, `sbatch`, `srun`."""

from pathlib import Path

import pytest
import yaml
from launch_stubs import LAUNCH, TRAIN, Stubs


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


# On GKE


def values(folder: Path, **changed) -> Path:
    lines = (LAUNCH / "gke/values.env").read_text().splitlines()
    named = {"IMAGE": "registry/image:1", **changed}
    lines = [line for line in lines if line.partition("=")[0] not in named]
    path = folder / "values.env"
    path.write_text("\n".join([*lines, *(f"{k}={v}" for k, v in named.items())]))
    return path


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_manifests_are_whole(stubs, kind):
    flags = "--config configs/mmeb.py --config.output='/shared/a & b/$x'"
    path = values(stubs.folder, TRAIN_FLAGS=flags, MAX_RESTARTS="5")
    done = stubs.run("gke/gke.sh", "render", "--kind", kind, "--values", path)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    assert manifest["kind"] == "JobSet" and manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    hosts = {"tpu": 16, "gpu": 2}[kind]
    assert job["parallelism"] == job["completions"] == hosts
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    pod_spec = job["template"]["spec"]
    (container,) = pod_spec["containers"]
    assert container["image"] == "registry/image:1"
    assert container["args"][0].startswith("exec python -m vlm2vec_jax.train --")
    assert container["args"][0].endswith(flags)
    limits = container["resources"]["limits"]
    assert limits == {"tpu": {"google.com/tpu": 4}, "gpu": {"nvidia.com/gpu": 8}}[kind]
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod_spec["volumes"]}


def test_missing_values_are_listed_together(stubs):
    path = values(stubs.folder, IMAGE="", NAME="")
    done = stubs.run("gke/gke.sh", "apply", "--kind", "gpu", "--values", path)
    assert done.returncode == 2 and "does not say: IMAGE NAME" in done.stderr


def test_applying_twice_creates_once(stubs):
    there = stubs.folder / "there"
    stubs.add(
        "kubectl",
        f"case \"$*\" in *' get '*) test -f {there} ;; *' apply '*) cat > {there} ;; esac",
    )
    args = ("apply", "--kind", "tpu", "--values", values(stubs.folder))
    assert stubs.run("gke/gke.sh", *args).returncode == 0
    assert yaml.safe_load(there.read_text())["kind"] == "JobSet"
    again = stubs.run("gke/gke.sh", *args)
    assert again.returncode == 0 and "is there already" in again.stderr
    assert sum(" apply " in call for call in stubs.calls()) == 1
    dry = stubs.run("gke/gke.sh", *args, "--dry_run")
    assert "+ kubectl --namespace default apply -f -" in dry.stderr and "JobSet" in dry.stdout


def test_kubectl_that_fails_is_handed_on(stubs):
    stubs.add("kubectl", 'echo "no cluster" >&2; exit 4')
    path = values(stubs.folder)
    done = stubs.run("gke/gke.sh", "apply", "--kind", "tpu", "--values", path)
    assert done.returncode == 4 and "no cluster" in done.stderr


# On SLURM


def test_a_job_is_submitted_once(stubs):
    queue = stubs.folder / "queue"
    stubs.add("sbatch", f"echo 12 > {queue}").add("squeue", f"cat {queue} 2>/dev/null || true")
    args = ("--nodes", 4, "--partition", "gpu", "--time", "01:00:00", *TRAIN)
    assert stubs.run("slurm.sbatch", *args).returncode == 0
    (call,) = [c for c in stubs.calls() if c.startswith("sbatch")]
    for word in (
        "--nodes=4",
        "--partition=gpu",
        "--time=01:00:00",
        "--gpus-per-node=8",
        "slurm.sbatch",
    ):
        assert word in call
    assert call.endswith("--config configs/mini.py --config.output=a folder")
    again = stubs.run("slurm.sbatch", *args)
    assert again.returncode == 0 and "is job 12 already" in again.stderr
    assert sum(c.startswith("sbatch") for c in stubs.calls()) == 1


def test_sbatch_that_fails_and_a_dry_run(stubs):
    stubs.add("squeue").add("sbatch", 'echo "invalid partition" >&2; exit 1')
    done = stubs.run("slurm.sbatch", *TRAIN)
    assert done.returncode == 1 and "invalid partition" in done.stderr
    before = len(stubs.calls())
    dry = stubs.run("slurm.sbatch", "--dry_run", *TRAIN)
    assert dry.returncode == 0 and "+ sbatch --job-name=vlm2vec" in dry.stderr
    assert len(stubs.calls()) == before


@pytest.mark.parametrize(
    ("code", "requeued", "ends"), [(75, True, 0), (0, False, 0), (2, False, 2)]
)
def test_inside_the_job(stubs, code, requeued, ends):
    stubs.add("srun", f"exit {code}").add("scontrol")
    done = stubs.run(
        "slurm.sbatch", *TRAIN, SLURM_JOB_ID="12", VLM2VEC_REPOSITORY=str(LAUNCH.parent)
    )
    assert done.returncode == ends
    (srun,) = [c for c in stubs.calls() if c.startswith("srun")]
    assert "-m vlm2vec_jax.train --distributed --config configs/mini.py" in srun
    assert ("scontrol requeue 12" in stubs.calls()) == requeued
