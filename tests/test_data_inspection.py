# SPDX-License-Identifier: Apache-2.0
"""`python -m vlm2vec_jax.data.verify`: the whole check, its report, its manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_files import eval_row, make_train, train_rows, write_image, write_parquet
from PIL import Image

from vlm2vec_jax import flags
from vlm2vec_jax.data import checks, duplicates, inspection, manifest, verify
from vlm2vec_jax.data.mmeb import open_eval, open_train
from vlm2vec_jax.errors import UserError


def call(*argv) -> int:
    return flags.call(verify.main, verify.define, ["verify", *map(str, argv)])


def report(data: Path) -> dict:
    return json.loads((data / ".verify/report.json").read_text())


def problems(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / ".verify/problems.jsonl").read_text().splitlines()]


def noise(path: Path, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_good_set_passes_with_a_report_and_a_manifest(tmp_path, capsys):
    data = make_train(tmp_path / "data", {"A": 9, "B": 5}, images=4)
    write_parquet(data / "A", "diverse_instruction", train_rows("A", 9, images=4))
    assert call("--data", data, "--workers", 1) == 0
    assert "no errors" in capsys.readouterr().out
    told = report(data)
    assert told["rows"] == 23 and told["images"] == 8 and told["errors"] == {}
    assert [(p["subset"], p["split"], p["targets"]) for p in told["parts"]] == [
        ("A", "diverse_instruction", 7), ("A", "original", 7), ("B", "original", 5),
    ]  # fmt: skip
    lines = manifest.read_manifest(data / ".verify/manifest.jsonl")
    assert len(lines) == 8 + 3 == told["manifest"]["files"]
    image = lines["image", "images/A/0.png"]
    assert (image["width"], image["height"]) == (8, 6)
    assert image["bytes"] == (data / "images/A/0.png").stat().st_size
    assert ("table", "A/original-00000-of-00001.parquet") in lines


def test_every_kind_of_trouble_is_told_at_once(tmp_path, capsys):
    data = tmp_path / "data"
    rows = train_rows("A", 12, images=10)
    for i in range(10):
        noise(data / f"images/A/{i}.png")
    rows[0]["qry_image_path"] = "images/A/gone.png"
    rows[1]["qry_image_path"] = "../x.png"
    rows[2]["qry"] = "no marker"
    rows[11]["pos_text"] = ""
    (data / "images/A/3.png").write_bytes(b"")
    whole = (data / "images/A/4.png").read_bytes()
    (data / "images/A/4.png").write_bytes(whole[:-500])
    Image.new("RGB", (1, 50)).save(data / "images/A/5.png")
    Image.new("RGB", (900, 3)).save(data / "images/A/6.png")
    (data / "images/A/7.png").unlink()
    (data / "images/A/7.png").symlink_to(tmp_path / "x.png")
    write_image(tmp_path / "x.png")
    rows[10]["qry"] = rows[10]["pos_text"] = "same"
    write_parquet(data / "A", "original", rows)
    write_parquet(data / "B", "original", train_rows("B", 3))
    (data / "B/original-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    assert call("--data", data, "--workers", 1) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "(10 problems)" in err and "problems.jsonl" in err
    found = {(p["kind"], p["where"].rpartition("row ")[2]) for p in problems(data)}
    assert found == {
        (inspection.UNREADABLE_TABLE, ""),
        (checks.MISSING, "0, qry_image_path"),
        (checks.UNSAFE, "1, qry_image_path"),
        (checks.MARKERS, "2, qry"),
        (checks.UNREADABLE, "3, qry_image_path"),
        (checks.UNREADABLE, "4, qry_image_path"),
        (inspection.WRONG_SIZE, "5, qry_image_path"),
        (inspection.WRONG_SIZE, "6, qry_image_path"),
        (checks.UNSAFE, "7, qry_image_path"),
        (checks.EMPTY, "11, pos_text"),
        (duplicates.OWN_TARGET, "10, pos_text"),
    }
    text = (data / ".verify/report.md").read_text()
    assert "### image of a wrong size (2)" in text and "more than 200 to 1" in text
    # A torn image shows only when it is decoded, an empty one at its header.
    call("--data", data, "--workers", 1, "--nodecode", "--output", tmp_path / "out")
    told = json.loads((tmp_path / "out/report.json").read_text())["errors"]
    assert told[checks.UNREADABLE] == 1
    call("--data", data, "--quick", "--output", tmp_path / "quick")
    told = json.loads((tmp_path / "quick/report.json").read_text())["errors"]
    assert checks.UNREADABLE not in told and told[checks.MISSING] == 1
    assert not (tmp_path / "quick/manifest.jsonl").exists()


def test_duplicates_in_candidate_lists(tmp_path):
    rows = [
        eval_row(0, 4),
        eval_row(1, 4, tgt_text=["a", "b", "a", "c"]),
        eval_row(2, 4, tgt_text=["a", "b", "b", "b"]),
        eval_row(3, 4, tgt_text=["a", "b"]),  # broken: not compared, told elsewhere
    ]
    write_image(tmp_path / "images/0.png")
    write_parquet(tmp_path / "A", "test", rows)
    (source,) = open_eval(tmp_path)
    found, targets = duplicates.eval_duplicates(source.select(np.arange(3)))
    assert [(f.index, f.kind) for f in found] == [
        (1, duplicates.TRUTH_TWICE), (2, duplicates.CANDIDATE_TWICE)
    ]  # fmt: skip
    assert targets == 7 and "2 of 4" in found[1].message
    seen = inspection.inspect(tmp_path)
    assert [issue.kind for issue in seen.errors] == [checks.UNEQUAL]
    assert len(seen.warnings) == 2


def test_duplicates_in_training_rows(tmp_path):
    rows = train_rows("A", 9)
    rows[4] = dict(rows[1])
    rows[8] = dict(rows[1])
    for row in rows:
        row["neg_text"], row["neg_image_path"] = ["other"], [""]
    rows[2]["neg_text"], rows[2]["neg_image_path"] = ["x", rows[2]["pos_text"]], ["", ""]
    write_parquet(tmp_path / "A", "original", rows)
    (source,) = open_train(tmp_path)
    found, targets = duplicates.train_duplicates(source)
    assert sorted((f.index, f.kind) for f in found) == [
        (2, duplicates.FALSE_NEGATIVE), (4, duplicates.PAIR_TWICE), (8, duplicates.PAIR_TWICE)
    ]  # fmt: skip
    assert targets == 6 and "as row 1" in found[-1].message


def test_against_an_earlier_manifest(tmp_path, capsys):
    data = make_train(tmp_path / "data", {"A": 4}, images=4)
    assert call("--data", data, "--output", tmp_path / "before", "--workers", 1) == 0
    before = tmp_path / "before/manifest.jsonl"
    assert call("--data", data, "--against", before, "--workers", 1) == 0
    write_image(data / "images/A/1.png", size=(9, 9))
    raw = bytearray((data / "images/A/2.png").read_bytes())
    assert call("--data", data, "--against", before, "--workers", 1) == 2
    err = capsys.readouterr().err
    assert "(1 problem)" in err and "images/A/1.png" in err and "before" in err
    raw[-1] ^= 1
    (data / "images/A/2.png").write_bytes(raw)
    (data / "images/A/3.png").unlink()
    seen = inspection.inspect(data, against=before, decode=False)
    changed = {i.where: i.message for i in seen.errors if i.kind == inspection.CHANGED}
    assert changed["images/A/2.png"] == "other content than before"
    assert "no row names it" in changed["images/A/3.png"]
    with pytest.raises(UserError, match="does not go with --quick"):
        inspection.inspect(data, against=before, images=False)
    before.write_text(before.read_text().replace("images/A/0.png", "images/A/9.png"))
    with pytest.raises(UserError, match="another hash"):
        inspection.inspect(data, against=before)
    with pytest.raises(UserError, match="not a readable manifest"):
        inspection.inspect(data, against=data / "A/original-00000-of-00001.parquet")


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path):
    data = make_train(tmp_path / "data", {"A": 150}, images=150)
    (data / "images/A/77.png").write_bytes(b"no image")
    one, two = (inspection.inspect(data, workers=n) for n in (1, 2))
    assert one.errors == two.errors and len(one.errors) == 1
    assert one.files == two.files


def test_what_cannot_be_looked_at_is_told(tmp_path, capsys):
    assert call("--data", tmp_path / "nowhere") == 2
    assert "no such data folder" in capsys.readouterr().err
    data = make_train(tmp_path / "data", {"A": 2})
    (tmp_path / "file").write_text("")
    assert call("--data", data, "--output", tmp_path / "file/x") == 2
    assert "name a folder by --output" in capsys.readouterr().err
    assert call("--data", data, "--subsets", "B") == 2
    assert "there are: A" in capsys.readouterr().err
