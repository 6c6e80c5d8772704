# SPDX-License-Identifier: Apache-2.0
"""Other layouts of the same data: instruction columns, own pairs, image roots, links."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import eval_row, make_train, train_rows, write_image, write_parquet

from vlm2vec_jax.data import verify
from vlm2vec_jax.data.mmeb import EvalSource, TrainSource, list_subsets, open_eval, open_train
from vlm2vec_jax.errors import UserError

M = "<|image_1|>"

# ------------------------------------------------------------------------- instruction columns


def v2_row(query, query_image, targets, target_images, instructions):
    return {
        "qry_inst": instructions[0], "qry_text": query, "qry_img_path": query_image,
        "tgt_inst": instructions[1], "tgt_text": targets, "tgt_img_path": target_images,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("subset", "row", "query", "targets"),
    [
        (
            "ImageNet-1K",
            v2_row("", "a.png", ["cat", "dog"], ["", ""], (f"{M} Represent it.", "")),
            f"{M} Represent it.\n",
            ["cat", "dog"],
        ),
        (
            "N24News",  # a classification with a caption keeps the space
            v2_row("a caption", "a.png", ["sport"], [""], ("Represent the news:", "")),
            f"{M} Represent the news: a caption\n",
            ["sport"],
        ),
        (
            "OK-VQA",
            v2_row("What? ", "a.png", ["one "], [""], (f"{M}\nRepresent with the question:", "")),
            f"{M}\nRepresent with the question: What? \n",
            ["one "],
        ),
        (
            "MSCOCO_i2t",
            v2_row("", "a.png", ["a caption \n"], [""], ("Find a caption. \n", "")),
            f"{M} Find a caption.\n\n",
            ["a caption \n"],
        ),
        (
            "VisDial",
            v2_row("Q: a A: b", "", ["", ""], ["a.png", "b.png"],
                   ("Represent the dialogue:", f"{M} Represent the given image.")),
            "Represent the dialogue: Q: a A: b\n\n",
            [f"{M} Represent the given image.\n"] * 2,
        ),
        (
            "WebQA",
            v2_row("who?", "", ["a page", "b page"], ["a.png", "b.png"],
                   ("Find an image:", f"{M} Represent the page:")),
            "Find an image: who?\n",
            [f"{M} Represent the page: a page\n", f"{M} Represent the page: b page\n"],
        ),
        (
            "NIGHTS",
            v2_row("", "a.png", [""], ["b.png"],
                   (f"{M} Find a similar image.", f"{M} Represent the given image.")),
            f"{M}\nFind a similar image.\n",
            [f"{M} Represent the given image."],
        ),
        (
            "MSCOCO",
            v2_row('"cat"', "a.png", [""], ["b.png"],
                   ("Select the object", f"{M}\nRepresent the crop.")),
            f'{M}\nSelect the object "cat"\n',
            [f"{M}\nRepresent the crop."],
        ),
        (
            "RefCOCO-Matching",
            v2_row("left cat", "a.png", ["left cat", "dog"], ["b.png", "c.png"],
                   ("Select:", f"{M} Represent the object:")),
            f"{M}\nSelect: left cat\n",
            [f"{M} Represent the object: left cat\n", f"{M} Represent the object: dog\n"],
        ),
        (
            "MyShop",  # none of the 36: the query's text decides
            v2_row("red?", "a.png", ["yes"], [""], ("Answer:", None)),
            f"{M}\nAnswer: red?\n",
            ["yes"],
        ),
    ],
    ids=lambda v: v if isinstance(v, str) and "\n" not in v else "",
)  # fmt: skip
def test_instruction_columns_are_joined_as_the_first_layout_has_them(
    tmp_path, subset, row, query, targets
):
    write_parquet(tmp_path / subset, "test", [row])
    (source,) = open_eval(tmp_path)
    assert source[0].query_key == (query, row["qry_img_path"])
    assert list(source[0].target_keys) == list(zip(targets, row["tgt_img_path"]))
    index = source.unique_keys()
    assert index.queries == [source[0].query_key]


def test_both_layouts_may_change_places_in_one_folder(tmp_path):
    write_parquet(tmp_path / "A", "test", [eval_row(0, 2)])
    before = EvalSource(tmp_path, "A")[0]
    write_parquet(tmp_path / "A", "test", [eval_row(0, 2, qry_inst="Look:", tgt_inst="")])
    after = EvalSource(tmp_path, "A")[0]
    assert before.query_key[0].startswith(M) and after.query_key[0].startswith(f"{M}\nLook: ")


def test_bad_candidate_lists_are_told_in_the_second_layout_too(tmp_path):
    rows = [eval_row(0, 3, qry_inst="x"), eval_row(1, 3, qry_inst="x", tgt_img_path=[""])]
    write_parquet(tmp_path / "A", "test", rows)
    with pytest.raises(UserError, match="row 1: 3 candidate texts .* but 1 candidate images"):
        EvalSource(tmp_path, "A").unique_keys()


# -------------------------------------------------------------------------------- image roots


def test_the_image_root_is_found_beside_the_rows(tmp_path):
    write_parquet(tmp_path / "A", "test", [eval_row(0, 2, qry_img_path="A/0.png")])
    assert EvalSource(tmp_path, "A").image_root == tmp_path
    write_image(tmp_path / "eval_images/A/0.png")
    source = EvalSource(tmp_path, "A")
    assert source.image_root == tmp_path / "eval_images"
    assert source.input(source[0].query_key).images == (tmp_path / "eval_images/A/0.png",)
    assert EvalSource(tmp_path, "A", "/elsewhere").image_root == Path("/elsewhere")
    assert verify.verify_eval([source], headers=True) == []


def link_out(root: Path) -> None:
    write_image(root / "outside/secret.png")
    make_train(root / "data", {"A": 3}, images=3)
    (root / "data/images/A/1.png").unlink()
    (root / "data/images/A/1.png").symlink_to(root / "outside/secret.png")
    (root / "data/images/A/2.png").unlink()
    (root / "data/images/A/2.png").symlink_to("0.png")  # within the root: no harm


def test_links_out_of_the_image_root_are_refused_unless_allowed(tmp_path):
    link_out(tmp_path)
    (source,) = open_train(tmp_path / "data")
    assert len(source[0].query.images) == len(source[2].query.images) == 1
    with pytest.raises(UserError, match=r"row 1: 'images/A/1.png': a symbolic link leads out"):
        source[1]
    (problem,) = verify.verify_train([source])
    assert (problem.index, problem.kind) == (1, verify.UNSAFE)
    (allowed,) = open_train(tmp_path / "data", follow_symlinks=True)
    assert allowed[1].query.images and verify.verify_train([allowed], headers=True) == []


def test_a_linked_folder_is_refused_and_a_linked_root_is_not(tmp_path):
    link_out(tmp_path)
    rows = train_rows("B", 1, images=1)
    rows[0]["qry_image_path"] = "images/out/secret.png"
    write_parquet(tmp_path / "data/B", "original", rows)
    (tmp_path / "data/images/out").symlink_to(tmp_path / "outside")
    (problem,) = verify.verify_train(open_train(tmp_path / "data", ["B"]))
    assert problem.kind == verify.UNSAFE and "symbolic link" in problem.message
    with pytest.raises(UserError, match="symbolic link"):
        TrainSource(tmp_path / "data", "B")[0]
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    assert len(TrainSource(tmp_path / "alias", "A")[0].query.images) == 1


# ---------------------------------------------------------------------------------- own pairs

PAIRS = [
    {"query": "a red cup", "positive": {"images": ["cup.png"]}, "negatives": ["x", "y"]},
    {
        "query": {"text": "how do they differ", "images": ["cup.png", "pan.png"]},
        "positive": "by colour",
    },
    {
        "query": {"text": f"{M} at the end", "image": "pan.png"},
        "positive": {"text": "pan"},
        "negatives": [{"text": "not this", "images": ["cup.png"]}],
    },
]


def write_pairs(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("cup.png", "pan.png"):
        write_image(path.parent / name)
    return path


def check_pairs(source: TrainSource, folder: Path):
    first, second, third = source.take(range(3))
    assert first.query.text == "a red cup" and first.positive.images == (folder / "cup.png",)
    assert [n.text for n in first.negatives] == ["x", "y"]
    assert second.query.text == "<|image_1|> <|image_2|> how do they differ"
    assert second.query.images == (folder / "cup.png", folder / "pan.png")
    assert second.negatives == () and second.positive.text == "by colour"
    assert third.query.text == f"{M} at the end" and third.query.problem() is None
    assert third.negatives[0].images == (folder / "cup.png",)
    assert third.negative_keys == ((f"{M} not this", "cup.png"),)
    assert verify.verify_train([source], headers=True) == []


def test_pairs_of_a_jsonl_file(tmp_path):
    file = write_pairs(tmp_path / "shop.jsonl", PAIRS)
    (source,) = open_train(file)
    assert source.subset == "shop" and len(source) == 3
    check_pairs(source, tmp_path)
    assert source.at(1) == f"{file} row 1"


def test_pairs_of_a_csv_file(tmp_path):
    write_pairs(tmp_path / "x.jsonl", [])
    (tmp_path / "x.jsonl").unlink()
    text = (
        "id,query,query_image,query_images,positive,positive_image,negatives,negative_1,"
        "negative_1_image\n"
        '1,a red cup,,,,cup.png,"[""x"", ""y""]",,\n'
        '2,how do they differ,,"[""cup.png"", ""pan.png""]",by colour,,,,\n'
        f"3,{M} at the end,pan.png,,pan,,,not this,cup.png\n"
    )
    (tmp_path / "shop.csv").write_text(text)
    check_pairs(TrainSource(tmp_path / "shop.csv", "shop"), tmp_path)
    (tmp_path / "shop.csv").unlink()
    lines = [["query", "positive"], ["a\tb", "c"], ["d", "e"]]
    (tmp_path / "t.tsv").write_text("\n".join('"' + '"\t"'.join(line) + '"' for line in lines))
    assert [r.query.text for r in TrainSource(tmp_path, "t").take([0, 1])] == ["a\tb", "d"]


@pytest.mark.parametrize("nested", [True, False])
def test_pairs_of_a_parquet_file(tmp_path, nested):
    write_pairs(tmp_path / "x.jsonl", [])
    (tmp_path / "x.jsonl").unlink()
    if nested:
        sides = [
            {
                name: {"text": v, "images": None} if isinstance(v, str) else
                {"text": v.get("text"), "images": v.get("images", [v["image"]] if "image" in v
                                                        else None)}
                for name, v in row.items() if name != "negatives"
            }
            for row in PAIRS
        ]  # fmt: skip
        for side, row in zip(sides, PAIRS):
            side["negatives"] = [
                {"text": n, "images": None} if isinstance(n, str) else n
                for n in row.get("negatives", [])
            ]
        table = pa.Table.from_pylist(sides)
    else:
        table = pa.table(
            {
                "query": ["a red cup", "how do they differ", f"{M} at the end"],
                "query_images": [None, ["cup.png", "pan.png"], ["pan.png"]],
                "positive": [None, "by colour", "pan"],
                "positive_image": ["cup.png", None, None],
                "negatives": [["x", "y"], None, []],
                "negative": [None, None, "not this"],
                "negative_image": ["", "", "cup.png"],
                "price": [1.0, 2.0, 3.0],
            }
        )
    pq.write_table(table, tmp_path / "shop.parquet")
    check_pairs(open_train(tmp_path)[0], tmp_path)


def test_a_folder_of_files_is_a_subset_each(tmp_path):
    write_pairs(tmp_path / "a.jsonl", PAIRS)
    write_pairs(tmp_path / "b.jsonl", PAIRS[:1])
    assert list_subsets(tmp_path, "original") == ["a", "b"]
    assert [len(s) for s in open_train(tmp_path, limit=2)] == [2, 1]
    with pytest.raises(UserError, match=r"unknown subset 'c'; .* has: a, b"):
        open_train(tmp_path, ["c"])
    (tmp_path / "a.csv").write_text("query,positive\nx,y\n")
    with pytest.raises(UserError, match="would be one subset"):
        open_train(tmp_path)


def test_a_folder_of_subsets_is_no_folder_of_files(tmp_path):
    make_train(tmp_path, {"A": 2})
    (tmp_path / "notes.csv").write_text("anything\n")
    assert list_subsets(tmp_path, "original") == ["A"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1]", "line 2: a line is a JSON object, not list"),
        ('{"query": "a"}', "line 2: positive: neither text nor image"),
        ('{"query": "", "positive": "b"}', "line 2: query: neither text nor image"),
        ('{"query": 3, "positive": "b"}', "line 2: query: an input must be"),
        ('{"qeury": "a", "positive": "b"}', "line 2: unknown column 'qeury'; did you mean query"),
        ('{"query": {"txt": "a"}, "positive": "b"}', r"line 2: query: unknown key\(s\) \['txt'\]"),
        ('{"query": "a", "positive": "b", "negatives": 3}', "negatives: must be a list, not int"),
        ('{"query": "a", "positive": "b", "negatives": ["c", ""]}', r"negatives\[1\]: neither"),
        ('{"query": "a", "positive": "b", "query_image": {"bytes": "x"}}', "path of a file"),
        ('{"query": {"images": ["a\\u001eb"]}, "positive": "b"}', "control character"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"query": "x", "positive": "y"}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        open_train(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"query\nx\n", "no column positive"),
        ("a.csv", b"query,positve\nx,y\n", "did you mean positive"),
        ("a.csv", b"query,positive\nx\n", "line 2: the row has not 2 cells"),
        ("a.csv", b"query,positive,negatives\nx,y,z\n", "line 2: negatives: must be a JSON list"),
        ("a.csv", b'query,positive\n"x,y\n', "not a readable table"),
        ("a.csv", b"query,positive\n\xff,y\n", "not UTF-8"),
        ("a.csv", b"", "no column query"),
        ("a.jsonl", b"\n\n", "no row in it"),
        ("a.parquet", b"PAR1 broken", "not a readable parquet file"),
        ("a.txt", b"x", "a data file is one of .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_train(tmp_path / name)


def test_all_bad_lines_come_in_one_message(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "x"}\n' * 30)
    with pytest.raises(UserError, match=r"(?s)30 problems.*line 20: .*and 10 more"):
        open_train(tmp_path / "a.jsonl")
    assert not list(tmp_path.glob(".arrow_cache/**/*.arrow"))


def test_pairs_are_candidates_for_evaluation(tmp_path):
    rows = [
        PAIRS[0],
        {"query": "q", "positive": "right", "candidates": ["wrong", "right", "other"]},
    ]
    write_pairs(tmp_path / "shop.jsonl", rows)
    (source,) = open_eval(tmp_path)
    assert source[0].target_keys == (("", "cup.png"), ("x", ""), ("y", ""))
    assert source[1].target_keys == (("right", ""), ("wrong", ""), ("other", ""))
    write_pairs(tmp_path / "shop.jsonl", [{**rows[1], "positive": "absent"}])
    with pytest.raises(UserError, match="line 1: the candidates do not hold the positive"):
        open_eval(tmp_path)


def test_images_of_several_are_all_checked(tmp_path):
    rows = [{"query": {"text": "two", "images": ["cup.png", "gone.png"]}, "positive": "y"},
            {"query": {"text": M, "images": ["cup.png", "pan.png"]}, "positive": "y"},
            {"query": {"images": ["../x.png"]}, "positive": "y"}]  # fmt: skip
    write_pairs(tmp_path / "a.jsonl", rows)
    (tmp_path / "pan.png").write_bytes(b"nothing")
    found = verify.verify_train(open_train(tmp_path), headers=True)
    assert [(p.index, p.kind) for p in found] == [
        (0, verify.MISSING), (1, verify.MARKERS), (1, verify.UNREADABLE), (2, verify.UNSAFE)
    ]  # fmt: skip
    assert "gone.png" in found[0].message
