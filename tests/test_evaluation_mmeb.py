# SPDX-License-Identifier: Apache-2.0
"""The table of MMEB's datasets: counts, groups, names."""

import collections

from vlm2vec_jax.evaluation import mmeb


def test_counts_of_groups():
    assert len(mmeb.DATASETS) == 36
    assert len({d.name for d in mmeb.DATASETS}) == 36
    tasks = collections.Counter(d.meta_task for d in mmeb.DATASETS)
    assert tasks == {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
    assert collections.Counter(d.split for d in mmeb.DATASETS) == {"ind": 20, "ood": 16}


def test_in_distribution_means_a_training_set():
    for d in mmeb.DATASETS:
        assert (d.train_rows > 0) == (d.split == "ind"), d.name
    # The paper's card speaks of about 662 thousand pairs under a cap of 50 thousand per dataset.
    capped = sum(min(d.train_rows, 50_000) for d in mmeb.DATASETS)
    assert 640_000 < capped < 690_000


def test_training_names_are_the_twenty_of_the_hub():
    names = {d.train_name for d in mmeb.DATASETS if d.split == "ind"}
    hub = """A-OKVQA ChartQA CIRR DocVQA HatefulMemes ImageNet_1K InfographicsVQA MSCOCO MSCOCO_i2t
      MSCOCO_t2i N24News NIGHTS OK-VQA SUN397 VisDial Visual7W VisualNews_i2t VisualNews_t2i VOC2007
      WebQA"""
    assert names == set(hub.split())


def test_modalities_follow_the_task():
    for d in mmeb.DATASETS:
        assert 2 <= d.candidates <= 1000
        if d.meta_task in ("classification", "vqa"):
            assert "image" in d.query and d.target == "text", d.name
        if d.meta_task == "grounding":
            assert d.query == "image+text" and "image" in d.target, d.name
    assert {d.name for d in mmeb.DATASETS if d.target == "image+text"} == {
        "WebQA", "OVEN", "EDIS", "RefCOCO-Matching"
    }  # fmt: skip


def test_names_are_found_in_both_spellings_and_nothing_is_guessed():
    assert mmeb.find("ImageNet-1K") is mmeb.find("ImageNet_1K") is not None
    assert mmeb.group_of("MSCOCO") == ("grounding", "ind")
    assert mmeb.group_of("RefCOCO") == ("grounding", "ood")
    assert mmeb.group_of("MyShop") == ("other", None)


def test_order_is_the_table_then_names():
    names = ["zeta", "RefCOCO", "alpha", "ImageNet-1K", "MSCOCO"]
    assert mmeb.in_order(names) == ["ImageNet-1K", "MSCOCO", "RefCOCO", "alpha", "zeta"]


def test_one_metric_and_a_thousand_queries_each():
    assert {(d.metric, d.queries) for d in mmeb.DATASETS} == {("hit@1", 1000)}
    assert mmeb.find("HatefulMemes").chance == 0.5
    assert all(len(d.published) == 20 for d in mmeb.DATASETS)


def test_the_training_sizes_are_the_cards():
    # Counts of a training log where the cards have more than thousands.
    exact = {"N24News": 48_988, "HatefulMemes": 8_500, "VOC2007": 7_844, "SUN397": 19_850}
    exact |= {"OK-VQA": 9_009, "A-OKVQA": 17_056}
    for name, rows in exact.items():
        assert mmeb.find(name).train_rows == rows
    capped = sum(min(d.train_rows, 50_000) for d in mmeb.DATASETS)
    assert round(capped, -3) == 662_000  # "about 662 K" under the paper's cap of 50 K a dataset
