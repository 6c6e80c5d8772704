# SPDX-License-Identifier: Apache-2.0
"""LoRA and DoRA against the reference: embeddings, merged weights, loss, every gradient."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_batches import golden_batch, load_npz, rope_table
from safetensors.numpy import load_file
from training_tools import QUICK, check_gradients

from vlm2vec_jax.losses.contrastive import contrastive_loss
from vlm2vec_jax.models.loading import add_adapter, fill, flatten, load_model, split_trainable
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.training.step import with_dora_norms
from vlm2vec_jax.weights.adapters import adapter_tensors, load_adapter, merge

NAMES = [
    # Rank 16 goes the whole road in test_end_to_end.py.
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("tiny_gqa_dora_r8", "tiny_mha_dora_r8", "tiny_mha_lora_r8")
]
EXACT = Compute("float32")
SIDES = ("query", "target")


class Case:
    """One adapter golden: base model, adapter, both batches with the reference's rope tables."""

    def __init__(self, goldens, name):
        folder = goldens / "adapters" / name
        self.said = json.loads((folder / "golden.json").read_text())
        self.golden = load_file(folder / "golden.safetensors")
        self.model = load_model(goldens / name[:8], dtype_of=lambda path: jnp.float32)
        self.base = flatten(self.model.module)
        self.adapter = load_adapter(folder, self.model.table, self.base)
        sides = [self._side(goldens, self.said[f"{side}_batch"]) for side in SIDES]
        self.batches, self.tables = zip(*sides)

    def _side(self, goldens, words):
        path, rows = re.fullmatch(r"(\S+)(?: \(first (\d+) rows\))?", words).groups()
        golden = load_npz(goldens / path)
        picked = slice(None) if rows is None else slice(int(rows))
        batch = golden_batch(self.model.config, golden, picked)
        return batch, rope_table(self.model.config, golden)

    def embed(self, module):
        return embed(*nnx.split(module), *self.batches, tables=self.tables)


@functools.partial(jax.jit, static_argnames=("graphdef", "tables"), compiler_options=QUICK)
def embed(graphdef, state, *batches, tables):
    module = nnx.merge(graphdef, state)
    # Slots of the golden batches are a column: one sequence to a row.
    return [module(b, EXACT, rope_table=t)[:, 0] for b, t in zip(batches, tables)]


@pytest.fixture(scope="module", params=NAMES)
def case(request, goldens):
    return Case(goldens, request.param)


def test_merged(case):
    """Runs first: the adapter is not on the module yet."""
    scaling = {path: linear.scaling for path, linear in case.adapter.linears.items()}
    assert set(scaling.values()) == {case.said["scaling"]}
    merged = merge(case.base, case.adapter.tensors, scaling)
    for name, wanted in case.golden.items():
        if name.startswith("merged/"):
            slot = case.model.table.slots[name.removeprefix("merged/")]
            leaf = np.asarray(merged[slot.rule.ours])
            found = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    found = case.embed(fill(case.model.module, merged))
    for side, embeddings in zip(SIDES, found):
        wanted = case.golden[f"{side}_embedding_merged"]
        np.testing.assert_allclose(embeddings, wanted, rtol=0, atol=1e-5)
    case.merged = found
    base = case.embed(case.model.module)[0]
    np.testing.assert_allclose(base, case.golden["query_embedding_base"], rtol=0, atol=1e-5)


def test_embeddings_loss_and_gradients(case):
    add_adapter(
        case.model.module,
        case.adapter.linears,
        dora=case.adapter.config.dora,
        dropout=case.adapter.config.dropout,
        tensors=case.adapter.tensors,
    )
    graphdef, params, frozen = split_trainable(case.model, full=False)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(params, frozen, *batches):
        # As `training.step.loss_and_grads`, but with the rope table of the reference's batch.
        module = nnx.merge(graphdef, params, frozen)
        found = [module(b, EXACT, rope_table=t)[:, 0] for b, t in zip(batches, case.tables)]
        loss, _ = contrastive_loss(*found, temperature=case.said["temperature"])
        return loss, found

    graphdef, frozen = with_dora_norms(graphdef, params, frozen)
    (loss, embeddings), grads = objective(params, frozen, *case.batches)
    for side, found in zip(SIDES, embeddings):
        wanted = case.golden[f"{side}_embedding"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
        if hasattr(case, "merged"):
            np.testing.assert_allclose(found, case.merged[SIDES.index(side)], rtol=0, atol=1e-6)
    np.testing.assert_allclose(loss, case.golden["loss"], rtol=1e-5)

    trained = flatten(grads)
    # Adapters on layers that never run are kept, but not trained: stand-ins to learn their names.
    adapters = {path for path in flatten(case.model.module) if "lora_" in path or "magn" in path}
    leaves = {
        path: trained.get(path, np.full(leaf.shape, np.nan, np.float32))
        for path, leaf in flatten(case.model.module).items()
        if path in adapters
    }
    named = dict(adapter_tensors(leaves, case.model.table, case.adapter.config))
    idle = {name for name, grad in named.items() if np.isnan(grad).all()}
    assert idle == set(case.said["params_without_gradient"])
    found = {name: grad for name, grad in named.items() if name not in idle}
    wanted = {n.removeprefix("grad/"): g for n, g in case.golden.items() if n.startswith("grad/")}
    check_gradients(found, wanted)
