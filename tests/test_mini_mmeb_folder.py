# SPDX-License-Identifier: Apache-2.0
"""The folder of mini-MMEB: the same bytes for the same seed, never half written, nobody else's."""

import hashlib
import json
from pathlib import Path

import pytest

from vlm2vec_jax.data import mini_mmeb
from vlm2vec_jax.errors import UserError


def _hashes(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_same_seed_same_bytes(tmp_path):
    names = ["SUN397", "OK-VQA", "DocVQA", "VOC2007", "NIGHTS", "VizWiz"]
    for folder, seed, some in (("a", 1, names), ("b", 1, names), ("c", 2, names[:1])):
        mini_mmeb.write_mini_mmeb(tmp_path / folder, seed, 0.01, subsets=some)
    a, b, c = (_hashes(tmp_path / folder) for folder in "abc")
    assert a == b
    assert any(a[name] != c[name] for name in set(a) & set(c) if name.endswith(".parquet"))


def test_finished_folder_is_left_alone_and_others_are_refused(tmp_path, capsys):
    root = tmp_path / "data"
    command = ["--output", str(root), "--scale", "0.01", "--subsets", "SUN397"]
    assert mini_mmeb.main(command) == 0
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert mini_mmeb.main(command) == 0
    assert "complete already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert mini_mmeb.main([*command, "--seed", "1"]) == 2
    message = capsys.readouterr().err
    assert str(root) in message and "--force" in message
    (root / "mine.txt").write_text("keep")
    assert mini_mmeb.main([*command, "--seed", "1", "--force"]) == 0
    assert json.loads((root / mini_mmeb.MANIFEST).read_text())["seed"] == 1
    assert (root / "mine.txt").read_text() == "keep"
    assert mini_mmeb.main([*command[:2], "--subsets", "Nonsense"]) == 2
    assert "Nonsense" in capsys.readouterr().err


def test_interrupted_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    root = tmp_path / "data"

    def broken(*_args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(mini_mmeb, "_write_eval", broken)
        with pytest.raises(OSError, match="disk full"):
            mini_mmeb.write_mini_mmeb(root, 0, 0.01, subsets=["SUN397"])
    assert not root.exists()
    mini_mmeb.write_mini_mmeb(root, 0, 0.01, subsets=["SUN397"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_foreign_folder_in_the_way_is_not_removed(tmp_path):
    partial = tmp_path / "data.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="in the way"):
        mini_mmeb.write_mini_mmeb(tmp_path / "data", 0, 0.01, subsets=["SUN397"])
    assert (partial / "mine.txt").exists()
