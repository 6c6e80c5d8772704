# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets made from rows give the same rows, without TensorFlow."""

from __future__ import annotations

import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_files import make_train, train_rows, write_image, write_parquet
from evaluation_data import FakeEncoder, captions, labels, write_subset
from PIL import Image

from vlm2vec_jax import flags
from vlm2vec_jax.data import prepare, tfds, tfds_eval, tfds_records, tfds_train, verify
from vlm2vec_jax.data.inspection import inspect
from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import open_eval, open_train
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import run
from vlm2vec_jax.images import load_image


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two subsets in MMEB's layout, with negatives and images of odd modes, and as TFDS."""
    root = tmp_path_factory.mktemp("tfds")
    data = make_train(root / "data", {"A": 11, "B-2": 5}, images=4)
    rows = train_rows("A", 11, images=4)
    for mode, name in (("L", "0"), ("RGBA", "1"), ("I;16", "2")):
        Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 900).convert(
            "L" if mode != "I;16" else "I;16"
        ).convert(mode).save(data / f"images/A/{name}.png")
    for i, row in enumerate(rows):
        row["neg_text"] = ["no", "<|image_1|>"][: i % 3] if i != 2 else ["a", "<|image_1|> b"]
        row["neg_image_path"] = ["", "images/A/3.png"][: i % 3]
    write_parquet(data / "A", "original", rows, shards=1)
    write_parquet(data / "A", "diverse_instruction", train_rows("A", 3))
    argv = ["prepare", "--data", str(data), "--tfds", str(root / "records")]
    assert flags.call(prepare.main, prepare.define, argv) == 0
    return data, root / "records"


def same(a, b):
    assert (a.text, len(a.images)) == (b.text, len(b.images))
    for x, y in zip(a.images, b.images):
        x, y = load_image(x), load_image(y)
        assert x.mode == y.mode and np.array_equal(np.asarray(x), np.asarray(y))


def test_rows_are_the_same(both):
    data, records = both
    for split in ("original", "diverse_instruction"):
        plain = {s.subset: s for s in open_train(data, ["A"], split)}
        stored = {s.subset: s for s in open_train(records, ["A"], split)}
        for name, source in stored.items():
            assert len(source) == len(plain[name])
            for a, b in zip(source.take(range(len(source))), plain[name].take(range(len(source)))):
                same(a.query, b.query)
                same(a.positive, b.positive)
                assert len(a.negatives) == len(b.negatives)
                for x, y in zip(a.negatives, b.negatives):
                    same(x, y)
                assert a[3:] == b[3:]  # subset, row, keys
    assert "tensorflow" not in sys.modules


def test_what_training_asks_of_a_source(both):
    data, records = both
    stored, plain = open_train(records), open_train(data)
    assert [s.subset for s in stored] == ["A", "B-2"] == [s.subset for s in plain]
    assert verify.verify_train(stored, headers=True) == []
    orders = [Mixture(s, 0).batch_indices(3, 4).tolist() for s in (stored, plain)]
    assert orders[0] == orders[1]
    # A run goes on from either: also where one has no negatives as null and the other as [].
    prints = [Mixture(s, 0).fingerprint(4) for s in (stored, plain)]
    samples = [p["subsets"]["B-2"].pop("sample_sha256") for p in prints]
    assert samples[0] != samples[1]
    for one in prints:
        one["subsets"]["A"].pop("sample_sha256")
    assert prints[0] == prints[1]
    for source in (*stored, *plain):
        source.target_instruction = "Say:"
    assert stored[1][4].positive.text == plain[1][4].positive.text == "Say: B-2 target 4\n"
    good = verify.good_rows(stored)
    assert [row.index for row in good.sources[1].select(np.array([1, 3])).take([0, 1])] == [1, 3]
    assert len(open_train(records, limit=2)[0]) == 2
    folder = records / tfds_train.NAME
    assert len(open_train(folder)) == 2 and len(open_train(folder / "A" / tfds.VERSION)) == 1
    assert "array_record" in stored[0].at(0)


def test_many_threads_read_the_same(both):
    (source,) = open_train(both[1], ["A"])
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda i: source[i % 11], range(88)))
    for i, row in enumerate(rows):
        assert row.index == i % 11 and len(row.query.images) == (i % 11 < 4)


def test_a_written_subset_is_left_alone_and_other_data_refused(both, tmp_path):
    data, records = both
    shutil.copytree(records, tmp_path / "records")
    file = tmp_path / "records/vlm2vec_pairs/A/1.0.0/features.json"
    before = file.stat().st_mtime_ns
    sources = [*open_train(data, ["A"], "diverse_instruction"), *open_train(data, ["A"])]
    assert [count for _, count in tfds.write(sources, tmp_path / "records")] == [14]
    assert file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds other data"):
        list(tfds.write(open_train(data, ["A"]), tmp_path / "records"))


def test_bad_rows_are_not_written(tmp_path):
    data = make_train(tmp_path / "data", {"A": 4}, images=2)
    (data / "images/A/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="1.png: not an image"):
        list(tfds.write(open_train(data), tmp_path / "out"))
    rows = [{"qry_text": "a", "qry_img_path": "x.png", "tgt_text": ["b"], "tgt_img_path": [""]}]
    write_parquet(tmp_path / "eval/A", "test", rows)
    with pytest.raises(UserError, match="no image file"):
        list(tfds.write(open_eval(tmp_path / "eval"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_check_opens_images_in_examples(both, tmp_path):
    data, records = both
    found, plain = inspect(records), inspect(data)
    assert not found.errors and found.images == 8
    assert [(p.subset, p.split, p.rows) for p in found.parts] == [
        (p.subset, p.split, p.rows) for p in sorted(plain.parts, key=lambda p: p.subset)
    ]
    image = {line["path"]: line["sha256"] for line in plain.files}["images/A/3.png"]
    assert {line["path"]: line["sha256"] for line in found.files}["images/A/3.png"] == image
    torn = make_train(tmp_path / "torn", {"A": 4}, images=2)
    write_image(torn / "images/A/1.png", (60, 60))
    whole = (torn / "images/A/1.png").read_bytes()
    (torn / "images/A/1.png").write_bytes(whole[:-30])  # its header is good
    list(tfds.write(open_train(torn), tmp_path / "out"))
    (error,) = inspect(tmp_path / "out").errors
    assert "example" in str(error) or "row 1" in str(error)
    assert "1.png" in error.message and "truncated" in error.message
    with pytest.raises(UserError, match="a TFDS data set already"):
        list(tfds.write(open_train(records), tmp_path / "again"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two evaluation subsets, one of them under two names, and as TFDS beside training pairs."""
    root = tmp_path_factory.mktemp("tfds_eval")
    write_subset(root / "data", "ImageNet-1K", labels())
    write_subset(root / "data", "MSCOCO_t2i", captions())
    make_train(root / "train", {"MSCOCO_t2i": 3})
    for name in ("data", "train"):
        argv = ["prepare", "--data", str(root / name), "--tfds", str(root / "records")]
        assert flags.call(prepare.main, prepare.define, argv) == 0
    return root


def test_evaluation_rows_are_the_same(evaluated):
    plain, stored = open_eval(evaluated / "data"), open_eval(evaluated / "records")
    assert [s.subset for s in stored] == ["ImageNet-1K", "MSCOCO_t2i"]
    for a, b in zip(stored, plain, strict=True):
        assert list(a) == list(b)
        for row in a:
            for key in (row.query_key, *row.target_keys):
                files = [open(i, "rb").read() for s in (a, b) for i in s.input(key).images]
                assert files == files[: len(files) // 2] * 2
        assert a.unique_keys().targets == b.unique_keys().targets
    assert len(open_train(evaluated / "records")) == 1  # the pairs of the same folder
    assert verify.verify_eval(stored, headers=True) == []
    found = inspect(evaluated / "records")
    assert not found.errors and found.images == 6 + 7 and len(found.parts) == 3
    # Brought out once, and not at all where somebody says where the images are.
    files = [p for p in stored[0].image_root.rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files}
    open_eval(evaluated / "records")
    assert len(files) == 6 and {p: p.stat().st_mtime_ns for p in files} == before
    (there,) = open_eval(evaluated / "records", ["MSCOCO_t2i"], image_root=evaluated / "data")
    assert there.image_root == evaluated / "data"


def test_an_evaluation_goes_on_from_one_to_the_other(evaluated, tmp_path):
    first = run.evaluate(FakeEncoder(), evaluated / "data", output=tmp_path / "out")
    encoder = FakeEncoder()
    assert run.evaluate(encoder, evaluated / "records", output=tmp_path / "out") == first
    assert not encoder.seen
    fresh = run.evaluate(FakeEncoder(), evaluated / "records", output=tmp_path / "fresh")
    assert fresh == first


@pytest.mark.parametrize(
    ("path", "files", "said"),
    [
        ("../../away.png", 1, "leaves the image root"),
        ("{}/away.png", 1, "absolute image path"),
        ("a.png", 0, "not one image"),
        ("", 1, "''"),
    ],
)
def test_images_of_a_hostile_set_stay_in_their_folder(tmp_path, path, files, said):
    def example(**more):
        none = {"query": {"text": "q", "paths": ""}, "targets": {"texts": ["t"], "paths": [""]}}
        return iter([{**none, "image": {"path": "", "images": []}, **more}])

    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    image.seek(0)
    hostile = {"path": path.format(tmp_path), "images": [image] * files}
    splits = {"test": example, "test_images": lambda: example(image=hostile)}
    tfds_records.write(tfds_eval.FORM, "Evil", splits, {}, tmp_path / "records")
    with pytest.raises(UserError, match=said):
        open_eval(tmp_path / "records")
    assert not list(tmp_path.rglob("away.png")) and not list(tmp_path.rglob("*.images"))
    with pytest.raises(UserError, match="has: Evil"):
        open_eval(tmp_path / "records", ["VOC2007"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: next(f.glob("*original*")).unlink(), "files missing"),
        (lambda f: (f / "features.json").write_text("{}"), "not a whole TFDS data set"),
        (
            lambda f: next(f.glob("*original*")).write_bytes(b"x" * 70000),
            "example 0: damaged records",
        ),
    ],
)
def test_a_spoilt_set_is_told_in_words(both, tmp_path, spoil, said):
    folder = shutil.copytree(both[1] / "vlm2vec_pairs/B-2/1.0.0", tmp_path / "x")
    spoil(folder)
    with pytest.raises(UserError, match=said):
        open_train(folder)


def test_unknown_names_list_what_there_is(both):
    with pytest.raises(UserError, match="has: A, B-2"):
        open_train(both[1], ["C"])
    with pytest.raises(UserError, match="splits there: original"):
        open_train(both[1], ["B-2"], "nothing")
    info = json.loads((both[1] / "vlm2vec_pairs/A/1.0.0/dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    write_image(both[1] / "x.png")
