# SPDX-License-Identifier: Apache-2.0
"""Writes an evaluation folder that repeats itself as MMEB does, with mini-MMEB's pictures.

MMEB's lists are long (1000 candidates for most queries) and its datasets draw on the same sources:
ImageNet-1K and ImageNet-A list the same 1000 labels, and half of its datasets show pictures of
COCO, as queries with other questions (A-OKVQA, OK-VQA, Visual7W, GQA), as queries of captions
(MSCOCO_i2t) and as targets (MSCOCO_t2i, VisDial). Which pictures really come twice was not at hand,
so this is a sketch: the names, modalities, instructions and lengths of lists are MMEB's
(`vlm2vec_jax/evaluation/mmeb.py`), that all datasets of a source draw from one pool is made up.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MARKER = "<|image_1|>"
CANDIDATES = 1000
_QUESTION = f"{MARKER}\nRepresent the given image with the following question: {{}}\n"
_IMAGE = f"{MARKER} Represent the given image.\n"
_CLASS = f"{MARKER} Represent the given image for classification.\n"
_FIRST = ("red", "small", "old", "wooden", "bright", "wet", "broken", "striped", "heavy", "round")
_SECOND = ("bird", "lamp", "river", "wheel", "bottle", "horse", "tower", "basket", "coat", "clock")

Row = tuple[str, str, Sequence[str], Sequence[str]]
"""Query's text and image, candidates' texts and images; "" for none."""


def write_mmeb_like(pictures: Path, output: Path, queries: int, seed: int = 0) -> None:
    """Write `output/<Subset>/test-*.parquet` and `output/eval_images`.

    Args:
      pictures: a folder with pictures of any names, `2 * CANDIDATES` at least.
      output: the folder to make.
      queries: of each of the twelve datasets.
      seed: of everything random.
    """
    rng = random.Random(seed)
    files = sorted(pictures.rglob("*.png"))
    rng.shuffle(files)
    images = output / "eval_images"
    images.mkdir(parents=True)
    wanted = files[: CANDIDATES + 2 * queries]
    for n, file in enumerate(wanted):
        shutil.copyfile(file, images / f"{n}.png")
    names = [f"{n}.png" for n in range(len(wanted))]
    coco, classes = names[:CANDIDATES], names[CANDIDATES:]
    for subset, rows in _subsets(rng, coco, classes, queries).items():
        texts, paths, lists, list_paths = zip(*rows, strict=True)
        strings = pa.list_(pa.string())
        table = pa.table(
            {
                "qry_text": list(texts),
                "qry_img_path": list(paths),
                "tgt_text": pa.array([list(r) for r in lists], strings),
                "tgt_img_path": pa.array([list(r) for r in list_paths], strings),
            }
        )
        (output / subset).mkdir()
        pq.write_table(table, output / subset / "test-00000-of-00001.parquet")


def _subsets(rng: random.Random, coco: list[str], classes: list[str], queries: int):
    """Rows of every dataset."""
    words = [f"{a} {b}" for a in _FIRST for b in _SECOND]
    labels = [f"{word} {n}" for n in range(CANDIDATES // len(words)) for word in words]
    answers = [f"{n} {word}" for n in range(15) for word in words]
    captions = [f"A {rng.choice(words)} beside a {rng.choice(words)}, {n}." for n in range(3000)]
    nothing = [""] * CANDIDATES
    same = [_IMAGE] * CANDIDATES
    made: dict[str, list[Row]] = {}

    def shown() -> list[str]:
        return rng.sample(coco, queries)

    def with_truth(pool: Sequence[str], truth: str) -> list[str]:
        found = [c for c in rng.sample(pool, CANDIDATES) if c != truth]
        return [truth, *found[: CANDIDATES - 1]]

    for k, subset in enumerate(("ImageNet-1K", "ImageNet-A")):
        own = classes[k * queries : (k + 1) * queries]
        made[subset] = [(_CLASS, i, with_truth(labels, rng.choice(labels)), nothing) for i in own]
    for subset in ("A-OKVQA", "OK-VQA", "Visual7W", "GQA"):
        made[subset] = [
            (
                _QUESTION.format(f"Which {rng.choice(words)} is this?"),
                image,
                with_truth(answers, rng.choice(answers)),
                nothing,
            )
            for image in shown()
        ]
    find = f"{MARKER} Find an image caption describing the given everyday image.\n"
    made["MSCOCO_i2t"] = [
        (find, image, with_truth(captions, rng.choice(captions)), nothing) for image in shown()
    ]
    for subset, words_of in (
        ("MSCOCO_t2i", "Find me an everyday image that matches the given caption: {}\n"),
        (
            "VisDial",
            "Represent the given dialogue about an image, which is used for image retrieval: {}\n\n",
        ),
    ):
        made[subset] = [
            (words_of.format(rng.choice(captions)), "", same, with_truth(coco, image))
            for image in shown()
        ]
    select = f'{MARKER}\nSelect the portion of the image that isolates the object labeled as "{{}}"\n'
    made["MSCOCO"] = [
        (select.format(rng.choice(words)), image, same, with_truth(coco, rng.choice(coco)))
        for image in shown()
    ]
    similar = f"{MARKER}\nFind a day-to-day image that looks similar to the provided image.\n"
    made["NIGHTS"] = [
        (similar, image, same, with_truth(coco, rng.choice(coco))) for image in shown()
    ]
    made["CIRR"] = [
        (
            f"{MARKER}\nGiven an image, find a similar everyday image with the described changes: "
            f"with a {rng.choice(words)}\n",
            image,
            same,
            with_truth(coco, rng.choice(coco)),
        )
        for image in shown()
    ]
    return made
