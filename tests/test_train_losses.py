# SPDX-License-Identifier: Apache-2.0
"""Every option of the loss by way of `train`: fields, data, hard negatives, meshes, GradCache."""

import json

import numpy as np
import pytest
from data_files import train_rows, write_parquet
from training_tools import mini_model

from vlm2vec_jax import config as config_lib
from vlm2vec_jax import train
from vlm2vec_jax.flags import call

pytestmark = pytest.mark.usefixtures("compiled_quickly")

EVERYTHING = {
    "loss.negatives": 2,
    "loss.symmetric": True,
    "loss.mask_duplicate_targets": True,
    "loss.same_query": "positive",
    "loss.margin": 0.3,
    "loss.same_source": True,
    "loss.private_negatives": True,
    "loss.hardness": 2,
    "loss.matryoshka": "8,16",
    "loss.learn_temperature": True,
    "loss.temperature_lr": 0.1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, repository):
    """A function (name, fields) -> the metrics of a run of three steps, and its folder."""
    root = tmp_path_factory.mktemp("train_losses")
    for subset in "AB":
        rows = train_rows(subset, 24)
        for i, row in enumerate(rows):
            row["qry"] = f"{subset} query {i // 2}"  # every query twice, with other targets
            texts = [f"near miss {i} {k}" for k in range(i % 4)]
            row |= {"neg_text": texts, "neg_image_path": [""] * len(texts)}
        write_parquet(root / "data" / subset, "original", rows)
    fixed = {
        **{"model.path": mini_model(root), "model.dtype": "float32", "data.path": root / "data"},
        **{"data.subsets": "", "data.num_crops": 1, "data.max_len": 64, "batch_size": 16},
        **{"steps": 3, "optim.warmup_steps": 0, "optim.lr": 1e-2, "adapter.type": "lora"},
        **{"adapter.dropout": 0, "mesh.data": 1, "remat": "none", "temperature": 0.1},
    }

    def go(name, fields):
        output = root / name
        flags = [f"--config.{k}={v}" for k, v in {**fixed, "output": output, **fields}.items()]
        argv = ["train", "--config", f"{repository}/configs/mmeb.py", *flags]
        assert call(train.main, train.define, argv) == 0
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], output

    return go


@pytest.fixture(scope="module")
def alone(run):
    """All options on one device, dense, without GradCache."""
    return run("alone", EVERYTHING | {"grad_cache": "off", "loss.form": "dense"})


def test_the_learned_temperature_is_trained_and_kept(alone):
    metrics, output = alone
    used = [line["temperature"] for line in metrics]
    assert used[0] == pytest.approx(0.1) and len(set(used)) == 3
    # Adam's first step is the learning rate, whatever the gradient.
    assert abs(np.log(used[1] / used[0])) == pytest.approx(0.1, rel=1e-3)
    record = json.loads((output / "vlm2vec.json").read_text())
    assert 0.005 <= record["temperature"] <= 0.5 and record["temperature"] not in used
    config = config_lib.from_dict(json.loads((output / "config.json").read_text()))
    assert config_lib.prefix_widths(config) == (8, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "form"),
    [
        ((2, 4, 1), "ring"),
        ((2, 2, 2), "tiled"),
        pytest.param((8, 1, 1), "dense", marks=pytest.mark.long),
    ],
)
def test_all_options_on_meshes_with_grad_cache(run, alone, mesh, form):
    data, fsdp, tensor = mesh
    fields = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "loss.form": form}
    fields |= {"grad_cache": "on", "packing.chunk_tokens": 64, "loss.tile": 8}
    metrics, _ = run(f"{form}{data}{fsdp}{tensor}", EVERYTHING | fields)
    for ours, wanted in zip(metrics, alone[0], strict=True):
        for name in ("loss", "temperature", "accuracy", "positive_cosine", "negative_cosine"):
            assert ours[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_resuming_takes_the_temperature_along(run, alone):
    fields = EVERYTHING | {"grad_cache": "off", "loss.form": "dense", "checkpoint.every": 1}
    stopped, output = run("resumed", fields | {"steps": 3})
    for folder in (output / "checkpoints").iterdir():
        if folder.name == "3":
            for file in sorted(folder.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            folder.rmdir()
    again, _ = run("resumed", fields)
    assert [line["loss"] for line in again] == [line["loss"] for line in stopped]
    assert [line["temperature"] for line in again] == [line["temperature"] for line in alone[0]]


@pytest.mark.slow
def test_hard_negatives_count(run):
    """The same batches with one more column per query: their exponentials are added."""
    fields = {"grad_cache": "off", "steps": 1}
    without, _ = run("without", fields)
    having, _ = run("having", fields | {"loss.negatives": 3})
    assert having[0]["loss"] > without[0]["loss"]
    assert having[0]["positive_cosine"] == pytest.approx(without[0]["positive_cosine"], abs=1e-6)
    assert having[0]["duplicate_targets"] == without[0]["duplicate_targets"]
