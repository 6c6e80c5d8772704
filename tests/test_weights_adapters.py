# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters: targets, tensors both ways, merging, and everything that does not fit."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.phi3v import config as phi3v_config
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.weights.adapter_config import (
    AdapterConfig,
    base_difference,
    config_from_dict,
    match_targets,
    peft_config,
    read_config,
    resolve,
)
from vlm2vec_jax.weights.adapters import adapter_tensors, load_adapter, merge
from vlm2vec_jax.weights.load import load_host
from vlm2vec_jax.weights.safetensors import Checkpoint, write

NAMES = [
    "tiny_mha_lora_r8",
    "tiny_mha_lora_r16",
    "tiny_mha_dora_r8",
    "tiny_mha_dora_r16",
    "tiny_gqa_dora_r8",
]
REFERENCE_TARGETS = "qkv_proj,o_proj,gate_up_proj,down_proj,k_proj,q_proj,out_proj,v_proj".split(
    ","
)


def base_of(goldens, name):
    folder = goldens / name[: len("tiny_mha")]
    table = phi3v_table(phi3v_config.from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        return table, load_host(checkpoint, table)


def copied(goldens, tmp_path, name="tiny_gqa_dora_r8", tensors=None, **settings):
    """The golden adapter in a folder of its own, with other settings or tensors."""
    source, folder = goldens / "adapters" / name, tmp_path / "adapter"
    folder.mkdir()
    raw = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, **settings}))
    if tensors is None:
        shutil.copy(source / "adapter_model.safetensors", folder)
    else:
        write(folder, tensors.items(), stem="adapter_model")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_goldens_both_ways_and_merged(goldens, name):
    folder = goldens / "adapters" / name
    golden = json.loads((folder / "golden.json").read_text())
    table, base = base_of(goldens, name)
    adapter = load_adapter(folder, table, base)

    modules = [module for linear in adapter.linears.values() for module in linear.modules]
    assert sorted(modules) == sorted(golden["matched_modules"])
    assert {linear.scaling for linear in adapter.linears.values()} == {golden["scaling"]}
    rank = adapter.config.rank
    assert adapter.tensors["decoder/last/attn/out/lora_a"].shape[0::2] == (1, rank)
    assert adapter.tensors["vision/clip/unused_layers/attn/q/lora_b"].shape[:2] == (1, rank)
    assert ("decoder/last/mlp/down/magnitude" in adapter.tensors) == ("dora" in name)

    original = load_file(folder / "adapter_model.safetensors")
    back = dict(adapter_tensors(adapter.tensors, table, adapter.config))
    assert set(back) == set(original)
    for key, array in original.items():
        assert back[key].shape == array.shape and back[key].tobytes() == array.tobytes(), key
    written = peft_config(adapter.config)
    assert written == json.loads((folder / "adapter_config.json").read_text())
    again = config_from_dict(written)
    assert (again.rank, again.targets, again.dora) == (rank, adapter.config.targets, "dora" in name)

    scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
    merged = merge({**base, **adapter.tensors}, adapter.tensors, scaling)
    assert set(merged) == set(base)
    assert merged["embed/table"] is base["embed/table"]
    checked = 0
    for key, array in load_file(folder / "golden.safetensors").items():
        if key.startswith("merged/"):
            slot = table.slots[key.removeprefix("merged/")]
            ours = slot.rule.to_hf(merged[slot.rule.ours][slot.layer])
            np.testing.assert_allclose(ours, array, atol=2e-6, rtol=0)
            before = slot.rule.to_hf(base[slot.rule.ours][slot.layer])
            assert np.abs(before - array).max() > 1e-3
            checked += 1
    assert checked == 4


def test_merge_of_one_unstacked_layer_and_its_cast():
    rng = np.random.default_rng(1)
    w, a, b = (rng.normal(size=s).astype(np.float32) for s in ((6, 4), (6, 2), (2, 4)))
    m = rng.uniform(1, 2, size=4).astype(np.float32)
    full = w.astype(np.float64) + 0.5 * a.astype(np.float64) @ b.astype(np.float64)
    leaves = {"x/lora_a": a, "x/lora_b": b}
    lora = merge({"x/kernel": w}, leaves, {"x": 0.5})["x/kernel"]
    np.testing.assert_allclose(lora, full, atol=1e-6)
    dora = merge({"x/kernel": w}, {**leaves, "x/magnitude": m}, {"x": 0.5})["x/kernel"]
    np.testing.assert_allclose(dora, full * m / np.linalg.norm(full, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(dora, axis=0), m, rtol=1e-6)
    half = merge({"x/kernel": w}, leaves, {"x": 0.5}, dtype=ml_dtypes.bfloat16)["x/kernel"]
    assert half.tobytes() == lora.astype(ml_dtypes.bfloat16).tobytes()


@pytest.fixture
def table(goldens):
    return phi3v_table(phi3v_config.from_hf(goldens / "tiny_mha"))


def test_targets_follow_peft(table):
    decoder = ["attn/qkv", "attn/out", "mlp/gate_up", "mlp/down"]
    clip = [f"attn/{part}" for part in ("q", "k", "v", "out")]
    both = [f"decoder/{s}/{p}" for s in ("layers", "last") for p in decoder]
    both += [f"vision/clip/{s}/{p}" for s in ("layers", "unused_layers") for p in clip]
    assert match_targets(REFERENCE_TARGETS, table) == both
    # "." and the entry, or the whole name: "proj" alone is the end of no module's name.
    with pytest.raises(UserError, match="no linear layer matches.*qkv_proj"):
        match_targets(["proj"], table)
    heads = {"mlp.down_proj": 2, "fc1": 2, "lm_head": 1, "img_projection.0": 1}
    for entry, count in heads.items():
        assert len(match_targets([entry], table)) == count
    assert len(match_targets(r"model\.layers\.\d+\.self_attn\..*", table)) == 4
    with pytest.raises(UserError, match="no linear layer"):
        match_targets(r"self_attn\..*", table)  # a regular expression covers the whole name
    everything = match_targets("all-linear", table)
    assert set(everything) == set(table.linears) - {"lm_head"}
    without = match_targets(REFERENCE_TARGETS, table, exclude=("qkv_proj",))
    assert without == [path for path in both if not path.endswith("qkv")]


def test_targets_that_cannot_be_adapted_are_explained(table):
    with pytest.raises(UserError, match="model.embed_tokens is no linear layer"):
        match_targets(["embed_tokens", "qkv_proj"], table)
    with pytest.raises(UserError, match="no regular expression"):
        match_targets("(", table)


def test_rank_and_alpha_patterns(table):
    config = AdapterConfig(
        rank=8,
        alpha=16,
        targets=("qkv_proj", "o_proj", "down_proj"),
        rank_pattern={"o_proj": 4, r"layers\.\d+\.mlp\.down_proj": 2},
        alpha_pattern={"qkv_proj": 64},
    )
    found = resolve(config, table)
    values = {p.split("/", 2)[2]: (x.rank, x.alphas[0], x.scaling) for p, x in found.items()}
    assert values == {"attn/qkv": (8, 64, 8), "attn/out": (4, 16, 4), "mlp/down": (2, 16, 8)}
    root = AdapterConfig(rank=16, alpha=8, targets=("fc1",), rslora=True)
    assert {linear.scaling for linear in resolve(root, table).values()} == {2.0}
    uneven = AdapterConfig(targets=("qkv_proj",), rank_pattern={"layers.0.self_attn.qkv_proj": 4})
    linear = resolve(uneven, table)["decoder/layers/attn/qkv"]
    assert (linear.ranks, linear.rank, linear.scalings) == ((4, 8), 8, (2.0, 1.0))
    np.testing.assert_array_equal(linear.scaling, np.float32([2, 1]))
    one = resolve(AdapterConfig(targets=("layers.0.self_attn.qkv_proj",)), table)
    assert one["decoder/layers/attn/qkv"].ranks == (8, 0)
    assert [layer for layer, _, _ in one["decoder/layers/attn/qkv"].adapted] == [0]
    by_number = AdapterConfig(targets=("qkv_proj", "q_proj"), layers=(1,))
    assert {p: x.ranks for p, x in resolve(by_number, table).items()} == {
        "decoder/layers/attn/qkv": (0, 8),
        "vision/clip/layers/attn/q": (0, 8),
    }
    ours = AdapterConfig(targets=("qkv_proj",), layers=(1,), layers_pattern=("layers",))
    assert list(resolve(ours, table)) == ["decoder/layers/attn/qkv"]


def test_patterns_that_an_old_peft_reads_otherwise_are_written_by_name(goldens):
    table = phi3v_table(phi3v_config.from_hf(goldens / "tiny_mha"))
    config = AdapterConfig(rank=8, alpha=16, targets=("qkv_proj", "down_proj"))
    # PEFT up to 0.13 takes rank and alpha from one and the same pattern.
    same = dataclasses.replace(config, rank_pattern={"down_proj": 2})
    assert peft_config(same, table=table)["rank_pattern"] == {"down_proj": 2}
    other = dataclasses.replace(same, alpha_pattern={"layers.1.mlp.down_proj": 4})
    written = peft_config(other, table=table)
    name = "model.layers.{}.mlp.down_proj"
    assert written["rank_pattern"] == {name.format(i): 2 for i in range(3)}
    assert written["alpha_pattern"] == {name.format(i): 4 if i == 1 else 16 for i in range(3)}
    assert resolve(config_from_dict(written), table) == resolve(other, table)


def test_settings_of_newer_versions_that_change_nothing_are_read(goldens, tmp_path):
    newer = {"peft_version": "0.21.2", "qalora_group_size": 16, "use_qalora": False}
    newer |= {"exclude_modules": None, "lora_bias": False, "eva_config": None, "arrow_config": {}}
    newer |= {"trainable_token_indices": [], "ensure_weight_tying": False, "future": None}
    config = read_config(copied(goldens, tmp_path, **newer))
    assert config.rank == 8 and config.dora and config.kind == "dora" and config.base == "tiny_gqa"
    assert not set(newer) & set(peft_config(config))


def test_settings_that_would_change_the_numbers_are_all_named(goldens, tmp_path):
    wrong = {
        "peft_type": "LOHA",
        "bias": "all",
        "fan_in_fan_out": True,
        "modules_to_save": "lm_head",
        "layers_to_transform": [-1],
        "init_lora_weights": "pissa",
        "lora_bias": True,
        "future": {"a": 1},
        "r": 0,
        "lora_dropout": 1.5,
        "target_modules": 3,
    }
    with pytest.raises(UserError) as error:
        read_config(copied(goldens, tmp_path, **wrong))
    assert all(f"{name} = " in str(error.value) for name in wrong)
    assert f"({len(wrong)} problems)" in str(error.value)


def test_unreadable_configurations(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("spelling", ["{}.weight", "{}.default", "{}.default.weight", "encoder"])
def test_other_spellings_of_the_names(goldens, tmp_path, spelling):
    name = "tiny_gqa_dora_r8"
    table, base = base_of(goldens, name)
    tensors = {}
    for key, array in load_file(goldens / "adapters" / name / "adapter_model.safetensors").items():
        if spelling == "encoder":
            key = key.replace("base_model.model.", "base_model.model.encoder.")
        elif key.endswith("lora_magnitude_vector"):
            key = spelling.format(key)
        elif "default" in spelling:
            key = key.replace(".weight", ".default.weight")
        tensors[key] = array
    plain = load_adapter(goldens / "adapters" / name, table, base)
    other = load_adapter(copied(goldens, tmp_path, tensors=tensors), table, base)
    assert set(plain.tensors) == set(other.tensors)
    for path, leaf in plain.tensors.items():
        np.testing.assert_array_equal(other.tensors[path], leaf)


def test_half_precision_adapters_become_float32(goldens, tmp_path):
    name = "tiny_gqa_dora_r8"
    table, base = base_of(goldens, name)
    tensors = load_file(goldens / "adapters" / name / "adapter_model.safetensors")
    half = {key: array.astype(ml_dtypes.bfloat16) for key, array in tensors.items()}
    adapter = load_adapter(copied(goldens, tmp_path, tensors=half), table, base)
    assert {leaf.dtype for leaf in adapter.tensors.values()} == {np.dtype(np.float32)}
    written = adapter_tensors(adapter.tensors, table, adapter.config, dtype=ml_dtypes.bfloat16)
    assert all(array.tobytes() == half[key].tobytes() for key, array in written)


def test_tensors_that_do_not_fit_are_all_listed(goldens, tmp_path):
    name = "tiny_gqa_dora_r8"
    table, base = base_of(goldens, name)
    tensors = load_file(goldens / "adapters" / name / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0"
    del tensors[f"{start}.mlp.down_proj.lora_magnitude_vector"]
    tensors[f"{start}.self_attn.o_proj.lora_A.weight"] = np.ones((4, 48), np.float32)
    tensors["base_model.model.lm_head.weight"] = np.ones((704, 48), np.float32)
    with pytest.raises(UserError) as error:
        load_adapter(copied(goldens, tmp_path, tensors=tensors), table, base)
    text = str(error.value)
    assert "1 missing, 1 unexpected" in text
    assert "missing: model.layers.0.mlp.down_proj.lora_magnitude_vector" in text
    assert "unexpected: lm_head.weight" in text
    assert "model.layers.0.self_attn.o_proj.lora_A.weight is (4, 48), should be (8, 48)" in text


def test_magnitudes_without_dora_are_not_dropped_in_silence(goldens, tmp_path):
    table, base = base_of(goldens, "tiny_gqa")
    with pytest.raises(UserError, match="unexpected.*lora_magnitude_vector") as error:
        load_adapter(copied(goldens, tmp_path, use_dora=False), table, base)
    assert "use_dora" in str(error.value)


def test_an_adapter_of_another_model_is_refused(goldens):
    table, base = base_of(goldens, "tiny_gqa")
    with pytest.raises(UserError, match="another base model"):
        load_adapter(goldens / "adapters" / "tiny_mha_lora_r8", table, base)


def test_pickled_adapters_are_refused(goldens, tmp_path):
    table, base = base_of(goldens, "tiny_gqa")
    folder = copied(goldens, tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        load_adapter(folder, table, base)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="holds no adapter_model.safetensors"):
        load_adapter(folder, table, base)


def test_writing_needs_exactly_the_leaves_of_the_targets(goldens):
    table, base = base_of(goldens, "tiny_gqa")
    adapter = load_adapter(goldens / "adapters" / "tiny_gqa_dora_r8", table, base)
    fewer = dict(adapter.tensors)
    del fewer["decoder/last/attn/qkv/magnitude"]
    with pytest.raises(ValueError, match="decoder/last/attn/qkv/magnitude"):
        list(adapter_tensors(fewer, table, adapter.config))
    more = {**adapter.tensors, "lm_head/lora_a": np.ones((48, 8), np.float32)}
    with pytest.raises(ValueError, match="lm_head/lora_a"):
        list(adapter_tensors(more, table, adapter.config))


def test_exclusions_are_written_as_a_plain_list(table):
    config = AdapterConfig(targets="all-linear", exclude=("fc1", "fc2", "0", "2"))
    written = peft_config(config, base="org/base", table=table)
    assert "exclude_modules" not in written
    assert written["base_model_name_or_path"] == "org/base"
    again = config_from_dict(written)
    assert match_targets(again.targets, table) == match_targets(REFERENCE_TARGETS, table)


def test_another_base_is_said():
    config = AdapterConfig(base="microsoft/Phi-3.5-vision-instruct")
    assert base_difference(config, "/models/Phi-3.5-vision-instruct") is None
    assert "microsoft/Phi" in (base_difference(config, "/models/mine") or "")
    assert base_difference(AdapterConfig(), "/models/mine") is None
