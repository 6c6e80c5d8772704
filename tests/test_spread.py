# SPDX-License-Identifier: Apache-2.0
"""How the model is spread: the collectives of compiled train steps, and values on every mesh.

The programs are compiled for eight simulated devices with XLA's cheap passes only: what is sent
where has been decided by then.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from full_size import FOLDER

from vlm2vec_jax import config as config_lib
from vlm2vec_jax.config import AdapterConfig, Config, DataConfig, ModelConfig
from vlm2vec_jax.models.loading import abstract_model, fill, flatten
from vlm2vec_jax.models.phi3v.mini import MiniSizes, model_config
from vlm2vec_jax.packing import ChunkShape, RowShape
from vlm2vec_jax.parallel import hlo
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.parallel.sharding import shardings, table
from vlm2vec_jax.training import aot, setup
from vlm2vec_jax.training.step import StepSpec, TrainBatch, loss_and_grads

SIZES = MiniSizes(
    hidden_size=64, intermediate_size=128, layers=3, heads=4, kv_heads=4, vision_size=32,
    vision_intermediate=64, vision_layers=3, vision_heads=4, image_size=28,
)  # fmt: skip
CHEAP = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
SHAPE = ChunkShape(RowShape(tokens=40, units=4, sequences=2), rows=16, chunks=3)
PAIRS = 16
LAYER = 64 * 2 * 128
"""Elements of the largest kernel of one layer (gate and up)."""
TABLE = 512 * 64
LONG = (pytest.mark.slow, pytest.mark.long)
CROP_TOKENS = 5
"""Patches of a crop and the class token."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(model_config(SIZES, 512, 448)))
    return path


@functools.cache
def program(folder: Path, kind: str, mesh: tuple[int, int, int], cached: bool = True):
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(type=kind, rank=4),
        data=DataConfig(path="-"),
        output="-",
    )
    trainer = aot.abstract_trainer(config, make_mesh(*mesh))
    model = abstract_model(folder)
    layout = model.backbone.visual_layout(model.config)
    shape = SHAPE if cached else SHAPE._replace(chunks=1)
    batch = aot.abstract_batch([shape], PAIRS, layout, trainer.mesh)
    spec = StepSpec(setup.compute(config), cached=cached, dropout=kind == "dora")
    return aot.compile_step(trainer, spec, batch, CHEAP)


def largest(array: hlo.Array) -> int:
    return int(np.prod(array.shape))


def activations(arrays, rows: int) -> list[hlo.Array]:
    """Arrays that hold tokens of more rows than a chip has: [rows, tokens, ...] or of crops."""
    lengths = {SHAPE.row.tokens, CROP_TOKENS}
    leading = (rows, rows * SHAPE.row.units)
    return [
        a
        for a in arrays
        if len(a.shape) >= 3 and a.shape[0] in leading and lengths & set(a.shape[1:])
    ]


def gathers(found):
    return [op for op in found if op.kind in ("all-gather", "all-to-all")]


@pytest.mark.parametrize(
    ("kind", "cached"),
    [
        ("lora", True),
        pytest.param("dora", True, marks=LONG),
        pytest.param("lora", False, marks=LONG),
        pytest.param("none", True, marks=LONG),
        pytest.param("none", False, marks=pytest.mark.slow),
    ],
)
def test_pure_data_parallel_talks_twice(folder, kind, cached):
    """One gather of the embeddings, one sum of the gradients, and nothing inside any loop."""
    found = hlo.collectives(program(folder, kind, (8, 1, 1), cached))
    assert [op for op in found if op.loops] == []
    floats = [op for op in found if op.arrays[0].dtype == "f32"]
    kinds = sorted(op.kind for op in floats)
    assert kinds == ["all-gather", "all-reduce"], found
    gathered, summed = sorted(floats, key=lambda op: op.kind)
    embeddings = np.prod([*gathered.arrays[0].shape])
    chunks = SHAPE.chunks if cached else 1
    assert embeddings == chunks * SHAPE.rows * SHAPE.row.sequences * SIZES.hidden_size
    trained = sum(map(largest, summed.arrays))
    # Beside them only the slots, a number for each embedding.
    slots = sum(op.bytes for op in found if op.arrays[0].dtype != "f32")
    assert slots <= 4 * chunks * SHAPE.rows * SHAPE.row.sequences
    assert trained == TRAINED[kind](folder)


def _trained(kind, folder):
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(type=kind, rank=4),
        data=DataConfig(path="-"), output="-",
    )  # fmt: skip
    return aot.abstract_trainer(config, make_mesh()).sizes()[0]


TRAINED = {kind: functools.partial(_trained, kind) for kind in ("lora", "dora", "none")}


FSDP = [
    ("lora", (2, 4, 1), True),
    pytest.param("dora", (2, 4, 1), True, marks=LONG),
    pytest.param("none", (2, 4, 1), True, marks=LONG),
    pytest.param("dora", (2, 4, 1), False, marks=pytest.mark.slow),
    pytest.param("lora", (2, 2, 2), True, marks=LONG),
    pytest.param("none", (2, 2, 2), True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "mesh", "cached"), FSDP)
def test_fsdp_gathers_a_layer_and_never_activations(folder, kind, mesh, cached):
    found = hlo.collectives(program(folder, kind, mesh, cached))
    assert activations([a for op in gathers(found) for a in op.arrays], SHAPE.rows) == []
    depth = 2 if cached else 1
    in_layers = [op for op in found if len(op.loops) == depth and op.kind == "all-gather"]
    weights = [a for op in in_layers for a in op.arrays]
    # One layer's kernels, whole over fsdp: never a stack of them.
    assert max(map(largest, weights)) == LAYER // mesh[2]
    assert all(len(a.shape) <= 2 or a.shape[0] == 1 for a in weights)
    # Forward, and forward and backward again for the gradient.
    assert len(in_layers) >= (3 if cached else 2) * (4 + 6)
    for op in found:
        if op.kind == "all-gather" and op not in in_layers:
            assert max(map(largest, op.arrays)) <= TABLE, op


@pytest.mark.slow
def test_fsdp_keeps_no_gathered_weights_without_remat(folder):
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(type="lora", rank=4),
        data=DataConfig(path="-"), output="-", remat="none",
    )  # fmt: skip
    model = abstract_model(folder)
    trainer = aot.abstract_trainer(config, make_mesh(1, 8, 1))
    layout = model.backbone.visual_layout(model.config)
    batch = aot.abstract_batch([SHAPE], PAIRS, layout, trainer.mesh)
    compiled = aot.compile_step(trainer, StepSpec(setup.compute(config)), batch, CHEAP)
    # A second gather of each layer in the backward pass is the price.
    loops = [op for op in hlo.collectives(compiled) if op.kind == "all-gather"]
    backward = [op for op in loops if len(op.loops) == 2 and "transpose" in op.source]
    assert any(a.shape[-2:] == (64, 256) for op in backward for a in op.arrays)
    stacked = f"f32[{SIZES.layers - 1},64,256]"
    assert stacked not in compiled.as_text()


@pytest.mark.slow
def test_a_chips_memory_is_level_from_16_to_256(folder, repository):
    """The same rows per chip, a batch that grows with the chips, the loss as a ring."""
    script = Path(__file__).with_name("chips_memory.py")
    env = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, script, folder], env=env, capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 0, done.stderr[-3000:]
    few, more, many = json.loads(done.stdout.splitlines()[-1]).values()
    # Beside the activations each chip holds a few numbers for every pair of the batch.
    assert more["temporaries"] < 1.05 * few["temporaries"], (few, more)
    assert many["temporaries"] < 1.1 * few["temporaries"], (few, many)
    # A layer's weights, or a share of the embeddings: nothing that grows with the batch.
    assert few["largest_moved"] == more["largest_moved"] == many["largest_moved"]


def _values(folder):
    """A model with values and a batch of two groups: (graphdef, params, frozen, batch)."""
    model = abstract_model(folder)
    rng = np.random.default_rng(0)
    flat = flatten(model.module)
    values = {p: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for p, leaf in flat.items()}
    module = fill(model.module, values)
    groups = []
    slot = 0
    for shape in (ChunkShape(RowShape(24, 0, 2), 8, 2), ChunkShape(RowShape(24, 3, 1), 8, 2)):
        lead = (shape.chunks, shape.rows)
        count = shape.chunks * shape.rows * shape.row.sequences
        layout = model.backbone.visual_layout(model.config)
        group = aot.abstract_group(shape, layout, make_mesh())
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), group)
        batch = zeros.batch
        length = shape.row.tokens // shape.row.sequences
        place = np.arange(shape.row.tokens)
        batch = batch._replace(
            tokens=rng.integers(3, 400, (*lead, shape.row.tokens)).astype(np.int32),
            feature_index=np.full((*lead, shape.row.tokens), -1, np.int32),
            positions=np.broadcast_to(place % length, (*lead, len(place))).astype(np.int32),
            segment_ids=np.broadcast_to(1 + place // length, (*lead, len(place))).astype(np.int32),
            pool_index=np.broadcast_to(
                length * np.arange(1, 1 + shape.row.sequences) - 1, (*lead, shape.row.sequences)
            ).astype(np.int32),
            slot=slot + np.arange(count, dtype=np.int32).reshape(*lead, -1),
        )
        slot += count
        if shape.row.units:
            batch.visual["crops"][:] = rng.integers(0, 255, batch.visual["crops"].shape)
            batch.visual["crop_info"][..., 1:, :] = [(1, 0, 2, 0, 1), (1, 0, 2, 1, 2)]
            batch.feature_index[..., 2:5] = (2, 3, 0)
        groups.append(type(group)(batch, np.int32(shape.chunks)))
    return module, TrainBatch(tuple(groups), np.arange(slot // 2, dtype=np.int32))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("cached", [True, False])
def test_every_mesh_gives_the_values_of_one_device(folder, cached):
    module, batch = _values(folder)
    if not cached:
        one = [
            jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), g.batch) for g in batch.groups
        ]
        groups = [g._replace(batch=b, num_chunks=np.int32(1)) for g, b in zip(batch.groups, one)]
        batch = batch._replace(groups=tuple(groups))
    graphdef, params, frozen = nnx.split(module, nnx.Param, ...)
    spec = StepSpec(setup.compute(Config(model=ModelConfig(dtype="float32"))), 0.5, cached=cached)
    rules = abstract_model(folder).backbone.sharding
    key = jax.random.key(0)

    def run(mesh):
        placed = shardings(flatten(params), mesh, rules)
        spread = fill(params, {p: jax.device_put(v, placed[p]) for p, v in flatten(params).items()})
        with jax.set_mesh(mesh):
            step = jax.jit(functools.partial(loss_and_grads, graphdef, spec))
            loss, _, grads = step(spread, frozen, batch, key)
        return float(loss), {p: np.asarray(g) for p, g in flatten(grads).items()}

    loss, grads = run(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    assert np.isfinite(loss) and max(np.abs(g).max() for g in grads.values()) > 1e-3
    for dims in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
        spread_loss, spread_grads = run(make_mesh(*dims))
        assert spread_loss == pytest.approx(loss, rel=1e-5)
        for path, grad in grads.items():
            scale = max(np.abs(grad).max(), 1e-4)
            np.testing.assert_allclose(
                spread_grads[path] / scale, grad / scale, atol=2e-4, err_msg=f"{dims} {path}"
            )


def test_sharding_table_of_the_real_model():
    """Every parameter of the 4.15 B model with its place on an 8 x 8 pod, as a golden text."""
    model = abstract_model(FOLDER)
    leaves = flatten(model.module)
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == 4_146_621_440
    mesh = jax.sharding.AbstractMesh((8, 8, 1), ("data", "fsdp", "tensor"))
    leaves = {p: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for p, v in leaves.items()}
    found = table(leaves, shardings(leaves, mesh, model.backbone.sharding)) + "\n"
    golden = Path(__file__).parent / "golden_sharding" / "phi3v_data8_fsdp8.txt"
    assert found == golden.read_text()


def test_sharding_table_of_full_training():
    """Masters and both moments of every trained parameter are cut like the parameter itself."""
    config = Config(
        model=ModelConfig(path=str(FOLDER)), adapter=AdapterConfig(type="none"),
        data=DataConfig(path="-"), output="-",
    )  # fmt: skip
    mesh = jax.sharding.AbstractMesh((1, 64, 1), ("data", "fsdp", "tensor"))
    trainer = aot.abstract_trainer(config, mesh)  # pyright: ignore[reportArgumentType]
    found = trainer.table() + "\n"
    golden = Path(__file__).parent / "golden_sharding" / "phi3v_full_fsdp64.txt"
    assert found == golden.read_text()
    lines = {line.split("  ")[0]: line.split()[-1] for line in found.splitlines()}
    trained = [path.removeprefix("optimizer/mu/") for path in lines if "optimizer/mu/" in path]
    assert len(trained) > 40
    for path in trained:
        assert lines[path] == lines[f"optimizer/mu/{path}"] == lines[f"optimizer/nu/{path}"], path


def test_assumed_step_of_the_recipe_packs_well():
    from vlm2vec_jax.training import plan
    from vlm2vec_jax.training.assumed import Mix

    config = config_lib.Config(model=ModelConfig(path=str(FOLDER)), data=DataConfig(path="-"))
    model = abstract_model(FOLDER)
    sizes = plan.sample(config, model, Mix())
    assert not plan.shapes(config, model, sizes, 64).cached
    config.packing.chunk_tokens = 4096
    packed = plan.shapes(config, model, sizes, 64)
    assert packed.cached and packed.token_share > 0.85 and packed.unit_share > 0.85
    assert all(c.rows % 64 == 0 and c.rows * c.row.tokens <= 64 * 4096 for c in packed.chunks)
    # Section 1.3 of the performance notes: 8.5 TF forward, LoRA twice that.
    assert plan.useful_flops_per_pair(config, model, sizes) / 1e12 == pytest.approx(17, rel=0.1)
    config.adapter.type = "none"
    assert plan.useful_flops_per_pair(config, model, sizes) / 1e12 == pytest.approx(25.5, rel=0.1)
