# SPDX-License-Identifier: Apache-2.0
"""Compiling for TPUs that are not here, with the TPU's own compiler, in processes of their own.

libtpu reads its environment when jax is first imported, so nothing here imports it.
"""

import json
import os
import subprocess
import sys

import pytest
from full_size import CONFIG

pytestmark = pytest.mark.slow

LAYERS = 5
TEXT_STEP = """
import json, os, sys
from pathlib import Path
import vlm2vec_jax.compile as command
accelerator, hbm = command.read_topology("v5e:2x2")
os.environ["TPU_ACCELERATOR_TYPE"] = accelerator
import jax
from vlm2vec_jax.config import AdapterConfig, Config, DataConfig, ModelConfig
from vlm2vec_jax.models.loading import abstract_model
from vlm2vec_jax.packing import ChunkShape, RowShape
from vlm2vec_jax.parallel import hlo
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.training import aot, plan, setup
from vlm2vec_jax.training.step import StepSpec
config = Config(
    model=ModelConfig(path=sys.argv[1]), adapter=AdapterConfig(type="lora", dropout=0.0),
    data=DataConfig(path="-"), output="-",
)
mesh = make_mesh(1, 4, 1, devices=command.devices("v5e:2x2"))
trainer = aot.abstract_trainer(config, mesh)
model = abstract_model(sys.argv[1])
layout = model.backbone.visual_layout(model.config)
batch = aot.abstract_batch([ChunkShape(RowShape(512, 0, 16), 16, 2)], 64, layout, mesh)
compiled = aot.compile_step(trainer, StepSpec(setup.compute(config)), batch)
found = [
    {"kind": op.kind, "loops": op.loops, "arrays": [[a.dtype, a.shape] for a in op.arrays]}
    for op in hlo.collectives(compiled)
]
print(json.dumps({**plan.measure(compiled, hbm), "found": found}))
"""


@pytest.fixture(scope="module")
def environment():
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return {
        **keep,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def test_real_width_lora_step_for_a_v5e_slice(tmp_path, environment, repository):
    """The real model's width, five layers, GradCache, weights cut four ways."""
    config = json.loads(CONFIG.read_text()) | {"num_hidden_layers": LAYERS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", TEXT_STEP, str(tmp_path)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    # A quarter of 0.57 G decoder and 0.1 G vocabulary parameters in bf16; vision is not asked for.
    assert 0.3e9 < report["memory"]["arguments"] < 0.45e9
    assert report["fits"] and report["peak_bytes_per_chip"] < 4e9
    found = report["found"]
    layer = {(1, 3072, 16384), (1, 3072, 9216), (1, 8192, 3072), (1, 3072, 3072)}
    gathered = [
        (tuple(op["loops"]), dtype, tuple(shape))
        for op in found
        if op["kind"] == "all-gather"
        for dtype, shape in op["arrays"]
    ]
    for loops, dtype, shape in gathered:
        if loops:
            assert shape in layer and dtype == "bf16", (loops, dtype, shape)
        elif dtype == "bf16":
            assert shape in layer | {(32064, 3072)}, shape
    # Both passes of GradCache and the backward pass gather each kernel once a layer.
    in_layers = [shape for loops, _, shape in gathered if len(loops) == 2]
    assert {in_layers.count(shape) for shape in layer} == {3}
    # Chunks x rows x sequences of embeddings, once.
    assert [s for loops, d, s in gathered if d == "f32"] == [(2, 16, 16, 3072)]


def test_the_command_reports_a_small_model(tmp_path, environment, repository):
    from vlm2vec_jax.models.phi3v.mini import MiniSizes, model_config

    (tmp_path / "config.json").write_text(json.dumps(model_config(MiniSizes(layers=3), 512, 448)))
    output = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vlm2vec_jax.compile", "--config", "configs/mini.py"),
            *("--topology", "v5e:2x2", "--json", str(output)),
            *(f"--config.model.path={tmp_path}", "--config.mesh.data=4"),
            *("--config.batch_size=32", "--config.packing.chunk_tokens=256"),
        ],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verdict     it fits" in done.stdout and "assumed" in done.stdout
    report = json.loads(output.read_text())
    assert report["fits"] is True and report["hbm_bytes_per_chip"] == 16 * 2**30
    assert 0 < report["peak_bytes_per_chip"] < 2**30
    assert report["useful_flops_per_pair"] > 1e8
    # Pure data parallelism: nothing is sent inside a loop.
    assert report["collectives"]["inside"] == {}
    assert report["collectives"]["outside"]["all-reduce"]["operations"] >= 1
