# SPDX-License-Identifier: Apache-2.0
"""The presets' compiled TPU programs: what their golden figures show, and that they still hold.

`tests/tools/tpu_programs.py` compiles them, minutes each, which only `make test-long` does again.
Here the package must still plan the steps that were compiled, for which it needs no compiler.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import pytest
from full_size import FOLDER

from vlm2vec_jax.config import Config
from vlm2vec_jax.models.loading import abstract_model
from vlm2vec_jax.training import aot, fitting, plan, setup
from vlm2vec_jax.training.assumed import Mix

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import tpu_programs
from test_config import load

DATA_PARALLEL = ("v5p-32", "v6e-16")


@pytest.fixture(params=tpu_programs.PRESETS)
def preset(request):
    return request.param


@pytest.fixture
def golden(preset):
    return json.loads((tpu_programs.GOLDENS / f"{preset}.json").read_text())


def configuration(repository, preset) -> Config:
    config = load(repository, f"mmeb:lora,{preset}")
    config.model.path = str(FOLDER)
    return config


def test_what_was_compiled(preset, golden):
    assert golden["peak_bytes_per_chip"] == sum(golden["memory"].values())
    assert golden["peak_bytes_per_chip"] <= fitting.USABLE * golden["hbm_bytes_per_chip"]
    inside, outside = golden["collectives"]["inside"], golden["collectives"]["outside"]
    if preset in DATA_PARALLEL:
        assert inside == {}
        # The gradient of what is trained, once, in float32; besides it only numbers of targets.
        assert outside["all-reduce"]["largest_bytes"] == 4 * golden["parameters_trained"]
        assert outside["all-reduce"]["total_bytes"] < 4.01 * golden["parameters_trained"]
    else:  # a layer's widest kernel in bfloat16, and no activations
        assert inside["all-gather"]["largest_bytes"] == 2 * 3072 * 16384
        assert inside["all-reduce"]["largest_bytes"] < 1e6
    flops = golden["flops"]
    # Products with weights: within a tenth of those that real tokens need. Attention's kernels
    # come on top: blocks of rows, whose tokens see only their own sequence's.
    assert flops["products"] <= 1.1 * flops["useful"]
    assert flops["attention"] <= 0.16 * flops["useful"]
    assert flops["passes"] == 3  # the normal case of adapters


def test_the_step_that_was_compiled_is_still_the_presets(repository, preset, golden):
    config = configuration(repository, preset)
    shape = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh = jax.sharding.AbstractMesh(shape, ("data", "fsdp", "tensor"))
    model = abstract_model(FOLDER)
    trainer = aot.abstract_trainer(config, mesh)  # pyright: ignore[reportArgumentType]
    sizes = plan.sample(config, model, Mix())
    rows = setup.rows_of(config, model, sizes)
    fitted = fitting.fit(
        config, model, trainer, rows,
        memory=golden["hbm_bytes_per_chip"], compiled=lambda config: golden["peak_bytes_per_chip"],
    ).config  # fmt: skip
    assert (fitted.grad_cache == "on") == golden["grad_cache"]
    assert (fitted.remat, fitted.remat_vision) == (golden["remat"], golden["remat_vision"])
    packed = plan.shapes(fitted, model, sizes, shape[0] * shape[1])
    groups = [
        {"chunks": c.chunks, "used": used, "rows": c.rows, **dataclasses.asdict(c.row)}
        for c, used in zip(packed.chunks, packed.used, strict=True)
    ]
    assert groups == golden["groups"] and packed.chunk_tokens == golden["chunk_tokens"]
    # State and weights, but for the head that is not run; packed pixels.
    held = fitting.held(trainer)
    assert abs(golden["memory"]["arguments"] - held["weights"] - held["optimizer"]) < 0.3e9
    # What the choice was estimated to need, and what it needs.
    way = fitting.Way(golden["grad_cache"], golden["remat"], golden["remat_vision"])
    tokens = max(g["rows"] * g["tokens"] for g in groups) / (shape[0] * shape[1])
    kept = fitting.activations(config, model, way, rows, tokens)
    assert golden["memory"]["temporaries"] == pytest.approx(kept, rel=0.15)
    useful = sum(model.backbone.flops(model.config, *size) for size in sizes) / golden["chips"]
    assert golden["flops"]["useful"] == pytest.approx(3 * useful)


@pytest.mark.long
@pytest.mark.slow
def test_the_programs_compile_as_they_did(preset, golden, tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    assert "XLA_FLAGS" not in os.environ
    found = tpu_programs.golden(tpu_programs.compiled(preset, tmp_path))
    assert found["peak_bytes_per_chip"] <= 1.03 * golden["peak_bytes_per_chip"]
    for kind in ("products", "attention"):
        assert found["flops"][kind] <= 1.005 * golden["flops"][kind]
    for place in ("inside", "outside"):
        known = golden["collectives"][place]
        for kind, numbers in found["collectives"][place].items():
            assert numbers["total_bytes"] <= 1.01 * known[kind]["total_bytes"], (place, kind)
