# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' table and file, and that the baseline computes what the model computes."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import quick_compiler

from benchmarks import __main__ as command
from benchmarks import common, reference_shaped, suite
from benchmarks.beds import Bed, NoProcessor
from benchmarks.reference_shaped import PLAIN, REFERENCE, Embedding, Form, PeftLinear
from benchmarks.reference_step import Step, Trained
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.models.loading import split_trainable
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import Linear

TINY = Bed("tiny")
COMPUTE = Compute("float32")


def row(**fields):
    return common.Row(**{"what": "texts", "ours": 0.5, "ratio": 2.0, "target": 1.5, **fields})


@pytest.mark.parametrize(
    ("fields", "met"),
    [
        ({}, True),
        ({"ratio": 1.4}, False),
        ({"at_most": True}, False),
        ({"ratio": 1.2, "at_most": True}, True),
        ({"target": None}, None),
        ({"ratio": None}, False),  # then the figure itself must reach it
        ({"ratio": None, "ours": 1.6}, True),
    ],
)
def test_whether_a_target_is_met(fields, met):
    assert row(**fields).met is met


def test_ratios_are_medians_over_the_rounds_and_cases_take_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(common, "clock", lambda: now[0])

    def case(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds[0] if len(seconds) == 1 else seconds.pop(0)

        return run

    # The run that does not count, then three rounds, the second of them slow for both.
    slow, fast = case("slow", [9.0, 2.0, 60.0, 2.2]), case("fast", [9.0, 1.0, 20.0, 1.0])
    timing = common.alternate({"slow": slow, "fast": fast}, 3)
    assert order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert timing.median("slow") == pytest.approx(2.2)
    assert timing.ratio("slow", "fast") == pytest.approx(2.2)
    line = common.compared("w", "a", timing, "fast", "slow", 2.0)
    assert (line.ours, line.baseline) == pytest.approx((1.0, 2.2)) and line.met
    over = common.overhead("w", "a", timing, "slow", "fast", 2.0)
    assert over.ratio == pytest.approx(2.2) and over.met is False


def test_the_table_and_the_file(tmp_path, capsys):
    lines = [row(), row(what="share", ours=0.95, unit="share", ratio=None, target=0.93)]
    results = {"text_embed": common.Result([*lines, row(ratio=1.0)], more={"wall_s": 1.0})}
    common.show(results, "cpu")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("text_embed", "2.00", ">= 1.5", "95.0%", "yes", "NO"))
    how = common.How()
    record = suite.record(results, {"peak": "OSError: no"}, how)
    path = common.write(tmp_path / "folder" / "out.json", record)
    found = json.loads(path.read_text())
    assert [r["met"] for r in found["benchmarks"]["text_embed"]["rows"]] == [True, True, False]
    assert found["failed"] == {"peak": "OSError: no"} and found["device"] == "cpu"
    assert found["versions"]["jax"] == jax.__version__ and len(found["load_average"]) == 3
    assert found["how"]["rounds"] == how.rounds
    with pytest.raises(TypeError):
        common.write(path, {"not json": object()})
    assert json.loads(path.read_text()) == found and len(list(path.parent.iterdir())) == 1


def test_selection():
    default = suite.select(None, "cpu")
    assert "text_embed" in default and set(default) < set(suite.select("all", "cpu"))
    assert suite.select("peak, packing", "gpu") == ["peak", "packing"]
    for only in ("peak,nonsense", ","):
        with pytest.raises(ValueError, match="there are peak"):
            suite.select(only, "cpu")


def test_every_entry_names_a_function():
    import importlib

    for name, entry in suite.ENTRIES.items():
        module, _, function = entry.function.partition(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function)), name


def test_one_that_fails_keeps_no_other_from_running(monkeypatch, capsys):
    monkeypatch.setitem(suite.ENTRIES, "broken", suite.Entry("nowhere:nothing", "breaks"))
    results, failed = suite.run(["broken", "crops"], common.How(quick=True))
    assert set(results) == {"crops"} and "nowhere" in failed["broken"]
    assert all(line.met is None for line in results["crops"].rows)


@pytest.mark.parametrize("seed", [0, 4])
def test_an_embedder_has_its_programs_early(seed):
    from benchmarks.compile_time import WARM_UP, planned_calls

    windows = planned_calls(common.How(seed=seed), 8, 2048)
    early = set().union(*windows[:WARM_UP])
    assert len(early) <= 8 and not set().union(*windows) - early


def test_the_command(tmp_path, repository):
    with pytest.raises(SystemExit) as error:
        command.main(["--only", "nonsense", "--device", "cpu"])
    assert error.value.code == 2
    # In a process of its own, which the command may pin and whose XLA flags it may set.
    line = [sys.executable, "-m", "benchmarks", "--quick", "--only", "packing", "--device", "cpu"]
    done = subprocess.run(
        [*line, "--output", tmp_path / "r.json"], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["benchmarks"]["packing"]["rows"][0]["unit"] == "share"


@pytest.mark.slow
def test_training_is_measured_without_what_reads_data(repository):
    """A machine that is lent for measuring has jax and flax, and no loader of data or settings."""
    code = (
        "import sys\n"
        "for name in ('grain', 'ml_collections', 'array_record', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks import common\n"
        "common.prepare()\n"
        "from benchmarks import train_rate\n"
        "rate, share = train_rate.measure(common.How(rounds=1, quick=True)).rows\n"
        "assert rate.ours > 0 and 0 < share.ours < 1, (rate, share)\n"
        "print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.split()[-1:] == ["fine"], done.stderr


def test_dora_in_pefts_form_is_dora():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    key = jax.random.key(1)
    layers = {}
    for cls in (Linear, PeftLinear):
        layer = cls(6, 4, bias=True, rngs=nnx.Rngs(0))
        leaves = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.linspace(-1, 1, 8).reshape(2, 4)}
        layer.set_adapter({**leaves, "magnitude": jnp.arange(1.0, 5.0)}, scale=0.5, dropout=0.4)
        layers[cls] = nnx.split(layer, nnx.LoRAParam, ...)

    def both(function):
        return [function(*layers[cls]) for cls in (Linear, PeftLinear)]

    for draw in (None, key):  # also what is dropped, as `exact` has it
        a, b = both(lambda g, p, r, draw=draw: nnx.merge(g, p, r)(x, draw))
        np.testing.assert_allclose(a, b, atol=1e-5)
    grads = both(lambda g, p, r: jax.grad(lambda p: (nnx.merge(g, p, r)(x, key) ** 2).sum())(p))
    for a, b in zip(*map(jax.tree.leaves, grads)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_head_needs_every_token():
    with pytest.raises(ValueError, match="full_layers"):
        Form(full_layers=False)


def mixture():
    rng = np.random.default_rng(2)
    photos = [TINY.photo(rng, 1, 2, 3), TINY.photo(rng, 2, 2, 2)]
    texts = [TINY.text(rng, n) for n in (5, 17, 2)]
    return [texts[0], photos[0], texts[1], photos[1], texts[2]]


@pytest.mark.slow
@pytest.mark.parametrize("off", [(), ("lm_head",), ("lm_head", "full_layers"), ("padded_crops",)])
def test_every_form_embeds_alike(off):
    items = mixture()
    model = TINY.model()
    plain = Embedder(model, NoProcessor(TINY.layout), COMPUTE, None).encode_encoded(items)
    form = dataclasses.replace(REFERENCE, **dict.fromkeys(off, False))
    with quick_compiler():
        found = Embedding(model.module, TINY.layout, COMPUTE, form)(items, 5, most_crops=6)
    np.testing.assert_allclose(found, plain, atol=2e-6)


@pytest.mark.slow
def test_forms_run_what_they_say():
    """Padding is counted: tokens, crops, and what is computed for nothing."""
    items = mixture()
    batch = reference_shaped.right_padded(items, TINY.layout, units=6)
    assert batch.tokens.shape == (5, max(map(len, items))) and batch.visual["crops"].shape[1] == 6
    graphdef, state = nnx.split(TINY.model().module)

    def waste(form):
        run = lambda s: reference_shaped.embed(nnx.merge(graphdef, s), batch, COMPUTE, form)  # noqa: E731
        return [leaf.shape for leaf in jax.eval_shape(run, state)[1]]

    clip = TINY.config.clip
    seen = clip.patches_per_side**2 + 1
    vocabulary = (*batch.tokens.shape, TINY.config.vocab_size)
    assert waste(REFERENCE) == [(12, seen, clip.hidden_size), vocabulary]
    assert waste(PLAIN) == []


@pytest.mark.slow
def test_the_reference_shaped_step_has_our_loss_and_gradients():
    """DoRA as PEFT writes it, every habit on, chunk by chunk, against our step in one piece."""
    from benchmarks.train_step import check_equal
    from vlm2vec_jax.training.batching import BatchPacker, choose_rows
    from vlm2vec_jax.training.step import StepSpec, TrainBatch, loss_and_grads

    rng = np.random.default_rng(4)
    sides = [TINY.photo(rng, 1, 2, 4), TINY.text(rng, 9)], [TINY.text(rng, 7), TINY.text(rng, 3)]
    model = TINY.adapted("dora", rank=2)
    ours = Trained(*split_trainable(model, full=False))
    sizes = [(len(item), item.units) for side in sides for item in side]
    packer = BatchPacker(choose_rows(sizes, longest=512), TINY.layout, chunk_tokens=None)
    batch = TrainBatch(packer(*sides).groups, np.arange(2, dtype=np.int32))
    with quick_compiler():
        step = jax.jit(loss_and_grads, static_argnums=(0, 1))
        spec, trained = StepSpec(COMPUTE, cached=False), (ours.params, ours.frozen)
        value, _, grads = step(ours.graphdef, spec, *trained, batch, jax.random.key(0))
        direct = Step(ours, TINY.layout, COMPUTE, PLAIN, *sides, chunk=None)
        reference_shaped.use_peft_form(model.module)
        peft = Trained(*split_trainable(model, full=False))
        shaped = Step(peft, TINY.layout, COMPUTE, REFERENCE, *sides, most_crops=5)
        found = {"ours": (value, grads), "shaped": shaped(), "packed, direct": direct()}
    longest = [max(map(len, side)) for side in sides]
    assert shaped.run_tokens == 2 * sum(longest) and shaped.run_units == 5
    assert (direct.run_tokens, direct.run_units) == (packer.arrange(sizes)[0].run_tokens, 3)
    check_equal(found, "float32")


def test_growth_curves_are_drawn(tmp_path):
    from benchmarks.growth import CURVES, Curve, draw

    curve = Curve("t", "tokens", "s", [1, 64], {"a": [0.1, 9.0], "b": [1.0, 2.0]}, "linear")
    first, second = (draw({"layers": curve}, tmp_path / name)[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size < 50_000
    assert first.name == "layers.svg" and "layers" in CURVES


@pytest.mark.slow
def test_growth_writes_what_it_draws(tmp_path, repository):
    line = [sys.executable, "-m", "benchmarks.growth", "--quick", "--only", "candidates"]
    done = subprocess.run(
        [*line, "--output", tmp_path], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-cpu-growth.json")
    found = json.loads(path.read_text())
    assert found["quick"] and found["curves"]["candidates"]["x"] == [100, 200]
    assert (tmp_path / "candidates.svg").exists()


def test_ours_beside_the_reference(tmp_path, capsys):
    from benchmarks import beside_reference

    first, second = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32) + 1e-3
    beside_reference.add(tmp_path / "reference.npz", first, [2.0])
    assert beside_reference.compare(tmp_path) == 2 and "ours" in capsys.readouterr().out
    beside_reference.add(tmp_path / "ours.npz", second, [1.0])
    beside_reference.add(tmp_path / "ours.npz", second, [1.0, 8.0])
    assert beside_reference.compare(tmp_path) == 0
    assert "ratio 2.00" in capsys.readouterr().out
