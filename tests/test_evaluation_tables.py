# SPDX-License-Identifier: Apache-2.0
"""Averages and tables of scores."""

import pytest

from vlm2vec_jax.evaluation import mmeb, tables


def score(name, acc, reference=None):
    task, split = mmeb.group_of(name)
    return {
        "acc": acc, "meta_task": task, "split": split, "num_correct": int(acc * 10),
        "num_pred": 10, "acc_reference": acc if reference is None else reference,
    }  # fmt: skip


def scores(**accuracies):
    subsets = {n.replace("__", "-"): score(n.replace("__", "-"), a) for n, a in accuracies.items()}
    return {"subsets": subsets, "averages": tables.averages(subsets)}


def test_averages_are_means_over_subsets():
    found = scores(VOC2007=0.4, ObjectNet=0.2, SUN397=0.6, MSCOCO=0.8, MyShop=1.0)["averages"]
    assert found["classification"] == pytest.approx(0.4)
    assert found["grounding"] == pytest.approx(0.8)
    assert found["vqa"] is None and found["retrieval"] is None
    assert found["ind"] == pytest.approx((0.4 + 0.6 + 0.8) / 3)
    assert found["ood"] == pytest.approx(0.2)
    # A subset of one's own has no group, and counts over all.
    assert found["all"] == pytest.approx((0.4 + 0.2 + 0.6 + 0.8 + 1.0) / 5)
    assert list(found) == [
        "classification", "vqa", "retrieval", "grounding", "ind", "ood", "all"
    ]  # fmt: skip


def test_the_published_averages_of_clip():
    """The paper's per-dataset scores of CLIP give the averages that the paper prints."""
    published = """55.8 34.7 51.1 50.7 43.4 28.5 25.5 75.6 43.4 19.2
      7.5 3.8 4.0 4.6 1.4 4.0 9.4 8.2 41.3 7.0
      30.7 12.6 78.9 79.6 59.5 57.7 60.4 67.5 41.1 11.4 81.0 55.0 33.8 55.1 56.9 61.3"""
    subsets = {
        d.name: score(d.name, float(p) / 100)
        for d, p in zip(mmeb.DATASETS, published.split(), strict=True)
    }
    printed = {
        "classification": 42.8, "vqa": 9.1, "retrieval": 53.0, "grounding": 51.8,
        "ind": 37.1, "ood": 38.7, "all": 37.8,
    }  # fmt: skip
    assert {k: 100 * v for k, v in tables.averages(subsets).items()} == pytest.approx(
        printed, abs=0.0501
    )


def test_markdown_says_what_is_missing():
    value = scores(VOC2007=0.4, ObjectNet=0.25, My__Shop=1.0)
    text = tables.markdown(value)
    assert "| **average** | 32.5 | – | – | – | 40.0 | 25.0 | 55.0 |" in text
    assert "| VOC2007 | IND | 40.0 | 4 | 10 | 40.0 |" in text
    assert "| My-Shop | – | 100.0 | 10 | 10 | 100.0 |" in text
    assert "2 of MMEB's 36 datasets" in text
    assert "Not among MMEB's 36 datasets" in text
    assert "ties" not in text


def test_a_difference_from_the_reference_is_said():
    subsets = {"VOC2007": score("VOC2007", 0.5, reference=1.0)}
    value = {"subsets": subsets, "averages": tables.averages(subsets)}
    assert any("ties and non-finite" in n and "VOC2007" in n for n in tables.notes(value))


def test_markup_in_a_name_does_not_break_the_table():
    value = scores(**{"a|b[red]": 0.5})
    assert "| a\\|b[red] | – |" in tables.markdown(value)


def test_console_table_holds_every_row():
    from rich.console import Console

    value = scores(VOC2007=0.4, MSCOCO=0.8, **{"odd[bold]": 1.0})
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(tables.console_table(value))
    text = console.export_text()
    for words in ("VOC2007", "40.0", "Grounding, mean of 1", "80.0", "odd[bold]", "All, mean of 3"):
        assert words in text
