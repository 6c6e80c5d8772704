# SPDX-License-Identifier: Apache-2.0
"""`python -m vlm2vec_jax.search`: what is nearest, by the same model only, shown safely."""

import functools
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from small_models import label, picture, quick_compiler, write_model, write_train

from vlm2vec_jax import embed, flags, search
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.embedding import index, show
from vlm2vec_jax.embedding import search as searching
from vlm2vec_jax.embedding.search import Hit
from vlm2vec_jax.inputs import MultimodalInput


@pytest.fixture(scope="module", autouse=True)
def one_embedder():
    """Commands of one process share the model, so that each shape compiles once."""
    with pytest.MonkeyPatch.context() as patch:
        load = functools.cache(Embedder.from_pretrained)

        def same(path, adapter=None, **options):
            return load(path=str(path), adapter=adapter, dtype=options["dtype"])

        patch.setattr(Embedder, "from_pretrained", staticmethod(same))
        with quick_compiler():
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("search")
    write_model(write_train(root / "data"), root / "base")
    (root / "pictures").mkdir()
    for k in range(12):
        picture(k).save(root / "pictures" / f"{k:02}.png")
    (root / "pictures" / "<b>&.png").write_bytes((root / "pictures" / "03.png").read_bytes())
    lines = [{"text": label(k), "id": f"t{k}"} for k in range(12)]
    (root / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source, output in (
        ("pictures", "p.npz"),
        ("pictures", "p.parquet"),
        ("texts.jsonl", "t.npz"),
    ):
        assert run(embed, "--model", root / "base", "--dtype", "float32",
                   "--input", root / source, "--output", root / output) == 0  # fmt: skip
    return root


def run(module, *argv) -> int:
    return flags.call(module.main, module.define, [module.__name__, *map(str, argv)])


def hits(capsys, *argv) -> list[dict]:
    capsys.readouterr()
    assert run(search, *argv, "--json") == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert run(search, *argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said


@pytest.mark.parametrize("name", ["p.npz", "p.parquet"])
def test_an_image_finds_itself_and_its_copy(folder, capsys, name):
    query = folder / "pictures" / "03.png"
    found = hits(capsys, "--index", folder / name, "--query", query, "--top_k", 3)
    names = [Path(hit["images"][0]).name for hit in found]
    assert sorted(names[:2]) == ["03.png", "<b>&.png"] and len(found) == 3
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert found[0]["score"] >= found[1]["score"] >= found[2]["score"]


def test_a_text_finds_itself_and_the_order_is_exact(folder, capsys):
    found = hits(capsys, "--index", folder / "t.npz", "--query", label(5), "--top_k", 99)
    assert len(found) == 12 and found[0]["text"] == label(5) and found[0]["id"] == "t5"
    stored = index.open_index(folder / "t.npz")
    vectors = np.concatenate(list(stored.stored()))
    order = np.argsort(-(vectors @ vectors[5]), kind="stable")
    assert [hit["row"] for hit in found] == order.tolist()


def test_blocks_change_nothing(folder, monkeypatch):
    stored = index.open_index(folder / "t.npz")
    query = next(stored.stored())[7]
    whole = searching.exact(stored, query, 5)
    for block in (1, 5, 12):
        monkeypatch.setattr(index, "BLOCK", block)
        found = searching.exact(stored, query, 5)
        assert [hit.row for hit in found] == [hit.row for hit in whole]
        np.testing.assert_allclose([h.score for h in found], [h.score for h in whole], atol=1e-6)


def test_text_and_image_together(folder, capsys):
    alone = hits(capsys, "--index", folder / "p.npz", "--image", folder / "pictures" / "01.png")
    both = hits(capsys, "--index", folder / "p.npz", "--query", "something red",
                "--image", folder / "pictures" / "01.png")  # fmt: skip
    assert alone[0]["score"] > both[0]["score"] and len(both) == 10


def test_quantised_vectors_are_searched(folder, capsys):
    for precision in ("int8", "binary"):
        output = folder / f"{precision}.npz"
        argv = ("--model", folder / "base", "--dtype", "float32", "--precision", precision)
        assert run(embed, *argv, "--input", folder / "texts.jsonl", "--output", output) == 0
        found = hits(capsys, "--index", output, "--query", label(5), "--top_k", 1)
        assert found[0]["text"] == label(5)


def test_a_corpus_that_is_gone_leaves_numbers(folder, tmp_path, capsys):
    for name in ("t.npz", "texts.jsonl"):
        shutil.copy(folder / name, tmp_path)
    assert run(embed, "--model", folder / "base", "--dtype", "float32", "--input",
               tmp_path / "texts.jsonl", "--output", tmp_path / "o.npz") == 0  # fmt: skip
    query = ("--index", tmp_path / "o.npz", "--query", label(5), "--top_k", 1)
    assert hits(capsys, *query)[0]["text"] == label(5)
    (tmp_path / "texts.jsonl").write_text("changed\n")
    found = hits(capsys, *query)
    assert found == [{"score": found[0]["score"], "row": 5}]
    assert run(search, *query, "--html", tmp_path / "page.html") == 0
    assert "row 5" in (tmp_path / "page.html").read_text()


def test_another_model_is_refused(folder, tmp_path, capsys):
    other = write_model(folder / "data", tmp_path / "other", seed=1)
    said = refused(capsys, "--index", folder / "t.npz", "--query", "a", "--model", other)
    assert "was made by another model" in said and "base: " in said
    copy = shutil.copytree(folder / "base", tmp_path / "copy")
    assert hits(capsys, "--index", folder / "t.npz", "--query", "a", "--model", copy)


def test_wrong_queries_and_indexes(folder, tmp_path, capsys):
    stored = ("--index", folder / "t.npz")
    for argv, words in (
        (stored, "give --query"),
        ((*stored, "--query", "gone.png"), "no such file; --query_type text"),
        ((*stored, "--query", folder / "texts.jsonl", "--query_type", "image"), "not an image"),
        ((*stored, "--query", "a", "--image", "gone.png"), "no such image"),
        ((*stored, "--query", "a <|image_1|>"), "there are 0 images"),
        ((*stored, "--query", "a", "--prompt_name", "gone"), "no prompt called 'gone'"),
        ((*stored, "--query", "a", "--engine", "lancedb"), "searches .lance tables"),
        ((*stored, "--query", "a", "--html", tmp_path / "gone" / "a.html"), "there is no folder"),
        (("--index", tmp_path / "gone.npz", "--query", "a"), "no such file"),
        (("--index", tmp_path, "--query", "a"), "is a folder with these stored vectors: none"),
    ):
        assert words in refused(capsys, *argv), argv
    found = hits(capsys, *stored, "--query", "gone.png", "--query_type", "text", "--top_k", 1)
    assert len(found) == 1
    (tmp_path / "empty.jsonl").write_text("")
    assert run(embed, "--model", folder / "base", "--dtype", "float32", "--input",
               tmp_path / "empty.jsonl", "--output", tmp_path / "empty.npz") == 0  # fmt: skip
    assert "holds no vectors" in refused(capsys, "--index", tmp_path, "--query", "a")


def test_faiss_that_is_missing_is_told(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    said = refused(capsys, "--index", folder / "t.npz", "--query", "a", "--engine", "faiss")
    assert "vlm2vec_jax[faiss]" in said


def test_without_a_terminal_a_page_is_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query = folder / "pictures" / "03.png"
    assert run(search, "--index", folder / "p.parquet", "--query", query, "--top_k", 4) == 0
    assert "search.html" in capsys.readouterr().out
    page = (tmp_path / "search.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 5  # the query and the hits
    assert "<b>&.png" not in page and "&lt;b&gt;&amp;.png" in page
    assert "<script" not in page and not re.search(r"(src|href)=.https?:", page)


def test_a_page_escapes_what_it_shows(tmp_path):
    evil = '<script>alert("x")</script>'
    row = {"row": 0, "id": evil, "text": evil, "images": [str(tmp_path / f"{evil}.png")]}
    page = show.page(MultimodalInput(evil), [Hit(0.5, row)], evil)
    assert "<script" not in page and "&lt;script&gt;" in page and "no picture" in page


def test_a_terminal_gets_pictures(folder):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=100)
    path = str(folder / "pictures" / "03.png")
    found = [Hit(0.5, {"row": 0, "id": "an [b]id\x1b[2J", "text": "words", "images": [path]})]
    found.append(Hit(0.4, {"row": 1, "text": "x", "images": [str(folder / "gone.png")]}))
    assert show.can_draw(console)
    show.print_hits(console, found)
    said = out.getvalue()
    assert "an [b]id" in said and "words" in said and "(no picture)" in said
    assert "\x1b[2J" not in said  # nothing of the data steers the terminal
    assert len(said.splitlines()) > 8 and "\x1b[" in said
    plain = Console(file=io.StringIO(), force_terminal=False)
    assert not show.can_draw(plain)
    show.print_hits(plain, found)
    assert len(plain.file.getvalue().splitlines()) < 9  # type: ignore[attr-defined]


def test_parquet_from_elsewhere_is_looked_up_by_columns(folder, tmp_path, capsys):
    table = pa.table({"caption": [label(k) for k in range(6)], "key": range(6)})
    pq.write_table(table, tmp_path / "i.parquet")
    assert run(embed, "--model", folder / "base", "--dtype", "float32", "--input",
               tmp_path / "i.parquet", "--output", tmp_path / "o.npz",
               "--text_column", "caption", "--id_column", "key") == 0  # fmt: skip
    found = hits(capsys, "--index", tmp_path, "--query", label(4), "--top_k", 1)
    assert (found[0]["id"], found[0]["text"]) == ("4", label(4))
