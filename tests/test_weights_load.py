# SPDX-License-Identifier: Apache-2.0
"""Checkpoints into arrays: both goldens, shards, copies, ties, casts, meshes, and every refusal."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.phi3v import config as phi3v_config
from vlm2vec_jax.models.phi3v.model import Phi3V
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.weights.arrays import copy_cast
from vlm2vec_jax.weights.load import load, load_host
from vlm2vec_jax.weights.matching import abstract_from, match
from vlm2vec_jax.weights.rules import Rule, Table
from vlm2vec_jax.weights.safetensors import Checkpoint, write

WTE = "model.vision_embed_tokens.wte.weight"
EMBED = "model.embed_tokens.weight"


def tiny(goldens, name="tiny_gqa"):
    table = phi3v_table(phi3v_config.from_hf(goldens / name))
    return goldens / name, table, load_file(goldens / name / "model.safetensors")


def wanted(folder, table):
    """What a model of these sizes would ask for."""
    with Checkpoint(folder) as checkpoint:
        return abstract_from(checkpoint, table)


def load_from(folder, table, abstract, **kwargs):
    with Checkpoint(folder) as checkpoint:
        return load(checkpoint, table, abstract, **kwargs)


def saved(folder, tensors, **kwargs):
    write(folder, tensors.items(), **kwargs)
    return folder


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa"])
def test_goldens_load_exactly_and_invert_exactly(goldens, name):
    folder, table, original = tiny(goldens, name)
    flat = load_from(folder, table, wanted(folder, table), check_finite=True)
    assert set(flat) == set(table.by_leaf)
    assert all(isinstance(leaf, jax.Array) for leaf in flat.values())
    back = {}
    for hf, slot in table.written():
        leaf = np.asarray(flat[slot.rule.ours])
        back[hf] = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
    assert set(back) == set(original)
    for hf, array in original.items():
        assert back[hf].shape == array.shape and back[hf].dtype == array.dtype
        assert back[hf].tobytes() == array.tobytes(), hf


def test_layouts_are_ours(goldens):
    folder, table, original = tiny(goldens, "tiny_mha")
    flat = load_from(folder, table, wanted(folder, table))
    qkv = [original[f"model.layers.{i}.self_attn.qkv_proj.weight"].T for i in range(3)]
    stack = [flat["decoder/layers/attn/qkv/kernel"], flat["decoder/last/attn/qkv/kernel"]]
    np.testing.assert_array_equal(np.concatenate(stack), np.stack(qkv))
    vision = "model.vision_embed_tokens"
    clip = f"{vision}.img_processor.vision_model"
    conv = original[f"{clip}.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(flat["vision/clip/patch/kernel"], conv.transpose(2, 3, 1, 0))
    unused = original[f"{clip}.encoder.layers.2.mlp.fc1.weight"]
    kernel = flat["vision/clip/unused_layers/mlp/fc1/kernel"]
    np.testing.assert_array_equal(kernel, unused.T[None])
    np.testing.assert_array_equal(flat["vision/newline"], original[f"{vision}.sub_GN"].ravel())
    np.testing.assert_array_equal(flat["vision/separator"], original[f"{vision}.glb_GN"].ravel())


def test_shards_copies_buffers_and_old_names_give_the_same(goldens, tmp_path):
    folder, table, original = tiny(goldens)
    expected = load_from(folder, table, wanted(folder, table))
    extra = dict(original)
    extra[WTE] = extra[EMBED]
    clip = "model.vision_embed_tokens.img_processor.vision_model"
    extra[f"{clip}.embeddings.position_ids"] = np.arange(577)[None]
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    forms = {
        "sharded": (extra, {"shard_bytes": 100_000}),
        "prefixed": ({f"encoder.{name}": array for name, array in extra.items()}, {}),
    }
    for name, (tensors, how) in forms.items():
        made = saved(tmp_path / name, tensors, **how)
        with Checkpoint(made) as checkpoint:
            found = load(checkpoint, table, wanted(folder, table))
            skipped = match(checkpoint, table, wanted(folder, table)).skipped
        assert skipped[WTE] == f"an equal copy of {EMBED}" and len(skipped) == 3
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=f"{name} {path}")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3


def test_a_copy_that_differs_is_an_error(goldens, tmp_path):
    folder, table, original = tiny(goldens)
    copy = original[EMBED].copy()
    copy[-1, -1] += 1
    made = saved(tmp_path / "m", {**original, WTE: copy})
    with pytest.raises(UserError, match=f"{WTE} should be an equal copy"):
        load_from(made, table, wanted(folder, table))


def test_everything_wrong_is_in_one_message(goldens, tmp_path):
    folder, table, tensors = tiny(goldens)
    gone = tensors.pop("model.norm.weight")
    tensors["model.nrom.weight"] = gone
    for layer in range(2):
        del tensors[f"model.layers.{layer}.input_layernorm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.layers.2.input_layernorm.weight"] = gone
    with pytest.raises(UserError) as error:
        load_from(saved(tmp_path / "m", tensors), table, wanted(folder, table))
    text = str(error.value)
    assert "3 missing, 2 unexpected, 1 misshapen" in text
    assert "missing: model.layers.{0-1}.input_layernorm.weight (2 tensors)" in text
    assert "missing: model.norm.weight; the file has, unexpected, model.nrom.weight" in text
    assert "unexpected: model.nrom.weight; nearest known: model.norm.weight" in text
    assert "unexpected: model.layers.2.input_layernorm.weight" in text
    assert "lm_head.weight is (703, 48) in the file, the model has (704, 48)" in text


def test_more_than_twenty_problems_fit_by_grouping_layers(tmp_path):
    hf = [f"layers.{{l}}.part{i}.weight" for i in range(4)]
    rules = [Rule(name, f"part{i}/scale", layers=(0, 30)) for i, name in enumerate(hf)]
    abstract = {rule.ours: jax.ShapeDtypeStruct((30, 3), jnp.float32) for rule in rules}
    made = saved(tmp_path / "m", {"other": np.ones(3, np.float32)})
    with pytest.raises(UserError) as error:
        load_from(made, Table(tuple(rules)), abstract)
    assert all(f"layers.{{0-29}}.part{i}.weight (30 tensors)" in str(error.value) for i in range(4))
    assert "unexpected: other" in str(error.value)


def test_integers_are_no_weights(goldens, tmp_path):
    folder, table, tensors = tiny(goldens)
    tensors["model.norm.weight"] = np.ones(48, np.int32)
    with pytest.raises(UserError, match="model.norm.weight is I32"):
        load_from(saved(tmp_path / "m", tensors), table, wanted(folder, table))


def test_leaves_not_asked_for_are_neither_needed_nor_read(goldens, tmp_path):
    folder, table, tensors = tiny(goldens)
    abstract = wanted(folder, table)
    del abstract["lm_head/kernel"]
    with pytest.raises(ValueError, match="lm_head/kernel"):
        load_from(folder, table, abstract)
    with Checkpoint(folder) as checkpoint:
        found = load(checkpoint, table, abstract, skip={"lm_head/kernel"})
        skipped = match(checkpoint, table, abstract, skip={"lm_head/kernel"}).skipped
    assert "lm_head/kernel" not in found and "not asked for" in skipped["lm_head.weight"]
    del tensors["lm_head.weight"]
    made = saved(tmp_path / "m", tensors)
    assert set(load_from(made, table, abstract, skip={"lm_head/kernel"})) == set(abstract)


def test_tied_head_is_filled_from_the_embedding(goldens, tmp_path):
    folder, _, tensors = tiny(goldens)
    raw = phi3v_config.from_hf(folder)
    table = phi3v_table(raw.__class__(**{**raw.__dict__, "tie_word_embeddings": True}))
    abstract = wanted(folder, phi3v_table(raw))
    with pytest.raises(UserError, match="lm_head.weight should be an equal copy"):
        load_from(folder, table, abstract)
    for name, head in (("absent", {}), ("equal", {"lm_head.weight": tensors[EMBED]})):
        body = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
        flat = load_from(saved(tmp_path / name, {**body, **head}), table, abstract)
        np.testing.assert_array_equal(flat["lm_head/kernel"], tensors[EMBED].T)
    assert "lm_head.weight" not in dict(table.written())


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16])
def test_types_are_cast_explicitly(goldens, tmp_path, stored, asked):
    folder, table, tensors = tiny(goldens)
    made = saved(tmp_path / "m", {name: array.astype(stored) for name, array in tensors.items()})
    flat = load_from(made, table, wanted(folder, table), dtype_of=lambda path: asked)
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype(asked)}
    expected = tensors["model.vision_embed_tokens.img_projection.0.weight"].astype(stored)
    expected = expected.astype(np.dtype(asked)).T
    got = np.asarray(flat["vision/projector/fc1/kernel"])
    assert got.tobytes() == expected.tobytes()


def test_weights_that_are_not_finite_are_named(goldens, tmp_path):
    folder, table, tensors = tiny(goldens)
    for layer, value in enumerate((np.nan, -np.inf)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[name] = tensors[name].copy()
        tensors[name][3, 4] = value
    made = saved(tmp_path / "m", tensors)
    with pytest.raises(UserError, match=r"model.layers.\{0-1\}.mlp.down_proj.weight \(2 tensors\)"):
        load_from(made, table, wanted(folder, table), check_finite=True)
    load_from(made, table, wanted(folder, table))


class Counting(Checkpoint):
    """Counts the elements read."""

    elements = 0

    def read(self, name, index=None, out=None):
        array = super().read(name, index, out)
        self.elements += array.size
        return array


def test_sharded_load_reads_each_part_once(goldens):
    assert len(jax.devices()) >= 8
    folder, table, _ = tiny(goldens)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plain = load_from(folder, table, wanted(folder, table))
    specs = {
        "decoder/layers/attn/qkv/kernel": PartitionSpec(None, "fsdp", None),
        "decoder/last/mlp/down/kernel": PartitionSpec(None, "data", "fsdp"),
        "embed/table": PartitionSpec(("data", "fsdp"), None),
        "lm_head/kernel": PartitionSpec(None, "fsdp"),
        "vision/clip/patch/kernel": PartitionSpec(None, "data", None, "fsdp"),
        "vision/newline": PartitionSpec("fsdp"),
    }
    abstract = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(mesh, specs.get(path, PartitionSpec())),
        )
        for path, leaf in wanted(folder, table).items()
    }
    with Counting(folder) as checkpoint:
        flat = load(checkpoint, table, abstract)
        # Replicas share a read: every element of the file came once, no more.
        assert checkpoint.elements == sum(leaf.size for leaf in plain.values())
    for path, leaf in flat.items():
        assert leaf.sharding == abstract[path].sharding
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(plain[path]), err_msg=path)
    kernel = flat["decoder/layers/attn/qkv/kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 12, 96)}


def test_host_load_equals_device_load(goldens):
    folder, table, _ = tiny(goldens)
    plain = load_from(folder, table, wanted(folder, table))
    with Checkpoint(folder) as checkpoint:
        host = load_host(checkpoint, table)
        half = load_host(checkpoint, table, dtype=ml_dtypes.bfloat16, skip={"lm_head/kernel"})
    assert set(host) == set(plain) and set(half) == set(plain) - {"lm_head/kernel"}
    for path, leaf in plain.items():
        np.testing.assert_array_equal(host[path], leaf)
    assert half["embed/table"].dtype == ml_dtypes.bfloat16


def test_a_model_of_other_leaves_is_a_mistake_of_ours(goldens):
    folder, table, _ = tiny(goldens)
    leaf = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(ValueError, match="strange/leaf"):
        load_from(folder, table, {**wanted(folder, table), "strange/leaf": leaf})
    deeper = {**wanted(folder, table), "decoder/layers/input_norm/scale": leaf}
    with pytest.raises(ValueError, match="the table stacks 1 layers"):
        load_from(folder, table, deeper)


@pytest.mark.parametrize("shape", [(3, 5), (200, 300), (129, 128)])
@pytest.mark.parametrize("kinds", [(np.float32, np.float32), (ml_dtypes.bfloat16,) * 2])
def test_tiled_copy_equals_plain_copy(shape, kinds):
    source = np.random.default_rng(0).normal(size=shape).astype(kinds[0]).T
    target = np.empty(source.shape, kinds[1])
    copy_cast(target, source)
    assert target.tobytes() == np.ascontiguousarray(source.astype(kinds[1])).tobytes()


def test_copies_are_compared_to_the_last_block(goldens, tmp_path, monkeypatch):
    folder, table, original = tiny(goldens)
    monkeypatch.setattr("vlm2vec_jax.weights.matching._BLOCK_BYTES", 10_000)
    made = saved(tmp_path / "equal", {**original, WTE: original[EMBED]})
    load_from(made, table, wanted(folder, table))
    copy = original[EMBED].copy()
    copy[-1, -1] += 1
    made = saved(tmp_path / "differs", {**original, WTE: copy})
    with pytest.raises(UserError, match="differs"):
        load_from(made, table, wanted(folder, table))


def test_the_published_model_has_exactly_the_tables_leaves():
    rope = phi3v_config.RopeConfig(1e4, (1.0,) * 48, (1.0,) * 48, 131072, 4096)
    clip = phi3v_config.ClipConfig()
    config = phi3v_config.Phi3VConfig(3072, 8192, 32, 32, 32, 32064, 1e-5, rope, clip)
    model = nnx.eval_shape(lambda: Phi3V(config, rngs=nnx.Rngs(0)))
    flat = {"/".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert set(flat) == set(phi3v_table(config).by_leaf)
    assert sum(int(np.prod(leaf.shape)) for leaf in flat.values()) == 4_146_621_440
