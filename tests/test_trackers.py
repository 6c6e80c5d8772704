# SPDX-License-Identifier: Apache-2.0
"""trackers.py, profiling.py and parallel/chips.py: where a run's numbers go, and two of them."""

import builtins
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from vlm2vec_jax.config import read_range
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.parallel import chips
from vlm2vec_jax.training import trackers
from vlm2vec_jax.training.profiling import Profiler
from vlm2vec_jax.training.trackers import open_tensorboard, open_trackers


class _Board:
    made: list = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.points, self.closed = folder, purge_step, [], False
        _Board.made.append(self)

    def add_scalar(self, *point):
        self.points.append(point)

    def close(self):
        self.closed = True


def test_tensorboardx_gets_the_numbers(tmp_path, monkeypatch):
    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = _Board
    module.__spec__ = types.SimpleNamespace(name="tensorboardX")
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    (tracker,) = open_trackers(tmp_path, 4)
    tracker.write(5, {"loss": 0.5})
    tracker.close()
    board = _Board.made[-1]
    assert board.points == [("loss", 0.5, 5)] and board.closed
    assert board.purge_step == 5 and board.folder == str(tmp_path / "tensorboard")


def test_tensorboard_alone_is_enough(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda n: None if n == "tensorboardX" else find(n)
    )
    for resume, steps in ((0, (1, 2, 3)), (1, (2,))):
        tracker = open_tensorboard(tmp_path, resume)
        for step in steps:
            tracker.write(step, {"loss": step + resume / 2, "subset_loss/A": 1.0})
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.5)]
    assert events.Scalars("subset_loss/A")


def test_without_them_nothing_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert open_trackers(tmp_path, 0) == [] and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="not installed: pip install"):
        open_trackers(tmp_path, 0, wandb="offline")


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    for step in (1, 2):  # the second goes on after an interruption
        (tracker,) = open_trackers(
            tmp_path, step - 1, tensorboard=False, wandb="offline", project="p", config={"lr": 0.1}
        )
        tracker.write(step, {"loss": 1.0 / step, "subset_loss/A": 2.0})
        tracker.close()
    name = (tmp_path / "wandb/run_id").read_text().strip()
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert files
    text = b"".join(file.read_bytes() for file in files)
    assert b"subset_loss/A" in text and b"lr" in text


def test_profile_range():
    assert read_range("") is None and read_range("3:5") == (3, 5)
    for wrong in ("3", "0:2", "5:3", "a:b", "1:2:3"):
        with pytest.raises(UserError, match="START:STOP"):
            read_range(wrong)


def test_a_trace_of_the_steps_asked_for(tmp_path):
    step = jax.jit(lambda x: x * 2)
    profiler = Profiler("2:3", tmp_path / "profile")
    said = []
    for number in range(1, 5):
        profiler.before(number)
        said.append(profiler.after(number, step(jnp.ones(4))))
    assert said[:2] == [None, None] and "(2, 3)" in said[2] and said[3] is None
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert profiler.close() is None


def test_a_run_that_ends_within_the_range_still_writes_its_trace(tmp_path):
    profiler = Profiler("1:9", tmp_path / "profile")
    profiler.before(1)
    assert profiler.after(1, jnp.ones(1)) is None
    assert "in" in profiler.close() and list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks(kind, tera):
    assert chips.peak_flops(kind) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize(
    ("kind", "giga"),
    [
        ("TPU v5 lite", 100),
        ("TPU v5", 200),
        ("NVIDIA H200", 450),
        ("NVIDIA L40S", 32),
        ("cpu", None),
    ],
)
def test_links(kind, giga):
    assert chips.link_bytes(kind) == (None if giga is None else giga * 1e9)


def test_mfu_and_memory():
    def chip(kind, peak=None):
        stats = {"peak_bytes_in_use": peak} if peak else None
        return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)

    two = [chip("TPU v5e", 5), chip("TPU v5e", 7)]
    assert chips.mfu(197e12, 2.0, two) == pytest.approx(0.25)
    assert chips.mfu(1e12, 1.0, [*two, chip("cpu")]) is None
    assert chips.mfu(1e12, 0.0, two) is None and chips.mfu(1e12, 1.0, []) is None
    assert chips.peak_memory(two) == 7 and chips.peak_memory([chip("cpu")]) is None


def test_nothing_of_this_is_imported_unasked(monkeypatch):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.split(".")[0] not in ("wandb", "tensorboard", "tensorboardX"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert open_trackers("nowhere", 0, tensorboard=False) == []
