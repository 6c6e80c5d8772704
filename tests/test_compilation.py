# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk and counted: what a second start finds, what never stops it."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from vlm2vec_jax import compilation, flags
from vlm2vec_jax.compilation import Programs, keep_programs

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
START = """
import sys, json, jax
from vlm2vec_jax import flags
def main(args):
    flags.use_compilation_cache(args)
    from vlm2vec_jax.compilation import Programs
    def slow(x):
        for i in range(60):  # long enough to compile to be kept
            x = jax.numpy.sort(x @ x + i)
        return x
    with Programs(only="slow") as programs:
        jax.block_until_ready(jax.jit(slow)(jax.numpy.ones((8, 8))))
    print(json.dumps([programs.count, programs.loaded, programs.seconds]))
sys.exit(flags.call(main, flags.define_compilation_cache, sys.argv))
"""


@pytest.fixture
def settings():
    """jax as it was before."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder():
    return jax.config.jax_compilation_cache_dir


def test_the_users_own_cache_folder_by_default(settings, tmp_path, monkeypatch):
    def place(name, appauthor):
        return tmp_path / name

    monkeypatch.setattr(compilation.platformdirs, "user_cache_dir", place)
    assert keep_programs("auto") is None
    assert folder() == str(tmp_path / "vlm2vec_jax" / "programs")
    assert (tmp_path / "vlm2vec_jax" / "programs").stat().st_mode & 0o077 == 0


def test_what_jax_was_told_stays_unless_the_flag_names_another(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert keep_programs("auto") is None
    assert folder() == str(tmp_path / "theirs") and not (tmp_path / "theirs").exists()
    assert keep_programs(str(tmp_path / "mine")) is None
    assert folder() == str(tmp_path / "mine")


def test_off(settings, tmp_path):
    assert keep_programs("off") is None
    assert not jax.config.jax_enable_compilation_cache
    assert keep_programs(str(tmp_path / "mine")) is None  # jax's own switch is respected
    assert folder() is None


@pytest.mark.parametrize("case", ["a file in the way", "others may write"])
def test_a_folder_that_cannot_be_used_is_said_and_stops_nothing(settings, tmp_path, case):
    there = tmp_path / "there"
    if case == "a file in the way":
        there.write_text("")
        problem = keep_programs(str(there / "programs"))
    else:
        there.mkdir()
        there.chmod(0o777)
        problem = keep_programs(str(there))
    assert problem and str(there) in problem and "--compilation_cache" in problem
    assert folder() is None and not jax.config.jax_enable_compilation_cache
    assert float(jax.jit(lambda x: x + 3)(jnp.float32(1))) == 4


def test_programs_are_counted_by_name():
    def mine(x):
        return jnp.sin(x) * 3

    def other(x):
        return jnp.cos(x) * 5

    step = jax.jit(mine)
    with Programs(only="mine") as programs, Programs() as everything:
        jax.jit(other)(jnp.ones(3))
        for length in (3, 3, 4):
            step(jnp.ones(length))
    assert programs.count == 2 and programs.seconds > 0
    assert everything.count >= 3
    step(jnp.ones(5))
    assert programs.count == 2  # not after the block


@pytest.mark.slow
def test_a_second_start_loads_what_the_first_compiled(tmp_path):
    def start(*arguments):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", START, *arguments], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    own = f"--compilation_cache={tmp_path / 'programs'}"
    assert start(own)[:2] == [1, 0]
    assert any((tmp_path / "programs").iterdir())
    assert start(own)[:2] == [1, 1]
    assert start("--compilation_cache=off")[:2] == [1, 0]


def test_every_command_that_compiles_has_the_flag():
    from absl import flags as absl_flags

    from vlm2vec_jax import embed, evaluate, export, replay, search, train
    from vlm2vec_jax.weights import compare

    for command in (embed, evaluate, export, replay, search, train, compare):
        values = absl_flags.FlagValues()
        object.__setattr__(values, "command_line", ["x"])
        command.define(values)
        assert values["compilation_cache"].default == "auto", command.__name__
    assert flags.use_compilation_cache


def loop_over(lengths):
    """A loop whose step is compiled for each length; returns what it says and writes."""
    from types import SimpleNamespace as Fake

    from vlm2vec_jax.training.loop import Loop

    said, written = [], []
    stats = Fake(rows=[0], skipped=())
    batches = ((i, Fake(real_tokens=1, real_units=1, n=n), stats) for i, n in enumerate(lengths))
    loop = Loop(
        trainer=Fake(state=jnp.zeros(()), frozen=None, put=lambda x: x, saved=dict),
        step_fn=jax.jit(lambda state, frozen, batch, key: (state + batch.sum(), {"loss": state})),
        key=jax.random.key(0),
        batches=batches,
        make_batch=lambda packed, stats: jnp.asarray([1.0] * packed.n),
        checkpoints=Fake(is_due=lambda step: False, save_at_once=lambda *a: None),
        meta=lambda step, packed: {},
        metrics=Fake(message=said.append, write=lambda step, values: written.append(values)),
        skipped=Fake(at_limit=False, look=lambda *a: None),
        stopping=Fake(asked=lambda step: False),
        dump=lambda *a: None,
    )
    loop.run(0, len(lengths))
    return said, written


def test_a_step_that_is_compiled_again_is_said():
    said, written = loop_over([3, 3, 4, 4, 3])
    assert len(said) == 1 and said[0].startswith("warning: step 3: the step was compiled again")
    assert "program 2" in said[0]
    assert ["compile_s" in line for line in written] == [True, False, True, False, False]
    said, _ = loop_over(range(2, 14))
    assert len(said) == 11 and "row_tokens" in said[-1] and "row_tokens" not in said[8]
