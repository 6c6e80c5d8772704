# SPDX-License-Identifier: Apache-2.0
"""Published scores: complete columns, and averages that follow from them up to rounding."""

import pytest

from vlm2vec_jax.evaluation import mmeb, published

CONTRADICTIONS = {
    # The paper prints another average than its own table 6 gives.
    ("SigLIP", "retrieval"): (31.6, 44.1),
    # Its column mixes variants: grounding is BLIP_FF's.
    ("UniIR CLIP_SF", "grounding"): (65.3, 62.2),
    ("UniIR CLIP_SF", "ind"): (47.1, 46.8),
    ("UniIR CLIP_SF", "ood"): (41.7, 41.3),
    ("UniIR CLIP_SF", "all"): (44.7, 44.3),
    # MoCa's appendix has the two of this model the other way round.
    ("MMRet-MLLM 7B", "ind"): (59.1, 68.0),
    ("MMRet-MLLM 7B", "ood"): (68.0, 59.2),
}
"""Where sources contradict themselves: what is printed, and what their own scores average to."""

WITH_SCORES = [p for p in published.PUBLISHED if p.scores]


def mean(scores, group: str) -> float:
    chosen = [
        scores[d.name] for d in mmeb.DATASETS if group in ("all", d.meta_task, d.split)
    ]  # fmt: skip
    return sum(chosen) / len(chosen)


def test_every_column_is_complete_and_in_percent():
    names = {d.name for d in mmeb.DATASETS}
    for entry in WITH_SCORES:
        assert set(entry.scores) == names, entry.model
        assert all(0 <= s <= 100 for s in entry.scores.values()), entry.model
    assert len({p.model for p in published.PUBLISHED}) == len(published.PUBLISHED)
    assert len(WITH_SCORES) == 20 and sum(p.reference for p in WITH_SCORES) == 4


@pytest.mark.parametrize("entry", WITH_SCORES, ids=lambda p: p.model)
def test_averages_follow_from_the_scores(entry):
    assert "all" in entry.averages
    for group, printed in entry.averages.items():
        own = mean(entry.scores, group)
        if (entry.model, group) in CONTRADICTIONS:
            said, really = CONTRADICTIONS[entry.model, group]
            assert printed == said and own == pytest.approx(really, abs=0.06)
            continue
        # Scores and averages are each rounded by at most 0.05 (their float sum by nothing).
        assert own == pytest.approx(printed, abs=0.1 + 1e-9), (group, own)


def test_averages_of_two_digits_follow_exactly():
    for entry in WITH_SCORES:
        if entry.source == published.RERUN:
            assert round(mean(entry.scores, "all"), 2) == pytest.approx(entry.averages["all"])


@pytest.mark.parametrize("entry", published.PUBLISHED, ids=lambda p: p.model)
def test_the_average_of_all_follows_from_the_groups(entry):
    """With or without scores per dataset: the 36 are 10 + 10 + 12 + 4, and 20 + 16."""
    groups = entry.averages
    if "classification" not in groups:
        return
    sizes = {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
    by_task = sum(groups[g] * n for g, n in sizes.items()) / 36
    by_split = (20 * groups["ind"] + 16 * groups["ood"]) / 36
    if not any(model == entry.model for model, _ in CONTRADICTIONS):
        assert by_task == pytest.approx(groups["all"], abs=0.11)
        assert by_split == pytest.approx(groups["all"], abs=0.11)


def test_lookups():
    assert published.find("VLM2Vec LLaVA-1.6, 1344 px").scores["ImageNet-1K"] == 74.5
    assert published.find("nobody's model") is None
    assert published.of_dataset("OVEN")["VLM2Vec-V2.0 2B"] == 64.8
    assert mmeb.find("OVEN").published == published.of_dataset("OVEN")
    assert published.of_dataset("MyShop") == {}
