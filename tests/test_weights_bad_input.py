# SPDX-License-Identifier: Apache-2.0
"""Broken weights through the real commands: one message that names the trouble, exit code 2."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_export_forms import run

from vlm2vec_jax.weights.safetensors import write

NORM = "model.norm.weight"
SHARD = "model-00002-of-"


def sharded(goldens, folder, change=None):
    shutil.copytree(goldens / "tiny_gqa", folder, ignore=lambda *_: ["model.safetensors"])
    tensors = load_file(goldens / "tiny_gqa/model.safetensors")
    if change is not None:
        change(tensors)
    write(folder, tensors.items(), shard_bytes=200_000)
    return folder


def truncate(folder):
    shard = next(folder.glob(f"{SHARD}*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    return [shard.name, "truncated"]


def lose(folder):
    shard = next(folder.glob(f"{SHARD}*"))
    shard.unlink()
    return [shard.name, "is absent"]


def garble(folder):
    shard = next(folder.glob(f"{SHARD}*"))
    shard.write_bytes(b"<html>not found</html>" * 10)
    return [shard.name, "cannot be read as safetensors"]


def misplace(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NORM] = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps(content))
    return ["model-00001-of-00001.safetensors is absent", NORM]


@pytest.mark.parametrize("spoil", [truncate, lose, garble, misplace])
def test_broken_files(goldens, tmp_path, capsys, spoil):
    folder = sharded(goldens, tmp_path / "m")
    words = spoil(folder)
    assert run(folder, "hf", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    for word in (*words, str(folder)):
        assert word in said


def not_a_number(tensors):
    tensors[NORM] = tensors[NORM].copy()
    tensors[NORM][3] = np.nan


def whole_numbers(tensors):
    tensors[NORM] = np.ones(48, np.int64)


def other_shape(tensors):
    tensors[NORM] = np.ones(47, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (not_a_number, ["not finite", NORM]),
        (whole_numbers, [f"{NORM} is I64", "F32"]),
        (other_shape, [f"{NORM} is (47,)", "(48,)"]),
        (lambda tensors: tensors.pop(NORM), [f"missing: {NORM}"]),
        (lambda tensors: tensors.update({"extra": np.ones(1)}), ["unexpected: extra"]),
    ],
)
def test_broken_tensors(goldens, tmp_path, capsys, change, words):
    folder = sharded(goldens, tmp_path / "m", change)
    assert run(folder, "hf", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 16}, ["should be (16,", "o_proj.lora_A.weight"]),
        ({"target_modules": ["qkv_proj"]}, ["unexpected: model.layers", "other targets"]),
        ({"target_modules": ["query"]}, ["no linear layer matches", "qkv_proj"]),
        ({"use_dora": False}, ["lora_magnitude_vector", "use_dora = true"]),
        ({"peft_type": "LOHA"}, ["peft_type = 'LOHA' is not supported"]),
        ({"base_model_name_or_path": None}, ["names no base model"]),
    ],
)
def test_adapters_that_do_not_fit(goldens, tmp_path, capsys, settings, words):
    folder = tmp_path / "adapter"
    shutil.copytree(goldens / "adapters/tiny_gqa_dora_r8", folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    raw["base_model_name_or_path"] = str(goldens / "tiny_gqa")
    (folder / "adapter_config.json").write_text(json.dumps(raw | settings))
    for form in ("peft", "merged"):
        assert run(folder, form, tmp_path / "out", "--nomeasure") == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and not (tmp_path / "out").exists()
        assert all(word in said for word in words), said


def test_numbers_of_an_adapter_that_are_none(goldens, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(goldens / "adapters/tiny_gqa_dora_r8", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
    tensors[name] = tensors[name] * np.inf
    (folder / "adapter_model.safetensors").unlink()
    write(folder, tensors.items(), stem="adapter_model")
    assert run(folder, "peft", tmp_path / "out", "--model", goldens / "tiny_gqa") == 2
    said = capsys.readouterr().err
    assert "not finite" in said and "self_attn.o_proj.lora_B.weight" in said
