# SPDX-License-Identifier: Apache-2.0
"""Following a run: what a step's line says, evaluation during training, the best model kept."""

import json

import numpy as np
import pytest
from data_files import make_train
from evaluation_data import captions, labels, write_subset
from training_tools import mini_model

from vlm2vec_jax import train
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.evaluation.run import evaluate
from vlm2vec_jax.flags import call
from vlm2vec_jax.training.best import Best
from vlm2vec_jax.training.follow import Follower, subset_losses


def test_losses_by_subset():
    losses, sources = np.float32([1, 2, 3, 4]), np.array([2, 0, 2, 0])
    assert subset_losses(losses, sources, ["A", "B", "C"]) == {"A": 3.0, "C": 2.0}


@pytest.mark.parametrize(("full", "times"), [(True, 3), (False, 2)])
def test_useful_flops_and_what_a_chip_makes_of_them(full, times):
    class Chip:
        device_kind, process_index = "TPU v5e", 0

        def memory_stats(self):
            return {"peak_bytes_in_use": 12}

    follower = Follower(["A"], [Chip(), Chip()], full=full)
    values = {"example_loss": np.ones(2, np.float32)}
    found = follower.numbers(values, np.zeros(2, int), 197e12 / 10, 0.5)
    assert found["tflops_per_s"] == pytest.approx(times * 197 / 10 / 0.5)
    assert found["mfu"] == pytest.approx(times / 10) and found["memory_bytes"] == 12
    assert found["subset_loss"] == {"A": 1.0}


def lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, training data of two subsets, held-out rows."""
    folder = tmp_path_factory.mktemp("following")
    make_train(folder / "train", {"A": 12, "B": 20})
    write_subset(folder / "eval", "ImageNet-1K", labels())
    write_subset(folder / "eval", "MSCOCO_t2i", captions())
    return folder, mini_model(folder)


def run(world, output, *more) -> int:
    folder, model = world
    flags = {
        "model.path": model,
        "data.path": folder / "train",
        "output": output,
        "steps": 4,
        "batch_size": 8,
        "mesh.data": 2,
        "checkpoint.every": 2,
        "eval.every": 3,
        "eval.path": folder / "eval",
        "eval.max_queries": 4,
        "optim.warmup_steps": 1,
    }
    argv = ["train", "--config", "configs/mini.py", *more]
    argv += [f"--config.{name}={value}" for name, value in flags.items()]
    return call(train.main, train.define, argv)


@pytest.mark.slow
def test_a_run_is_followed_and_its_best_model_kept(
    world, repository, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(repository)
    output = tmp_path / "out"
    assert run(world, output, "--config.profile=2:2") == 0
    said = capsys.readouterr().err
    assert "evaluation every 3 steps, 8 queries" in said and "a trace of the steps (2, 2)" in said
    assert list((output / "profile").rglob("*.xplane.pb"))
    steps = lines(output)
    for step in steps:
        by_subset = step["subset_loss"]
        assert set(by_subset) <= {"A", "B"} and step["tflops_per_s"] > 0
        smallest, largest = min(by_subset.values()), max(by_subset.values())
        assert smallest - 1e-6 <= step["loss"] <= largest + 1e-6
    # Every three steps and after the last.
    assert [("eval_acc" in step) for step in steps] == [False, False, True, True]
    last = steps[-1]
    assert set(last["eval"]) == {"ImageNet-1K", "MSCOCO_t2i"}
    assert last["eval_acc"] == pytest.approx(np.mean(list(last["eval"].values())))

    # The best is a model folder, with the score that it was kept for.
    best = Best(output, {}, done=4)
    assert best.score == max(step["eval_acc"] for step in steps[2:])
    kept = Embedder.from_pretrained(output / "best", dtype="float32")
    scores = evaluate(kept, world[0] / "eval", ["MSCOCO_t2i"], output=tmp_path / "scores")
    right = [
        json.loads(line)["correct"]
        for line in (tmp_path / "scores/MSCOCO_t2i_pred.jsonl").read_text().splitlines()
    ][:4]
    assert scores["subsets"]["MSCOCO_t2i"]["acc"] >= 0
    chosen = next(step for step in steps[2:] if step["eval_acc"] == best.score)
    assert np.mean(right) == pytest.approx(chosen["eval"]["MSCOCO_t2i"])


@pytest.mark.slow
def test_mistakes_in_the_evaluation_cost_no_step(world, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    assert run(world, tmp_path / "out", "--config.eval.subsets=Nothing") == 2
    assert "no subset 'Nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_new_run_forgets_the_best_of_an_older_one(tmp_path):
    (tmp_path / "best/checkpoints").mkdir(parents=True)
    assert Best(tmp_path, {}, done=0).score == -1.0
    assert not (tmp_path / "best").exists()
    assert not Best(tmp_path, {}, done=0).offer(1, float("nan"), {}, {})
