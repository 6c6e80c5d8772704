# SPDX-License-Identifier: Apache-2.0
"""`python -m vlm2vec_jax.train`: the reference's curves, the output contract, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_files import make_train
from training_tools import mini_model

from vlm2vec_jax import train
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.flags import call
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.training.metrics import MetricsWriter

pytestmark = pytest.mark.usefixtures("compiled_quickly")

slow = pytest.mark.slow


def run(*flags) -> int:
    return call(train.main, train.define, ["train", *map(str, flags)])


def log(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def column(output, name) -> list[float]:
    return [line[name] for line in log(output)]


# The reference's curves


@slow
@pytest.mark.parametrize("kind", ["full", "dora", pytest.param("lora", marks=pytest.mark.long)])
def test_curves_of_the_reference(kind, goldens, repository, tmp_path):
    folder = goldens / "end_to_end/train"
    said = json.loads((folder / "expected.json").read_text())
    flags = ["--config", repository / "configs/mmeb.py"]
    flags += [
        f"--config.{name}={value}"
        for name, value in {
            "model.path": goldens / "tiny_mha",
            "model.dtype": "float32",
            "data.path": folder,
            "data.subsets": "Pairs8",
            "data.split": "original",
            "data.num_crops": said["num_crops"],
            "data.max_len": said["max_len"],
            "batch_size": said["pairs"],
            "steps": said["steps"],
            "temperature": said["temperature"],
            "optim.warmup_steps": said["warmup_steps"],
            "optim.lr": said["learning_rate"][kind],
            "optim.clip_norm": said["clip_norm"],
            "mesh.data": 1,
            "output": tmp_path / "out",
            "adapter.type": "none" if kind == "full" else kind,
            "adapter.dropout": 0,
            "remat": "none",
            "model.adapter": "" if kind == "full" else goldens / f"adapters/tiny_mha_{kind}_r8",
        }.items()
    ]
    assert run(*flags) == 0
    found, wanted = log(tmp_path / "out"), said["log"][kind]
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(ours["lr"], theirs["lr"], rtol=1e-6)
        if ours["step"] <= 8:
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-3, atol=1e-4)
            # Not the contract's: rounding grows along the way, and a norm near 0 is all rounding.
            np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=5e-2, atol=5e-2)
    embedder = Embedder.from_pretrained(tmp_path / "out", dtype="float32")
    rows = pq.read_table(folder / "Pairs8").to_pylist()
    inputs = [
        MultimodalInput(
            row["qry"], (folder / row["qry_image_path"],) if row["qry_image_path"] else ()
        )
        for row in rows
    ]
    with np.load(folder / "final_query_embeddings.npz") as final:
        off = np.abs(embedder.encode(inputs) - final[kind]).max()
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found, wanted)]
    worst = max(abs(a - b) / max(abs(b), 0.1) for a, b in pairs[:8])
    print(f"{kind}: losses of 8 steps within {worst:.1e}, final embeddings within {off:.1e}")
    assert off <= 5e-3


# A small model on a few lines


@pytest.fixture(scope="module")
def ground(tmp_path_factory, repository):
    """A function (output, **overrides) -> flags of a run of 12 steps, with dropout, one device."""
    root = tmp_path_factory.mktemp("train_command")
    make_train(root / "data", {"Lines": 60})
    settings = {
        "model.path": mini_model(root),
        "model.dtype": "float32",
        "data.path": root / "data",
        "data.subsets": "Lines",
        "data.num_crops": 1,
        "data.max_len": 64,
        "batch_size": 16,
        "steps": 12,
        "optim.warmup_steps": 2,
        "optim.lr": 1e-2,
        "adapter.type": "lora",
        "checkpoint.every": 3,
        "mesh.data": 1,
        "remat": "none",
    }

    def flags(output, overrides=()):
        values = {**settings, "output": output, **dict(overrides)}
        config = repository / "configs/mmeb.py"
        return ["--config", config, *(f"--config.{name}={v}" for name, v in values.items())]

    flags.root = root
    return flags


@pytest.fixture(scope="module")
def whole(ground):
    """The run without interruption."""
    output = ground.root / "whole"
    assert run(*ground(output)) == 0
    return output


@pytest.fixture(scope="module")
def stopped(ground):
    """The same run, interrupted in step 7."""
    output = ground.root / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        write = MetricsWriter.write

        def interrupted(self, step, values):
            if step == 7:
                raise KeyboardInterrupt
            write(self, step, values)

        patch.setattr(MetricsWriter, "write", interrupted)
        assert run(*ground(output)) == 130
    return output


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of the interrupted run to go on with."""
    return shutil.copytree(stopped, tmp_path / "again")


def test_output_contract(whole):
    lines = log(whole)
    assert [line["step"] for line in lines] == list(range(1, 13))
    wanted = {"loss", "lr", "grad_norm", "accuracy", "step_s", "pairs_per_s", "data_wait_s"}
    for line in lines:
        assert wanted <= set(line)
        assert 0 < line["real_tokens"] <= 1 and 0 <= line["accuracy"] <= 1
    assert lines[0]["lr"] == 0 and lines[2]["lr"] == pytest.approx(1e-2)
    assert lines[-1]["loss"] < lines[0]["loss"]
    config = json.loads((whole / "config.json").read_text())
    assert config["steps"] == 12 and config["optim"]["lr"] == 1e-2
    record = json.loads((whole / "vlm2vec.json").read_text())
    assert record["backbone"] == "phi3_v" and record["processor"]["num_crops"] == 1
    steps = sorted(int(p.name) for p in (whole / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [9, 12]  # keep=2


def test_resume_is_the_uninterrupted_run(ground, whole, again):
    assert len(log(again)) == 6
    assert run(*ground(again)) == 0
    for name in ("step", "loss", "grad_norm", "lr"):
        assert column(again, name) == column(whole, name), name


def test_nothing_left_to_do(ground, whole, tmp_path, capfd):
    output = shutil.copytree(whole, tmp_path / "done")
    assert run(*ground(output)) == 0
    assert log(output) == log(whole)


@slow
def test_meshes_and_grad_cache_give_one_curve(ground):
    """No dropout: one device or eight, cached or not, begun here and finished there."""
    base = {"adapter.dropout": 0, "steps": 6}
    variants = {
        "auto": {},
        "off": {"grad_cache": "off"},
        "on": {"grad_cache": "on", "packing.chunk_tokens": 128},
        "eight": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        "bfloat16": {"model.dtype": "bfloat16"},
    }
    losses = {}
    for name, changes in variants.items():
        output = ground.root / f"curve_{name}"
        assert run(*ground(output, {**base, **changes})) == 0
        losses[name] = column(output, "loss")
    for name in ("off", "on", "eight"):
        np.testing.assert_allclose(losses[name], losses["auto"], rtol=1e-5, err_msg=name)
    assert losses["bfloat16"] != losses["auto"]
    np.testing.assert_allclose(losses["bfloat16"], losses["auto"], rtol=0.05)

    # The last three steps again, on eight devices, from the checkpoint that one device wrote.
    output = ground.root / "curve_auto"
    shutil.rmtree(output / "checkpoints/6")
    assert run(*ground(output, {**base, **variants["eight"]})) == 0
    np.testing.assert_allclose(column(output, "loss"), losses["auto"], rtol=1e-5)


def test_another_configuration_is_refused(ground, again, capsys):
    before = log(again)
    assert run(*ground(again, {"optim.lr": 2e-2, "temperature": 0.05})) == 2
    error = capsys.readouterr().err
    assert "optim.lr: 0.01 before, 0.02 now" in error and "temperature: 0.02 before" in error
    assert "Traceback" not in error
    assert log(again) == before


def test_a_used_folder_is_refused_without_resume(ground, stopped, capsys):
    assert run(*ground(stopped, {"checkpoint.resume": False})) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert len(log(stopped)) == 6


@slow
def test_killed_and_started_again(ground, whole, repository, tmp_path):
    """SIGKILL, at any moment after the first checkpoint; then the same command again."""
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "vlm2vec_jax.train", *map(str, ground(output))]
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=repository, stdout=out, stderr=out, env=env)
        try:
            limit = time.monotonic() + 240
            while not any((output / "checkpoints").glob("[0-9]*")) and process.poll() is None:
                assert time.monotonic() < limit, (tmp_path / "out.txt").read_text()
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert run(*ground(output)) == 0
    for name in ("step", "loss", "grad_norm", "lr"):
        assert column(output, name) == column(whole, name), name
