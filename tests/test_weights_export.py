# SPDX-License-Identifier: Apache-2.0
"""Exported folders: bit-equal round trips, kept files, merged adapters, and failures."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.phi3v import config as phi3v_config
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.weights import export, safetensors
from vlm2vec_jax.weights.adapters import load_adapter, merge
from vlm2vec_jax.weights.export import export_hf, export_merged, export_peft, staged
from vlm2vec_jax.weights.load import load, load_host
from vlm2vec_jax.weights.matching import abstract_from
from vlm2vec_jax.weights.safetensors import Checkpoint

RECORD = {"backbone": "phi3_v", "pooling": "last"}


@pytest.fixture(params=["tiny_mha", "tiny_gqa"])
def model(request, goldens):
    folder = goldens / request.param
    table = phi3v_table(phi3v_config.from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        return folder, table, load(checkpoint, table, abstract_from(checkpoint, table))


@pytest.fixture
def gqa(goldens):
    folder = goldens / "tiny_gqa"
    table = phi3v_table(phi3v_config.from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        base = load_host(checkpoint, table)
    return folder, table, base, load_adapter(goldens / "adapters/tiny_gqa_dora_r8", table, base)


def tensors_of(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


def same_bits(a, b):
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("shard_bytes", [1e9, 200_000])
def test_full_export_is_the_source_again(model, tmp_path, shard_bytes):
    source, table, flat = model
    out = export_hf(flat, table, source, tmp_path / "out", record=RECORD, shard_bytes=shard_bytes)
    assert same_bits(tensors_of(out), tensors_of(source))
    assert (len(list(out.glob("model-*.safetensors"))) > 2) == (shard_bytes < 1e9)
    for file in source.iterdir():
        if file.suffix == ".json":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((out / "vlm2vec.json").read_text()) == RECORD
    assert leftovers(tmp_path) == []


def test_bf16_export_says_so_and_keeps_every_other_field(gqa, tmp_path):
    source, table, base, _ = gqa
    source_config = json.loads((source / "config.json").read_text())
    out = export_hf(base, table, source, tmp_path / "out", record=RECORD, dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert config == {**source_config, "torch_dtype": "bfloat16"}
    expected = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors_of(source).items()}
    assert same_bits(tensors_of(out), expected)


def test_what_does_not_belong_to_a_model_is_not_copied(gqa, tmp_path):
    _, table, base, _ = gqa
    source = export_hf(base, table, gqa[0], tmp_path / "source", record={"old": 1})
    keep = ["modeling_phi3_v.py", "LICENSE", "chat_template.jinja", "tokenizer.model"]
    drop = [
        "README.md",
        "adapter_config.json",
        "trainer_state.json",
        "optimizer.pt",
        "x.index.json",
    ]
    for name in keep + drop:
        (source / name).write_text("x")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "a.jinja").write_text("x")
    out = export_hf(base, table, source, tmp_path / "out", record=RECORD)
    assert all((out / name).read_text() == "x" for name in keep)
    assert not any((out / name).exists() for name in drop)
    assert (out / "additional_chat_templates" / "a.jinja").exists()
    assert json.loads((out / "vlm2vec.json").read_text()) == RECORD


def test_leaves_that_were_not_loaded_come_from_the_source(gqa, tmp_path):
    source, table, base, _ = gqa
    part = {path: leaf for path, leaf in base.items() if "lm_head" not in path}
    with pytest.raises(ValueError, match="lm_head/kernel"):
        export_hf(part, table, source, tmp_path / "out", record=RECORD)
    out = export_hf(
        part, table, source, tmp_path / "out", record=RECORD, from_source={"lm_head/kernel"}
    )
    assert same_bits(tensors_of(out), tensors_of(source))


def test_merged_export_equals_the_merge(gqa, tmp_path):
    source, table, base, adapter = gqa
    flat = {**base, **adapter.tensors}
    out = export_merged(flat, table, adapter.config, source, tmp_path / "f32", record=RECORD)
    scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
    expected = merge(base, adapter.tensors, scaling)
    with Checkpoint(out) as checkpoint:
        found = load_host(checkpoint, table)
    assert same_bits(found, expected)
    # A bf16 base merged for f32 keeps the digits of the merge; the reverse rounds once.
    half = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in base.items()}
    for start, kind in ((half, np.float32), (base, ml_dtypes.bfloat16)):
        out = export_merged(
            {**start, **adapter.tensors},
            table,
            adapter.config,
            source,
            tmp_path / str(np.dtype(kind)),
            record=RECORD,
            dtype=kind,
        )
        with Checkpoint(out) as checkpoint:
            found = load_host(checkpoint, table)
        path = "decoder/last/mlp/down/kernel"
        wanted = merge(start, adapter.tensors, scaling)[path].astype(kind)
        assert found[path].tobytes() == wanted.tobytes()


def test_adapters_do_not_slip_through_an_export(gqa, tmp_path):
    source, table, base, adapter = gqa
    with pytest.raises(ValueError, match="unmerged"):
        export_hf({**base, **adapter.tensors}, table, source, tmp_path / "o", record=RECORD)
    with pytest.raises(ValueError, match="lora_a"):
        export_merged(base, table, adapter.config, source, tmp_path / "o", record=RECORD)
    stray = {**base, **adapter.tensors, "lm_head/lora_a": np.ones((48, 8), np.float32)}
    with pytest.raises(ValueError, match="lm_head"):
        export_merged(stray, table, adapter.config, source, tmp_path / "o", record=RECORD)
    unused = [path for path in adapter.linears if "unused" in path]
    part = {k: v for k, v in base.items() if "unused" not in k} | adapter.tensors
    with pytest.raises(ValueError, match=unused[0]):
        export_merged(
            part,
            table,
            adapter.config,
            source,
            tmp_path / "o",
            record=RECORD,
            from_source={path for path in base if "unused" in path},
        )
    assert not (tmp_path / "o").exists()


def test_peft_export_is_the_adapter_again(gqa, goldens, tmp_path):
    _, table, base, adapter = gqa
    source = goldens / "adapters" / "tiny_gqa_dora_r8"
    flat = {**base, **adapter.tensors}
    out = export_peft(flat, table, adapter.config, tmp_path / "out", record=RECORD, base="org/b")
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "vlm2vec.json",
    ]
    name = "adapter_model.safetensors"
    assert same_bits(load_file(out / name), load_file(source / name))
    config = json.loads((out / "adapter_config.json").read_text())
    original = json.loads((source / "adapter_config.json").read_text())
    assert config == {**original, "base_model_name_or_path": "org/b"}
    again = load_adapter(out, table, base)
    assert same_bits(again.tensors, adapter.tensors)


def test_existing_folders_are_replaced_by_force_only(gqa, tmp_path):
    source, table, base, _ = gqa
    out = export_hf(base, table, source, tmp_path / "out", record={"n": 1})
    with pytest.raises(UserError, match="--force"):
        export_hf(base, table, source, out, record={"n": 2})
    assert json.loads((out / "vlm2vec.json").read_text()) == {"n": 1}
    (out / "model.safetensors").write_bytes(b"old")
    export_hf(base, table, source, out, record={"n": 2}, force=True)
    assert same_bits(tensors_of(out), tensors_of(source))
    assert json.loads((out / "vlm2vec.json").read_text()) == {"n": 2}
    assert leftovers(tmp_path) == []


def test_force_does_not_remove_what_is_no_model(gqa, tmp_path):
    source, table, base, _ = gqa
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(UserError, match="no model folder"):
        export_hf(base, table, source, tmp_path / "photos", record=RECORD, force=True)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert export_hf(base, table, source, tmp_path / "empty", record=RECORD).exists()


def test_the_base_model_is_never_overwritten(gqa, tmp_path):
    _, table, base, _ = gqa
    source = export_hf(base, table, gqa[0], tmp_path / "a" / "source", record=RECORD)
    (tmp_path / "a" / "config.json").write_text("{}")
    for target in (source, tmp_path / "a"):
        with pytest.raises(UserError, match="holds the base model"):
            export_hf(base, table, source, target, record=RECORD, force=True)
    with pytest.raises(UserError, match="config.json"):
        export_hf(base, table, tmp_path, tmp_path / "b", record=RECORD)


@pytest.mark.parametrize("where", ["weights", "files"])
def test_a_full_disk_leaves_the_old_folder_whole(gqa, tmp_path, monkeypatch, where):
    source, table, base, _ = gqa
    out = export_hf(base, table, source, tmp_path / "out", record=RECORD)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if where == "files" or len(calls) == 3:
            raise OSError(28, "No space left on device")
        return fsync(*args)

    fsync = os.fsync
    if where == "weights":
        monkeypatch.setattr(safetensors.os, "fsync", full)
    else:
        monkeypatch.setattr(export.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        export_hf(base, table, source, out, record={}, shard_bytes=100_000, force=True)
    assert calls and {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failing_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    rename = type(tmp_path).rename

    def refuse(self, target):
        if self.name.startswith(".out-") and "old" not in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with (
        pytest.raises(UserError, match="Input/output"),
        staged(tmp_path / "out", force=True) as folder,
    ):
        (folder / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
