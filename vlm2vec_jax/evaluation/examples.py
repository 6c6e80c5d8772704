# SPDX-License-Identifier: Apache-2.0
"""Example queries of a subset with their top targets as pictures, wrong ones first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec_jax.evaluation import html, store


def _predictions(folder: Path, subset: str) -> list[dict[str, Any]]:
    try:
        lines = store.predictions_path(folder, subset).read_text(
            encoding="utf-8", errors="surrogatepass"
        )
        rows = [json.loads(line) for line in lines.split("\n") if line]
    except (OSError, ValueError):
        return []
    needed = {"row", "correct", "query", "truth", "top", "rank"}
    return rows if all(isinstance(r, dict) and needed <= set(r) for r in rows) else []


def choose(correct: Sequence[bool], count: int) -> list[int]:
    """Rows to show: wrong ones, then right ones, half of each, spread evenly through the file.

    Where there are too few of one kind the other fills up.
    """
    wrong = [n for n, c in enumerate(correct) if not c]
    right = [n for n, c in enumerate(correct) if c]
    few = min(len(wrong), max(count - count // 2, count - len(right)))
    return [*_spread(wrong, few), *_spread(right, count - few)]


def _spread(rows: list[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[(2 * k + 1) * len(rows) // (2 * count)] for k in range(count)]


def cards(
    subset: str, shown: Path, before: Path | None, pictures: html.Pictures, count: int
) -> str:
    """Queries of a subset with their top targets, what they are in words above.

    Args:
      subset: its name.
      shown: evaluation folder of the model that is shown.
      before: that of the model to compare with.
      pictures: of the data.
      count: queries to show.
    """
    rows = _predictions(shown, subset)
    if not rows:
        return "<p>There are no predictions of this subset to show.</p>"
    earlier = {} if before is None else {r["row"]: r for r in _predictions(before, subset)}
    chosen = choose([bool(r["correct"]) for r in rows], count)
    right = sum(bool(r["correct"]) for r in rows)
    found = [
        f"<h2>Queries and their top targets</h2><p>{len(chosen)} of {len(rows)} queries "
        f"({len(rows) - right} wrong, {right} right), spread evenly through the file, half of them "
        "wrong where there are as many, the wrong ones first. Targets stand in the order of the "
        "model's scores. Green is the truth, red is what a wrong row took for it.</p>"
    ]
    for n in chosen:
        row = rows[n]
        then = earlier.get(row["row"])
        if then is not None and then["query"] != row["query"]:
            then = None
        found.append(_card(row, then, pictures))
    return "".join(found)


def _card(row: dict[str, Any], then: dict[str, Any] | None, pictures: html.Pictures) -> str:
    """One query with its targets."""
    of = f" of {row['candidates']}" if "candidates" in row else ""
    verdict = "✓ right" if row["correct"] else f"✗ wrong: truth at {row['rank']}{of}"
    was = f'<div class="before">untrained: rank {int(then["rank"])}{of}</div>' if then else ""
    predicted = row.get("predicted")
    targets, has_truth = [], False
    for place, target in enumerate(row["top"], 1):
        value = {"text": target["text"], "image": target["image"]}
        truth = bool(target.get("truth")) or value == row["truth"]
        has_truth |= truth
        taken = not row["correct"] and value == predicted
        targets.append(_target(value, str(place), target.get("score"), truth, taken, pictures))
    if not has_truth:
        score = row.get("truth_score")
        targets.append(_target(row["truth"], str(row["rank"]), score, True, False, pictures))
    return (
        f'<div class="query{"" if row["correct"] else " bad"}"><div>'
        f'<div class="verdict">{html.text(verdict)}</div>{pictures.item(row["query"])}{was}</div>'
        f'<div class="targets">{"".join(targets)}</div></div>'
    )


def _target(
    value: dict[str, str],
    place: str,
    score: float | None,
    truth: bool,
    taken: bool,
    pictures: html.Pictures,
) -> str:
    kind = "right" if truth else "wrong" if taken else ""
    word = " ✓ truth" if truth else " ✗ taken" if taken else ""
    number = f" · {score:.3f}" if isinstance(score, (int, float)) else ""
    return (
        f'<div class="target {kind}"><span class="tag">{html.text(place + word + number)}</span>'
        f"{pictures.item(value)}</div>"
    )
