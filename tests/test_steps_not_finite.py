# SPDX-License-Identifier: Apache-2.0
"""Steps that are not finite: skipped bit for bit, reported, in the end fatal with a dump."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_files import make_train
from test_train_command import log
from training_tools import mini_model

from vlm2vec_jax import replay, train
from vlm2vec_jax.flags import call
from vlm2vec_jax.training import guard
from vlm2vec_jax.training.guard import SkippedSteps, guarded
from vlm2vec_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.mark.parametrize("where", ["", "loss", "grad_norm"])
@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(where, what):
    def step(state, frozen, batch, key):
        metrics = {"loss": jnp.float32(1), "grad_norm": jnp.float32(2)}
        if where:
            metrics[where] = jnp.float32(what)
        after = jax.tree.map(lambda x: x + what if where else x + 1, (state.params, state.opt))
        return TrainState(state.step + 1, *after), metrics

    before = TrainState(jnp.int32(4), {"w": jnp.arange(3.0)}, {"mu": jnp.ones(2)})
    after, metrics = jax.jit(guarded(step))(before, {}, {}, None)
    assert after.step == 5 and metrics["step_skipped"] == bool(where)
    expected = before if where else jax.tree.map(lambda x: x + 1, before)
    np.testing.assert_array_equal(after.params["w"], expected.params["w"])
    np.testing.assert_array_equal(after.opt["mu"], expected.opt["mu"])


def test_examples_are_named():
    skipped = SkippedSteps(1, 0, ["A", "B"])
    rows = np.array([[0, 3], [1, 7], [0, 1], *([1, n] for n in range(20, 32))])
    good = {"loss": 1.0, "grad_norm": 1.0, "step_skipped": 0.0}
    assert skipped.look(1, good, rows) == "" and not skipped.at_limit
    said = skipped.look(2, {**good, "loss": np.nan, "step_skipped": 1.0}, rows)
    assert "step 2 was skipped: loss not finite" in said and "A 1, 3; B 7, 20" in said
    assert "and 5 more" in said and skipped.at_limit


@pytest.fixture(scope="module")
def ground(tmp_path_factory, repository):
    root = tmp_path_factory.mktemp("not_finite")
    make_train(root / "data", {"Lines": 60})
    settings = {
        "model.path": mini_model(root),
        "model.dtype": "float32",
        "data.path": root / "data",
        "data.subsets": "Lines",
        "data.num_crops": 1,
        "data.max_len": 64,
        "batch_size": 8,
        "steps": 8,
        "optim.warmup_steps": 1,
        "adapter.type": "lora",
        "checkpoint.every": 2,
        "mesh.data": 1,
        "remat": "none",
    }

    def run(output, **overrides):
        values = {**settings, "output": output, **overrides}
        flags = [f"--config.{name.replace('__', '.')}={v}" for name, v in values.items()]
        config = str(repository / "configs/mmeb.py")
        return call(train.main, train.define, ["train", "--config", config, *flags])

    run.root = root
    return run


@pytest.fixture
def poisoned(monkeypatch):
    """Make the loss of some steps (counted from 1) infinite, inside the compiled program."""

    def poison(*steps):
        def wrap(step):
            def bad(*args):
                state, metrics = step(*args)
                wrong = jnp.isin(state.step, jnp.array(steps))
                params = jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), state.params)
                loss = jnp.where(wrong, jnp.inf, metrics["loss"])
                return state._replace(params=params), {**metrics, "loss": loss}

            return guarded(bad)

        monkeypatch.setattr("vlm2vec_jax.training.state.guarded", wrap)

    return poison


def test_the_run_goes_on_and_tells(ground, poisoned, capfd):
    poisoned(3, 6)
    output = ground.root / "borne"
    assert ground(output) == 0
    lines = log(output)
    assert [line["step"] for line in lines if line["step_skipped"]] == [3, 6]
    assert lines[2]["loss"] is None and lines[2]["non_finite"] == ["loss"]
    assert all(line["loss"] is not None for line in lines if not line["step_skipped"])
    # The schedule waits for the update that was not made.
    assert lines[3]["lr"] == lines[2]["lr"] and lines[4]["lr"] < lines[3]["lr"]
    error = capfd.readouterr().err
    assert "step 3 was skipped: loss not finite" in error and "Its examples: Lines " in error
    assert "2 so far, 10 are borne" in error


def test_too_many_stop_the_run_with_a_dump_that_shows_it_again(ground, poisoned, capsys):
    poisoned(3, 4, 6)
    output = ground.root / "fatal"
    assert ground(output, max_skipped_steps=2) == 2
    error = capsys.readouterr().err
    folder = output / "non_finite" / "step-6"
    assert "3 steps were not finite" in error and str(folder) in error
    assert [line["step"] for line in log(output)] == list(range(1, 7))
    said = json.loads((folder / "dump.json").read_text())
    assert said["step"] == 6 and said["metrics"]["loss"] == "inf" and len(said["rows"]) == 8
    assert (output / "checkpoints" / "4").is_dir()  # what was there is whole

    # Without the poison the step is finite; its loss is that of a run that was never poisoned
    # from the same state on.
    argv = ["replay", "--dump", str(folder)]
    assert call(replay.main, replay.define, argv) == 0
    text = capsys.readouterr().out
    assert "the step is finite here" in text and "step 6: loss " in text
    assert "in the run: " in text

    # With a model that is really broken it names examples and gradients.
    stopped = call(replay.main, replay.define, [*argv, "--model", str(_broken(ground.root))])
    text = capsys.readouterr().out
    assert stopped == 1 and "embedding not finite: Lines row " in text
    assert "gradient not finite: " in text and "the step is not finite here either" in text


def _broken(root):
    """The model with a final norm that overflows."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = root / "broken"
    shutil.copytree(root / "model", folder, dirs_exist_ok=True)
    (file,) = folder.glob("*.safetensors")
    arrays = load_file(file)
    name = next(n for n in arrays if n.endswith("model.norm.weight"))
    arrays[name] = np.full_like(arrays[name], 3e38)
    save_file(arrays, file, metadata={"format": "pt"})
    return folder


def test_a_folder_that_is_no_dump(tmp_path, capsys):
    assert call(replay.main, replay.define, ["replay", "--dump", str(tmp_path)]) == 2
    assert "is no dump" in capsys.readouterr().err
    assert guard.SKIPPED == "step_skipped"
