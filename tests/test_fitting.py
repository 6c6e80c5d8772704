# SPDX-License-Identifier: Apache-2.0
"""What is kept and how large chunks are, by the memory there is: the whole model as shapes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from data_files import make_train
from full_size import FOLDER
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from small_models import quick_compiler
from training_tools import mini_model

from vlm2vec_jax import train
from vlm2vec_jax.config import AdapterConfig, Config, DataConfig, ModelConfig, PackingConfig
from vlm2vec_jax.flags import call
from vlm2vec_jax.models.loading import abstract_model, flatten
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.training import aot, fitting, plan, setup
from vlm2vec_jax.training.assumed import Mix

GB = 10**9
KEPT = ("none none", "dots dots", "none full", "dots full", "full full")


def configuration(**fields) -> Config:
    config = Config(
        model=ModelConfig(path=str(FOLDER)),
        adapter=AdapterConfig(dropout=0.0),
        data=DataConfig(path="-", num_crops=4),
        output="-",
        batch_size=1024,
    )
    return dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def real():
    """Model, trainer and rows of the real Phi-3.5-Vision on one chip."""
    config = configuration()
    model = abstract_model(FOLDER)
    trainer = aot.abstract_trainer(config, make_mesh(8, 1, 1))
    sizes = plan.sample(config, model, Mix())
    return model, trainer, setup.rows_of(config, model, sizes)


def settled(real, memory, compiled=None, **fields):
    config = configuration(**fields)
    return fitting.fit(config, *real, memory=memory, compiled=compiled).config


def speed(config):
    """Position among the ways, fastest first, then the larger chunk."""
    kept = KEPT.index(f"{config.remat} {config.remat_vision}")
    return (config.grad_cache == "on", kept, -config.packing.chunk_tokens)


def test_more_memory_is_never_slower(real):
    found = [settled(real, memory * GB) for memory in (12, 16, 32, 80, 140, 300, 1000, 4000)]
    assert [speed(c) for c in found] == sorted((speed(c) for c in found), reverse=True)
    # GradCache keeps what it can; 128 pairs a chip in one piece fit only where all is recomputed.
    assert (found[3].grad_cache, found[3].remat) == ("on", "none")
    assert (found[4].grad_cache, found[4].remat) == ("off", "full")
    assert (found[-1].grad_cache, found[-1].remat) == ("off", "none")


def test_what_is_given_is_kept(real):
    packing = PackingConfig(chunk_tokens=4096)
    config = settled(real, 80 * GB, packing=packing, grad_cache="on", remat="dots")
    assert (config.grad_cache, config.remat, config.packing) == ("on", "dots", packing)
    # A batch is not taken in one piece where a chunk is given that does not hold it.
    config = settled(real, 1000 * GB, packing=packing)
    assert (config.grad_cache, config.remat) == ("on", "none")
    assert settled(real, 80 * GB, remat_vision="offload").remat_vision == "offload"
    # Nothing fits: the most frugal way, for the run to say so.
    config = settled(real, GB)
    assert (config.grad_cache, config.remat) == ("on", "full")


def test_chunks_of_data_parallel_chips_do_not_depend_on_their_links(real):
    assert fitting.gathering(configuration(), *real, "TPU v5 lite") == 0
    for memory in (12, 32, 80, 140):
        config = configuration()
        fits = {
            fitting.fit(config, *real, memory=memory * GB, chip=chip).words
            for chip in ("", "TPU v5 lite", "TPU v6 lite")
        }
        assert len(fits) == 1
    assert fitting.largest_chunk(58_000) == 3405 and fitting.largest_chunk(10**6) == 14142


def test_gathering_weights_asks_for_fewer_larger_chunks(real):
    """Under fsdp every chunk gathers all layers, which is worth so many tokens of computing."""
    model, alone, rows = real
    config = configuration()
    trainer = aot.abstract_trainer(config, make_mesh(2, 4, 1))
    cost = {
        chip: fitting.gathering(config, model, trainer, rows, chip)
        for chip in ("TPU v5 lite", "TPU v5", "NVIDIA H100 80GB HBM3")
    }
    # By hand: three quarters of 3.62 B and 0.31 B weights in bfloat16 over 200 GB/s, against half
    # of 459 TFLOP/s at what a row costs.
    flops = model.backbone.flops(model.config, rows.visual, rows.units) / rows.visual
    expected = 0.75 * 2 * 3.93e9 / 200e9 * 459e12 / 2 / flops
    assert cost["TPU v5"] == pytest.approx(expected, rel=0.02)
    assert cost["TPU v5 lite"] == pytest.approx(cost["TPU v5"] * 2 * 197 / 459)
    assert all(400 < tokens < 1500 for tokens in cost.values())
    # Twice as many share the same weights: each receives more of them.
    wider = aot.abstract_trainer(config, make_mesh(1, 8, 1))
    assert fitting.gathering(config, model, wider, rows, "TPU v5") == pytest.approx(
        cost["TPU v5"] * (7 / 8) / (3 / 4), rel=1e-3
    )
    # Tensor partners share the products as they share what is gathered.
    tensor = aot.abstract_trainer(config, make_mesh(2, 2, 2))
    assert fitting.gathering(config, model, tensor, rows, "TPU v5") == pytest.approx(
        cost["TPU v5"] * (1 / 2) / (3 / 4), rel=1e-3
    )
    assert fitting.gathering(config, model, trainer, rows, "cpu") == fitting.GATHERING

    def chunk(trainer, **fields):
        found = fitting.fit(
            configuration(grad_cache="on", **fields), model, trainer, rows, chip="TPU v5",
            memory=80 * GB,
        ).config  # fmt: skip
        return found.packing.chunk_tokens, found.remat

    # Of what fits: twice the memory's worth of everything recomputed, less than that of nothing.
    (small, _), (large, _) = chunk(alone, remat="full"), chunk(trainer, remat="full")
    assert large >= 2 * small and large <= fitting.MOST_CHUNK
    (small, remat), (large, same) = chunk(alone), chunk(trainer)
    assert large > small and remat == same == "none"


def test_small_chunks_that_are_gathered_for_long_give_way_to_large_ones(real):
    """Under fsdp: with all kept, but often gathered for, they would lose to all made again."""
    model, alone, rows = real
    chip = "TPU v6 lite"
    trainer = aot.abstract_trainer(configuration(), make_mesh(1, 8, 1))
    cost = fitting.gathering(configuration(), model, trainer, rows, chip)

    def chosen(trainer, memory):
        config = configuration(grad_cache="on")
        found = fitting.fit(config, model, trainer, rows, memory=memory * GB, chip=chip).config
        return found.packing.chunk_tokens, found.remat

    taken = {memory: chosen(trainer, memory) for memory in range(10, 100)}
    assert {"none", "full"} <= {remat for _, remat in taken.values()}
    most = max(tokens for tokens, _ in taken.values())
    for tokens, remat in taken.values():
        if remat != "full":  # three passes and their gathering, against four in the largest chunk
            assert 3 * (1 + cost / tokens) <= 4 + 3 * cost / most
    # Where nothing is gathered (whole weights take 7 GB more), small chunks are good enough.
    ahead = [memory for memory, (_, remat) in taken.items() if remat == "full"][-1]
    assert chosen(alone, ahead + 10)[1] in ("none", "dots")


def test_a_tower_without_adapters_keeps_nothing(real):
    """No gradient goes there: what would be kept for one does not count, nor how."""
    model, _, rows = real
    text = "qkv_proj,o_proj,gate_up_proj,down_proj"
    config = configuration(adapter=AdapterConfig(type="lora", dropout=0.0, targets=text))
    trainer = aot.abstract_trainer(config, make_mesh(8, 1, 1))
    assert not any("vision" in path for path in flatten(trainer.state.params))
    way = fitting.Way(False, "full", "full")
    seen, unseen = (
        fitting.activations(config, model, way, rows, 1.0, tower=tower) for tower in (True, False)
    )
    token, unit = model.backbone.activation_bytes(model.config, "full", "full", 2)
    assert unseen == token and seen == token + rows.units / rows.visual * unit
    # The batch in one piece fits into less; no step is compiled for the tower's sake alone.
    tried = []

    def compiled(config):
        tried.append((config.grad_cache, config.remat, config.remat_vision))
        return 10**15

    fitting.fit(config, model, trainer, rows, memory=10**14, compiled=compiled)
    assert len(tried) == len({one[:2] for one in tried}) > 1


@given(factor=st.floats(0.4, 3.0), memory=st.integers(20, 2000))
def test_what_was_compiled_decides(real, factor, memory):
    """A compiler that needs more or less than was estimated."""
    asked = {}
    model, trainer, rows = real

    def needs(config):
        way = fitting.Way(config.grad_cache == "on", config.remat, config.remat_vision)
        whole = int(2 * 1024 * rows.mean_tokens / 0.9 / 8)
        tokens = config.packing.chunk_tokens if way.cached else whole
        kept = fitting.activations(config, model, way, rows, tokens)
        return int(sum(fitting.held(trainer).values()) + factor * kept)

    def compiled(config):
        assert speed(config) not in asked  # nothing is compiled twice
        asked[speed(config)] = needs(config)
        return asked[speed(config)]

    limit = fitting.USABLE * memory * GB
    config = settled(real, memory * GB, compiled)
    assert 1 <= len(asked) <= fitting.MOST_TRIALS
    if len(asked) < fitting.MOST_TRIALS:
        assert needs(config) <= limit
    assert all(size > limit for key, size in asked.items() if key != speed(config))
    if factor <= 1:  # the first that is compiled fits
        assert list(asked) == [speed(config)]


def test_going_on_takes_up_what_was_chosen(real):
    fitted = fitting.fit(configuration(), *real, memory=80 * GB)
    again = fitting.taken_up(configuration(), json.loads(json.dumps(fitted.chosen)))
    assert again is not None and again.config == fitted.config and "as before" in again.words
    chunked = fitting.fit(configuration(), *real, memory=32 * GB)
    assert chunked.config.grad_cache == "on"
    tokens = chunked.config.packing.chunk_tokens
    same = configuration(packing=PackingConfig(chunk_tokens=tokens), grad_cache="on")
    assert fitting.taken_up(same, chunked.chosen) is not None
    for asked in ({"grad_cache": "off"}, {"remat": "full"}, {"remat_vision": "offload"}):
        assert fitting.taken_up(configuration(**asked), chunked.chosen) is None, asked
    other = configuration(packing=PackingConfig(chunk_tokens=tokens + 128))
    assert fitting.taken_up(other, chunked.chosen) is None


@pytest.mark.slow
def test_a_run_compiles_its_step_once_and_goes_on_alike(tmp_path, repository, monkeypatch, capfd):
    """Devices that report their memory: the step that was compiled to be looked at is the run's."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(setup, "reported_memory", lambda: 4 * GB)
    make_train(tmp_path / "data", {"Lines": 60})
    fields = {
        "model.path": mini_model(tmp_path), "model.dtype": "float32",
        "data.path": tmp_path / "data", "data.subsets": "Lines", "data.num_crops": 1,
        "data.max_len": 64, "batch_size": 16, "steps": 4, "adapter.type": "lora",
        "checkpoint.every": 2, "mesh.data": 1, "output": tmp_path / "out",
    }  # fmt: skip

    def run(**others):
        command = ["train", "--config", repository / "configs/mmeb.py"]
        command += [f"--config.{name}={value}" for name, value in (fields | others).items()]
        with quick_compiler():
            assert call(train.main, train.define, [str(word) for word in command]) == 0
        lines = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines], capfd.readouterr().err

    try:
        reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        losses, said = run()
        assert said.count("compiling the step") == 1
        assert "the plain step, remat none, chosen for 4.0 GB a device (compiled" in said
        assert len(list((tmp_path / "programs").glob("jit_train_step-*-cache"))) == 1
        # With other memory it would choose otherwise; going on, it does as before.
        monkeypatch.setattr(setup, "reported_memory", lambda: 5 * GB)
        shutil.rmtree(tmp_path / "out/checkpoints/4")
        again, said = run()
        assert again == losses and "as before" in said and "compiling" not in said
        # Less memory, or another wish: it chooses again.
        monkeypatch.setattr(setup, "reported_memory", lambda: 3 * GB)
        shutil.rmtree(tmp_path / "out/checkpoints/4")
        again, said = run(remat="dots")
        np.testing.assert_allclose(again, losses, rtol=1e-5)
        assert "remat dots" in said and "as before" not in said
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


def test_estimates_of_the_real_model():
    """Per token and crop in bf16: the stream of each layer, and all of the one recomputed."""
    model = abstract_model(FOLDER)
    layer = 139e3, 26e6
    for remat, token, crop in (
        *(("none", 32 * layer[0], 23 * layer[1]), ("offload", *layer)),
        ("full", 197e3 + layer[0], 27e6 + layer[1]),
    ):
        found = model.backbone.activation_bytes(model.config, remat, remat, 2)
        assert found == pytest.approx((token, crop), rel=0.02)
