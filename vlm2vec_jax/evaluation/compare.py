# SPDX-License-Identifier: Apache-2.0
"""Our scores beside published ones: which may be compared, the table, and the differences.

Published numbers are of MMEB's own data. A subset is compared only if it has as many queries and
candidates as they were made with (`published_shape` in its score), and a group's average only if
all of its datasets were scored so; anything else would look like a result and be none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import mmeb, published, tables


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the comparison, in percent.

    Attributes:
      name: a dataset's name, or the title of an average.
      average: whether it is an average.
      ours: our score.
      theirs: the models' scores in their order; None where a source gives none.
    """

    name: str
    average: bool
    ours: float
    theirs: list[float | None]


def models(names: Sequence[str] | None = None) -> list[published.Published]:
    """The published models of these names; by default VLM2Vec's own, with datasets first.

    Raises:
      UserError: listing the names that are known.
    """
    if names is None:
        own = [p for p in published.PUBLISHED if p.reference]
        return sorted(own, key=lambda p: not p.scores)  # stable: the others keep their order
    if list(names) == ["all"]:
        return list(published.PUBLISHED)
    found = [published.find(name) for name in names]
    unknown = [repr(n) for n, p in zip(names, found, strict=True) if p is None]
    if unknown:
        known = "; ".join(p.model for p in published.PUBLISHED)
        raise UserError(f"no published scores of {', '.join(unknown)}; known are: all; {known}")
    return [p for p in found if p is not None]


def comparable(scores: Mapping[str, Any]) -> list[str]:
    """The subsets that may be compared, in the order of the paper's table."""
    return mmeb.in_order([n for n, s in scores["subsets"].items() if s.get("published_shape")])


def lines(scores: Mapping[str, Any], chosen: Sequence[published.Published]) -> list[Line]:
    """All rows of the comparison: datasets by meta-task, then averages."""
    names = comparable(scores)
    subsets = {n: scores["subsets"][n] for n in names}
    found = []
    for _, members in tables.grouped(subsets):
        for name in members:
            known = mmeb.find(name)
            key = known.name if known else name
            theirs = [p.scores.get(key) for p in chosen]
            found.append(Line(name, False, 100 * subsets[name]["acc"], theirs))
    means = tables.averages(subsets)
    behind = tables.counts(subsets)
    whole = tables.counts(
        {d.name: {"meta_task": d.meta_task, "split": d.split} for d in mmeb.DATASETS}
    )
    for group in tables.AVERAGES:
        mean = means[group]
        if mean is not None and behind[group] == whole[group]:
            theirs = [p.averages.get(group, _mean(p, group)) for p in chosen]
            title = f"{tables.TITLES[group]}: mean of {whole[group]}"
            found.append(Line(title, True, 100 * mean, theirs))
    return found


def _mean(entry: published.Published, group: str) -> float | None:
    """A published model's average over a group, None unless it has all of the group's scores."""
    members = [d.name for d in mmeb.DATASETS if group in ("all", d.meta_task, d.split)]
    if not all(name in entry.scores for name in members):
        return None
    return sum(entry.scores[name] for name in members) / len(members)


def difference(ours: float, theirs: float | None) -> str:
    """A published score with how far ours is from it: `62.9 (+1.3)`."""
    return tables.NO_SCORE if theirs is None else f"{theirs:.1f} ({ours - theirs:+.1f})"


def mark(ours: float, theirs: float | None) -> str:
    """`up` where ours is higher by at least a twentieth of a point, `down` where lower."""
    if theirs is None or abs(ours - theirs) < 0.05:
        return ""
    return "up" if ours > theirs else "down"


def note(scores: Mapping[str, Any]) -> str:
    """A sentence on what could not be compared, empty if all was."""
    known = [n for n in scores["subsets"] if mmeb.find(n) is not None]
    other = len(known) - len(comparable(scores))
    if not other:
        return ""
    return (
        f"{other} of {len(known)} subsets of MMEB's names have another number of queries or "
        f"candidates than MMEB-eval, so published scores do not compare with theirs."
    )


def markdown(scores: Mapping[str, Any], chosen: Sequence[published.Published]) -> str:
    """The comparison as a markdown table, with the sources below; empty if nothing compares."""
    rows = lines(scores, chosen)
    if not rows or not chosen:
        return ""
    head = ["", "ours", *(p.model for p in chosen)]
    out = [
        "## Beside published models",
        "",
        "Percent; in brackets how far ours is above (+) or below (-) the published score.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    for row in rows:
        cells = [difference(row.ours, t) for t in row.theirs]
        name = f"**{row.name}**" if row.average else row.name
        out.append(f"| {name} | {row.ours:.1f} | " + " | ".join(cells) + " |")
    sources = {p.source: None for p in chosen}
    out += ["", "Sources: " + "; ".join(sources) + "."]
    return "\n".join(out) + "\n"
