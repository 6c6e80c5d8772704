# SPDX-License-Identifier: Apache-2.0
"""Every registered backbone with goldens against transformers: encodings, features, embeddings,
gradients, adapters, names of all generations, published sizes.

Whatever is registered and has goldens (tests/backbone_goldens.py) is tested; nothing here knows
which backbone it has. `docs/porting-a-backbone.md` states the tolerances.
"""

import functools
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_goldens import (
    ADAPTERS,
    GOLDENS,
    VARIANTS,
    arrays,
    cases,
    gradient_sketch,
    names,
)
from flax import nnx
from safetensors.numpy import load_file, save_file
from training_tools import QUICK, check_gradients

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.losses.contrastive import contrastive_loss
from vlm2vec_jax.models.loading import (
    abstract_model,
    add_adapter,
    flatten,
    load_model,
    split_trainable,
)
from vlm2vec_jax.models.registry import BACKBONES
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.packing import RowShape, fill
from vlm2vec_jax.training.step import with_dora_norms
from vlm2vec_jax.weights.adapters import adapter_tensors, load_adapter

EXACT = Compute("float32")
CHECKPOINTS = [(b, v) for b in VARIANTS if b in BACKBONES for v in VARIANTS[b]]
PUBLISHED = sorted(
    path.parent.name
    for path in GOLDENS.glob("names/*/config.json")
    if json.loads(path.read_text())["model_type"] in BACKBONES
)


class Checkpoint:
    """A golden checkpoint with its inputs as our processor encodes them."""

    def __init__(self, backbone: str, variant: str):
        self.folder = GOLDENS / backbone / variant
        self.model = load_model(self.folder, dtype_of=lambda path: jnp.float32)
        self.cases = cases(backbone, variant)
        self.arrays = arrays(backbone, variant)
        self.rules = sorted(
            {key.split("/")[2] for key in self.arrays if key.split("/")[1] == "embedding"}
        )
        self._encoded: dict[str, list] = {}
        self.layout = self.model.backbone.visual_layout(self.model.config)

    def processor(self, case: dict, rule: str):
        """One that does with this case what the golden did."""
        wanted = {
            "image_positions": rule,
            "image_markers": "wrapped" if case["wrapped"] else "bare",
            "transparency": "white",
        }
        known = self.model.backbone.options
        options = {name: wanted.get(name) for name in known}
        return self.model.backbone.processor(self.folder, self.model.config, **options)

    def encoded(self, rule: str) -> list:
        if rule not in self._encoded:
            self._encoded[rule] = [
                self.processor(c, rule).encode(MultimodalInput(c["text"], tuple(c["images"])))
                for c in self.cases
            ]
        return self._encoded[rule]

    def batch(self, rule: str, rows: list[list[int]], pad: int = 3):
        """Cases laid end to end in rows, with some padding."""
        items = self.encoded(rule)
        tokens = max(sum(len(items[i]) for i in row) for row in rows) + pad
        units = max(sum(items[i].units for i in row) for row in rows)
        units += 1 if units else 0
        shape = RowShape(tokens, units, max(map(len, rows)) + 1)
        return jax.tree.map(jnp.asarray, fill(rows, items, shape, self.layout))

    def number(self, name: str) -> int:
        return [c["name"] for c in self.cases].index(name)


@functools.cache
def checkpoint(backbone: str, variant: str) -> Checkpoint:
    return Checkpoint(backbone, variant)


@pytest.fixture(scope="module", params=CHECKPOINTS, ids="-".join)
def golden(request):
    return checkpoint(*request.param)


@functools.partial(jax.jit, static_argnames="graphdef")
def forward(graphdef, state, batch):
    """Embeddings [R, S, D], merged inputs [R, T, D] and the residual stream after every layer."""
    module = nnx.merge(graphdef, state)
    x, deep = module.inputs(batch, EXACT)
    states = module.decoder.hidden_states(x, module.places(batch), EXACT, deep)
    return module(batch, EXACT), x, states


def test_encodings(golden):
    for rule in golden.rules:
        for case, item in zip(golden.cases, golden.encoded(rule)):
            text = item.feature_index < 0
            np.testing.assert_array_equal(item.tokens[text], case["ids"][text], case["name"])
            # All that is not text has one id: the placeholder's.
            assert len(item) == case["length"] and len(set(case["ids"][~text])) <= 1
            wanted = golden.arrays.get(f"{case['name']}/positions/{rule}")
            wanted = np.arange(len(item)) if wanted is None else wanted.T
            np.testing.assert_array_equal(item.positions, wanted, f"{rule} {case['name']}")
            length = golden.processor(case, rule).length(
                MultimodalInput(case["text"], tuple(case["images"]))
            )
            assert length == (len(item), item.units)


def results(golden, rule):
    """Every case with our embedding, merged inputs and layers, packed among the others.

    The rows hold text, one image and several; one program for all rules.
    """
    count = len(golden.cases)
    order = [(7 * i) % count for i in range(count)]
    rows = [order[:4], order[4:8], order[8:]]
    batch = golden.batch(rule, rows)
    found, inputs, states = jax.tree.map(
        np.asarray, forward(*nnx.split(golden.model.module), batch)
    )
    for r, row in enumerate(rows):
        start = 0
        for s, number in enumerate(row):
            case = golden.cases[number]
            own = slice(start, start + case["length"])
            yield case, found[r, s], inputs[r, own], [x[r, own] for x in states]
            start += case["length"]


def test_packed_inputs_layers_and_embeddings(golden):
    """Nothing depends on neighbours: the embeddings under every rule of positions, and under one
    the features in their places and the residual stream, before anything is added there."""
    whole = "mrope" if "mrope" in golden.rules else golden.rules[0]
    for rule in golden.rules:
        for case, found, inputs, states in results(golden, rule):
            wanted = golden.arrays[f"{case['name']}/embedding/{rule}"]
            said = f"{rule} {case['name']}"
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=said)
            if rule == whole:
                check_parts(golden, case, inputs, states)


def check_parts(golden, case, inputs, states):
    kept = np.array(case.get("inputs_kept", range(case["length"])))
    wanted = golden.arrays[f"{case['name']}/inputs_embeds"]
    np.testing.assert_allclose(inputs[kept], wanted, rtol=0, atol=2e-5, err_msg=case["name"])
    kept = np.array(case["tokens_kept"])
    for layer, state in enumerate(states):
        wanted = golden.arrays[f"{case['name']}/layer_{layer}"]
        np.testing.assert_allclose(
            state[kept], wanted, rtol=0, atol=1e-4, err_msg=f"{layer} {case['name']}"
        )
    assert f"{case['name']}/layer_{len(states)}" not in golden.arrays


def contrast(golden, said: dict, params, frozen, graphdef):
    """Loss, embeddings and gradients of the golden batch."""
    sides = [[golden.number(n) for n in said[side]] for side in ("queries", "targets")]
    rule = said["positions"] if said["positions"] in golden.rules else golden.rules[0]
    batch = golden.batch(rule, sides)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(params, frozen, batch):
        module = nnx.merge(graphdef, params, frozen)
        found = module(batch, EXACT)[:, : len(sides[0])]
        loss, _ = contrastive_loss(*found, temperature=said["temperature"])
        return loss, found

    return objective(params, frozen, batch)


@pytest.mark.slow
def test_gradients_of_all_parameters(golden):
    backbone, variant = golden.folder.parent.name, golden.folder.name
    said = json.loads((GOLDENS / backbone / f"{variant}_gradients.json").read_text())
    graphdef, params, frozen = split_trainable(golden.model, full=True)
    (loss, _), grads = contrast(golden, said, params, frozen, graphdef)
    assert math.isclose(loss, said["loss"], rel_tol=1e-5)
    table, found = golden.model.table, {}
    for path, leaf in flatten(grads).items():
        rule = table.by_leaf[path]
        pieces = np.asarray(leaf) if rule.stacked else np.asarray(leaf)[None]
        for name, piece in zip(rule.names(), pieces, strict=True):
            found[name] = rule.to_hf(piece)
    wanted = {table.canonical(n): (n, v) for n, v in said["norm_and_projection"].items()}
    dead = {name for name, grad in found.items() if not np.abs(grad).max() > 1e-7}
    assert set(found) - dead <= set(wanted)
    for canonical, (name, (norm, projection)) in wanted.items():
        if norm < 1e-5:  # k_proj.bias: mathematically nothing
            continue
        got = gradient_sketch(name, found[canonical])
        tolerance = 1e-4 * norm + 2e-5
        np.testing.assert_allclose(
            got, (norm, projection), rtol=0, atol=5 * tolerance, err_msg=name
        )
    # What torch gives no gradient to, we give none either.
    for name in said["without_gradient"]:
        grad = found.get(table.canonical(name))
        assert grad is None or not np.abs(grad).max() > 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name, place", ADAPTERS)
@pytest.mark.parametrize("backbone", [b for b in VARIANTS if b in BACKBONES])
def test_adapters(backbone, name, place):
    """LoRA, DoRA, and DoRA with the names of transformers 4.4x."""
    golden = Checkpoint(backbone, VARIANTS[backbone][place])
    folder = GOLDENS / backbone / "adapters" / name
    said = json.loads((folder / "golden.json").read_text())
    wanted = load_file(folder / "golden.safetensors")
    model = golden.model
    adapter = load_adapter(folder, model.table, flatten(model.module))
    scaling = {linear.scaling for linear in adapter.linears.values()}
    assert scaling == {said["scaling"]}
    add_adapter(
        model.module,
        adapter.linears,
        dora=adapter.config.dora,
        dropout=adapter.config.dropout,
        tensors=adapter.tensors,
    )
    graphdef, params, frozen = split_trainable(model, full=False)
    graphdef, frozen = with_dora_norms(graphdef, params, frozen)
    (loss, found), grads = contrast(golden, said, params, frozen, graphdef)
    for side, got in zip(("query", "target"), found):
        np.testing.assert_allclose(got, wanted[f"{side}_embedding"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)
    idle = {model.table.canonical(_module(n)) for n in said["params_without_gradient"]}
    trained = flatten(grads)
    leaves = {
        path: trained.get(path, np.full(leaf.shape, np.nan, np.float32))
        for path, leaf in flatten(model.module).items()
        if re.search(r"/(lora_a|lora_b|magnitude)$", path)
    }
    named = dict(adapter_tensors(leaves, model.table, adapter.config))
    got = {_key(model.table, n): g for n, g in named.items() if not np.isnan(g).all()}
    want = {
        _key(model.table, n.removeprefix("grad/")): g
        for n, g in wanted.items()
        if n.startswith("grad/")
    }
    assert len(idle) == len({n.split(".lora_")[0] for n in named if np.isnan(named[n]).all()})
    # At temperature 0.02, through a tower of random weights. On one kind of CPU 0.34 of this were
    # used at most, on another 0.58: they add up in another order.
    check_gradients(got, want, relative=2e-4, absolute=2e-4)


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"


def _key(table, name: str) -> str:
    return f"{table.canonical(_module(name))} {name.split('.lora_')[1]}"


def _respelled(name: str, backbone: str, spelling: str) -> str:
    """A parameter's name in another generation, from its name in memory of transformers 5."""
    if spelling == "memory":
        return name
    if spelling == "bare":  # the model without its head, as sentence-transformers writes it
        return name.removeprefix("model.")
    if backbone == "llava_next":  # as transformers 5 writes it
        name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
        name = name.replace("model.language_model.", "language_model.model.", 1)
        return name.removeprefix("model.")
    return name


@pytest.mark.parametrize("spelling", ["memory", "bare", "written"])
def test_every_spelling_of_the_names_loads(golden, spelling, tmp_path):
    backbone = golden.folder.parent.name
    table = golden.model.table
    tensors = load_file(golden.folder / "model.safetensors")
    shutil.copytree(golden.folder, tmp_path / "model")
    renamed = {}
    for name, value in tensors.items():
        memory = table.spelled(table.canonical(name), "5")
        other = _respelled(memory, backbone, spelling)
        if spelling == "bare" and "lm_head" in other:
            continue
        renamed[other] = value
    save_file(renamed, tmp_path / "model" / "model.safetensors")
    found = flatten(load_model(tmp_path / "model", dtype_of=lambda p: jnp.float32).module)
    for path, leaf in flatten(golden.model.module).items():
        if not (spelling == "bare" and path.startswith("lm_head")):
            np.testing.assert_array_equal(found[path], leaf, path)
    # ... and is then strict.
    renamed.pop(next(iter(renamed)))
    renamed["model.something.else"] = np.zeros(3, np.float32)
    save_file(renamed, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.something\.else"):
        load_model(tmp_path / "model", dtype_of=lambda p: jnp.float32)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_every_name_and_shape(model):
    """Built abstractly: the parameters of the published checkpoint and no other."""
    built = abstract_model(GOLDENS / "names" / model)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(built.module).items()}
    for generation, layout in ((4, "4.46"), (5, "5")):
        wanted = names(model, generation)
        found = {}
        for name, slot in built.table.written():
            shape = shapes[slot.rule.ours]
            shape = shape[1:] if slot.rule.stacked else shape
            found[built.table.spelled(name, layout)] = slot.rule.hf_shape(shape)
        assert found == wanted
    assert set(shapes) == {slot.rule.ours for _, slot in built.table.written()}


def test_goldens_cover_every_registered_backbone():
    assert set(BACKBONES) - set(VARIANTS) == {"phi3_v"}  # which has goldens of its own
