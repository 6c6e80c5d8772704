# SPDX-License-Identifier: Apache-2.0
"""Every form in which a Phi-3.5-Vision model or adapter is published: all give the same leaves."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.loading import add_adapter, flatten, load_model, replace_saved
from vlm2vec_jax.models.phi3v import config as phi3v_config
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.nn.linear import linears
from vlm2vec_jax.weights.adapter_config import config_from_dict, peft_config, read_config, resolve
from vlm2vec_jax.weights.adapters import adapter_tensors, load_adapter, merge
from vlm2vec_jax.weights.arrays import all_finite
from vlm2vec_jax.weights.export import export_hf, export_peft
from vlm2vec_jax.weights.load import load_host
from vlm2vec_jax.weights.safetensors import Checkpoint, write

VISION = "model.vision_embed_tokens.img_processor."
ADAPTER = "tiny_gqa_dora_r8"


@pytest.fixture(scope="module")
def base(goldens):
    """(folder, table, leaves, tensors by HF name)"""
    folder = goldens / "tiny_mha"
    table = phi3v_table(phi3v_config.from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        leaves = load_host(checkpoint, table)
    return folder, table, leaves, load_file(folder / "model.safetensors")


def newer(name):
    """As transformers 5 calls it, whose CLIPVisionModel has no `vision_model`."""
    return name.replace(f"{VISION}vision_model.", VISION)


def without_head(name):
    """As a save of the model inside of the head's class; vLLM's names of the image parts."""
    return name.removeprefix("model.")


def served(name):
    """vLLM's tree."""
    vision = name.startswith("model.vision")
    return name.removeprefix("model.") if vision else f"language_model.{name}"


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"encoder.{name}",
        newer,
        without_head,
        served,
        lambda name: f"_orig_mod.module.encoder.{newer(name)}",
        lambda name: newer(name).removeprefix("model."),
        lambda name: f"base_model.model.{name}",
    ],
)
def test_spellings_of_a_full_checkpoint(base, tmp_path, spell):
    _, table, leaves, tensors = base
    write(tmp_path, ((spell(name), array) for name, array in tensors.items()))
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names) != set(tensors)
        found = load_host(checkpoint, table)
    assert all(np.array_equal(found[path], leaf) for path, leaf in leaves.items())


def copied(folder, tmp_path, tensors):
    shutil.copytree(folder, tmp_path, ignore=lambda *_: ["model.safetensors"])
    write(tmp_path, tensors.items())
    return tmp_path


def test_a_model_without_a_head_loads_and_goes_out_as_it_came(base, tmp_path):
    folder, table, leaves, tensors = base
    tensors = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    made = copied(folder, tmp_path / "headless", tensors)
    with pytest.warns(UserWarning, match="lacks lm_head.weight"):
        model = load_model(made, dtype_of=lambda path: jnp.float32)
    flat = flatten(model.module)
    assert not np.any(flat["lm_head/kernel"])
    assert np.array_equal(flat["embed/table"], leaves["embed/table"])
    out = export_hf(flat, table, made, tmp_path / "out", record={})
    assert set(load_file(out / "model.safetensors")) == set(tensors)
    with Checkpoint(made) as checkpoint:
        assert set(load_host(checkpoint, table)) == set(leaves) - {"lm_head/kernel"}


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_not_finite_is_seen_in_every_type(kind):
    array = np.linspace(-3, 3, 200_001).astype(kind)
    array[7] = np.finfo(np.float16).max if kind == np.float16 else 1e38
    assert all_finite(array) and all_finite(array.reshape(3, -1).T)
    for at, value in ((0, np.nan), (123_456, np.inf), (200_000, -np.inf), (70_000, -np.nan)):
        bad = array.copy()
        bad[at] = value
        assert not all_finite(bad)
    assert all_finite(array[:0])


def test_weights_that_are_not_finite_never_become_a_model(base, tmp_path):
    folder, _, _, tensors = base
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = {**tensors, name: tensors[name].copy()}
    tensors[name][5, 5] = np.nan
    made = copied(folder, tmp_path / "m", tensors)
    with pytest.raises(UserError, match=rf"not finite.*\n.*{name}"):
        load_model(made, dtype_of=lambda path: jnp.bfloat16)


# ------------------------------------------------------------------------------------- adapters


def write_adapter(folder, tensors, **settings):
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["qkv_proj"]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(raw | settings))
    write(folder, ((f"base_model.model.{n}", a) for n, a in tensors.items()), stem="adapter_model")
    return folder


def uneven(table, tensors, *, dora, seed=0):
    """Settings that give each module its own rank and alpha, and leave one out; PEFT's tensors."""
    settings = {
        "target_modules": ["layers.0.self_attn.qkv_proj", "layers.2.self_attn.qkv_proj"]
        + ["down_proj", "layers.1.self_attn.q_proj", "fc1"],
        "rank_pattern": {"layers.0.mlp.down_proj": 2, r".*\.mlp\.fc1": 3, "q_proj": 5},
        "alpha_pattern": {r"model\.layers\.1\.mlp\.down_proj": 32, "layers.1.mlp.fc1": 1},
        "use_dora": dora,
        "use_rslora": not dora,
    }
    rng = np.random.default_rng(seed)
    decoder = "model.layers.{}"
    ranks = {f"{decoder.format(i)}.self_attn.qkv_proj": 4 for i in (0, 2)}
    ranks |= {f"{decoder.format(i)}.mlp.down_proj": 4 if i else 2 for i in range(3)}
    clip = f"{VISION}vision_model.encoder.layers."
    ranks |= {f"{clip}1.self_attn.q_proj": 5} | {f"{clip}{i}.mlp.fc1": 3 for i in range(3)}
    out = {}
    for module, rank in ranks.items():
        rows, columns = tensors[f"{module}.weight"].shape
        out[f"{module}.lora_A.weight"] = rng.normal(size=(rank, columns))
        out[f"{module}.lora_B.weight"] = rng.normal(size=(rows, rank)) / 10
        if dora:
            out[f"{module}.lora_magnitude_vector"] = rng.uniform(1, 2, rows)
    return settings, {name: array.astype(np.float32) for name, array in out.items()}, ranks


def alpha_of(module):
    special = {
        "model.layers.1.mlp.down_proj": 32,
        f"{VISION}vision_model.encoder.layers.1.mlp.fc1": 1,
    }
    return special.get(module, 6)


@pytest.mark.parametrize("dora", [False, True])
def test_ranks_and_alphas_of_single_modules(base, tmp_path, dora):
    folder, table, leaves, tensors = base
    settings, adapted, ranks = uneven(table, tensors, dora=dora)
    made = write_adapter(tmp_path / "a", adapted, **settings)
    adapter = load_adapter(made, table, leaves)
    again = dict(adapter_tensors(adapter.tensors, table, adapter.config))
    assert set(again) == {f"base_model.model.{name}" for name in adapted}
    for name, array in adapted.items():
        assert again[f"base_model.model.{name}"].tobytes() == array.tobytes(), name

    # The definition, module by module, in float64.
    expected = dict(tensors)
    for module, rank in ranks.items():
        scale = alpha_of(module) / (rank if dora else np.sqrt(rank))
        a, b = (adapted[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        w = tensors[f"{module}.weight"] + scale * b @ a
        if dora:
            m = adapted[f"{module}.lora_magnitude_vector"]
            w *= (m / np.linalg.norm(w, axis=1))[:, None]
        expected[f"{module}.weight"] = w
    scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
    merged = merge(leaves, adapter.tensors, scaling)
    for name, slot in table.slots.items():
        leaf = merged[slot.rule.ours]
        found = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=2e-5, err_msg=name)
        if name.removesuffix(".weight") not in ranks:
            assert np.array_equal(found, tensors[name]), name

    # And on the model: each layer of a stack computes with its own.
    model = load_model(folder, dtype_of=lambda path: jnp.float32)
    add_adapter(model.module, adapter.linears, dora=dora, dropout=0.0, tensors=adapter.tensors)
    rng = np.random.default_rng(1)
    for path in adapter.linears:
        graphdef, state = nnx.split(linears(model.module)[path])
        x = rng.normal(size=(3, leaves[f"{path}/kernel"].shape[-2])).astype(np.float32)
        stacked = leaves[f"{path}/kernel"].ndim == 3
        for layer in range(len(leaves[f"{path}/kernel"])) if stacked else (...,):
            linear = nnx.merge(graphdef, jax.tree.map(lambda leaf, at=layer: leaf[at], state))
            bias = 0 if linear.bias is None else np.asarray(linear.bias[...])
            wanted = x @ merged[f"{path}/kernel"][layer] + bias
            np.testing.assert_allclose(linear(jnp.asarray(x)), wanted, rtol=0, atol=5e-5)


def test_new_adapters_of_several_ranks_are_zero_beyond_them(base):
    folder, table, _, tensors = base
    settings, _, _ = uneven(table, tensors, dora=False)
    module = load_model(folder, dtype_of=lambda path: jnp.float32).module
    adapter = config_from_dict({"peft_type": "LORA", "r": 4, "lora_alpha": 6, **settings})
    found = resolve(adapter, table)
    add_adapter(module, found, dora=False, dropout=0.0)
    for path, linear in found.items():
        a = np.asarray(linears(module)[path].lora_a[...]).reshape(
            len(linear.ranks), -1, linear.rank
        )
        for layer, rank in enumerate(linear.ranks):
            assert a[layer, :, :rank].all() and not a[layer, :, rank:].any()


def test_modules_saved_whole_replace_the_base(base, tmp_path):
    folder, table, leaves, tensors = base
    rng = np.random.default_rng(2)
    settings, adapted, _ = uneven(table, tensors, dora=False)
    names = ["lm_head.weight", "model.vision_embed_tokens.img_projection.0.weight"]
    names += ["model.vision_embed_tokens.img_projection.0.bias"]
    names += [f"model.layers.{i}.post_attention_layernorm.weight" for i in range(3)]
    whole = {name: rng.normal(size=tensors[name].shape).astype(np.float16) for name in names}
    saved = ["lm_head", "img_projection.0", "post_attention_layernorm"]
    made = write_adapter(tmp_path / "a", adapted | whole, **settings, modules_to_save=saved)
    adapter = load_adapter(made, table, leaves)
    assert set(adapter.saved) == set(names)
    model = load_model(folder, dtype_of=lambda path: jnp.float32)
    replace_saved(model, adapter.saved)
    found = flatten(model.module)
    for name in table.slots:
        slot = table.slots[name]
        leaf = np.asarray(found[slot.rule.ours])
        array = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
        np.testing.assert_array_equal(array, whole.get(name, tensors[name]), err_msg=name)
    # Out again, in the types of the file.
    options = {"saved": adapter.saved, "dtypes": adapter.dtypes}
    out = export_peft(
        adapter.tensors, table, adapter.config, tmp_path / "out", record={}, base="b", **options
    )
    before, after = (load_file(f / "adapter_model.safetensors") for f in (made, out))
    assert set(before) == set(after)
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert all(before[n].tobytes() == after[n].tobytes() for n in before)
    assert read_config(out).saved == tuple(saved)
    with pytest.raises(UserError, match="modules_to_save.*\n.*nothing is the end"):
        settings["modules_to_save"] = ["nothing"]
        load_adapter(write_adapter(tmp_path / "b", adapted, **settings), table, leaves)


@pytest.mark.parametrize("style", ["endings", "regular expression"])
def test_adapters_of_both_generations(goldens, tmp_path, style):
    folder = goldens / "tiny_gqa"
    table = phi3v_table(phi3v_config.from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        leaves = load_host(checkpoint, table)
    plain = load_adapter(goldens / "adapters" / ADAPTER, table, leaves)
    raw = json.loads((goldens / "adapters" / ADAPTER / "adapter_config.json").read_text())
    if style != "endings":
        # Only the names of transformers 5 match.
        raw["target_modules"] = r".*\.layers\.\d+\.(self_attn|mlp)\.(qkv|o|gate_up|down)_proj|"
        raw["target_modules"] += r".*\.img_processor\.encoder\..*\.self_attn\.(k|q|v|out)_proj"
        raw["target_modules"] = raw["target_modules"].replace(r".*\.layers", r"(?!)|model\.layers")
        raw["rank_pattern"] = {}
    tensors = load_file(goldens / "adapters" / ADAPTER / "adapter_model.safetensors")
    made = tmp_path / "five"
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps(raw))
    write(made, ((newer(n), a) for n, a in tensors.items()), stem="adapter_model")
    adapter = load_adapter(made, table, leaves)
    assert (adapter.layout, plain.layout) == ("5", "4.46")
    assert set(adapter.tensors) == set(plain.tensors)
    assert all(np.array_equal(adapter.tensors[p], leaf) for p, leaf in plain.tensors.items())
    for layout, spell in (("5", newer), ("4.46", str)):
        out = export_peft(
            adapter.tensors, table, adapter.config, tmp_path / layout, record={}, layout=layout
        )
        found = load_file(out / "adapter_model.safetensors")
        assert set(found) == set(map(spell, tensors))
        assert all(np.array_equal(found[spell(n)], a) for n, a in tensors.items())
        # What PEFT will match there are the same modules.
        targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
        modules = {re.sub(r"^base_model\.model\.|\.lora_.*", "", name) for name in found}
        every = {spell(n.removesuffix(".weight")) for n in table.slots if n.endswith(".weight")}
        hit = (
            {m for m in every if re.fullmatch(targets, m)}
            if isinstance(targets, str)
            else {m for m in every if any(m == t or m.endswith(f".{t}") for t in targets)}
        )
        assert hit == modules
    with pytest.raises(UserError, match="transformers 6 are not known; known: 4.46, 5"):
        export_peft(adapter.tensors, table, adapter.config, tmp_path / "6", record={}, layout="6")
    assert peft_config(adapter.config)["target_modules"] == raw["target_modules"]
