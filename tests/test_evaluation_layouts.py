# SPDX-License-Identifier: Apache-2.0
"""One score whatever the layout: mini-MMEB plain, as the hub serves it, and as MMEB-V2 has it."""

from __future__ import annotations

import json

import pytest
from evaluation_data import FakeEncoder, write_image

from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
from vlm2vec_jax.data.prepare import prepare
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import html, run

SUBSETS = ("ImageNet-1K", "OK-VQA", "MSCOCO_t2i", "WebQA", "CIRR", "MSCOCO")


def test_every_layout_scores_the_same(tmp_path):
    scores, seen = {}, {}
    for layout in ("plain", "hub", "hub_v2"):
        write_mini_mmeb(tmp_path / layout, 1, 0.004, subsets=SUBSETS, layout=layout)
        data = tmp_path / layout / "eval"
        prepare(data)
        encoder = FakeEncoder()
        found = run.evaluate(encoder, data, output=tmp_path / f"out_{layout}")
        scores[layout] = {name: s["acc"] for name, s in found["subsets"].items()}
        seen[layout] = sorted(encoder.seen)
    assert len(scores["plain"]) == len(SUBSETS)
    assert scores["plain"] == scores["hub"] == scores["hub_v2"]
    assert seen["plain"] == seen["hub"] == seen["hub_v2"]  # texts to the last newline
    picture = next((tmp_path / "hub/eval/eval_images").rglob("*.png"))
    name = str(picture.relative_to(tmp_path / "hub/eval/eval_images"))
    assert html.Pictures(tmp_path / "hub/eval").show(name).startswith("<img")


def test_own_pairs_are_scored(tmp_path):
    rows = [
        {"query": {"images": ["a.png"]}, "positive": "a", "negatives": ["b", "c"]},
        {"query": {"text": "two", "images": ["a.png", "b.png"]}, "positive": "a",
         "candidates": ["b", "a"]},
    ]  # fmt: skip
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    encoder = FakeEncoder()
    found = run.evaluate(encoder, tmp_path / "shop.jsonl", output=tmp_path / "out")
    assert found["subsets"]["shop"]["meta_task"] == "other"
    assert ("<|image_1|> <|image_2|> two", ("a.png", "b.png")) in encoder.seen


def test_links_out_of_the_images_are_refused_before_embedding(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_image(tmp_path / "secret.png")
    (data / "a.png").symlink_to(tmp_path / "secret.png")
    line = {"query": {"images": ["a.png"]}, "positive": "a", "negatives": ["b"]}
    (data / "shop.jsonl").write_text(json.dumps(line) + "\n")
    encoder = FakeEncoder()
    with pytest.raises(UserError, match="symbolic link leads out"):
        run.evaluate(encoder, data, output=tmp_path / "out")
    assert not encoder.seen
    run.evaluate(encoder, data, output=tmp_path / "out", follow_symlinks=True)
    assert len(encoder.seen) == 3
