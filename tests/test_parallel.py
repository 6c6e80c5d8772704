# SPDX-License-Identifier: Apache-2.0
"""mesh.py, sharding.py and the rules of the Phi-3-Vision tree, on eight simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.phi3v.sharding import RULES
from vlm2vec_jax.parallel.mesh import ROWS, batch_spec, describe, make_mesh, row_shards
from vlm2vec_jax.parallel.sharding import constrain, shardings, spec_for, table

P = PartitionSpec


def _leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_mesh_sizes_and_axis_types():
    mesh = make_mesh(fsdp=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert row_shards(mesh) == 8
    assert dict(make_mesh(2, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1, 2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert "8" in describe(mesh) and "data 2, fsdp 4, tensor 1" in describe(mesh)
    assert dict(make_mesh(devices=jax.devices()[:3]).shape)["data"] == 3


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["needs 3 devices", "there are 8"]),
        ({"fsdp": 3}, ["multiple of 3", "8"]),
        ({"data": 2, "fsdp": 2}, ["data 2 x fsdp 2 x tensor 1", "needs 4", "8"]),
        ({"data": 16}, ["needs 16", "8"]),
        ({"data": -1, "fsdp": -1}, ["data and fsdp"]),
        ({"data": 0, "tensor": -2}, ["mesh.data = 0", "mesh.tensor = -2"]),
    ],
)
def test_impossible_meshes_are_told_in_words(sizes, words):
    with pytest.raises(UserError) as caught:
        make_mesh(**sizes)
    for word in words:
        assert word in str(caught.value)


def test_batch_spec_spreads_rows():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rows = jax.device_put(np.zeros((8, 3)), NamedSharding(mesh, batch_spec()))
    assert rows.sharding.shard_shape(rows.shape) == (2, 3)
    chunks = jax.device_put(np.zeros((5, 8, 3)), NamedSharding(mesh, batch_spec(1)))
    assert chunks.sharding.shard_shape(chunks.shape) == (5, 2, 3)


def test_first_matching_rule_wins_and_ones_divide_everything():
    rules = [(r"a/.*", P("fsdp")), (r".*", P())]
    mesh = make_mesh(fsdp=8)
    assert spec_for("a/kernel", (16, 3), mesh, rules) == P("fsdp")
    assert spec_for("b/a/kernel", (3,), mesh, rules) == P()
    assert spec_for("a/kernel", (3,), make_mesh(), rules) == P("fsdp")


def test_all_problems_come_in_one_message():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    rules = [
        (r"odd", P("fsdp")),
        (r"both", P(("fsdp", "tensor"))),
        (r"twice", P("fsdp", "fsdp")),
        (r"long", P(None, "fsdp")),
        (r"axis", P("model")),
        (r"good", P("fsdp", "tensor")),
    ]
    shapes = {"odd": (6,), "both": (12,), "twice": (8, 8), "long": (4,), "axis": (4,)}
    abstract = {name: _leaf(*shape) for name, shape in (shapes | {"none": (1,)}).items()}
    with pytest.raises(UserError) as caught:
        shardings(abstract | {"good": _leaf(4, 2)}, mesh, rules)
    message = str(caught.value)
    assert "6 problems" in message and "data 1, fsdp 4, tensor 2" in message
    for words in (
        "odd (6,): dimension 0 (6) is not a multiple of fsdp 4",
        "both (12,): dimension 0 (12) is not a multiple of fsdp 4 x tensor 2",
        "twice (8, 8): fsdp, fsdp uses the axis 'fsdp' twice",
        "long (4,): -, fsdp names 2 dimensions, the parameter has 1",
        "axis (4,): model names the axis 'model'",
        "none (1,): no sharding rule matches",
    ):
        assert words in message
    assert "good" not in message


def _phi3v(layers=2, d=64, clip=32, heads=4, kv=4, width=16, mlp=128, vocab=704):
    """The tree of a Phi-3-Vision model, adapters included (shapes only)."""
    tree = {
        "embed/table": _leaf(vocab, d),
        "lm_head/kernel": _leaf(d, vocab),
        "decoder/norm/scale": _leaf(d),
        "decoder/layers/input_norm/scale": _leaf(layers, d),
        "decoder/layers/post_norm/scale": _leaf(layers, d),
        "decoder/layers/attn/qkv/kernel": _leaf(layers, d, (heads + 2 * kv) * width),
        "decoder/layers/attn/qkv/lora_a": _leaf(layers, d, 3),
        "decoder/layers/attn/qkv/lora_b": _leaf(layers, 3, (heads + 2 * kv) * width),
        "decoder/layers/attn/qkv/magnitude": _leaf(layers, (heads + 2 * kv) * width),
        "decoder/layers/attn/out/kernel": _leaf(layers, heads * width, d),
        "decoder/layers/mlp/gate_up/kernel": _leaf(layers, d, 2 * mlp),
        "decoder/layers/mlp/down/kernel": _leaf(layers, mlp, d, dtype=jnp.bfloat16),
        "vision/clip/class_embedding": _leaf(clip),
        "vision/clip/position_embedding": _leaf(577, clip),
        "vision/clip/patch/kernel": _leaf(14, 14, 3, clip),
        "vision/projector/fc1/kernel": _leaf(4 * clip, d),
        "vision/projector/fc1/bias": _leaf(d),
        "vision/projector/fc2/kernel": _leaf(d, d),
        "vision/projector/fc2/bias": _leaf(d),
        "vision/newline": _leaf(4 * clip),
        "vision/separator": _leaf(4 * clip),
    }
    for norm in ("pre_norm", "post_norm"):
        tree |= {f"vision/clip/{norm}/{leaf}": _leaf(clip) for leaf in ("scale", "bias")}
    for part in ("layers", "unused_layers"):
        root = f"vision/clip/{part}"
        for name in ("q", "k", "v", "out"):
            tree[f"{root}/attn/{name}/kernel"] = _leaf(layers, clip, clip)
            tree[f"{root}/attn/{name}/bias"] = _leaf(layers, clip)
        for name, shape in (("fc1", (clip, 2 * clip)), ("fc2", (2 * clip, clip))):
            tree[f"{root}/mlp/{name}/kernel"] = _leaf(layers, *shape)
            tree[f"{root}/mlp/{name}/bias"] = _leaf(layers, shape[1])
        for norm in ("norm1", "norm2"):
            tree |= {f"{root}/{norm}/{leaf}": _leaf(layers, clip) for leaf in ("scale", "bias")}
    return tree


def test_phi3v_rules_cover_the_tree_and_cut_every_large_parameter():
    tree = _phi3v(layers=32, d=3072, clip=1024, heads=32, kv=32, width=96, mlp=8192, vocab=32064)
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    placed = shardings(tree, mesh, RULES)
    assert set(placed) == set(tree)
    for path, sharding in placed.items():
        shape = tree[path].shape
        cut = np.prod(shape) // np.prod(sharding.shard_shape(shape))
        if path.endswith(("lora_a", "lora_b", "magnitude", "scale", "bias")):
            assert cut == 1, path
        elif path.endswith("kernel") and "patch" not in path:
            assert cut == 8, path
    spec = placed["decoder/layers/attn/out/kernel"].spec
    assert spec == P(None, "tensor", "fsdp")
    assert placed["embed/table"].spec == P(None, "fsdp")


def test_phi3v_rules_never_replicate_silently():
    with pytest.raises(UserError) as caught:
        shardings(_phi3v(clip=36), make_mesh(fsdp=8), RULES)
    assert "vision/clip/layers/attn/q/kernel" in str(caught.value)
    assert "(36) is not a multiple of fsdp 8" in str(caught.value)
    with pytest.raises(UserError, match="decoder/layers/attn/extra/kernel"):
        shardings({"decoder/layers/attn/extra/kernel": _leaf(2, 8, 8)}, make_mesh(), RULES)


def test_table_counts_bytes_per_chip():
    tree = {
        "decoder/norm/scale": _leaf(64),
        "decoder/layers/mlp/down/kernel": _leaf(2, 128, 64, dtype=jnp.bfloat16),
    }
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    lines = table(tree, shardings(tree, mesh, RULES)).splitlines()
    assert lines[0].split()[0] == "parameter"
    down = 2 * 128 * 64 * 2
    assert lines[2].split()[-4:] == ["-,", "tensor,", "fsdp", f"{down // 4:,}"]
    assert "2 x 128 x 64" in lines[2] and "bfloat16" in lines[2]
    assert lines[3].split()[-2:] == ["replicated", "256"]
    assert lines[4].startswith("2 parameters")
    assert lines[4].endswith(f"{down // 4 + 256:,}") and f"of {down + 256:,} in all" in lines[4]


def test_constrain_needs_a_mesh_to_do_anything():
    x = jnp.ones((8, 4))
    assert constrain(x, ROWS) is x

    @jax.jit
    def f(x):
        return constrain(x * 2, ROWS)

    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        spread = f(x)
        assert spread.sharding.shard_shape(spread.shape) == (2, 4)
        whole = jax.jit(lambda x: constrain(x + 1))(spread)
        assert whole.sharding.is_fully_replicated
    np.testing.assert_array_equal(f(x), 2 * np.ones((8, 4)))


def test_constrain_inside_shard_map():
    mesh = make_mesh(fsdp=2)

    def whole(x):
        return constrain(x, ROWS) + 1

    with jax.set_mesh(mesh):
        everything = jax.shard_map(whole, in_specs=P(ROWS), out_specs=P(ROWS))
        np.testing.assert_array_equal(jax.jit(everything)(jnp.zeros((8, 2))), np.ones((8, 2)))
        part = jax.shard_map(whole, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        np.testing.assert_array_equal(jax.jit(part)(jnp.zeros((8, 2))), np.ones((8, 2)))
