# SPDX-License-Identifier: Apache-2.0
"""From scores of subsets to averages and tables: `scores.json`'s numbers, markdown, console.

An average is the unweighted mean over its subsets, as in the paper: a subset counts once, however
many rows it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm2vec_jax.evaluation import mmeb

if TYPE_CHECKING:
    from rich.table import Table

AVERAGES = (*mmeb.META_TASKS, *mmeb.SPLITS, "all")
TITLES = {
    "classification": "Classification",
    "vqa": "VQA",
    "retrieval": "Retrieval",
    "grounding": "Grounding",
    "other": "Not one of MMEB's 36",
    "ind": "IND",
    "ood": "OOD",
    "all": "All",
}
NO_SCORE = "–"


def averages(subsets: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Unweighted means over subsets.

    Args:
      subsets: name -> {"acc": fraction, "meta_task", "split"}.

    Returns:
      For each of `AVERAGES` the mean as a fraction, None where no subset belongs to it. A subset
      without meta-task or split counts in "all" only.
    """
    result: dict[str, float | None] = {}
    for name in AVERAGES:
        scores = [
            float(s["acc"]) for s in subsets.values() if name in ("all", s["meta_task"], s["split"])
        ]
        result[name] = sum(scores) / len(scores) if scores else None
    return result


def percent(fraction: float | None) -> str:
    """A fraction in percent with one digit, a dash where there is none."""
    return NO_SCORE if fraction is None else f"{100 * fraction:.1f}"


def counts(subsets: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many subsets stand behind each average."""
    return {
        name: sum(name in ("all", s["meta_task"], s["split"]) for s in subsets.values())
        for name in AVERAGES
    }


def grouped(subsets: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Subset names by meta-task, both in the order of the paper's table; empty groups left out."""
    names = mmeb.in_order(list(subsets))
    groups = [
        (task, [n for n in names if subsets[n]["meta_task"] == task])
        for task in (*mmeb.META_TASKS, mmeb.OTHER)
    ]
    return [(task, members) for task, members in groups if members]


def markdown(scores: Mapping[str, Any]) -> str:
    """The table of `scores.md`: averages first, then each subset by meta-task, in percent."""
    subsets, means = scores["subsets"], scores["averages"]
    behind = counts(subsets)
    version = scores.get("benchmark", mmeb.BENCHMARK_VERSION)
    lines = [
        "# MMEB scores",
        "",
        f"{version}, hit@1 in percent; an average is the unweighted mean over its subsets.",
        "",
        "| | " + " | ".join(f"{TITLES[a]} ({behind[a]})" for a in AVERAGES) + " |",
        "|---|" + "---:|" * len(AVERAGES),
        "| **average** | " + " | ".join(percent(means[a]) for a in AVERAGES) + " |",
    ]
    for task, names in grouped(subsets):
        lines += [
            "",
            f"## {TITLES[task]}",
            "",
            "| subset | split | hit@1 | correct | rows | reference's count |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for name in names:
            s = subsets[name]
            lines.append(
                f"| {_cell(name)} | {TITLES.get(s['split'] or '', NO_SCORE)} | {percent(s['acc'])} "
                f"| {s['num_correct']} | {s['num_pred']} | {percent(s['acc_reference'])} |"
            )
    lines += [*_metrics(scores), *_variants(scores), "", *notes(scores)]
    return "\n".join(lines).rstrip() + "\n"


def _metrics(scores: Mapping[str, Any]) -> list[str]:
    """Averages of every metric at every cut-off."""
    means = scores.get("metric_averages")
    if not means:
        return []
    names = list(dict.fromkeys(name.split("@")[0] for name in means))
    ks = list(dict.fromkeys(name.split("@")[1] for name in means))
    lines = [
        "",
        "## Metrics",
        "",
        "Average over all subsets, in percent.",
        "",
        "| metric | " + " | ".join(f"@{k}" for k in ks) + " |",
        "|---|" + "---:|" * len(ks),
    ]
    for name in names:
        values = [percent(means[f"{name}@{k}"]["all"]) for k in ks]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return lines


def _variants(scores: Mapping[str, Any]) -> list[str]:
    """Smaller vectors beside the full ones."""
    found = scores.get("variants")
    if not found:
        return []
    full = next(iter(found.values()))["bytes_full"]
    lines = [
        "",
        "## Smaller vectors",
        "",
        "hit@1 in percent of what a vector store would keep. A tie counts as wrong, and short or "
        "binary vectors tie often: the last column counts ties as the reference does.",
        "",
        "| vectors | bytes | "
        + " | ".join(TITLES[a] for a in AVERAGES)
        + " | All, ties as right |",
        "|---|---:|" + "---:|" * (len(AVERAGES) + 1),
    ]

    def line(name: str, size: int, means: Mapping[str, float | None], lucky: float | None) -> str:
        cells = [percent(means[a]) for a in AVERAGES]
        return f"| {name} | {size} | {' | '.join(cells)} | {percent(lucky)} |"

    reference = [s["acc_reference"] for s in scores["subsets"].values()]
    lines.append(line("full", full, scores["averages"], sum(reference) / len(reference)))
    for name, v in found.items():
        lines.append(line(name, v["bytes"], v["averages"], v["averages_reference"]["all"]))
    return lines


def notes(scores: Mapping[str, Any]) -> list[str]:
    """Sentences that a reader of the table needs."""
    subsets = scores["subsets"]
    found = []
    other = [n for n, s in subsets.items() if s["meta_task"] == mmeb.OTHER]
    if other:
        found.append(
            f"Not among MMEB's 36 datasets, so without meta-task and IND/OOD, counted in the "
            f"average over all only: {', '.join(mmeb.in_order(other))}."
        )
    missing = [d.name for d in mmeb.DATASETS if d.name not in subsets]
    if missing and len(missing) < len(mmeb.DATASETS):
        found.append(
            f"{len(mmeb.DATASETS) - len(missing)} of MMEB's 36 datasets were scored; averages "
            f"compare with published ones only over all of them."
        )
    differ = [n for n, s in subsets.items() if s["acc"] != s["acc_reference"]]
    if differ:
        found.append(
            f"The reference counts ties and non-finite values as correct; here they are wrong. "
            f"Both differ in: {', '.join(mmeb.in_order(differ))}."
        )
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def console_table(scores: Mapping[str, Any]) -> Table:
    """The same table for a terminal (rich)."""
    from rich.table import Table
    from rich.text import Text

    subsets, means = scores["subsets"], scores["averages"]
    behind = counts(subsets)
    table = Table(title="MMEB scores (hit@1, percent)")
    table.add_column("subset")
    table.add_column("split")
    for title in ("hit@1", "correct", "rows"):
        table.add_column(title, justify="right")
    for task, names in grouped(subsets):
        for name in names:
            s = subsets[name]
            table.add_row(
                Text(name),
                TITLES.get(s["split"] or "", NO_SCORE),
                percent(s["acc"]),
                str(s["num_correct"]),
                str(s["num_pred"]),
            )
        if task in means:
            title = f"{TITLES[task]}, mean of {behind[task]}"
            table.add_row(Text(title, style="bold"), "", Text(percent(means[task]), style="bold"))
        table.add_section()
    for name in (*mmeb.SPLITS, "all"):
        if behind[name]:
            title = f"{TITLES[name]}, mean of {behind[name]}"
            table.add_row(Text(title, style="bold"), "", Text(percent(means[name]), style="bold"))
    return table
