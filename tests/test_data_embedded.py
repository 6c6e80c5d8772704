# SPDX-License-Identifier: Apache-2.0
"""Images inside parquet files, as `datasets` writes them: the same as files beside them."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_data import FakeEncoder, captions, write_subset
from PIL import Image
from small_models import picture

from vlm2vec_jax.data import embedded, prepare, verify
from vlm2vec_jax.data.inspection import inspect
from vlm2vec_jax.data.mmeb import open_eval, open_train
from vlm2vec_jax.data.pairs import read_side
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import run
from vlm2vec_jax.images import load_image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""What the feature `Image` of `datasets` is stored as."""


def encoded(number: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture(number, (20, 16)).save(out, kind)
    return out.getvalue()


def inside(number: int | None, kind: str = "PNG"):
    if number is None:
        return None
    return {"bytes": encoded(number, kind), "path": f"{number}.png"}


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One set of pairs in every form, by name; the first has its images in files."""
    root = tmp_path_factory.mktemp("embedded")
    shown = [0, None, 2, 0, 4]
    texts = [f"query {n}" for n in range(5)]
    positive = ["red", "blue", "red", "green", "red"]
    others = [[1, 2], [3], [], [4], [0]]  # images of hard negatives
    (root / "files").mkdir()
    for n in range(5):
        (root / "files" / f"{n}.png").write_bytes(encoded(n))
    with open(root / "files" / "pairs.jsonl", "w") as file:
        for n in range(5):
            images = [] if shown[n] is None else [f"{shown[n]}.png"]
            negatives = [{"images": [f"{k}.png"]} for k in others[n]]
            line = {"query": {"text": texts[n], "images": images}, "positive": positive[n],
                    "negatives": negatives}  # fmt: skip
            file.write(json.dumps(line) + "\n")

    def write(name: str, columns: dict) -> None:
        (root / name).mkdir()
        pq.write_table(pa.table(columns), root / name / "pairs.parquet", row_group_size=2)

    negatives = pa.array([[inside(k) for k in row] for row in others], pa.list_(IMAGE))
    common = {"positive": positive, "negatives": negatives}
    write("structs", {"query": texts, **common,
                      "query_image": pa.array([inside(n) for n in shown], IMAGE)})  # fmt: skip
    content = [None if n is None else encoded(n) for n in shown]
    write("bytes", {"query": texts, **common, "query_image": pa.array(content, pa.binary())})
    lists = pa.array([[] if n is None else [inside(n)] for n in shown], pa.list_(IMAGE))
    write("lists", {"query": texts, **common, "query_images": lists})
    side = pa.struct([("text", pa.string()), ("images", pa.list_(IMAGE))])
    sides = [{"text": t, "images": i} for t, i in zip(texts, lists.to_pylist())]
    apart = [[{"text": None, "images": [inside(k)]} for k in row] for row in others]
    write("nested", {"query": pa.array(sides, side), "positive": positive,
                     "negatives": pa.array(apart, pa.list_(side))})  # fmt: skip
    return root


def same(a, b):
    assert a.text == b.text and len(a.images) == len(b.images)
    for x, y in zip(a.images, b.images):
        np.testing.assert_array_equal(np.asarray(load_image(x)), np.asarray(load_image(y)))


@pytest.mark.parametrize("form", ["structs", "bytes", "lists", "nested"])
def test_every_form_gives_the_rows_of_files(forms, form):
    (source,) = open_train(forms / form)
    (plain,) = open_train(forms / "files")
    assert len(source) == len(plain) == 5
    for a, b in zip(source, plain):
        same(a.query, b.query)
        same(a.positive, b.positive)
        assert len(a.negatives) == len(b.negatives)
        for x, y in zip(a.negatives, b.negatives):
            same(x, y)
    # Each image once, under a name that its bytes decide, below the cache.
    files = [p for p in source.kept.rglob("*") if p.is_file()]
    assert len(files) == 5 and {p.suffix for p in files} == {".png"}
    assert source.kept == forms / form / ".arrow_cache" / "images"
    assert verify.verify_train([source], headers=True) == []
    found = inspect(forms / form)
    assert not found.errors and found.images == 5
    assert all(line["path"].startswith(embedded.PREFIX) for line in found.files[:5])
    assert prepare.prepare(forms / form).missing == 0


def test_the_cache_may_lie_elsewhere_and_the_image_root_too(forms, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(forms / "structs", data, ignore=shutil.ignore_patterns(".*"))
    elsewhere = {"cache_dir": tmp_path / "cache", "image_root": forms / "files"}
    (source,) = open_train(data, **elsewhere)
    assert not (data / ".arrow_cache").exists()
    assert (tmp_path / "cache") in source.kept.parents
    assert verify.verify_train([source], headers=True) == []
    same(source[0].query, open_train(forms / "files")[0][0].query)
    # A file that somebody removed is told by its name.
    for path in source.kept.rglob("*.png"):
        path.unlink()
    problems = verify.verify_train([source])
    assert problems and str(source.kept) in problems[0].message


def test_paths_and_bytes_in_one_table(forms, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(encoded(1))
    images = [inside(0), {"bytes": None, "path": "1.png"}, {"bytes": None, "path": None}, None]
    columns = {"query": list("abcd"), "positive": list("efgh"),
               "query_image": pa.array(images, IMAGE)}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    (source,) = open_train(tmp_path)
    assert source.image_root == tmp_path / "images"
    assert [len(row.query.images) for row in source] == [1, 1, 0, 0]
    assert verify.verify_train([source], headers=True) == []


def test_bytes_that_are_no_image_are_told_with_their_row(tmp_path):
    torn = encoded(1)[:-30]
    images = [inside(0), {"bytes": b"nothing", "path": None}, {"bytes": torn, "path": None},
              {"bytes": b"", "path": None}]  # fmt: skip
    columns = {"query": list("abcd"), "positive": list("efgh"),
               "query_image": pa.array(images, IMAGE)}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    said = [str(issue) for issue in inspect(tmp_path).errors]
    assert len(said) == 3
    for n, words in ((1, "not an image"), (2, "truncated"), (3, "is empty (0 bytes)")):
        assert any(f"pairs.parquet row {n}, " in line and words in line for line in said)


def test_what_is_no_image_is_refused():
    for value in ({"bytes": "text"}, {"images": [{"bytes": b"", "size": 3}]}, {"images": [3]}):
        with pytest.raises(UserError):
            read_side(value)
    assert read_side({"bytes": None, "path": "a.png"}) == ("", "a.png")
    assert read_side({"bytes": None, "path": None}) == ("", "")
    assert read_side("text", {"path": "a.png"}) == ("<|image_1|> text", "a.png")


def test_types():
    assert embedded.image_type(IMAGE) == embedded.image_type(pa.binary()) == pa.string()
    assert embedded.image_type(pa.large_list(IMAGE)) == pa.list_(pa.string())
    for other in (pa.string(), pa.struct([("path", pa.string())]), pa.list_(pa.string()),
                  pa.struct([("bytes", pa.binary()), ("more", pa.int8())])):  # fmt: skip
        assert embedded.image_type(other) is None
    assert embedded.holds_bytes(pa.struct([("a", pa.list_(IMAGE))]))
    assert not embedded.holds_bytes(pa.struct([("a", pa.list_(pa.string()))]))


def test_endings_go_by_the_content(tmp_path):
    store = embedded.Store(tmp_path)
    for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("GIF", "gif"), ("WEBP", "webp"),
                         ("TIFF", "tif"), ("BMP", "bmp")):  # fmt: skip
        path = store.keep(encoded(1, kind))
        assert path.endswith(f".{ending}")
        folder, below = embedded.place(path, "root", store.folder)
        with Image.open(folder / below) as image:
            assert image.format == kind
    assert store.keep(b"?").endswith(".img")


def test_mmeb_s_layouts_with_images_in_their_columns(tmp_path):
    """What a data set of MMEB's columns becomes when it is pushed with the feature `Image`."""
    write_subset(tmp_path / "files", "MSCOCO_t2i", captions())
    rows = pq.read_table(tmp_path / "files/MSCOCO_t2i/test-00000-of-00001.parquet").to_pylist()

    def content(path):
        data = (tmp_path / "files" / path).read_bytes() if path else None
        return data and {"bytes": data, "path": path}

    columns = {
        "qry_text": [r["qry_text"] for r in rows],
        "qry_img_path": pa.array([content(r["qry_img_path"]) for r in rows], IMAGE),
        "tgt_text": [r["tgt_text"] for r in rows],
        "tgt_img_path": pa.array([[content(p) for p in r["tgt_img_path"]] for r in rows],
                                 pa.list_(IMAGE)),
    }  # fmt: skip
    folder = tmp_path / "inside" / "MSCOCO_t2i"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "test-00000-of-00001.parquet")
    (source,) = open_eval(tmp_path / "inside")
    assert len(source) == 5 and all(path.startswith(".arrow") for _, path in source[0].target_keys)
    scores = [
        run.evaluate(FakeEncoder(), tmp_path / name, output=tmp_path / f"out_{name}")
        for name in ("files", "inside")
    ]
    assert scores[0]["subsets"] == scores[1]["subsets"]


def test_the_library_s_own_files(tmp_path):
    """Written by `datasets` itself."""
    datasets = pytest.importorskip("datasets")
    rows = {"query": ["a", "b"], "positive": ["c", "d"],
            "query_image": [picture(n, (20, 16)) for n in range(2)]}  # fmt: skip
    table = datasets.Dataset.from_dict(rows)
    table = table.cast_column("query_image", datasets.Image())
    table.to_parquet(str(tmp_path / "pairs.parquet"))
    (source,) = open_train(tmp_path)
    for n, row in enumerate(source):
        image = load_image(row.query.images[0])
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(n, (20, 16))))
