# SPDX-License-Identifier: Apache-2.0
"""The train step: GradCache against the plain step, on meshes, with adapters, dropout, DoRA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_tools import (
    check_gradients,
    encode,
    mini_model,
    packer_for,
    pairs,
    train_batch,
)

from vlm2vec_jax.losses import LossOptions, contrastive_loss
from vlm2vec_jax.models.loading import add_adapter, fill, flatten, load_model
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import Linear, refresh_dora_norms
from vlm2vec_jax.parallel.mesh import make_mesh, row_shards
from vlm2vec_jax.training.exchange import in_slots
from vlm2vec_jax.training.optimizer import AdamW, make_schedule
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import StepSpec, TrainBatch, loss_and_grads
from vlm2vec_jax.weights.adapter_config import AdapterConfig, resolve

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SPEC = StepSpec(Compute("float32"), temperature=0.1)
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj")
ONE = (1, 1, 1)
slow = pytest.mark.slow
LONG = (pytest.mark.slow, pytest.mark.long)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mini_model(tmp_path_factory.mktemp("step"))


@pytest.fixture(scope="module")
def processor(folder):
    model = load_model(folder, dtype_of=lambda path: jnp.float32)
    return model.backbone.processor(folder, model.config, num_crops=2, max_len=64)


@pytest.fixture(scope="module")
def encoded(processor):
    return encode(processor, *pairs(12))


@pytest.fixture(scope="module")
def texts(processor):
    return encode(processor, *pairs(12, images=False))


def trainer_for(folder, kind, shape=ONE, *, dropout=0.0, lr=1e-3, dtype=jnp.float32):
    """A trainer on a mesh; adapters have random B and magnitudes, the same on every mesh."""
    devices = jax.devices()[: np.prod(shape)]
    mesh = make_mesh(*shape, devices=devices)
    model = load_model(folder, dtype_of=lambda path: dtype, mesh=mesh)
    if kind != "full":
        config = AdapterConfig(
            rank=4, alpha=8.0, dropout=dropout, targets=TARGETS, dora=kind == "dora", base=""
        )
        linears = resolve(config, model.table)
        add_adapter(model.module, linears, dora=config.dora, dropout=dropout, mesh=mesh)
        rng = np.random.default_rng(3)
        leaves = flatten(model.module)
        for path, leaf in sorted(leaves.items()):
            if path.endswith(("lora_b", "magnitude")):
                moved = np.asarray(leaf) + 0.05 * rng.standard_normal(leaf.shape, np.float32)
                leaves[path] = jax.device_put(moved, leaf.sharding)
        model.module = fill(model.module, leaves)
    optimizer = AdamW(make_schedule("constant", lr, 0, 100))
    return Trainer.create(model, optimizer, mesh, full=kind == "full")


def gradients(trainer, spec, batch, key=None):
    """Loss and gradients by path."""
    key = jax.random.key(0) if key is None else key
    step = jax.jit(loss_and_grads, static_argnums=(0, 1))
    with jax.set_mesh(trainer.mesh):
        loss, _, grads = step(
            trainer.graphdef, spec, trainer.state.params, trainer.frozen, trainer.put(batch), key
        )
    assert all(leaf.dtype == jnp.float32 for leaf in flatten(grads).values())
    return float(loss), {path: np.asarray(leaf) for path, leaf in flatten(grads).items()}


@pytest.fixture(scope="module")
def plain(folder, processor, encoded):
    """Per kind: loss and gradients of the plain step on one device."""
    found = {}

    def get(kind):
        if kind not in found:
            spec = dataclasses.replace(SPEC, cached=False)
            batch = train_batch(processor, encoded)
            found[kind] = gradients(trainer_for(folder, kind), spec, batch)
            assert all(np.abs(g).max() > 0 for g in found[kind][1].values())
        return found[kind]

    return get


def same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    check_gradients(found[1], expected[1], relative=2e-5, absolute=1e-7)


@pytest.mark.parametrize("chunk_tokens", [64, pytest.param(200, marks=LONG)])
def test_cached_is_plain(chunk_tokens, folder, processor, encoded, plain):
    batch = train_batch(processor, encoded, chunk_tokens=chunk_tokens, row_tokens=64)
    counts = [(int(g.num_chunks), g.batch.tokens.shape[:2]) for g in batch.groups]
    assert max(count for count, _ in counts) > 1
    if chunk_tokens == 200:  # three rows to a chunk, and not all chunks are full
        empty = [(g.batch.slot[: int(g.num_chunks)] < 0).all(-1).any() for g in batch.groups]
        assert any(empty), counts
    same(gradients(trainer_for(folder, "full"), SPEC, batch), plain("full"))


@pytest.mark.parametrize(
    "shape, kind",
    [
        pytest.param((2, 2, 2), "dora", marks=LONG),
        pytest.param((2, 2, 2), "full", marks=slow),
    ],
)
def test_every_mesh_gives_the_gradients_of_one_device(
    shape, kind, folder, processor, encoded, plain
):
    trainer = trainer_for(folder, kind, shape)
    batch = train_batch(
        processor,
        encoded,
        chunk_tokens=64 * row_shards(trainer.mesh),
        row_multiple=row_shards(trainer.mesh),
        row_tokens=64,
    )
    same(gradients(trainer, SPEC, batch), plain(kind))


def test_one_program_for_any_number_of_chunks(folder, processor):
    """Batches that are smaller, or lack a group, run the program of the larger; and rightly."""
    large = encode(processor, *pairs(12))
    queries, targets = pairs(12, images=False, seed=5)
    small = encode(processor, queries, [targets[0]] * 12)
    sizes = [(len(item), item.units) for side in (*large, *small) for item in side]
    packer = packer_for(processor, sizes, chunk_tokens=128, row_tokens=64)
    ids = np.arange(12, dtype=np.int32)
    for batch in (large, small):
        packer(*batch)  # shapes never shrink: from now on all batches have the largest
    first, second, again = (TrainBatch(packer(*b).groups, ids) for b in (large, small, large))
    counts = [[int(g.num_chunks) for g in batch.groups] for batch in (first, second)]
    assert counts[0] != counts[1] and 0 in counts[1]
    trainer = trainer_for(folder, "lora", lr=0.0)
    step = trainer.compile_step(SPEC)
    losses = []
    with jax.set_mesh(trainer.mesh):
        for number, batch in enumerate((first, second, again), start=1):
            trainer.state, values = step(
                trainer.state, trainer.frozen, trainer.put(batch), jax.random.key(0)
            )
            losses.append(float(values["loss"]))
            assert int(trainer.state.step) == number
    assert step._cache_size() == 1
    assert losses[0] == losses[2]
    # Twelve times the same target: nothing to tell apart.
    np.testing.assert_allclose(losses[1], np.log(12), rtol=1e-5)


def test_masked_duplicates(folder, processor, texts):
    """A target that is there twice is no negative of the other pair."""
    queries, targets = texts
    encoded = queries[:6], [*targets[:5], targets[0]]
    ids = [0, 1, 2, 3, 4, 0]
    trainer = trainer_for(folder, "lora")
    batch = train_batch(processor, encoded, ids=ids)
    spec = dataclasses.replace(SPEC, cached=False)
    plain, _ = gradients(trainer, spec, batch)
    masking = dataclasses.replace(spec, loss=LossOptions(mask_duplicates=True))
    masked, _ = gradients(trainer, masking, batch)

    module = nnx.merge(trainer.graphdef, trainer.state.params, trainer.frozen)
    chunks = [jax.tree.map(lambda leaf: leaf[0], group.batch) for group in batch.groups]
    embed = jax.jit(lambda chunk: module(chunk, SPEC.compute))
    found = [embed(chunk) for chunk in chunks]
    embeddings = np.asarray(in_slots([chunk.slot for chunk in chunks], found, 12))
    logits = (embeddings[:6] @ embeddings[6:].T / SPEC.temperature).astype(np.float64)

    def loss(logits):
        return np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))

    np.testing.assert_allclose(plain, loss(logits), rtol=1e-5)
    logits[0, 5] = logits[5, 0] = -np.inf
    np.testing.assert_allclose(masked, loss(logits), rtol=1e-5)
    assert masked < plain


@pytest.mark.parametrize(
    "kind, inputs",
    [
        ("dora", "texts"),
        pytest.param("dora", "encoded", marks=LONG),
    ],
)
def test_dropout_is_the_same_in_both_passes(kind, inputs, folder, processor, request):
    """Gradients with dropout are those of one function with every chunk's own key."""
    trainer = trainer_for(folder, kind, dropout=0.3)
    spec = dataclasses.replace(SPEC, dropout=True)
    encoded = request.getfixturevalue(inputs)
    batch = train_batch(processor, encoded, chunk_tokens=256, row_tokens=64)
    assert max(int(group.num_chunks) for group in batch.groups) > 1
    key = jax.random.key(11)
    found = gradients(trainer, spec, batch, key)

    def whole(params, frozen, batch, key):
        module = nnx.merge(trainer.graphdef, params, frozen)
        refresh_dora_norms(module)
        embedded, slots = [], []
        for g, group in enumerate(batch.groups):
            for k in range(group.batch.slot.shape[0]):
                chunk = jax.tree.map(lambda leaf, k=k: leaf[k], group.batch)
                chunk_key = jax.random.fold_in(jax.random.fold_in(key, g), k)
                embedded.append(module(chunk, SPEC.compute, key=chunk_key))
                slots.append(chunk.slot)
        out = jnp.zeros((24, 32))
        for slot, values in zip(slots, embedded):
            out = out.at[jnp.where(slot < 0, 24, slot)].set(values, mode="drop")
        return contrastive_loss(out[:12], out[12:], temperature=SPEC.temperature)[0]

    by_hand = jax.jit(jax.value_and_grad(whole))
    loss, grads = by_hand(trainer.state.params, trainer.frozen, batch, key)
    same(found, (float(loss), {path: np.asarray(g) for path, g in flatten(grads).items()}))
    # Another key drops other inputs.
    assert abs(gradients(trainer, spec, batch, jax.random.key(12))[0] - found[0]) > 1e-4


def test_dropout_differs_between_steps(folder, processor, texts):
    """With a learning rate of 0 only what is dropped changes, and a run repeats it."""

    def losses(spec):
        trainer = trainer_for(folder, "lora", dropout=0.3, lr=0.0)
        step = trainer.compile_step(spec)
        out = []
        with jax.set_mesh(trainer.mesh):
            batch = trainer.put(train_batch(processor, texts))
            for _ in range(2):
                key = jax.random.key(1)
                trainer.state, values = step(trainer.state, trainer.frozen, batch, key)
                out.append(float(values["loss"]))
        return out

    dropping = losses(dataclasses.replace(SPEC, cached=False, dropout=True))
    assert dropping[0] != dropping[1]
    still = losses(dataclasses.replace(SPEC, cached=False))
    assert still[0] == still[1] != dropping[0]


@pytest.mark.parametrize("stack", [(), (3,)])
def test_dora_norm_is_the_direct_one(stack):
    rng = np.random.default_rng(0)
    linear = Linear(24, 40, bias=False, rngs=nnx.Rngs(0))
    w, a, b = (
        rng.standard_normal((*stack, *shape)).astype(np.float32)
        for shape in ((24, 40), (24, 4), (4, 40))
    )
    b[..., 0] *= 1e-4
    linear.kernel = nnx.Param(jnp.asarray(w))
    leaves = {"lora_a": a, "lora_b": b, "magnitude": np.ones((*stack, 40), np.float32)}
    linear.set_adapter({k: jnp.asarray(v) for k, v in leaves.items()}, scale=2.0, dropout=0.0)
    direct = np.linalg.norm(w.astype(np.float64) + 2.0 * a.astype(np.float64) @ b, axis=-2)
    np.testing.assert_allclose(linear.dora_norm(), direct, rtol=2e-6)


@slow
def test_embeddings_in_bfloat16_train(folder, processor, encoded, plain):
    """A frozen bfloat16 base: float32 gradients of the same direction."""
    trainer = trainer_for(folder, "lora", dtype=jnp.bfloat16)
    # What add_adapter made is float32 whatever the base is.
    assert {leaf.dtype for leaf in flatten(trainer.state.params).values()} == {np.dtype("f4")}
    spec = dataclasses.replace(SPEC, compute=Compute("bfloat16"), cached=False)
    loss, grads = gradients(trainer, spec, train_batch(processor, encoded))
    wanted, exact = plain("lora")
    assert abs(loss - wanted) < 0.05 * wanted
    a, b = (np.concatenate([g[p].ravel() for p in sorted(exact)]) for g in (grads, exact))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
