# SPDX-License-Identifier: Apache-2.0
"""MMEB as data: its 36 image datasets, what each asks, and how they group for the averages.

Every dataset has 1000 test queries; the metric is precision@1 (= hit@1) over the row's own
candidate list, whose first entry is the truth. Sources: the VLM2Vec paper (arXiv 2410.05160) and
the dataset cards of TIGER-Lab/MMEB-train and MMEB-eval.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from vlm2vec_jax.evaluation import published as published_scores

MetaTask = Literal["classification", "vqa", "retrieval", "grounding"]
Split = Literal["ind", "ood"]
Modality = Literal["image", "text", "image+text"]

META_TASKS: tuple[MetaTask, ...] = ("classification", "vqa", "retrieval", "grounding")
SPLITS: tuple[Split, ...] = ("ind", "ood")
OTHER = "other"
"""Meta-task of a subset that is not one of the 36."""

BENCHMARK_VERSION = "MMEB-v1-36"
"""Named in every score file: 36 image datasets, hit@1 over each row's own candidates."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset of the benchmark.

    Attributes:
      name: as MMEB-eval spells it (`ImageNet-1K`).
      meta_task: the group of the paper's table.
      split: "ind" if MMEB-train has a training set of it, "ood" if held out.
      query: what the query is made of.
      target: what the candidates are made of.
      candidates: length of a row's candidate list.
      train_rows: rows of MMEB-train's `original` split, 0 for a held-out dataset. Where the
        cards give only thousands the figure is rounded.
      queries: rows of MMEB-eval's `test` split.
      metric: the score that counts, as MMEB-V2's score files name it.
    """

    name: str
    meta_task: MetaTask
    split: Split
    query: Modality
    target: Modality
    candidates: int
    train_rows: int = 0
    queries: int = 1000
    metric: str = "hit@1"

    @property
    def chance(self) -> float:
        """The score of a blind guess, as a fraction."""
        return 1 / self.candidates

    @property
    def published(self) -> dict[str, float]:
        """Published percentages on this dataset by model (`published.PUBLISHED`)."""
        return published_scores.of_dataset(self.name)

    @property
    def train_name(self) -> str:
        """The folder name in MMEB-train, which differs for one dataset (`ImageNet_1K`)."""
        return "ImageNet_1K" if self.name == "ImageNet-1K" else self.name


def _table() -> tuple[Dataset, ...]:
    i, t, it = "image", "text", "image+text"
    cls, vqa, ret, grd = META_TASKS
    return (
        Dataset("ImageNet-1K", cls, "ind", i, t, 1000, 100_000),
        # The paper's table prints the target of N24News as an image; the data has labels.
        Dataset("N24News", cls, "ind", it, t, 24, 48_988),
        Dataset("HatefulMemes", cls, "ind", i, t, 2, 8_500),
        Dataset("VOC2007", cls, "ind", i, t, 20, 7_844),
        Dataset("SUN397", cls, "ind", i, t, 397, 19_850),
        Dataset("Place365", cls, "ood", i, t, 365),
        Dataset("ImageNet-A", cls, "ood", i, t, 1000),
        Dataset("ImageNet-R", cls, "ood", i, t, 200),
        Dataset("ObjectNet", cls, "ood", i, t, 313),
        Dataset("Country211", cls, "ood", i, t, 211),
        Dataset("OK-VQA", vqa, "ind", it, t, 1000, 9_009),
        Dataset("A-OKVQA", vqa, "ind", it, t, 1000, 17_056),
        Dataset("DocVQA", vqa, "ind", it, t, 1000, 40_000),
        Dataset("InfographicsVQA", vqa, "ind", it, t, 1000, 24_000),
        Dataset("ChartQA", vqa, "ind", it, t, 1000, 28_000),
        Dataset("Visual7W", vqa, "ind", it, t, 1000, 70_000),
        Dataset("ScienceQA", vqa, "ood", it, t, 1000),
        Dataset("VizWiz", vqa, "ood", it, t, 1000),
        Dataset("GQA", vqa, "ood", it, t, 1000),
        Dataset("TextVQA", vqa, "ood", it, t, 1000),
        Dataset("VisDial", ret, "ind", t, i, 1000, 123_000),
        Dataset("CIRR", ret, "ind", it, i, 1000, 26_000),
        Dataset("VisualNews_t2i", ret, "ind", t, i, 1000, 100_000),
        Dataset("VisualNews_i2t", ret, "ind", i, t, 1000, 100_000),
        Dataset("MSCOCO_t2i", ret, "ind", t, i, 1000, 100_000),
        Dataset("MSCOCO_i2t", ret, "ind", i, t, 1000, 113_000),
        Dataset("NIGHTS", ret, "ind", i, i, 1000, 16_000),
        Dataset("WebQA", ret, "ind", t, it, 1000, 17_000),
        Dataset("OVEN", ret, "ood", it, it, 1000),
        Dataset("FashionIQ", ret, "ood", it, i, 1000),
        Dataset("EDIS", ret, "ood", t, it, 1000),
        Dataset("Wiki-SS-NQ", ret, "ood", t, i, 1000),
        Dataset("MSCOCO", grd, "ind", it, i, 1000, 100_000),
        Dataset("Visual7W-Pointing", grd, "ood", it, i, 1000),
        Dataset("RefCOCO", grd, "ood", it, i, 1000),
        Dataset("RefCOCO-Matching", grd, "ood", it, it, 1000),
    )


DATASETS: tuple[Dataset, ...] = _table()
"""The 36 datasets in the order of the paper's table."""

_BY_NAME = {name: d for d in DATASETS for name in (d.name, d.train_name)}
_ORDER = {d.name: k for k, d in enumerate(DATASETS)}


def find(name: str) -> Dataset | None:
    """The dataset of this name (MMEB-eval's or MMEB-train's spelling), None if not of the 36."""
    return _BY_NAME.get(name)


def group_of(name: str) -> tuple[str, str | None]:
    """Meta-task and split of a subset.

    Returns:
      (meta_task, split) of one of the 36; (`OTHER`, None) for any other name: nothing about it
      is guessed, and it counts in the average "all" only.
    """
    found = find(name)
    return (found.meta_task, found.split) if found else (OTHER, None)


def in_order(names: list[str]) -> list[str]:
    """Sort subset names as the paper's table does, others behind them by name."""

    def place(name: str) -> tuple[int, str]:
        found = find(name)
        return (_ORDER[found.name] if found else len(DATASETS), name)

    return sorted(names, key=place)
