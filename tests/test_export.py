# SPDX-License-Identifier: Apache-2.0
"""Exports of short runs: they embed as the trainer's own model does, and hold every weight."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm2vec_jax import export, train
from vlm2vec_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    check,
)
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import call
from vlm2vec_jax.weights.safetensors import Checkpoint

STEPS = 3
TEXTS = ["A cat and a dog", "Find me an everyday image that matches the given caption: A cat."]


def run_config(goldens, output, kind):
    adapter = "" if kind == "none" else str(goldens / "adapters" / f"tiny_mha_{kind}_r8")
    return check(
        Config(
            model=ModelConfig(str(goldens / "tiny_mha"), adapter, "float32"),
            adapter=AdapterConfig(type=kind, dropout=0.0),
            data=DataConfig(str(goldens / "end_to_end/train"), num_crops=1, max_len=48, workers=1),
            optim=OptimConfig(lr=1e-3, warmup_steps=1),
            mesh=MeshConfig(data=1),
            checkpoint=CheckpointConfig(every=0),
            batch_size=4,
            steps=STEPS,
            output=str(output),
            grad_cache="off",
            remat="none",
        )
    )


@pytest.fixture(scope="module", params=["none", "lora", "dora"])
def trained(request, goldens, tmp_path_factory):
    """(kind, output folder of a short run)."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    train.train(run_config(goldens, output, request.param))
    return request.param, output


def inputs(goldens):
    image = goldens / "end_to_end/train/images/noise_37x51.png"
    return [*TEXTS, {"text": "<|image_1|> What is shown here?", "images": [str(image)]}]


def embeddings(goldens, folder, **options):
    return Embedder.from_pretrained(folder, dtype="float32", **options).encode(inputs(goldens))


def run_export(checkpoint, format, output, *more):
    argv = ["export", "--checkpoint", str(checkpoint), "--format", format]
    return call(export.main, export.define, [*argv, "--output", str(output), *more])


def record_of(folder):
    return json.loads((folder / "vlm2vec.json").read_text())


def test_exports_embed_as_the_run(trained, goldens, tmp_path):
    kind, run = trained
    expected = embeddings(goldens, run)
    assert np.abs(expected - embeddings(goldens, goldens / "tiny_mha")).max() > 1e-3
    formats = {"hf": 1e-6} if kind == "none" else {"peft": 1e-6, "merged": 1e-5}
    for format, tolerance in formats.items():
        out = tmp_path / format
        assert run_export(run, format, out) == 0
        np.testing.assert_allclose(embeddings(goldens, out), expected, rtol=0, atol=tolerance)
        record = record_of(out)
        assert record["exported"]["step"] == STEPS and record["exported"]["format"] == format
        # What was used in training goes along: crops and the longest text.
        assert record["processor"] == record_of(run)["processor"]
        assert (record["adapter"] is None) == (format != "peft")
    others = {"hf", "peft", "merged"} - set(formats)
    for format in others:
        assert run_export(run, format, tmp_path / "other") == 2
    assert not (tmp_path / "other").exists()


def test_full_export_is_complete(trained, goldens, tmp_path):
    """All tensors of the base are there, and those that cannot matter are the base's own."""
    kind, run = trained
    format = "hf" if kind == "none" else "merged"
    assert run_export(run, format, tmp_path / "out", "--shard_bytes", "200000") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    with Checkpoint(tmp_path / "out") as ours, Checkpoint(goldens / "tiny_mha") as base:
        assert set(ours.names) == set(base.names)
        changed = {n for n in base.names if not np.array_equal(ours.read(n), base.read(n))}
    assert "model.layers.2.mlp.down_proj.weight" in changed
    assert "lm_head.weight" not in changed
    assert ("model.embed_tokens.weight" in changed) == (kind == "none")
    if kind == "none":
        assert not any("post_layernorm" in n or "encoder.layers.2" in n for n in changed)
    for file in (goldens / "tiny_mha").glob("*.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_bfloat16_and_force(trained, goldens, tmp_path):
    kind, run = trained
    format = {"none": "hf", "lora": "merged", "dora": "peft"}[kind]
    assert run_export(run, format, tmp_path / "out") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert run_export(run, format, tmp_path / "out") == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert run_export(run, format, tmp_path / "out", "--force", "--dtype", "bfloat16") == 0
    name = "adapter_model.safetensors" if format == "peft" else "model.safetensors"
    kinds = {t.dtype.name for t in load_file(tmp_path / "out" / name).values()}
    assert kinds == {"bfloat16"}
    cosine = np.sum(embeddings(goldens, run) * embeddings(goldens, tmp_path / "out"), axis=-1)
    assert cosine.min() > 0.999


def test_a_peft_folder_merges(goldens, tmp_path):
    """An adapter folder in, a model out; PEFT's own export holds what came in."""
    folder = tmp_path / "adapter"
    shutil.copytree(goldens / "adapters/tiny_gqa_dora_r8", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(goldens / "tiny_gqa")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert run_export(folder, "merged", tmp_path / "merged") == 0
    expected = embeddings(goldens, folder)
    found = embeddings(goldens, tmp_path / "merged")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert record_of(tmp_path / "merged")["exported"]["adapter"]["use_dora"] is True

    assert run_export(folder, "peft", tmp_path / "peft") == 0
    ours = load_file(tmp_path / "peft/adapter_model.safetensors")
    original = load_file(folder / "adapter_model.safetensors")
    assert set(ours) == set(original)
    assert all(np.array_equal(ours[name], original[name]) for name in original)
    again = embeddings(goldens, tmp_path / "peft")
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-6)


def test_a_model_folder_is_written_again(goldens, tmp_path):
    assert run_export(goldens / "tiny_gqa", "hf", tmp_path / "out") == 0
    with Checkpoint(tmp_path / "out") as ours, Checkpoint(goldens / "tiny_gqa") as base:
        assert all(np.array_equal(ours.read(n), base.read(n)) for n in base.names)


@pytest.mark.parametrize(
    "checkpoint, format, words",
    [
        ("tiny_mha", "peft", "--format hf"),
        ("tiny_mha", "merged", "--format hf"),
        ("nothing", "hf", "there is no model folder"),
    ],
)
def test_mistakes_are_told(goldens, tmp_path, capsys, checkpoint, format, words):
    assert run_export(goldens / checkpoint, format, tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_format_for_an_adapter_run_is_named(trained, tmp_path):
    kind, run = trained
    wrong = "peft" if kind == "none" else "hf"
    with pytest.raises(UserError) as told:
        export.export(run, wrong, tmp_path / "out")
    for word in ("hf",) if kind == "none" else ("peft", "merged", kind):
        assert word in str(told.value)


def test_a_run_without_a_checkpoint(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained[1], copy, ignore=lambda folder, names: {"checkpoints"} & set(names))
    (copy / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        export.export(copy, "hf" if trained[0] == "none" else "peft", tmp_path / "out")
    assert jax.device_count() >= 1 and not (tmp_path / "out").exists()
