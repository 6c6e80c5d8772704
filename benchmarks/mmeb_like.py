# SPDX-License-Identifier: Apache-2.0
"""Writes an evaluation folder that repeats itself as MMEB does, with mini-MMEB's pictures.

MMEB's lists are long (1000 candidates for most queries), its datasets have a folder of images each,
and several draw on the same source: ImageNet-1K and ImageNet-A list the same 1000 labels; pictures
of COCO are shown with questions (A-OKVQA, OK-VQA, Visual7W), are to be captioned (MSCOCO_i2t), and
are candidates themselves (MSCOCO_t2i, VisDial, with the same words around them). How many pictures
really come twice was not at hand, so this is a sketch: names, modalities, instructions and lengths
of lists are MMEB's, that every dataset draws its pictures of COCO from one pool of 1500 is made up.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CANDIDATES = 1000
_M = "<|image_1|>"
_IMAGE = f"{_M} Represent the given image.\n"
_CLASS = f"{_M} Represent the given image for classification.\n"
_QUESTION = f"{_M}\nRepresent the given image with the following question: {{}}\n"
_CAPTION = f"{_M} Find an image caption describing the given everyday image.\n"
_FIND = "Find me an everyday image that matches the given caption: {}\n"
_DIALOGUE = "Represent the given dialogue about an image, which is used for image retrieval: {}\n\n"
_PORTION = f'{_M}\nSelect the portion of the image that isolates the object labeled as "{{}}"\n'
_SIMILAR = f"{_M}\nFind a day-to-day image that looks similar to the provided image.\n"
_FIRST = ("red", "small", "old", "wooden", "bright", "wet", "broken", "striped", "heavy", "round")
_SECOND = ("bird", "lamp", "river", "wheel", "bottle", "horse", "tower", "basket", "coat", "clock")

Row = tuple[str, str, Sequence[str], Sequence[str]]
"""Query's text and image, candidates' texts and images; "" for none."""


def write_mmeb_like(pictures: Path, output: Path, queries: int, seed: int = 0) -> None:
    """Write `output/<Subset>/test-*.parquet` and `output/eval_images/<Subset>`.

    Args:
      pictures: a folder with PNG pictures, `3500 + 3 * queries` at least.
      output: the folder to make.
      queries: of each of the ten datasets.
      seed: of everything random.
    """
    rng = random.Random(seed)
    files = sorted(pictures.rglob("*.png"))
    rng.shuffle(files)
    for subset, rows in _subsets(rng, [str(file) for file in files], queries).items():
        texts, images, lists, list_images = zip(*rows, strict=True)
        folder = output / "eval_images" / subset
        folder.mkdir(parents=True)
        named = {"": ""}
        for image in sorted({*images, *(i for row in list_images for i in row)} - {""}):
            named[image] = f"eval_images/{subset}/{len(named)}.png"
            shutil.copyfile(image, output / named[image])
        strings = pa.list_(pa.string())
        table = pa.table(
            {
                "qry_text": list(texts),
                "qry_img_path": [named[i] for i in images],
                "tgt_text": pa.array([list(r) for r in lists], strings),
                "tgt_img_path": pa.array([[named[i] for i in r] for r in list_images], strings),
            }
        )
        (output / subset).mkdir()
        pq.write_table(table, output / subset / "test-00000-of-00001.parquet")


def _subsets(rng: random.Random, files: list[str], queries: int) -> dict[str, list[Row]]:
    """Rows of every dataset; images are files."""
    words = [f"{a} {b}" for a in _FIRST for b in _SECOND]
    labels = [f"{word} {n}" for n in range(CANDIDATES // len(words)) for word in words]
    answers = [f"{n} {word}" for n in range(15) for word in words]
    captions = [f"A {rng.choice(words)} beside a {rng.choice(words)}, {n}." for n in range(3000)]
    coco, portions, days = files[:1500], files[1500:2500], files[2500:3500]
    rest = iter(files[3500:])
    nothing, same = [""] * CANDIDATES, [_IMAGE] * CANDIDATES

    def own() -> list[str]:
        return [next(rest) for _ in range(queries)]

    def among(pool: Sequence[str], truth: str | None = None) -> list[str]:
        truth = rng.choice(pool) if truth is None else truth
        return [truth, *[c for c in rng.sample(pool, CANDIDATES) if c != truth][: CANDIDATES - 1]]

    made: dict[str, list[Row]] = {}
    for subset in ("ImageNet-1K", "ImageNet-A"):
        made[subset] = [(_CLASS, image, among(labels), nothing) for image in own()]
    for subset in ("A-OKVQA", "OK-VQA", "Visual7W"):
        made[subset] = [
            (_QUESTION.format(f"Is it a {rng.choice(words)}?"), image, among(answers), nothing)
            for image in rng.sample(coco, queries)
        ]
    made["MSCOCO_i2t"] = [
        (_CAPTION, image, among(captions), nothing) for image in rng.sample(coco, queries)
    ]
    for subset, words_of in (("MSCOCO_t2i", _FIND), ("VisDial", _DIALOGUE)):
        made[subset] = [
            (words_of.format(rng.choice(captions)), "", same, among(coco, image))
            for image in rng.sample(coco, queries)
        ]
    made["MSCOCO"] = [
        (_PORTION.format(rng.choice(words)), image, same, among(portions))
        for image in rng.sample(coco, queries)
    ]
    made["NIGHTS"] = [(_SIMILAR, image, same, among(days)) for image in own()]
    return made
