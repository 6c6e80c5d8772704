# SPDX-License-Identifier: Apache-2.0
"""From the hub's layouts, archives included, to rows with their images: mini-MMEB in each."""

from __future__ import annotations

import json
import shutil
import sys
import types
import zipfile
from pathlib import Path

import pytest
from data_files import make_train, write_image

from vlm2vec_jax import flags
from vlm2vec_jax.data import hub, prepare, verify
from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
from vlm2vec_jax.data.mmeb import open_eval, open_train
from vlm2vec_jax.errors import UserError

SUBSETS = ("ImageNet-1K", "N24News", "OK-VQA", "MSCOCO_i2t", "MSCOCO_t2i", "WebQA", "NIGHTS",
           "CIRR", "MSCOCO", "OVEN", "RefCOCO")  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """The same small mini-MMEB in each layout."""
    root = tmp_path_factory.mktemp("layouts")
    for layout in ("plain", "hub", "hub_v2"):
        write_mini_mmeb(root / layout, 0, 0.004, subsets=SUBSETS, layout=layout)
    return {layout: root / layout for layout in ("plain", "hub", "hub_v2")}


def call(*argv) -> int:
    return flags.call(prepare.main, prepare.define, ["prepare", *map(str, argv)])


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def picture(paths) -> list[bytes]:
    return [Path(path).read_bytes() for path in paths]


def test_the_hub_layout_has_archives_and_no_images(layouts):
    train, test = layouts["hub"] / "train", layouts["hub"] / "eval"
    assert {p.name for p in train.iterdir()} == {
        "ImageNet_1K", "N24News", "OK-VQA", "MSCOCO_i2t", "MSCOCO_t2i", "WebQA", "NIGHTS", "CIRR",
        "MSCOCO", "images_zip",
    }  # fmt: skip
    names = zipfile.ZipFile(train / "images_zip/CIRR.zip").namelist()
    assert names and all(name.startswith("CIRR/") for name in names)
    names = zipfile.ZipFile(test / "images.zip").namelist()
    assert names and all(name.startswith("eval_images/") for name in names)
    assert not (test / "eval_images").exists()
    row = open_eval(layouts["hub_v2"] / "eval", ["ImageNet-1K"])[0][0]
    assert row.query_key[1] and not row.query_key[1].startswith("eval_images")


def test_training_rows_are_the_same_after_preparing(layouts, tmp_path, capsys):
    data = copy(layouts["hub"] / "train", tmp_path / "train")
    assert call("--data", data) == 0
    assert f"the image root is {data}" in capsys.readouterr().out
    for split in ("original", "diverse_instruction"):
        ours = open_train(data, split=split)
        plain = open_train(layouts["plain"] / "train", split=split)
        assert [s.subset for s in ours] == [s.subset for s in plain]
        for a, b in zip(ours, plain):
            assert len(a) == len(b)
            for x, y in zip(a.take(range(len(a))), b.take(range(len(b)))):
                assert (x.query.text, x.positive.text) == (y.query.text, y.positive.text)
                assert picture(x.query.images) == picture(y.query.images)
                assert picture(x.positive.images) == picture(y.positive.images)
                assert [n.text for n in x.negatives] == [n.text for n in y.negatives]
        assert verify.verify_train(ours, headers=True) == []


@pytest.mark.parametrize("layout", ["hub", "hub_v2"])
def test_evaluation_rows_are_the_same_in_every_layout(layouts, tmp_path, layout):
    data = copy(layouts[layout] / "eval", tmp_path / "eval")
    assert call("--data", data) == 0
    ours, plain = open_eval(data), open_eval(layouts["plain"] / "eval")
    assert len(ours) == len(SUBSETS)
    assert {s.image_root for s in ours} == {data / "eval_images"}
    for a, b in zip(ours, plain):
        x, y = a.unique_keys(), b.unique_keys()
        assert x.query_of_row.tolist() == y.query_of_row.tolist(), a.subset
        assert x.target_of.tolist() == y.target_of.tolist(), a.subset
        for key, other in zip(x.queries + x.targets, y.queries + y.targets):
            assert key[0] == other[0], a.subset
            assert picture(a.input(key).images) == picture(b.input(other).images)
    assert verify.verify_eval(ours, headers=True) == []


def test_a_second_run_does_nothing_and_an_interrupted_one_goes_on(layouts, tmp_path, capsys):
    data = copy(layouts["hub"] / "train", tmp_path / "train")
    assert call("--data", data, "--subsets", "CIRR,NIGHTS") == 0
    assert sorted(p.name for p in (data / "images").iterdir()) == ["CIRR", "NIGHTS"]
    files = {p: p.stat().st_mtime_ns for p in data.rglob("*.png")}
    capsys.readouterr()
    assert call("--data", data, "--subsets", "CIRR,NIGHTS") == 0
    said = capsys.readouterr().out
    assert said.count("unpacked already") == 2 and ": 0 files written" in said
    # Killed in the middle: no note of the archive, a file missing, a temporary one left.
    (data / prepare.STATE / "CIRR.zip.json").unlink()
    first, *_ = (data / "images/CIRR").rglob("*.png")
    first.unlink()
    (data / ".unpacking").mkdir()
    (data / ".unpacking/1-2").write_bytes(b"half")
    assert call("--data", data, "--subsets", "CIRR,NIGHTS") == 0
    assert "CIRR.zip: 1 files written" in capsys.readouterr().out
    assert not (data / ".unpacking").exists()
    again = {p: p.stat().st_mtime_ns for p in data.rglob("*.png")}
    assert {p: t for p, t in again.items() if p != first} == {
        p: t for p, t in files.items() if p != first
    }


def test_images_may_go_elsewhere(layouts, tmp_path, capsys):
    data = copy(layouts["hub"] / "eval", tmp_path / "eval")
    assert call("--data", data, "--output", tmp_path / "big", "--subsets", "OVEN") == 0
    assert f"the image root is {tmp_path / 'big/eval_images'}" in capsys.readouterr().out
    assert not list(data.rglob("*.png"))
    (source,) = open_eval(data, ["OVEN"], image_root=tmp_path / "big/eval_images")
    assert verify.verify_eval([source]) == []


def test_a_hostile_archive_is_refused_and_nothing_is_written(layouts, tmp_path, capsys):
    data = copy(layouts["hub"] / "train", tmp_path / "in/train")
    with zipfile.ZipFile(data / "images_zip/CIRR.zip", "a") as archive:
        archive.writestr("../../evil.png", b"x")
    assert call("--data", data, "--subsets", "CIRR") == 2
    said = capsys.readouterr().err
    assert "'../../evil.png'" in said and "nothing was unpacked" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "in").rglob("*.png")) and not list(tmp_path.glob("*.png"))


def test_missing_images_are_an_error_with_a_count(tmp_path, capsys):
    data = make_train(tmp_path / "data", {"A": 4}, images=3)
    (data / "images/A/1.png").unlink()
    assert call("--data", data) == 2
    assert "1 of 3 image files are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: shutil.rmtree(d), "no such data folder"),
        (lambda d: shutil.rmtree(d / "A"), "no data in it"),
        (lambda d: (d / "x.zip").write_bytes(b"PK"), "not a readable archive"),
        (lambda d: zipfile.ZipFile(d / "x.zip", "w").writestr("b.png", b"x"), "no row names any"),
        (lambda d: next((d / "A").iterdir()).write_bytes(b"PAR1"), "not a readable parquet"),
    ],
)
def test_bad_folders_are_told_in_words(tmp_path, capsys, spoil, said):
    data = make_train(tmp_path / "data", {"A": 4}, images=3)
    spoil(data)
    assert call("--data", data) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_unknown_subsets_and_a_second_run_beside_are_refused(tmp_path, capsys):
    data = make_train(tmp_path / "data", {"A": 4})
    assert call("--data", data, "--subsets", "B") == 2
    assert "no subset B; there are: A" in capsys.readouterr().err
    with prepare._alone(tmp_path), pytest.raises(UserError, match="another prepare"):
        with prepare._alone(tmp_path):
            pass


def test_own_pairs_are_prepared_too(tmp_path, capsys):
    (tmp_path / "shop.jsonl").write_text('{"query": {"images": ["a.png"]}, "positive": "a"}\n')
    write_image(tmp_path / "a.png")
    assert call("--data", tmp_path / "shop.jsonl") == 0
    assert "1 image files are there" in capsys.readouterr().out


def test_a_hub_id_is_fetched_into_a_folder_and_prepared(layouts, tmp_path, monkeypatch, capsys):
    asked = []

    def snapshot_download(named, **options):
        asked.append((named, options))
        shutil.copytree(layouts["hub"] / "train", options["local_dir"], dirs_exist_ok=True)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(UserError, match="prepare --data TIGER-Lab/MMEB-train"):
        hub.local_data("TIGER-Lab/MMEB-train")
    assert call("--data", "TIGER-Lab/MMEB-train", "--subsets", "CIRR") == 0
    ((named, options),) = asked
    assert named == "TIGER-Lab/MMEB-train" and options["repo_type"] == "dataset"
    assert options["allow_patterns"][:2] == ["CIRR/*.parquet", "images_zip/CIRR.zip"]
    folder = hub.local_data("TIGER-Lab/MMEB-train")
    assert len(open_train(folder, ["CIRR"])[0]) == 8 and tmp_path in folder.parents
    assert hub.local_data("some/where/else") == Path("some/where/else")


def test_without_a_network_or_the_library_it_is_said(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    fake = types.SimpleNamespace(snapshot_download=offline)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert call("--data", "nobody/nothing") == 2
    assert "cannot be fetched: no route" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert call("--data", "nobody/nothing") == 2
    assert "needs huggingface_hub" in capsys.readouterr().err


def test_the_plain_layout_is_unchanged_by_the_flag(layouts):
    manifest = json.loads((layouts["plain"] / "mini_mmeb.json").read_text())
    assert "layout" not in manifest
    assert json.loads((layouts["hub"] / "mini_mmeb.json").read_text())["layout"] == "hub"
