# SPDX-License-Identifier: Apache-2.0
"""`scores.json` and `scores.md`: what the scores of single subsets come to together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import vlm2vec_jax
from vlm2vec_jax.evaluation import mmeb, store, tables
from vlm2vec_jax.evaluation.rows import Settings

_SUMMARY = (
    "acc",
    "meta_task",
    "split",
    "num_correct",
    "num_pred",
    "acc_reference",
    "published_shape",
    "metrics",
)


def write(
    output: Path,
    scores: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    made_with: Mapping[str, Any],
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Write both files.

    Args:
      output: the folder.
      scores: what `<subset>_score.json` holds, by subset.
      settings: how they were scored.
      made_with: fingerprint of the encoder.
      say: receives what a reader of the table needs to know.

    Returns:
      The content of `scores.json`.
    """
    names = mmeb.in_order(list(scores))
    subsets = {name: {k: scores[name].get(k) for k in _SUMMARY} for name in names}
    result: dict[str, Any] = {
        "benchmark": mmeb.BENCHMARK_VERSION,
        "version": vlm2vec_jax.__version__,
        "similarity": settings.similarity,
        "candidates": settings.candidates,
        "target_instruction": settings.target_instruction,
        "subsets": subsets,
        "averages": tables.averages(scores),
        "metric_averages": _metric_averages(scores),
        "fingerprint": made_with,
    }
    if settings.variants:
        result["variants"] = {v.name: _variant(scores, v.name) for v in settings.variants if scores}
    for note in tables.notes(result):
        say(note)
    store.write_text(output / "scores.md", tables.markdown(result))
    store.write_json(output / "scores.json", result)
    return result


def _metric_averages(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
    names = next((list(s["metrics"]) for s in scores.values()), [])
    return {
        name: tables.averages({k: {**s, "acc": s["metrics"][name]} for k, s in scores.items()})
        for name in names
    }


def _variant(scores: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Averages and scores per subset of smaller vectors."""
    small = {k: {**s, "acc": s["variants"][name]["acc"]} for k, s in scores.items()}
    return {
        "bytes": max(s["variants"][name]["bytes"] for s in scores.values()),
        "bytes_full": max(4 * s["dimension"] for s in scores.values()),
        "subsets": {k: s["acc"] for k, s in small.items()},
        "averages": tables.averages(small),
        "averages_reference": tables.averages(
            {k: {**s, "acc": s["variants"][name]["acc_reference"]} for k, s in scores.items()}
        ),
    }
