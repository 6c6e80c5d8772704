# SPDX-License-Identifier: Apache-2.0
"""Results of several machines merged: equal to those of one, or refused."""

import itertools
import json
import shutil

import numpy as np
import pytest
from evaluation_data import FakeEncoder, captions, labels, write_subset

from vlm2vec_jax import flags
from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import merge, run
from vlm2vec_jax.evaluation.rows import Settings

SETTINGS = Settings(dims=(4,), precisions=("binary",))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, a plain evaluation, one in two halves of subsets, one in three shards."""
    root = tmp_path_factory.mktemp("merge")
    write_subset(root / "data", "ImageNet-1K", labels())
    rows = labels()
    rows[2]["qry_text"] = "<|image_1|> Another question about the same image\n"
    write_subset(root / "data", "VOC2007", rows)
    write_subset(root / "data", "MSCOCO_t2i", captions())
    evaluate(root, "plain")
    evaluate(root, "a", ["MSCOCO_t2i", "VOC2007"])
    evaluate(root, "b", ["ImageNet-1K"])
    seen = []
    for k in range(3):
        encoder = FakeEncoder()
        evaluate(root, f"shard{k}", encoder=encoder, shard=(k, 3))
        seen.append(encoder.seen)
    # Each distinct input was embedded by one machine, and those of an image by the same.
    assert not any(set(a) & set(b) for a, b in itertools.combinations(seen, 2))
    assert all(seen) and len(sum(seen, [])) == len(set(sum(seen, [])))
    of_image = [{i for _, images in part for i in images} for part in seen]
    assert not any(a & b for a, b in itertools.combinations(of_image, 2))
    return root


def evaluate(root, output, subsets=(), encoder=None, settings=SETTINGS, **options):
    return run.evaluate_sources(
        encoder or FakeEncoder(),
        open_eval(root / "data", list(subsets)),
        output=root / output,
        settings=settings,
        **options,
    )


def check_equal(folder, plain):
    expected = {p.name: p.read_bytes() for p in plain.iterdir() if p.suffix != ".npz"}
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".npz"} == expected
    for path in plain.glob("*.npz"):
        with np.load(path) as a, np.load(folder / path.name) as b:
            for name in a.files:
                np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("folders", [["a", "b"], ["shard2", "shard0", "shard1"]])
def test_merged_results_are_those_of_one_machine(made, tmp_path, folders, capsys):
    shutil.copytree(made / folders[0], tmp_path / "moved")  # folders may be moved
    argv = ["merge", tmp_path / "moved", *(made / f for f in folders[1:])]
    argv += ["--output", tmp_path / "out"]
    assert flags.call(merge.main, merge.define, list(map(str, argv))) == 0
    assert "MSCOCO_t2i" in capsys.readouterr().out
    check_equal(tmp_path / "out", made / "plain")
    # ... and are taken for such by an evaluation.
    encoder = FakeEncoder()
    evaluate(made, tmp_path / "out", encoder=encoder)
    assert encoder.seen == []


def test_shards_and_whole_subsets_together(made, tmp_path):
    folders = [made / f"shard{k}" for k in range(3)]
    merge.merge([made / "b", *folders], tmp_path / "out")
    check_equal(tmp_path / "out", made / "plain")


def test_a_shard_goes_on_where_it_stopped_and_becomes_a_whole(made, tmp_path):
    shutil.copytree(made / "shard1", tmp_path / "out")
    encoder = FakeEncoder()
    evaluate(made, tmp_path / "out", encoder=encoder, shard=(1, 3))
    assert encoder.seen == []
    evaluate(made, tmp_path / "out", encoder=encoder)
    already = FakeEncoder()
    evaluate(made, tmp_path / "again", encoder=already, shard=(1, 3))
    assert not set(encoder.seen) & set(already.seen)
    for path in (tmp_path / "out").glob("*_rows.npz"):
        path.unlink()
    check_equal(tmp_path / "out", made / "plain")


def test_a_missing_shard_is_told_and_nothing_written(made, tmp_path):
    with pytest.raises(
        UserError, match=r"ImageNet-1K: embeddings of \d+ of 12 inputs(.|\n)*all sh"
    ):
        merge.merge([made / "shard0", made / "shard2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_different_models_or_data_are_refused(made, tmp_path):
    evaluate(made, tmp_path / "other", ["ImageNet-1K"], FakeEncoder("b"))
    with pytest.raises(UserError, match='is of another model than(.|\n)*model: "a" -> "b"'):
        merge.merge([made / "a", tmp_path / "other"], tmp_path / "out")
    evaluate(made, tmp_path / "dot", ["ImageNet-1K"], settings=Settings("dot"))
    with pytest.raises(UserError, match="scored otherwise than"):
        merge.merge([made / "a", tmp_path / "dot"], tmp_path / "out")
    rows = labels()
    rows[0]["tgt_text"] = rows[0]["tgt_text"][::-1]
    write_subset(tmp_path / "data", "ImageNet-1K", rows)
    evaluate(tmp_path, "changed")
    with pytest.raises(UserError, match="ImageNet-1K in .*changed was made from something else"):
        merge.merge([made / "b", tmp_path / "changed"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_folders_are_all_named(made, tmp_path, capsys):
    shutil.copytree(made / "b", tmp_path / "b")
    (tmp_path / "b/ImageNet-1K_pred.jsonl").write_text("{}\n")
    shutil.copytree(made / "shard0", tmp_path / "s")
    (tmp_path / "s/VOC2007_rows.npz").write_bytes(b"PK\x03\x04 half")
    (tmp_path / "empty").mkdir()
    argv = ["merge", tmp_path / "b", tmp_path / "s", tmp_path / "empty", tmp_path / "no"]
    assert flags.call(merge.main, merge.define, [*map(str, argv), "--output=x"]) == 2
    said = capsys.readouterr().err
    for words in ("predictions are missing", "VOC2007_rows.npz cannot be read",
                  "empty holds no results", "no is not a folder"):  # fmt: skip
        assert words in said
    assert flags.call(merge.main, merge.define, ["merge", "--output=x"]) == 2
    assert "give the folders" in capsys.readouterr().err


def test_rows_that_do_not_hold_together_are_not_read(made, tmp_path):
    from vlm2vec_jax.evaluation import rows, store

    path = made / "shard0" / "VOC2007_rows.npz"
    loaded = rows.load(path)
    assert loaded is not None and json.dumps(loaded[0].scored_from)
    arrays = dict(np.load(path))
    for name, value in (
        ("candidates", arrays["candidates"] + 99),
        ("offsets", arrays["offsets"][:-1]),
        ("query_index", arrays["query_index"] - 1),
        ("settings", np.zeros(3, np.uint8)),
    ):
        store.write_npz(tmp_path / "X_rows.npz", {**arrays, name: value})
        assert rows.load(tmp_path / "X_rows.npz") is None
