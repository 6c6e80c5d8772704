# SPDX-License-Identifier: Apache-2.0
"""Reading MMEB folders: rows verbatim, caps, layouts, and every way a folder can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import eval_row, make_train, train_rows, write_parquet

from vlm2vec_jax.data.mmeb import (
    EvalSource,
    TrainSource,
    list_subsets,
    open_eval,
    open_train,
    to_input,
)
from vlm2vec_jax.data.paths import unsafe_path
from vlm2vec_jax.errors import UserError

GOLDEN = Path(__file__).parent / "goldens" / "end_to_end" / "train"


def test_the_golden_training_set_reads_as_written(tmp_path):
    source = TrainSource(GOLDEN, "Pairs8", cache_dir=tmp_path)
    assert len(source) == 8
    first = source[0]
    assert first.query.text.startswith("<|image_1|> Represent the given image with")
    assert first.query.images == (GOLDEN / "images/noise_37x51.png",)
    assert first.positive.text == "A cat and a dog" and first.positive.images == ()
    assert first.negatives == () and first.subset == "Pairs8" and first.index == 0
    assert source.take(range(8)) == [source[i] for i in range(8)]


@pytest.mark.parametrize("shards", [None, 1, 3])
def test_rows_are_verbatim_in_any_sharding(tmp_path, shards):
    rows = train_rows("A", 11, images=3)
    write_parquet(tmp_path / "A", "original", rows, shards)
    source = TrainSource(tmp_path, "A", image_root="/elsewhere")
    got = source.take(range(11))
    assert [r.query.text for r in got] == [r["qry"] for r in rows]
    assert [r.positive.text for r in got] == [r["pos_text"] for r in rows]
    assert got[2].query.images == (Path("/elsewhere/images/A/2.png"),)
    assert got[5].positive_key == (rows[5]["pos_text"], "")
    assert [source[i] for i in range(11)] == got


def test_rows_are_located_in_their_shard(tmp_path):
    files = write_parquet(tmp_path / "A", "original", train_rows("A", 10), shards=3)  # 4, 3, 3
    source = TrainSource(tmp_path, "A")
    assert [source.where(i) for i in (0, 3, 4, 9)] == [
        (str(files[0]), 0), (str(files[0]), 3), (str(files[1]), 0), (str(files[2]), 2)
    ]  # fmt: skip


def test_take_over_many_stored_batches_keeps_the_order(tmp_path):
    write_parquet(tmp_path / "A", "original", train_rows("A", 9000))
    source = TrainSource(tmp_path, "A")
    order = np.random.default_rng(0).permutation(9000)[:300]
    assert [row.index for row in source.take(order)] == order.tolist()
    assert [r.query.text for r in source.take(order)] == [f"A query {i} " for i in order]


@pytest.mark.parametrize(("limit", "count"), [(None, 9), (0, 9), (4, 4), (100, 9)])
def test_the_cap_takes_the_first_rows(tmp_path, limit, count):
    make_train(tmp_path, {"A": 9})
    source = TrainSource(tmp_path, "A", limit=limit)
    assert [source[i].index for i in range(len(source))] == list(range(count))


def test_a_negative_cap_is_refused(tmp_path):
    make_train(tmp_path, {"A": 2})
    with pytest.raises(UserError, match="must not be negative"):
        TrainSource(tmp_path, "A", limit=-1)


def test_select_keeps_row_numbers_of_the_file(tmp_path):
    make_train(tmp_path, {"A": 9})
    source = TrainSource(tmp_path, "A")
    part = source.select(np.array([1, 4, 8]))
    assert [row.index for row in part.take([0, 1, 2])] == [1, 4, 8] and len(source) == 9
    with pytest.raises(ValueError, match="increasing"):
        source.select(np.array([4, 1]))


def test_negatives_as_strings_and_lists(tmp_path):
    rows = train_rows("A", 4)
    negatives = [("no", ""), ("", ""), (None, None), ("", "x.png")]
    for row, negative in zip(rows, negatives, strict=True):
        row["neg_text"], row["neg_image_path"] = negative
    write_parquet(tmp_path / "A", "original", rows)
    got = [r.negatives for r in TrainSource(tmp_path, "A").take(range(4))]
    assert [len(n) for n in got] == [1, 0, 0, 1]
    assert got[0][0].text == "no" and got[3][0].images == (tmp_path / "x.png",)

    rows = train_rows("B", 3)
    for row, texts, paths in zip(
        rows, [["a", "b"], [], ["c"]], [["", ""], [], ["", ""]], strict=True
    ):
        row["neg_text"], row["neg_image_path"] = texts, paths
    write_parquet(tmp_path / "B", "original", rows)
    source = TrainSource(tmp_path, "B")
    assert [n.text for n in source[0].negatives] == ["a", "b"] and source[1].negatives == ()
    with pytest.raises(UserError, match="row 2: 1 negative texts but 2 negative images"):
        source[2]


def test_other_string_types_read_alike(tmp_path):
    columns = {
        "qry": pa.array(["a", "b", "a"]).dictionary_encode(),
        "qry_image_path": pa.nulls(3),
        "pos_text": pa.array(["x", None, "z"], pa.large_string()),
        "pos_image_path": pa.array(["", "p.png", ""]),
    }
    (tmp_path / "A").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "A" / "original.parquet")
    got = TrainSource(tmp_path, "A").take([0, 1, 2])
    assert [r.query.text for r in got] == ["a", "b", "a"]
    assert [r.positive.text for r in got] == ["x", "<|image_1|>", "z"]


def test_subsets_and_splits_are_found(tmp_path):
    make_train(tmp_path, {"B": 2, "A": 3})
    write_parquet(tmp_path / "A", "diverse_instruction", train_rows("D", 5))
    (tmp_path / "images").mkdir(exist_ok=True)
    assert list_subsets(tmp_path, "original") == ["A", "B"]
    assert [s.subset for s in open_train(tmp_path)] == ["A", "B"]
    assert [s.subset for s in open_train(tmp_path, ["B", "A"], limit=1)] == ["B", "A"]
    assert len(open_train(tmp_path, split="diverse_instruction")[0]) == 5


def test_an_unknown_subset_lists_what_there_is(tmp_path):
    make_train(tmp_path, {"ImageNet_1K": 2, "CIRR": 2})
    with pytest.raises(UserError, match=r"did you mean ImageNet_1K\?.* has: CIRR, ImageNet_1K"):
        open_train(tmp_path, ["ImageNet-1K"])
    with pytest.raises(UserError, match="unknown subset"):
        TrainSource(tmp_path, "../" + tmp_path.name)
    with pytest.raises(UserError, match="listed twice"):
        open_train(tmp_path, ["CIRR", "CIRR"])
    with pytest.raises(UserError, match=r"split 'train'; splits there: original"):
        open_train(tmp_path, ["CIRR"], "train")
    with pytest.raises(UserError, match="no such data folder"):
        open_train(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no subset with split 'dev'"):
        open_train(tmp_path, split="dev")


def test_missing_columns_of_all_subsets_come_in_one_message(tmp_path):
    make_train(tmp_path, {"A": 2})
    write_parquet(tmp_path / "B", "original", [{"qry": "a", "pos_text": "b"}])
    write_parquet(tmp_path / "C", "original", [{"query": "a"}])
    with pytest.raises(UserError) as caught:
        open_train(tmp_path)
    text = str(caught.value)
    assert "B/original-00000-of-00001.parquet: no column qry_image_path, pos_image_path" in text
    assert "C/original-00000-of-00001.parquet: no column qry, qry_image_path" in text
    assert "2 problems" in text and "A/" not in text


def test_missing_shards_and_two_sets_are_refused(tmp_path):
    files = write_parquet(tmp_path / "A", "original", train_rows("A", 9), shards=3)
    files[1].unlink()
    with pytest.raises(UserError, match="1 of 3 .*original-00001-of-00003.parquet"):
        TrainSource(tmp_path, "A")
    write_parquet(tmp_path / "A", "original", train_rows("A", 9), shards=1)
    with pytest.raises(UserError, match="several parquet sets"):
        TrainSource(tmp_path, "A")


def test_a_column_of_numbers_is_refused(tmp_path):
    rows = [{**row, "pos_text": 3} for row in train_rows("A", 2)]
    write_parquet(tmp_path / "A", "original", rows)
    with pytest.raises(UserError, match="column pos_text is int64, not text"):
        TrainSource(tmp_path, "A")
    rows = [{**row, "pos_text": ["x"]} for row in train_rows("B", 2)]
    write_parquet(tmp_path / "B", "original", rows)
    with pytest.raises(UserError, match="column pos_text holds list"):
        TrainSource(tmp_path, "B")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.png", "a/../../x.png", "..", "C:\\x.png", "a\0b"]
)
def test_paths_that_leave_the_root_are_refused(tmp_path, path):
    assert unsafe_path(path)
    with pytest.raises(UserError):
        to_input(("<|image_1|>", path), tmp_path)


@pytest.mark.parametrize("path", ["a.png", "a/../b.png", "..a/b.png", "a/..b"])
def test_paths_below_the_root_are_allowed(path):
    assert unsafe_path(path) is None


def test_an_unsafe_path_names_the_row(tmp_path):
    rows = train_rows("A", 3, images=2)
    rows[1]["qry_image_path"] = "../secret.png"
    write_parquet(tmp_path / "A", "original", rows)
    source = TrainSource(tmp_path, "A")
    with pytest.raises(UserError, match=r"A/original-.*parquet row 1: '../secret.png'"):
        source[1]


def test_eval_rows_and_their_unique_keys(tmp_path):
    rows = [eval_row(i % 3, 4) for i in range(5)]
    rows[4]["tgt_text"] = ["<|image_1|> Represent the given image.\n", "label 1"]
    rows[4]["tgt_img_path"] = ["images/1.png", ""]
    write_parquet(tmp_path / "ImageNet-1K", "test", rows, shards=2)
    source = EvalSource(tmp_path, "ImageNet-1K")
    assert source[1].query_key == ("<|image_1|> What is it? 1\n", "images/0.png")
    assert source[1].target_keys[0] == ("label 1", "")
    index = source.unique_keys()
    assert len(index.queries) == 3 and len(index.targets) == 5
    assert index.targets[-1] == ("<|image_1|> Represent the given image.\n", "images/1.png")
    for i in range(5):
        assert index.queries[index.query_of_row[i]] == source[i].query_key
        ids = index.target_of[index.offsets[i] : index.offsets[i + 1]]
        assert tuple(index.targets[k] for k in ids) == source[i].target_keys
    limited = open_eval(tmp_path, limit=2)[0]
    assert len(limited) == 2 and len(limited.unique_keys().query_of_row) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tgt_img_path": [""]}, "row 1: 4 candidate texts .* but 1 candidate images"),
        ({"tgt_text": [], "tgt_img_path": []}, "row 1: empty candidate list"),
        ({"tgt_img_path": None}, "row 1: 4 candidate texts .* but 0"),
    ],
)
def test_bad_candidate_lists_are_named(tmp_path, change, message):
    write_parquet(tmp_path / "A", "test", [eval_row(0, 4), eval_row(1, 4, **change)])
    source = EvalSource(tmp_path, "A")
    assert len(source[0].target_keys) == 4
    for read in (lambda: source[1], source.unique_keys):
        with pytest.raises(UserError, match=message):
            read()
