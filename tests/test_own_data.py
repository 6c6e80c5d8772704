# SPDX-License-Identifier: Apache-2.0
"""The example of own pairs: sound, and trains on a CPU, from its file and from TFDS alike."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from small_models import quick_compiler
from training_tools import mini_model

from vlm2vec_jax import flags, train
from vlm2vec_jax.data import prepare, verify
from vlm2vec_jax.data.inspection import inspect
from vlm2vec_jax.data.mmeb import open_eval, open_train
from vlm2vec_jax.data.pairs import read_row


@pytest.fixture
def example(repository, tmp_path):
    """A copy of the example, so that no cache is left in the repository."""
    return shutil.copytree(
        repository / "examples/own_data", tmp_path / "own_data",
        ignore=shutil.ignore_patterns(".*"),
    )  # fmt: skip


def losses(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run(repository, tmp_path, data, name, *more) -> list[float]:
    output = tmp_path / name
    fields = {
        "model.path": mini_model(tmp_path), "data.path": data, "output": output, "steps": 4,
        "mesh.data": 1, "data.max_len": 128, "packing.row_tokens": 512, "checkpoint.every": 2,
    }  # fmt: skip
    argv = ["train", "--config", f"{repository / 'configs/own_data.py'}:mini"]
    argv += [f"--config.{field}={value}" for field, value in fields.items()]
    with quick_compiler():
        assert flags.call(train.main, train.define, [*argv, *more]) == 0
    return losses(output)


def test_the_example_is_sound(example):
    found = inspect(example)
    assert not found.errors and not found.warnings and found.images == 8
    (source,) = open_train(example / "pairs.jsonl")
    assert len(source) == 10
    rows = source.take(range(10))
    assert sorted({len(row.negatives) for row in rows}) == [0, 1, 2, 3]
    assert max(len(row.query.images) for row in rows) == 2
    assert verify.verify_train([source], headers=True) == []
    assert len(open_eval(example)[0][2].target_keys) == 4


def test_the_page_shows_rows_that_can_be_read(repository):
    page = (repository / "docs/your-own-data.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", page, re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) >= 4
    for line in lines:
        read_row(json.loads(line))


@pytest.mark.slow
def test_the_example_trains_on_a_cpu_and_goes_on_from_records(repository, example, tmp_path):
    straight = run(repository, tmp_path, example / "pairs.jsonl", "straight")
    assert len(straight) == 4 and all(0 < loss < 10 for loss in straight)
    assert straight[-1] < straight[0]
    argv = ["prepare", "--data", str(example), "--tfds", str(tmp_path / "records")]
    assert flags.call(prepare.main, prepare.define, argv) == 0
    # Of the last two steps nothing is left but the checkpoint before them.
    shutil.rmtree(tmp_path / "straight" / "checkpoints" / "4")
    again = run(repository, tmp_path, tmp_path / "records", "straight")
    assert again == pytest.approx(straight, rel=1e-5)
