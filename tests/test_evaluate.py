# SPDX-License-Identifier: Apache-2.0
"""The command `evaluate`, with an encoder without a model in the Embedder's place."""

import json
import os
import sys
import types

import pytest
from evaluation_data import FakeEncoder, captions, labels, write_subset

from vlm2vec_jax import evaluate, flags


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    write_subset(root, "ImageNet-1K", labels())
    write_subset(root, "MSCOCO_t2i", captions())
    return root


@pytest.fixture
def loaded(monkeypatch):
    """What the command asked of `Embedder.from_pretrained` and of `encode`."""
    asked = []

    class Embedder(FakeEncoder):
        @classmethod
        def from_pretrained(cls, path, **options):
            asked.append((path, options))
            return cls(path)

        def encode(self, inputs, *, batch_tokens=None, progress=False):
            asked.append((len(inputs), batch_tokens, progress))
            return super().encode(inputs)

    module = types.SimpleNamespace(Embedder=Embedder)
    monkeypatch.setitem(sys.modules, "vlm2vec_jax.embedder", module)
    return asked


def call(*argv):
    return flags.call(evaluate.main, evaluate.define, ["evaluate", *map(str, argv)])


def test_flags_reach_the_model_and_scores_the_disk(data, tmp_path, loaded, capsys):
    output = tmp_path / "out"
    argv = [
        "--model",
        "some/model",
        "--adapter",
        "some/adapter",
        "--data",
        data,
        "--output",
        output,
    ]
    argv += [
        "--quantize",
        "int8",
        "--dtype",
        "float32",
        "--num_crops",
        4,
        "--max_len",
        256,
        "--batch_tokens",
        4096,
    ]
    assert call(*argv, "--subsets", "MSCOCO_t2i,ImageNet_1K") == 0
    assert loaded[0] == (
        "some/model",
        {
            "adapter": "some/adapter",
            "dtype": "float32",
            "quantize": "int8",
            "num_crops": 4,
            "max_len": 256,
        },
    )
    assert loaded[1:] == [(24, 4096, True)]
    scores = json.loads((output / "scores.json").read_text())
    assert list(scores["subsets"]) == ["ImageNet-1K", "MSCOCO_t2i"]
    printed = capsys.readouterr().out
    assert "Classification, mean of 1" in printed and "2 of MMEB's 36 datasets" in printed
    assert (output / "scores.md").read_text().startswith("# MMEB scores")


def test_an_unknown_subset_is_told_before_a_model_is_loaded(data, tmp_path, loaded, capsys):
    argv = ["--model", "m", "--data", data, "--output", tmp_path / "out", "--subsets", "CIFAR"]
    assert call(*argv) == 2
    said = capsys.readouterr().err
    assert "'CIFAR'" in said and "ImageNet-1K, MSCOCO_t2i" in said
    assert loaded == [] and not (tmp_path / "out").exists()


def test_bad_data_is_listed_whole_and_earlier_results_stay(data, tmp_path, loaded, capsys):
    output = tmp_path / "out"
    argv = ["--model", "m", "--data", data, "--output", output]
    assert call(*argv) == 0
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    os.unlink(data / "img/ImageNet-1K_1.png")
    os.unlink(data / "img/MSCOCO_t2i_2.png")
    (data / "img/ImageNet-1K_3.png").write_bytes(b"not a picture")
    loaded.clear()
    capsys.readouterr()
    assert call(*argv) == 2
    said = capsys.readouterr().err
    for name in ("ImageNet-1K_1.png", "ImageNet-1K_3.png", "MSCOCO_t2i_2.png"):
        assert name in said
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert not any(isinstance(entry[0], int) for entry in loaded)  # nothing was embedded


def test_unequal_lists_of_candidates(data, tmp_path, loaded, capsys):
    rows = labels()
    rows[4]["tgt_img_path"] = rows[4]["tgt_img_path"][:-1]
    write_subset(data, "ImageNet-1K", rows)
    assert call("--model", "m", "--data", data, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "ImageNet-1K" in said and "row 4" in said


def test_images_under_another_root(data, tmp_path, loaded):
    os.rename(data / "img", tmp_path / "img")
    argv = ["--model", "m", "--data", data, "--output", tmp_path / "out"]
    assert call(*argv) == 2
    assert call(*argv, "--image_root", tmp_path) == 0


def test_missing_flags_are_told(capsys):
    assert call("--data", "x") == 2
    said = capsys.readouterr().err
    assert "--model" in said and "--output" in said
