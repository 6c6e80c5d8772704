# SPDX-License-Identifier: Apache-2.0
"""`python -m vlm2vec_jax.embed`: every form in and out, resuming, bad input of all kinds."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import one_embedder, tear
from embed_tools import TOLERANCE, argv, load, texts, wanted, write_lines
from small_models import label, picture, write_model

from vlm2vec_jax import embed, flags
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.embedding import corpus, index, run, vectors
from vlm2vec_jax.embedding.corpus_parquet import open_corpus
from vlm2vec_jax.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with one_embedder():
        yield


@pytest.fixture(scope="module")
def model(base) -> Embedder:
    return Embedder.from_pretrained(path=str(base), adapter=None, dtype="float32")


@pytest.fixture
def small_windows(monkeypatch) -> int:
    """Windows of five, so that a corpus of a few dozen has many."""
    for where in (corpus, sys.modules["vlm2vec_jax.embedding.corpus_parquet"]):
        monkeypatch.setattr(where, "WINDOW", 5)
    return 5


def call(base, source, output, *more) -> int:
    return flags.call(embed.main, embed.define, argv(base, source, output, *more))


def refused(capsys, *words) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: "), said
    for word in words:
        assert str(word) in said, said
    return said


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for k, name in enumerate(("z.png", "a.PNG", "b/c.jpg", "b/a.webp")):
        picture(k).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def test_a_jsonl_of_many_windows_is_one_result(base, model, tmp_path, small_windows):
    lines = texts(23)
    source = write_lines(tmp_path / "i.jsonl", lines)
    source.write_text(source.read_text().replace("\n", "\n\n", 9))  # empty lines do not count
    assert call(base, source, tmp_path / "o.npz") == 0
    np.testing.assert_allclose(load(tmp_path / "o.npz"), wanted(model, lines), **TOLERANCE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.jsonl", "o.npz"]


def test_a_folder_of_images_to_parquet(base, model, tmp_path, pictures, small_windows):
    assert call(base, pictures, tmp_path / "o.parquet", "--prompt", "Represent it.") == 0
    table = pq.read_table(tmp_path / "o.parquet").to_pydict()
    names = [str(pictures / n) for n in ("a.PNG", "z.png", "b/a.webp", "b/c.jpg")]
    assert table["images"] == [[name] for name in names] and table["row"] == [0, 1, 2, 3]
    assert set(table["text"]) == {"<|image_1|>"} and set(table["id"]) == {None}
    found = np.array(table["embedding"], np.float32)
    expected = model.encode([Path(n) for n in names], prompt="Represent it.")
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    made = index.open_index(tmp_path / "o.parquet")
    assert made.meta["prompt"] == "Represent it."
    assert made.meta["fingerprint"] == json.loads(json.dumps(model.fingerprint()))


def encoded(number: int) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


def test_parquet_in_all_spellings(base, model, tmp_path, pictures, small_windows):
    plain = [None, "z.png", "b/c.jpg", None, "a.PNG"] * 5
    words = [label(k) if image is None else None for k, image in enumerate(plain)]
    items = [
        {"text": t or "", "images": [] if i is None else [pictures / i]}
        for t, i in zip(words, plain)
    ]
    expected = model.encode(items)

    def check(name, table, *more, group=7):
        pq.write_table(table, pictures / "t" / name, row_group_size=group)
        assert call(base, pictures / "t" / name, tmp_path / "o.npz", *more) == 0
        np.testing.assert_allclose(load(tmp_path / "o.npz"), expected, **TOLERANCE)

    (pictures / "t").mkdir()
    paths = [None if i is None else f"../{i}" for i in plain]
    check("paths.parquet", pa.table({"text": words, "image": paths}))
    lists = [[] if i is None else [i] for i in paths]
    check("lists.parquet", pa.table({"text": words, "images": lists}), group=100)
    data = [None if i is None else (pictures / i).read_bytes() for i in plain]
    structs = [None if d is None else {"bytes": d, "path": None} for d in data]
    named = pa.table({"caption": words, "picture": structs})
    check("structs.parquet", named, "--text_column", "caption", "--image_column", "picture")
    check("bytes.parquet", pa.table({"text": words, "image": data}), group=3)
    # A folder of several files is one corpus, in the order of their names.
    shards = tmp_path / "shards"
    shards.mkdir()
    for k, start in enumerate((0, 4, 18)):
        part = slice(start, (4, 18, 25)[k])
        pq.write_table(
            pa.table({"text": words[part], "image": data[part]}), shards / f"{k}.parquet"
        )
    assert call(base, shards, tmp_path / "o.npz") == 0
    np.testing.assert_allclose(load(tmp_path / "o.npz"), expected, **TOLERANCE)


def test_windows_can_be_read_in_any_order(tmp_path, small_windows):
    rows = [label(k) for k in range(23)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=8)
    write_lines(tmp_path / "a.jsonl", [{"text": t} for t in rows])
    for name in ("a.parquet", "a.jsonl"):
        source = open_corpus(tmp_path / name, tmp_path / "listing")
        windows = [window for window, _ in source.scan()]
        assert [w.count for w in windows] == [5, 5, 5, 5, 3]
        for order in ((4, 0, 2, 1, 3), (0, 2, 4), (1, 1)):
            for k in order:
                found = [e.input.text for e in corpus.read(source, windows[k])]
                assert found == rows[5 * k : 5 * k + 5]


def test_fewer_bits_and_shorter_vectors_are_stored(base, model, tmp_path, small_windows):
    lines = texts(23)
    source = write_lines(tmp_path / "i.jsonl", lines)
    full = wanted(model, lines)
    short = vectors.normalize(full[:, :12])
    ranges = vectors.value_ranges(full)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        for suffix in ("npz", "parquet"):
            output = tmp_path / f"{precision}.{suffix}"
            assert call(base, source, output, "--precision", precision) == 0
            stored = index.open_index(output)
            found = np.concatenate(list(stored.stored()))
            expected = vectors.quantize_embeddings(full, precision, ranges)
            assert found.dtype == expected.dtype and len(stored) == 23
            # Rounding of the last bit may move a number over the border of a step.
            assert np.mean(found != expected) < 0.02
            back = np.concatenate(list(index.vectors_of(stored)))
            step = np.max(ranges[1] - ranges[0]) / 255
            if "int" in precision:
                np.testing.assert_allclose(back, full, atol=1.1 * step)
    assert call(base, source, tmp_path / "short.npz", "--truncate_dim", 12) == 0
    np.testing.assert_allclose(load(tmp_path / "short.npz"), short, **TOLERANCE)


def interrupt_after(monkeypatch, parts: int) -> None:
    """A kill in the middle: the run ends when so many parts are written."""
    write, count = run.Parts.write, [0]

    def counted(self, window, part):
        if count[0] == parts:
            raise KeyboardInterrupt
        count[0] += 1
        write(self, window, part)

    monkeypatch.setattr(run.Parts, "write", counted)


def embedded_rows(monkeypatch) -> list[int]:
    """How many inputs each later run embeds."""
    counts: list[int] = []
    original = Embedder.encode_windows

    def counting(self, windows, **options):
        counts.append(0)

        def counted():
            for window in windows:
                counts[-1] += len(window)
                yield window

        return original(self, counted(), **options)

    monkeypatch.setattr(Embedder, "encode_windows", counting)
    return counts


def test_a_run_goes_on_where_it_was_interrupted(base, model, tmp_path, small_windows, monkeypatch):
    lines = texts(23)
    source = write_lines(tmp_path / "i.jsonl", lines)
    output = tmp_path / "o.npz"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert call(base, source, output) == 130
    assert not output.exists() and (tmp_path / ".o.npz.parts").is_dir()
    lines[12] = {"text": "another text"}  # in the third window: nothing of the first two is redone
    write_lines(source, lines)
    counts = embedded_rows(monkeypatch)
    assert call(base, source, output) == 0
    assert counts == [13]
    np.testing.assert_allclose(load(output), wanted(model, lines), **TOLERANCE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.jsonl", "o.npz"]


def test_parts_of_another_model_are_not_mixed_in(
    base, tmp_path, small_windows, monkeypatch, capsys
):
    source = write_lines(tmp_path / "i.jsonl", texts(12))
    output = tmp_path / "o.npz"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert call(base, source, output) == 130
    capsys.readouterr()
    assert call(base, source, output, "--prompt", "other ") == 2
    refused(capsys, "unfinished run with another model", 'prompt: "" -> "other "', "--restart")
    other = write_model(base.parent / "data", tmp_path / "other", seed=1)
    assert call(other, source, output) == 2
    refused(capsys, "fingerprint.base: ")
    assert call(base, source, output, "--prompt", "other ", "--restart") == 0
    assert index.open_index(output).meta["prompt"] == "other "


def test_a_damaged_part_is_made_again(base, model, tmp_path, small_windows, monkeypatch, capsys):
    lines = texts(12)
    source = write_lines(tmp_path / "i.jsonl", lines)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert call(base, source, tmp_path / "o.npz") == 130
    part = sorted((tmp_path / ".o.npz.parts").glob("*.npz"))[0]
    part.write_bytes(part.read_bytes()[:100])
    capsys.readouterr()
    assert call(base, source, tmp_path / "o.npz") == 2
    refused(capsys, part.name, "is damaged", "run the command again")
    assert call(base, source, tmp_path / "o.npz") == 0
    np.testing.assert_allclose(load(tmp_path / "o.npz"), wanted(model, lines), **TOLERANCE)


def test_all_bad_images_are_told_and_the_good_windows_kept(
    base, model, tmp_path, small_windows, capsys, monkeypatch
):
    lines = [{"images": [f"{k}.png"]} for k in range(12)]
    for k in range(12):
        picture(k).save(tmp_path / f"{k}.png")
    torn = {k: tear(tmp_path / f"{k}.png") for k in (1, 3, 11)}
    source = write_lines(tmp_path / "i.jsonl", lines)
    assert call(base, source, tmp_path / "o.npz") == 2
    refused(capsys, f"{source} has bad lines (3 problems)", "line 2: ", "line 4: ", "line 12: ")
    for k, data in torn.items():
        (tmp_path / f"{k}.png").write_bytes(data)
    counts = embedded_rows(monkeypatch)
    assert call(base, source, tmp_path / "o.npz") == 0
    assert counts == [7]  # the second window was good and is there
    assert "1 of 3 windows are there" in capsys.readouterr().out
    expected = model.encode([tmp_path / f"{k}.png" for k in range(12)])
    np.testing.assert_allclose(load(tmp_path / "o.npz"), expected, **TOLERANCE)


def test_bad_inputs_can_be_left_out(base, model, tmp_path, small_windows, capsys):
    for k in range(8):
        picture(k).save(tmp_path / f"{k}.png")
    tear(tmp_path / "2.png")
    lines = [{"images": [f"{k}.png"]} for k in range(8)] + [{"txt": "?"}, {"text": "fine"}]
    source = write_lines(tmp_path / "i.jsonl", lines)
    assert call(base, source, tmp_path / "o.npz", "--on_bad_input", "skip") == 0
    said = capsys.readouterr().out
    assert "line 3: " in said and "line 9: unknown key" in said and "8 embeddings" in said
    with np.load(tmp_path / "o.npz") as found:
        rows = [0, 1, 3, 4, 5, 6, 7, 9]
        assert found["rows"].tolist() == rows
        good = [tmp_path / f"{k}.png" for k in rows[:-1]] + ["fine"]
        np.testing.assert_allclose(found["embeddings"], model.encode(good), **TOLERANCE)
    assert call(base, source, tmp_path / "o.parquet", "--on_bad_input", "skip") == 0
    assert pq.read_table(tmp_path / "o.parquet")["row"].to_pylist() == rows


def test_corpora_that_cannot_be_read(base, tmp_path, capsys):
    output = tmp_path / "o.npz"
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = tmp_path / "torn.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1000, "x": range(1000)}), torn)
    whole = torn.read_bytes()
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), other)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    picture(1).save(mixed / "a.png")
    (mixed / "b.png").write_text("no picture")
    for source, words, more in (
        (tmp_path / "gone", ["No such file"], ()),
        (empty, ["without images and parquet"], ()),
        (other, ["neither a column `text` nor `image`; it has x", "--text_column"], ()),
        (other, ["has no column 'y'; it has x"], ("--text_column", "y")),
        (mixed, ["has bad images (1 problem)", "b.png: ", "not an image"], ()),
        (mixed, ["columns are named"], ("--id_column", "y")),
    ):
        assert call(base, source, output, *more) == 2
        refused(capsys, source, *words)
    torn.write_bytes(whole[:-20])
    assert call(base, torn, output) == 2
    refused(capsys, torn, "is not a readable parquet file")
    torn.write_bytes(whole[:4] + bytes(200) + whole[204:])
    assert call(base, torn, output) == 2
    refused(capsys, torn, "damaged parquet file")
    pq.write_table(pa.table({"text": ["a"]}), mixed / "c.parquet")
    assert call(base, mixed, output) == 2
    refused(capsys, "holds parquet files and images")
    pq.write_table(pa.table({"text": ["a", None, ""], "image": ["gone.png", None, 3 * "x"]}), torn)
    assert call(base, torn, output) == 2
    refused(capsys, "has bad rows (3 problems)", "torn.parquet row 1: neither text nor image",
            "row 0: 1 image(s) but markers none", "row 2: ")  # fmt: skip
    assert not output.exists()
    assert not list(tmp_path.glob(".*"))


def test_an_empty_corpus_gives_no_vectors(base, tmp_path):
    (tmp_path / "i.jsonl").write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "i.parquet")
    for name in ("i.jsonl", "i.parquet"):
        for output in ("o.npz", "o.parquet"):
            assert call(base, tmp_path / name, tmp_path / output) == 0
            found = index.open_index(tmp_path / output)
            assert len(found) == 0 and sum(map(len, found.stored())) == 0


def test_stored_vectors_that_cannot_be_searched(base, tmp_path):
    np.savez(tmp_path / "other.npz", embeddings=np.eye(3))
    (tmp_path / "torn.npz").write_bytes(b"PK")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    for name, words in (("other.npz", "does not say what model"), ("torn.npz", "cannot be read"),
                        ("other.parquet", "does not say"), ("gone.npz", "no such file"),
                        ("gone.bin", "end in"), (".", "is a folder with")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            index.open_index(tmp_path / name)


def test_a_missing_package_is_told_before_anything_is_computed(base, tmp_path, capsys, monkeypatch):
    source = write_lines(tmp_path / "i.jsonl", texts(3))
    for name in ("lancedb", "ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call(base, source, tmp_path / "o.lance") == 2
    refused(capsys, "needs the package lancedb", "vlm2vec_jax[lancedb]")
    assert call(base, source, tmp_path / "o.npz", "--engine", "ray") == 2
    refused(capsys, "needs the package ray", "vlm2vec_jax[ray]")
    assert call(base, source, tmp_path / "o.npz", "--engine", "ray", "--distributed") == 2
