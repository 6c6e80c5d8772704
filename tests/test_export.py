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
from vlm2vec_jax.embedder import Embedder, load_source
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import call
from vlm2vec_jax.models.folders import locate
from vlm2vec_jax.models.loading import flatten
from vlm2vec_jax.models.phi3v.config import from_hf
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.training import going_on, setup
from vlm2vec_jax.training.checkpoint import Checkpoints
from vlm2vec_jax.weights.adapters import load_adapter, merge
from vlm2vec_jax.weights.load import load_host
from vlm2vec_jax.weights.safetensors import Checkpoint

STEPS = 3
TEXTS = ["A cat and a dog", "Find me an everyday image that matches the given caption: A cat."]


def base_of(folder):
    table = phi3v_table(from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        return table, load_host(checkpoint, table)


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
def saved(request, goldens, tmp_path_factory):
    """(kind, folder as a run leaves it): the state of step 0 with noise on what is trained."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    config = run_config(goldens, output, request.param)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    model, processor, adapter = setup.load(config, mesh)
    trainer = setup.trainer(config, model, mesh)
    rng = np.random.default_rng(0)
    moved = {
        path: leaf + 0.01 * rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in flatten(trainer.state.params).items()
    }
    state = trainer.saved() | {"params": moved}
    output.mkdir()
    going_on.write_records(output, config, setup.record_of(config, model, processor, adapter))
    with Checkpoints(output / "checkpoints") as checkpoints:
        checkpoints.save(STEPS, state, {"step": STEPS}, force=True)
    return request.param, output, moved


def inputs(goldens):
    image = goldens / "end_to_end/train/images/noise_37x51.png"
    return [*TEXTS, {"text": "<|image_1|> What is shown here?", "images": [str(image)]}]


def leaves(folder):
    return flatten(load_source(locate(folder), dtype="float32", mesh=None)[0].module)


def embeddings(goldens, folder, **options):
    return Embedder.from_pretrained(folder, dtype="float32", **options).encode(inputs(goldens))


def run_export(checkpoint, format, output, *more):
    argv = ["export", "--checkpoint", str(checkpoint), "--format", format]
    # Embedding samples before and after merging has a test of its own.
    return call(export.main, export.define, [*argv, "--output", str(output), "--nomeasure", *more])


def record_of(folder):
    return json.loads((folder / "vlm2vec.json").read_text())


def formats_of(kind):
    return ("hf",) if kind == "none" else ("peft", "merged")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "dora", pytest.param("lora", marks=pytest.mark.long)])
def test_exports_of_a_real_run_embed_as_it_does(kind, goldens, tmp_path):
    run = tmp_path / "run"
    train.train(run_config(goldens, run, kind))
    expected = embeddings(goldens, run)
    assert np.abs(expected - embeddings(goldens, goldens / "tiny_mha")).max() > 1e-3
    for format in formats_of(kind):
        out = tmp_path / format
        assert run_export(run, format, out) == 0
        tolerance = 1e-5 if format == "merged" else 1e-6
        np.testing.assert_allclose(embeddings(goldens, out), expected, rtol=0, atol=tolerance)
        assert record_of(out)["exported"]["step"] == STEPS


@pytest.mark.slow
def test_exports_hold_what_was_trained(saved, tmp_path):
    kind, run, moved = saved
    before = leaves(run)
    assert all(np.array_equal(before[path], leaf) for path, leaf in moved.items())
    for format in formats_of(kind):
        out = tmp_path / format
        assert run_export(run, format, out) == 0
        after = leaves(out)
        if format == "merged":
            scaling = dict.fromkeys((p.rpartition("/")[0] for p in before if "lora_a" in p), 8.0)
            before = merge(before, before, scaling)
        assert set(after) == set(before)
        for path in before:
            np.testing.assert_allclose(after[path], before[path], rtol=0, atol=1e-6, err_msg=path)
        record = record_of(out)
        assert record["exported"]["step"] == STEPS and record["exported"]["format"] == format
        # What was used in training goes along: crops and the longest text.
        assert record["processor"] == record_of(run)["processor"]
        assert record["processor"]["max_len"] == 48
        assert (record["adapter"] is None) == (format != "peft")


def test_full_export_is_complete(saved, goldens, tmp_path):
    """All tensors of the base are there, and those that cannot matter are the base's own."""
    kind, run, _ = saved
    format = "hf" if kind == "none" else "merged"
    assert run_export(run, format, tmp_path / "out", "--max_shard_size", "200KB") == 0
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


def test_bfloat16_and_force(saved, goldens, tmp_path):
    kind, run, _ = saved
    format = {"none": "hf", "lora": "merged", "dora": "peft"}[kind]
    assert run_export(run, format, tmp_path / "out") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert run_export(run, format, tmp_path / "out") == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert run_export(run, format, tmp_path / "out", "--force", "--dtype", "bfloat16") == 0
    base = leaves(goldens / "tiny_mha")
    name = "adapter_model.safetensors" if format == "peft" else "model.safetensors"
    kinds = {t.dtype.name for t in load_file(tmp_path / "out" / name).values()}
    assert kinds == {"bfloat16"}
    assert set(leaves(tmp_path / "out")) == (set(leaves(run)) if format == "peft" else set(base))


def test_a_peft_folder_merges(goldens, tmp_path):
    """An adapter folder in, a model out; PEFT's own export holds what came in."""
    folder = tmp_path / "adapter"
    shutil.copytree(goldens / "adapters/tiny_gqa_dora_r8", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(goldens / "tiny_gqa")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert run_export(folder, "merged", tmp_path / "merged") == 0
    table, base = base_of(goldens / "tiny_gqa")
    adapter = load_adapter(folder, table, base)
    scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
    expected = merge(base, adapter.tensors, scaling)
    found = leaves(tmp_path / "merged")
    assert all(np.array_equal(found[path], expected[path]) for path in expected)
    assert record_of(tmp_path / "merged")["exported"]["adapter"]["use_dora"] is True

    assert run_export(folder, "peft", tmp_path / "peft") == 0
    ours = load_file(tmp_path / "peft/adapter_model.safetensors")
    original = load_file(folder / "adapter_model.safetensors")
    assert set(ours) == set(original)
    assert all(np.array_equal(ours[name], original[name]) for name in original)
    assert record_of(tmp_path / "peft")["adapter"]["r"] == 8


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


def test_the_format_for_an_adapter_run_is_named(saved, tmp_path):
    kind, run, _ = saved
    wrong = "peft" if kind == "none" else "hf"
    with pytest.raises(UserError) as told:
        export.export(run, wrong, tmp_path / "out")
    for word in ("hf",) if kind == "none" else ("peft", "merged", kind):
        assert word in str(told.value)


def test_a_run_without_a_checkpoint(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved[1], copy, ignore=lambda folder, names: {"checkpoints"} & set(names))
    (copy / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        export.export(copy, "hf" if saved[0] == "none" else "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
