# SPDX-License-Identifier: Apache-2.0
"""The suite that every registered backbone passes; one without goldens fails it.

Parity through the `Embedder`, packing, independence of neighbours, several devices, training on
MMEB's layout with its exports, and the TPU's compiler. `test_backbones_parity.py` goes through the
parts (layers, gradients, adapters, names) with every golden input, and what is peculiar to a
family has tests of its own. Compiling is nearly all that this file costs, so there are few inputs
(two texts, one image, two images), of a text row and an image row the same everywhere.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from backbone_goldens import GOLDENS, VARIANTS, arrays, cases
from flax import nnx
from small_models import quick_compiler, write_train

from vlm2vec_jax import export, flags
from vlm2vec_jax.config import AdapterConfig, Config, DataConfig, MeshConfig, ModelConfig, check
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.loading import abstract_model, flatten
from vlm2vec_jax.models.registry import BACKBONES, backbone
from vlm2vec_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Known:
    """Goldens of a checkpoint: inputs, and what torch embeds them to (f32 [N, D])."""

    folder: Path
    inputs: list[MultimodalInput]
    expected: np.ndarray
    options: dict
    tolerance: float = 1e-5


def _phi3v() -> list[Known]:
    root = GOLDENS / "end_to_end"
    lines = (root / "inputs.jsonl").read_text().splitlines()
    inputs = [MultimodalInput.of(json.loads(line)).relative_to(root) for line in lines]
    with np.load(root / "expected_embeddings.npz") as found:
        expected = found["tiny_gqa"]
    # Few of them: test_end_to_end.py takes them all. Two texts, an image, two images.
    kept = [i for i, item in enumerate(inputs) if not item.images][:2]
    kept += [next(i for i, x in enumerate(inputs) if len(x.images) == n) for n in (1, 2)]
    inputs, expected = [inputs[i] for i in kept], expected[kept]
    # The global view's pixels carry most of the difference (tests/goldens/README.md).
    return [Known(GOLDENS / "tiny_gqa", inputs, expected, {}, 2e-5)]


def _from_variants(name: str) -> list[Known]:
    """Markers wrapped as the golden's case was, by hand: text is the user's own."""
    out = []
    rule = "sequential" if name == "llava_next" else "mrope"
    for variant in VARIANTS[name]:
        found, inputs, expected = arrays(name, variant), [], []
        for case in cases(name, variant):
            if case["name"] not in ("text", "letter", "tall", "two_bare"):
                continue
            text = case["text"]
            if case["wrapped"] and name != "llava_next":
                text = text.replace("<|image_", "<|vision_start|><|image_")
                for k in range(1, len(case["images"]) + 1):
                    text = text.replace(f"<|image_{k}|>", f"<|image_{k}|><|vision_end|>")
            inputs.append(MultimodalInput(text, tuple(case["images"])))
            expected.append(found[f"{case['name']}/embedding/{rule}"])
        out.append(Known(GOLDENS / name / variant, inputs, np.stack(expected), {}))
    return out


KNOWN = {"phi3_v": _phi3v, **{n: lambda n=n: _from_variants(n) for n in VARIANTS}}
EVERY = sorted(BACKBONES)


@functools.cache
def known(name: str) -> list[Known]:
    assert name in KNOWN, f"{name} is registered but has no goldens: see docs/porting-a-backbone.md"
    return KNOWN[name]()


@functools.cache
def embedder(name: str) -> Embedder:
    case = known(name)[0]
    return Embedder.from_pretrained(case.folder, dtype="float32", **case.options)


@functools.cache
def embedded(name: str) -> np.ndarray:
    return embedder(name).encode(known(name)[0].inputs)


@functools.cache
def with_images(name: str) -> list[int]:
    """Numbers of the inputs with images: alone they are packed as among all."""
    return [i for i, item in enumerate(known(name)[0].inputs) if item.images]


@pytest.mark.parametrize("name", EVERY)
def test_embeds_as_torch_does_whatever_the_neighbours_and_the_order(name):
    case, together = known(name)[0], embedded(name)
    np.testing.assert_allclose(together, case.expected, atol=case.tolerance, rtol=0)
    # Others are in front of each and behind it.
    apart = embedder(name).encode(case.inputs[::-1])
    np.testing.assert_allclose(apart[::-1], together, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_lengths_are_known_without_pixels(name):
    case = known(name)[0]
    processor = embedder(name).processor
    layout = backbone(name).visual_layout(abstract_model(case.folder).config)
    assert layout == processor.visual_layout
    assert set(backbone(name).options) <= set(processor.settings)
    for item in case.inputs:
        encoded = processor.encode(item)
        assert processor.length(item) == (len(encoded), encoded.units)
        assert encoded.positions.shape == (len(encoded), *layout.position_shape)
        assert set(encoded.visual) == (set(layout.units) if encoded.units else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_eight_devices_embed_as_one(name):
    case, chosen = known(name)[0], with_images(name)
    with quick_compiler():
        spread = Embedder.from_pretrained(
            case.folder, dtype="float32", mesh=make_mesh(2, 2, 2), **case.options
        ).encode([case.inputs[i] for i in chosen])
    np.testing.assert_allclose(spread, embedded(name)[chosen], atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_trains_on_mmebs_layout_and_exports_embed_as_the_run_does(name, tmp_path):
    from vlm2vec_jax import train

    case = known(name)[0]
    data = write_train(tmp_path / "train", count=8)
    run = tmp_path / "run"
    config = Config(
        model=ModelConfig(str(case.folder), dtype="float32"),
        adapter=AdapterConfig(type="dora", rank=2, dropout=0.0, targets="auto"),
        data=DataConfig(str(data), max_len=64, workers=1),
        mesh=MeshConfig(data=1),
        batch_size=4,
        steps=2,
        output=str(run),
        grad_cache="off",
        remat="none",
    )
    config.optim.lr, config.optim.warmup_steps, config.checkpoint.every = 3e-2, 1, 0
    with quick_compiler():
        train.train(check(config))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert all(np.isfinite(json.loads(line)["loss"]) for line in lines) and len(lines) == 2
    chosen = with_images(name)
    inputs = [case.inputs[i] for i in chosen]
    found = Embedder.from_pretrained(run, dtype="float32").encode(inputs)
    assert np.abs(found - case.expected[chosen]).max() > 1e-4
    for form in ("merged", "peft"):
        output = tmp_path / form
        argv = ["export", "--checkpoint", run, "--format", form, "--output", output]
        argv += ["--dtype", "float32", "--nomeasure"] * (form == "merged")
        assert flags.call(export.main, export.define, [str(a) for a in argv]) == 0
        again = Embedder.from_pretrained(output, dtype="float32")
        assert again.processor.settings["max_len"] == 64
        np.testing.assert_allclose(again.encode(inputs), found, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_sharding_rules_reach_every_leaf(name):
    from vlm2vec_jax.parallel.sharding import shardings

    found = abstract_model(known(name)[-1].folder)
    leaves = flatten(found.module)
    assert set(shardings(leaves, make_mesh(8, 1, 1), found.backbone.sharding)) == set(leaves)
    assert any(found.backbone.is_unused(path) for path in leaves) or "lm_head/kernel" not in leaves


TPU_STEP = """
import os, sys
import vlm2vec_jax.compile as command
accelerator, hbm = command.read_topology("v5e:2x2")
os.environ["TPU_ACCELERATOR_TYPE"] = accelerator
import jax
from vlm2vec_jax.config import AdapterConfig, Config, DataConfig, ModelConfig
from vlm2vec_jax.models.loading import abstract_model
from vlm2vec_jax.packing import ChunkShape, RowShape
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.training import aot, plan, setup
from vlm2vec_jax.training.step import StepSpec
mesh = make_mesh(2, 2, 1, devices=command.devices("v5e:2x2"))
for folder in sys.argv[1:]:
    config = Config(
        model=ModelConfig(path=folder), data=DataConfig(path="-"), output="-",
        adapter=AdapterConfig(type="lora", rank=2, dropout=0.0, targets="auto"),
    )
    trainer = aot.abstract_trainer(config, mesh)
    model = abstract_model(folder)
    layout = model.backbone.visual_layout(model.config)
    shape = ChunkShape(RowShape(128, 16, 4), 4, 1)
    batch = aot.abstract_batch([shape], 16, layout, mesh)
    # Without GradCache, which holds the model twice: test_tpu_compile.py has it.
    spec = StepSpec(setup.compute(config), cached=False)
    compiled = aot.compile_step(trainer, spec, batch)
    report = plan.measure(compiled, compiled.as_text(), hbm)
    assert report["fits"], report
    print("fits", folder)
"""


@pytest.mark.slow
def test_a_train_step_with_images_compiles_for_a_tpu_slice(repository):
    folders = [str(known(name)[0].folder) for name in EVERY]
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    more = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", TPU_STEP, *folders],
        cwd=repository,
        env={**keep, **more},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fits ") == len(folders)


@pytest.mark.parametrize("name", EVERY)
def test_costs_and_sizes_are_told(name):
    model = abstract_model(known(name)[-1].folder)
    config, family = model.config, model.backbone
    tokens, units = family.image_size(config, {"num_crops": 1}, 60, 40)
    assert 0 < units <= tokens or family.visual_layout(config).features_per_unit > 1
    alone, seen = family.flops(config, 20, 0), family.flops(config, 20, units)
    assert alone < seen
    # Two images cost twice what one does, or less than one of their size: they do not mix.
    both = family.flops(config, 20, [units, units])
    assert both == pytest.approx(2 * seen - alone) and both <= family.flops(config, 20, 2 * units)
    assert min(family.activation_bytes(config, "full", "full", 4)) > 0
    assert family.width(config) == known(name)[-1].expected.shape[1]
    abstract = nnx.eval_shape(lambda: family.build(config, rngs=nnx.Rngs(0)))
    assert jax.tree.leaves(abstract)
