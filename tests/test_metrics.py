# SPDX-License-Identifier: Apache-2.0
"""metrics.py: the jsonl file over interruptions, values that json cannot hold, the console."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.training import metrics
from vlm2vec_jax.training.metrics import FILE, MetricsWriter, cut_after, read_metrics


def _console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def _text(console):
    return console.file.getvalue()


def test_a_line_per_step(tmp_path):
    with MetricsWriter(tmp_path, 2, console=_console()) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "lr": np.float64(1e-5), "tokens": np.int64(7)})
        writer.write(2, {"loss": 0.25, "subset": "A", "note": None})
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "lr": 1e-5, "tokens": 7},
        {"step": 2, "loss": 0.25, "subset": "A", "note": None},
    ]
    assert read_metrics(tmp_path / FILE)[1]["loss"] == 0.25


def test_non_finite_values_are_null_and_told(tmp_path):
    console = _console()
    with MetricsWriter(tmp_path, 5, console=console, log_every=5) as writer:
        writer.write(2, {"loss": jnp.nan, "grad_norm": np.float32(np.inf), "lr": 0.1})
    line = (tmp_path / FILE).read_text()
    assert json.loads(line) == {
        "step": 2,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "non_finite": ["loss", "grad_norm"],
    }
    assert "NaN" not in line and "Infinity" not in line
    assert "warning: step 2: loss is nan, grad_norm is inf" in _text(console)


def test_resume_leaves_each_step_once(tmp_path):
    path = tmp_path / FILE
    with MetricsWriter(tmp_path, 6, console=_console()) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    with MetricsWriter(tmp_path, 6, 3, console=_console()) as writer:
        assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
        for step in range(4, 7):
            writer.write(step, {"loss": -float(step)})
    losses = {line["step"]: line["loss"] for line in read_metrics(path)}
    assert losses == {1: 1.0, 2: 2.0, 3: 3.0, 4: -4.0, 5: -5.0, 6: -6.0}
    assert len(path.read_text().splitlines()) == 6
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_fresh_start_empties_the_file(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1}\n{"step": 2}\n')
    MetricsWriter(tmp_path, 2, console=_console()).close()
    assert (tmp_path / FILE).read_text() == ""


def test_cutting_is_one_move(tmp_path, monkeypatch):
    path = tmp_path / FILE
    before = '{"step": 1}\nnonsense\n[3]\n{"step": 1, "again": 1}\n{"step": 2}\n'
    path.write_text(before)

    def stopped(*_):
        raise OSError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "replace", stopped)
        with pytest.raises(OSError, match="killed here"):
            cut_after(path, 1)
    assert path.read_text() == before
    cut_after(path, 1)
    assert path.read_text() == '{"step": 1, "again": 1}\n'


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(now)))
    console = _console()
    writer = MetricsWriter(tmp_path, 25, console=console, log_every=10)
    values = {"loss": 1.5, "lr": 2e-5, "grad_norm": 3.25, "accuracy": 0.5}
    values |= {"pairs_per_s": 12.34, "real_tokens": 0.87, "data_wait_s": 0.125}
    for step in range(1, 26):
        writer.write(step, values)
    lines = _text(console).splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    for words in ("loss 1.5000", "lr 2.00e-05", "grad 3.25", "acc 50.0%", "12.3 pairs/s"):
        assert words in lines[0]
    assert "real tokens 87%" in lines[0] and "data wait 0.1" in lines[0]
    assert "eta 0:00:48" in lines[0]  # 2 s for one step, 24 to go
    assert "eta" not in lines[-1]
    writer.close()
    writer.close()


def test_live_line_on_a_terminal(tmp_path):
    console = _console(terminal=True)
    with MetricsWriter(tmp_path, 3, 1, console=console) as writer:
        writer.write(2, {"loss": 0.125})
        writer.message("saved [step 2]")
        writer.write(3, {"loss": 0.0625})
    text = _text(console)
    assert "saved [step 2]" in text and "3/3" in text and "loss 0.0625" in text


def test_other_processes_are_silent(tmp_path):
    with MetricsWriter(tmp_path / "x", 3, is_main=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.message("nothing")
    assert not (tmp_path / "x").exists()


def test_unwritable_output_is_told_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        MetricsWriter(tmp_path / "file", 1)
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "none")


def test_nested_numbers(tmp_path):
    class Kept:
        def __init__(self):
            self.seen, self.closed = [], False

        def write(self, step, values):
            self.seen.append((step, dict(values)))

        def close(self):
            self.closed = True

    kept, console = Kept(), _console()
    with MetricsWriter(tmp_path, 2, console=console, trackers=[kept]) as writer:
        writer.write(1, {"loss": 1, "subset_loss": {"A": jnp.float32(0.5), "B": np.nan}, "x": "y"})
    line = json.loads((tmp_path / FILE).read_text())
    assert line["subset_loss"] == {"A": 0.5, "B": None}
    assert line["non_finite"] == ["subset_loss/B"]
    assert kept.seen == [(1, {"loss": 1.0, "subset_loss/A": 0.5})] and kept.closed
    assert "subset_loss/B is nan" in _text(console)
