# SPDX-License-Identifier: Apache-2.0
"""The commands beside the weights: comparing two models, and pickles that need torch."""

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm2vec_jax.flags import call
from vlm2vec_jax.weights import compare, from_bin
from vlm2vec_jax.weights.safetensors import write

DORA = "adapters/tiny_gqa_dora_r8"


def run(*argv):
    return call(compare.main, compare.define, ["compare", *map(str, argv)])


def changed(goldens, folder, change):
    """The small model after `change` has had its tensors."""
    shutil.copytree(goldens / "tiny_gqa", folder, ignore=lambda *_: ["model.safetensors"])
    tensors = load_file(goldens / "tiny_gqa/model.safetensors")
    change(tensors)
    write(folder, tensors.items(), shard_bytes=200_000)
    return folder


def test_equal_models_are_equal(goldens, tmp_path, capsys):
    other = changed(goldens, tmp_path / "sharded", lambda tensors: None)
    assert run(goldens / "tiny_gqa", other, "--json", tmp_path / "r.json") == 0
    said = capsys.readouterr().out
    count = len(load_file(goldens / "tiny_gqa/model.safetensors"))
    assert f"{count} tensors: {count} equal, 0 not" in said
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["same"] and len(result["tensors"]) == count and result["embeddings"] is None


def test_differences_are_named_and_decide_the_exit_code(goldens, tmp_path, capsys):
    name = "model.layers.0.mlp.down_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name] + np.float32(0.25) * (np.arange(48) == 7)[:, None]
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
        del tensors["lm_head.weight"]

    other = changed(goldens, tmp_path / "other", change)
    assert run(goldens / "tiny_gqa", other, "--json", tmp_path / "r.json") == 1
    said = capsys.readouterr().out
    assert name in said and "2.500e-01" in said and "only in A" in said
    lines = {
        line["name"]: line for line in json.loads((tmp_path / "r.json").read_text())["tensors"]
    }
    assert lines[name]["difference"] == pytest.approx(0.25)
    assert lines["lm_head.weight"]["b"] is None
    norm = lines["model.norm.weight"]
    assert norm["a"] == "F32 [48]" and norm["b"] == "F16 [48]" and 0 < norm["difference"] < 1e-3
    # A tolerance forgives numbers, not what is missing.
    assert run(goldens / "tiny_gqa", other, "--tensor_tolerance", "0.5") == 1

    def smaller(tensors):
        tensors[name] = tensors[name] + np.float32(0.25)

    near = changed(goldens, tmp_path / "near", smaller)
    assert run(goldens / "tiny_gqa", near, "--tensor_tolerance", "0.5") == 0
    assert run(goldens / "tiny_gqa", near, "--tensor_tolerance", "0.2") == 1

    def broken(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = np.nan

    bad = changed(goldens, tmp_path / "bad", broken)
    assert run(goldens / "tiny_gqa", bad, "--tensor_tolerance", "1000") == 1
    assert run(bad, bad) == 0  # the same bits


def test_a_base_with_an_adapter_equals_the_merged_model(goldens, tmp_path, capsys):
    from test_export_forms import run as export

    pair = f"{goldens / 'tiny_gqa'}+{goldens / DORA}"
    base = ("--model", goldens / "tiny_gqa", "--nomeasure")
    assert export(goldens / DORA, "merged", tmp_path / "merged", *base) == 0
    assert run(pair, tmp_path / "merged") == 0
    assert run(goldens / "tiny_gqa", pair) == 1
    capsys.readouterr()
    assert run(goldens / "tiny_mha", pair) == 1
    assert "shapes differ" in capsys.readouterr().out


@pytest.mark.slow
def test_embeddings_are_compared(goldens, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "A cat"}\n\n{"text": "and a dog"}\n')
    name = "model.norm.weight"

    def change(tensors):
        tensors[name] = tensors[name] + np.float32(1e-3) * np.arange(48, dtype=np.float32)

    other = changed(goldens, tmp_path / "other", change)
    argv = (goldens / "tiny_gqa", other, "--input", tmp_path / "in.jsonl")
    loose = ("--tensor_tolerance", "1")
    assert run(*argv, *loose, "--json", tmp_path / "r.json") == 1
    said = capsys.readouterr().out
    assert "2 embeddings: smallest cosine 0.9" in said and "beyond 1e-05" in said
    found = json.loads((tmp_path / "r.json").read_text())["embeddings"]
    assert 0.9 < min(found["cosine"]) < 1 and max(found["difference"]) > 1e-5
    assert run(*argv, *loose, "--tolerance", "0.5") == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "two models must be given, A and B; here are 0"),
        (("tiny_gqa",), "here are 1"),
        (("tiny_gqa", "tiny_gqa", "tiny_mha"), "here are 3"),
        (("tiny_gqa", "nothing"), "there is no model folder"),
        (("tiny_gqa+nothing", "tiny_gqa"), "there is no model folder"),
        (("tiny_gqa", "tiny_gqa", "--input", "bad.jsonl"), "line 2: "),
        (("tiny_gqa", "tiny_gqa", "--input", "gone.jsonl"), "cannot be read"),
    ],
)
def test_mistakes(goldens, tmp_path, capsys, monkeypatch, argv, words):
    for name in ("tiny_gqa", "tiny_mha"):
        (tmp_path / name).symlink_to(goldens / name)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n[1]\n')
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


# ------------------------------------------------------------------------------------------ pickles


def convert(*argv):
    return call(from_bin.main, from_bin.define, ["from_bin", *map(str, argv)])


def test_conversion_without_torch_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    assert convert(tmp_path, "--output", tmp_path / "out") == 2
    assert "pip install torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_pickled_checkpoint(tmp_path, capsys):
    output = ("--output", tmp_path / "out")
    index = tmp_path / "pytorch_model.bin.index.json"
    assert convert(tmp_path, *output) == 2
    assert "holds no pickled weights" in capsys.readouterr().err
    assert convert(tmp_path / "nothing", *output) == 2
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    assert convert(tmp_path, *output) == 2
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}))
    assert convert(tmp_path, *output) == 2
    assert "pytorch_model-00001-of-00001.bin is absent" in capsys.readouterr().err
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    assert convert(tmp_path, *output) == 2
    assert "outside of its folder" in capsys.readouterr().err
    (tmp_path / "m.safetensors").write_bytes(b"x")
    assert convert(tmp_path / "m.safetensors", *output) == 2
    assert "is no pickled checkpoint" in capsys.readouterr().err
