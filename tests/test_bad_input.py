# SPDX-License-Identifier: Apache-2.0
"""Bad data and outputs through `train` and `evaluate`: one message, exit code 2, nothing lost.

(`embed` has a file of its own, full disks and kills another.)
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import (
    call,
    embed_argv,
    evaluate_argv,
    one_embedder,
    refused,
    snapshot,
    tear,
    text_data,
    train_argv,
    write_lines,
)
from data_files import write_parquet
from evaluation_data import labels, two_subsets, write_subset
from small_models import train_row, write_model, write_train

from vlm2vec_jax import embed, evaluate, train
from vlm2vec_jax.embedder import Embedder

SHARD = "ImageNet_1K/original-00000-of-00001.parquet"
TEST_SHARD = "ImageNet-1K/test-00000-of-00001.parquet"


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with one_embedder():
        yield


@pytest.fixture
def data(tmp_path) -> Path:
    return write_train(tmp_path / "train")


@pytest.fixture
def scored(tmp_path) -> Path:
    return two_subsets(tmp_path / "eval")


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
