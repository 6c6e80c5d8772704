# SPDX-License-Identifier: Apache-2.0
"""Every kind of bad input through the real commands: one message, exit code 2, nothing lost.

(Training that is killed and started again stands in `test_train_command.py`.)
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import write_parquet
from evaluation_data import captions, labels, write_subset
from full_disk import small_disk
from PIL import Image
from small_models import picture, quick_compiler, train_row, write_model, write_train

from vlm2vec_jax import embed, evaluate, flags, train
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.training.checkpoint import Checkpoints

SHARD = "ImageNet_1K/original-00000-of-00001.parquet"
TEST_SHARD = "ImageNet-1K/test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad_input")
    return write_model(write_train(root / "data"), root / "base")


@pytest.fixture(scope="module", autouse=True)
def one_embedder():
    """Commands of one process share the model, so that each shape compiles once."""
    with pytest.MonkeyPatch.context() as patch:
        load = Embedder.from_pretrained
        patch.setattr(Embedder, "from_pretrained", staticmethod(functools.cache(load)))
        with quick_compiler():
            yield


@pytest.fixture
def data(tmp_path) -> Path:
    return write_train(tmp_path / "train")


@pytest.fixture
def scored(tmp_path) -> Path:
    root = tmp_path / "eval"
    write_subset(root, "ImageNet-1K", labels())
    write_subset(root, "MSCOCO_t2i", captions())
    return root


def call(module, *argv) -> int:
    return flags.call(module.main, module.define, [module.__name__, *map(str, argv)])


def train_argv(base, data, output, *more) -> list[str]:
    fields = {
        "model.path": base, "data.path": data, "output": output, "batch_size": 4, "steps": 6,
        "optim.warmup_steps": 1, "checkpoint.every": 2, "mesh.data": 1, "log_every": 1,
        "grad_cache": "off", "packing.row_tokens": 512,
    }  # fmt: skip
    config = Path(__file__).parent.parent / "configs" / "mini.py"
    return ["--config", str(config), *(f"--config.{k}={v}" for k, v in fields.items()), *more]


def evaluate_argv(base, data, output, *more) -> list[str]:
    flags_ = ["--model", base, "--data", data, "--output", output, "--dtype", "float32"]
    return [*map(str, flags_), *more]


def embed_argv(base, lines, output, *more) -> list[str]:
    flags_ = ["--model", base, "--input", lines, "--output", output, "--dtype", "float32"]
    return [*map(str, flags_), *more]


def write_lines(folder: Path, *lines) -> Path:
    """A file of inputs; what is no string already is written as json."""
    path = folder / "inputs.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def tear(path: Path) -> bytes:
    """Cut the end off an image file, behind its header; returns what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    return whole


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def refused(capsys, *words) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lost = [word for word in words if str(word) not in said]
    assert not lost, f"{lost} not in\n{said}"
    return said


# -------------------------------------------------------------------------------------- training


def spoil_training_rows(root: Path) -> None:
    """One row of every kind of trouble that shows before the first step: rows 0 to 5."""
    rows = pq.read_table(root / SHARD).to_pylist()[:16]
    (root / rows[0]["qry_image_path"]).unlink()
    (root / rows[1]["qry_image_path"]).write_bytes(b"no picture")
    rows[2] |= {"qry": "", "qry_image_path": ""}
    rows[3]["qry"] = "a question without a marker"
    rows[4]["pos_text"] = "<|image_1|> a marker without an image"
    rows[5]["qry_image_path"] = "../../secret.png"
    write_parquet(root / "ImageNet_1K", "original", rows)


def test_train_lists_every_bad_row(base, data, tmp_path, capsys):
    spoil_training_rows(data)
    assert call(train, *train_argv(base, data, tmp_path / "out")) == 2
    file = data / SHARD
    refused(
        capsys,
        "(6 problems)",
        f"{file} row 0, qry_image_path: no image file {data}/images/ImageNet_1K/0.png",
        f"{file} row 1, qry_image_path: {data}/images/ImageNet_1K/1.png: not an image",
        f"{file} row 2, qry: neither text nor image",
        f"{file} row 3, qry: 1 image(s) but markers none",
        f"{file} row 4, pos_text: the text has the marker <|image_1|> but there are 0 images",
        f"{file} row 5, qry_image_path: '../../secret.png': image path leaves the image root",
        "--config.data.on_bad_example=skip",
    )
    assert not list((tmp_path / "out").iterdir())


def test_train_shows_twenty_rows_and_counts_the_rest(base, data, tmp_path, capsys):
    rows = [train_row(n, f"images/gone_{n}.png") for n in range(33)]
    write_parquet(data / "ImageNet_1K", "original", rows, shards=2)
    (data / SHARD).unlink()
    assert call(train, *train_argv(base, data, tmp_path / "out")) == 2
    said = refused(capsys, "(33 problems)", "... and 13 more", "00001-of-00002.parquet row 2,")
    assert said.count("no image file") == 20


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: shutil.rmtree(d), ["no such data folder"]),
        (lambda d: shutil.rmtree(d / "ImageNet_1K"), ["no subset with split 'original'"]),
        (lambda d: (d / SHARD).write_bytes(b"PAR1"), [SHARD, "not a readable parquet file"]),
        (
            lambda d: (d / SHARD).rename(d / "ImageNet_1K/original-00000-of-00003.parquet"),
            ["2 of 3 parquet files missing", "original-00001-of-00003.parquet"],
        ),
        (
            lambda d: write_parquet(d / "ImageNet_1K", "original", [{"qry": "a", "pos_text": "b"}]),
            [SHARD, "no column qry_image_path, pos_image_path", "it has qry, pos_text"],
        ),
        (
            lambda d: write_parquet(d / "ImageNet_1K", "original", [train_row(1, "") | {"qry": 3}]),
            ["column qry is int64, not text"],
        ),
        (lambda d: write_parquet(d / "ImageNet_1K", "original", [train_row(1, "")][:0]), [SHARD]),
    ],
)
def test_train_refuses_data_of_another_form(spoil, words, base, data, tmp_path, capsys):
    spoil(data)
    assert call(train, *train_argv(base, data, tmp_path / "out")) == 2
    refused(capsys, data, *words)


def test_train_names_unknown_subsets_with_the_nearest(base, data, tmp_path, capsys):
    more = "--config.data.subsets=ImageNet_2K,CIRR"
    assert call(train, *train_argv(base, data, tmp_path / "out", more)) == 2
    refused(capsys, "(2 problems)", "'ImageNet_2K' (did you mean ImageNet_1K?)", "'CIRR'")
    assert call(train, *train_argv(base, data, tmp_path / "out", "--config.data.split=all")) == 2
    refused(capsys, "split 'all'")


def test_train_names_a_truncated_image_when_it_comes_to_it(base, data, tmp_path, capsys):
    tear(data / "images/ImageNet_1K/5.png")
    more = "--config.data.num_crops=1", "--config.batch_size=24"  # all of it in the first batch
    assert call(train, *train_argv(base, data, tmp_path / "out", *more)) == 2
    path = data / "images/ImageNet_1K/5.png"
    refused(
        capsys,
        "(2 problems)",
        f"{data / SHARD} row 5: {path}: truncated or damaged",
        f"{data / SHARD} row 21: {path}: truncated or damaged",
        "--config.data.on_bad_example=skip",
    )


def test_train_refuses_a_used_or_impossible_output(base, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call(train, *train_argv(base, data, tmp_path / "file")) == 2
    refused(capsys, "cannot make the output folder", tmp_path / "file")
    (tmp_path / "out" / "checkpoints" / "notes").mkdir(parents=True)
    assert call(train, *train_argv(base, data, tmp_path / "out")) == 2
    refused(capsys, "holds other things than checkpoints", "notes", "another output folder")
    argv = train_argv(base, data, tmp_path / "out", "--config.checkpoint.resume=false")
    assert call(train, *argv) == 2
    refused(capsys, "checkpoints of an earlier run", "checkpoint.resume")


def text_data(root: Path, count: int = 40) -> Path:
    """Pairs of texts: the cheapest that can be trained on."""
    rows = [
        {"qry": f"which number is {n}", "qry_image_path": "", "pos_text": f"it is {n}",
         "pos_image_path": ""} for n in range(count)
    ]  # fmt: skip
    write_parquet(root / "WebQA", "original", rows)
    return root


@pytest.mark.slow
def test_train_skips_counts_and_goes_on(base, data, tmp_path, capsys):
    spoil_training_rows(data)
    tear(data / "images/ImageNet_1K/8.png")
    argv = train_argv(base, data, tmp_path / "out", "--config.data.on_bad_example=skip")
    assert call(train, *argv, "--config.data.num_crops=1") == 0
    said = refused(capsys, "ImageNet_1K: rows left out: ", "1 missing image file",
                   "1 neither text nor image", "1 unreadable image file", "1 image path refused",
                   "2 image markers disagree with images", "8.png: truncated")  # fmt: skip
    lines = [json.loads(line) for line in open(tmp_path / "out/metrics.jsonl", encoding="utf-8")]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert sum(line["skipped"] for line in lines) == said.count("skipped: ") > 0
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_and_kept(base, tmp_path, capsys):
    data, output, model = text_data(tmp_path / "d"), tmp_path / "out", tmp_path / "model"
    shutil.copytree(base, model)
    argv = train_argv(model, data, output)
    assert call(train, *argv) == 0
    kept = snapshot(output)
    capsys.readouterr()
    for change, words in (
        ("--config.temperature=0.5", ["temperature: 0.05 before, 0.5 now"]),
        (f"--config.model.path={base}", ["model.path", "another output"]),
        ("--config.adapter.type=lora", ["adapter.type: 'none' before, 'lora' now"]),
        ("--config.data.max_examples_per_subset=9", ["max_examples_per_subset"]),
    ):
        assert call(train, *argv, change) == 2
        refused(capsys, output, *words)
    other = write_model(base.parent / "data", tmp_path / "other", seed=3)
    shutil.copy(other / "model.safetensors", model)
    assert call(train, *argv) == 2
    refused(capsys, "holds other weights than before")
    assert snapshot(output) == kept
    lines = write_lines(tmp_path, {"text": "a"})
    assert call(embed, *embed_argv(output, lines, tmp_path / "o.npz")) == 2
    refused(capsys, output, "holds other weights now")


# ------------------------------------------------------------------------------------ evaluation


def test_evaluate_lists_every_bad_row_and_keeps_earlier_results(base, scored, tmp_path, capsys):
    output = tmp_path / "out"
    argv = evaluate_argv(base, scored, output)
    assert call(evaluate, *argv) == 0
    before = snapshot(output)
    rows = labels()
    rows[1]["tgt_text"] = rows[1]["tgt_text"][:-1]
    rows[2] |= {"tgt_text": [], "tgt_img_path": []}
    rows[3]["qry_text"] = "no marker"
    rows[4] |= {"qry_text": "", "qry_img_path": ""}
    rows[5]["tgt_text"][2] = None
    write_subset(scored, "ImageNet-1K", rows)
    (scored / "img/ImageNet-1K_0.png").unlink()
    (scored / "img/MSCOCO_t2i_3.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert call(evaluate, *argv) == 2
    file = scored / TEST_SHARD
    refused(
        capsys,
        f"{file} row 0, qry_img_path: no image file {scored}/img/ImageNet-1K_0.png",
        f"{file} row 1, tgt_text: 5 candidate texts but 6 candidate images",
        f"{file} row 2, tgt_text: the candidate list is empty",
        f"{file} row 3, qry_text: 1 image(s) but markers none",
        f"{file} row 4, qry_text: neither text nor image",
        f"{file} row 5, tgt_text[2]: neither text nor image",
        "MSCOCO_t2i/test-00000-of-00001.parquet row 1, tgt_img_path[2]",
        f"{scored}/img/MSCOCO_t2i_3.png: not an image",
    )
    assert snapshot(output) == before


def test_evaluate_names_the_row_of_a_truncated_image(base, scored, tmp_path, capsys):
    output = tmp_path / "out"
    for name in ("ImageNet-1K_1", "MSCOCO_t2i_0"):
        tear(scored / f"img/{name}.png")
    assert call(evaluate, *evaluate_argv(base, scored, output)) == 2
    refused(
        capsys,
        "(2 problems)",
        f"{scored / TEST_SHARD} row 1: {scored}/img/ImageNet-1K_1.png: truncated",
        f"MSCOCO_t2i/test-00000-of-00001.parquet row 0: {scored}/img/MSCOCO_t2i_0.png: truncated",
    )
    assert not any(output.iterdir())


def test_evaluate_refuses_data_of_another_form(base, scored, tmp_path, capsys):
    argv = evaluate_argv(base, scored, tmp_path / "out")
    assert call(evaluate, *argv, "--subsets", "CIFAR,MSCOCO_t2i,ImageNet_2K") == 2
    refused(capsys, "(2 problems)", "'CIFAR'", "'ImageNet_2K'", "ImageNet-1K, MSCOCO_t2i")
    table = pq.read_table(scored / TEST_SHARD)
    pq.write_table(table.drop(["tgt_text"]), scored / TEST_SHARD)
    assert call(evaluate, *argv) == 2
    refused(capsys, scored / TEST_SHARD, "no column tgt_text (it has qry_text")
    flat = table.drop(["tgt_text"]).append_column("tgt_text", pa.array(["a"] * len(table)))
    pq.write_table(flat, scored / TEST_SHARD)
    assert call(evaluate, *argv) == 2
    refused(capsys, "tgt_text", "not lists")
    pq.write_table(table.slice(0, 0), scored / TEST_SHARD)
    assert call(evaluate, *argv) == 2
    refused(capsys, "subset ImageNet-1K has no rows")
    (scored / TEST_SHARD).write_bytes(b"")
    assert call(evaluate, *argv) == 2
    refused(capsys, scored / TEST_SHARD, "not a readable parquet file")
    assert call(evaluate, *evaluate_argv(base, tmp_path, tmp_path / "out")) == 2
    refused(capsys, "no subset of MMEB-eval's layout", tmp_path)


def test_evaluate_finds_an_impossible_output_before_it_embeds(
    base, scored, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Embedder, "encode", lambda *a, **k: pytest.fail("embedded first"))
    (tmp_path / "file").write_text("kept")
    assert call(evaluate, *evaluate_argv(base, scored, tmp_path / "file")) == 2
    refused(capsys, tmp_path / "file", "is a file; a folder is needed")
    assert call(evaluate, *evaluate_argv(base, scored, tmp_path / "file" / "in")) == 2
    refused(capsys, "cannot write to the output folder", "Not a directory")
    assert (tmp_path / "file").read_text() == "kept"


# --------------------------------------------------------------------------------------- embed


def test_embed_reports_bad_lines_together(base, tmp_path, capsys):
    picture(1).save(tmp_path / "fine.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_bytes(b"no picture")
    lines = write_lines(
        tmp_path, {"text": "fine"}, "", "nonsense", "[1]", {"text": 3}, {"txt": "a"}, {},
        {"text": "<|image_2|>", "images": ["fine.png"]}, {"text": "<|image_1|>"},
        {"images": ["gone.png"]}, {"images": ["empty.png"]}, {"images": ["text.png"]},
        {"images": [""]}, {"images": [None]}, {"images": ["."]}, {"images": ["\0"]},
        {"text": "x", "image": "fine.png", "images": []}, '"a text"', {"images": ["fine.png"]},
        {"text": "\ud800 <|image_1|>", "images": ["gone.png"]},
    )  # fmt: skip
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    said = refused(capsys, lines, "(17 problems)", "line 3: not JSON", "line 5: 'text' must be",
                   "line 7: neither text nor image", "line 8: 1 image(s) but markers <|image_2|>",
                   f"line 10: {tmp_path}/gone.png: no such image file",
                   f"line 11: {tmp_path}/empty.png: the file is empty",
                   f"line 12: {tmp_path}/text.png: not an image",
                   "line 15:", "is a directory, not an image")  # fmt: skip
    for fine in (1, 2, 19):
        assert f"line {fine}:" not in said
    assert not (tmp_path / "o.npz").exists()


def test_embed_counts_lines_of_images_that_fail_late(base, tmp_path, capsys):
    picture(1).save(tmp_path / "fine.png")
    picture(1, (90, 90)).save(tmp_path / "torn.png")
    tear(tmp_path / "torn.png")
    (tmp_path / "o.npz").write_bytes(b"earlier")
    lines = write_lines(tmp_path, {"text": "a"}, "", {"images": "torn.png"}, "",
                        {"images": "fine.png"}, {"images": ["torn.png"]})  # fmt: skip
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    said = refused(capsys, lines, "(2 problems)", "line 3: ", "line 6: ", "torn.png: truncated")
    assert "line 5" not in said
    long = {"text": "<|image_1|>" + "word " * 5000, "images": ["fine.png"]}
    write_lines(tmp_path, "", {"text": "a"}, long)
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    refused(capsys, "line 3: ", "tokens are more than the 4096", "num_crops")
    assert (tmp_path / "o.npz").read_bytes() == b"earlier"


def test_embed_reads_what_other_programs_write(base, tmp_path, capsys):
    lines = tmp_path / "inputs.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 0
    with np.load(tmp_path / "o.npz") as found:
        assert list(found) == ["embeddings"] and found["embeddings"].shape == (2, 32)
    lines.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    refused(capsys, "line 2: not UTF-8")
    lines.write_bytes(b"\n")
    assert call(embed, *embed_argv(base, lines, tmp_path / "none.npz")) == 0
    with np.load(tmp_path / "none.npz") as found:
        assert found["embeddings"].shape == (0, 32)


def test_embed_refuses_impossible_paths(base, tmp_path, capsys):
    lines = write_lines(tmp_path, {"text": "a"})
    (tmp_path / "folder.npz").mkdir()
    for output, words in (
        (tmp_path / "o.txt", "ends in .npz"),
        (tmp_path / "gone" / "o.npz", f"no folder {tmp_path / 'gone'}; make it first"),
        (tmp_path / "folder.npz", "is a folder"),
    ):
        assert call(embed, *embed_argv(base, lines, output)) == 2
        refused(capsys, output, words)
    for path, words in ((tmp_path / "gone", "No such file"), (tmp_path, "Is a directory")):
        assert call(embed, *embed_argv(base, path, tmp_path / "o.npz")) == 2
        refused(capsys, f"--input {path} cannot be read", words)


def test_embed_takes_odd_images(base, tmp_path):
    rgb = picture(5, (64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    shades = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    shades.save(tmp_path / "deep.png")
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[picture(6, (64, 48))])
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.convert("1").save(tmp_path / "bits.png")
    rgb.convert("P").save(tmp_path / "palette.png", transparency=3)
    rgb.convert("LA").save(tmp_path / "grey_alpha.png")
    rgb.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    picture(5, (2000, 10)).save(tmp_path / "wide.png")
    picture(5, (1, 1)).save(tmp_path / "dot.png")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 10
    lines = write_lines(tmp_path, *({"images": [name]} for name in names))
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 0
    with np.load(tmp_path / "o.npz") as found:
        vectors = found["embeddings"]
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors @ vectors.T - np.eye(10)).max() < 1 - 1e-5


def test_a_picture_too_narrow_to_scale_is_refused_in_words(base, tmp_path, capsys):
    Image.new("RGB", (3000, 1)).save(tmp_path / "line.png")
    lines = write_lines(tmp_path, {"images": ["line.png"]})
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz", "--num_crops", "1")) == 2
    refused(capsys, "line 1: ", "line.png: 3000 x 1 pixels are too narrow", "num_crops")


# ------------------------------------------------------------------------- full disks and kills


@pytest.fixture
def little_disk(tmp_path):
    """A file system of 256 kB."""
    with small_disk(tmp_path / "little", 256) as folder:
        yield folder


def fill_disk(folder: Path, leave: int = 0) -> None:
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - leave)


def test_embed_on_a_full_disk_keeps_the_earlier_file(base, tmp_path, little_disk, capsys):
    lines = write_lines(tmp_path, *({"text": f"number {n}"} for n in range(100)))
    output = little_disk / "o.npz"
    assert call(embed, *embed_argv(base, lines, output)) == 0
    before = output.read_bytes()
    for leave in (0, 4096):
        fill_disk(little_disk, leave)
        assert call(embed, *embed_argv(base, lines, output)) == 2
        refused(capsys, f"cannot write {output}: No space left", "is unchanged")
        assert output.read_bytes() == before
        assert sorted(p.name for p in little_disk.iterdir()) == ["filler", "o.npz"]


def test_evaluate_on_a_full_disk_goes_on_later(base, scored, tmp_path, little_disk, capsys):
    assert call(evaluate, *evaluate_argv(base, scored, tmp_path / "whole")) == 0
    argv = evaluate_argv(base, scored, little_disk / "out")
    for leave, there in ((0, 0), (8192, 1), (5 * 4096, 4)):
        fill_disk(little_disk, leave)
        assert call(evaluate, *argv) == 2
        refused(capsys, "cannot write", "No space left", "earlier results are unchanged")
        assert len(list((little_disk / "out").iterdir())) >= there
    (little_disk / "filler").unlink()
    assert call(evaluate, *argv) == 0
    ours, whole = snapshot(little_disk / "out"), snapshot(tmp_path / "whole")
    assert ours["scores.json"] == whole["scores.json"] and set(ours) == set(whole)


@pytest.mark.slow
def test_train_on_a_full_disk_says_so_and_keeps_the_checkpoints(
    base, tmp_path, little_disk, capfd, monkeypatch
):
    monkeypatch.setattr(Checkpoints, "RETRY_S", (0.01, 0.01, 0.01))
    data, output = text_data(tmp_path / "data"), little_disk / "run"
    argv = train_argv(base, data, output)
    for leave, words in ((0, "data_check.json: No space left"), (12288, "metrics.jsonl: ")):
        fill_disk(little_disk, leave)
        assert call(train, *argv) == 2
        refused(capfd, "cannot write", words, "No space left")
    fill_disk(little_disk, 100 * 1024)  # the records and the metrics, but no checkpoint
    assert call(train, *argv) == 2
    refused(
        capfd,
        "saving a checkpoint failed, step 2: No space left",
        "the last checkpoint could not be written",
    )
    assert not [p for p in (output / "checkpoints").iterdir() if p.name.isdigit()]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def command(module: str, argv, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "XLA_FLAGS": "", **environment},
    )


def test_a_command_ends_without_a_traceback(tmp_path):
    lines = write_lines(tmp_path, "nonsense")
    process = command("vlm2vec_jax.embed", embed_argv(tmp_path, lines, tmp_path / "o.npz"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.startswith(f"error: {lines} has bad lines (1 problem):\n  - line 1: not JSON")
    assert "Traceback" not in said


def kill_when(process: subprocess.Popen, ready) -> None:
    until = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_scores(base, tmp_path):
    data = tmp_path / "data"
    for name in ("ImageNet-1K", "VOC2007", "SUN397"):
        write_subset(data, name, labels(name, 520))
    options = "--batch_tokens", "512"
    whole = command("vlm2vec_jax.evaluate", evaluate_argv(base, data, tmp_path / "a", *options))
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    argv = evaluate_argv(base, data, tmp_path / "b", *options)
    killed = command("vlm2vec_jax.evaluate", argv)
    kill_when(killed, lambda: len(list((tmp_path / "b").glob("*_score.json"))) > 0)
    assert not (tmp_path / "b" / "scores.json").exists(), "it was over before it could be killed"
    again = command("vlm2vec_jax.evaluate", argv)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "already evaluated" in said, said
    first, second = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert first["scores.json"] == second["scores.json"]
    assert {n for n in second if not n.startswith(".")} == set(first)
