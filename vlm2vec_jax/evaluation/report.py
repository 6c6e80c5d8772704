# SPDX-License-Identifier: Apache-2.0
"""An evaluation as static pages: scores, training curves, and queries with their top targets.

    python -m vlm2vec_jax.evaluation.report --trained DIR [--untrained DIR] [--train DIR]
        [--data DIR] --output report.html [--compare MODEL ...]

`--trained` and `--untrained` are output folders of `evaluate`, `--train` is one of `train`; each
may be left out, but not both of the first two. `report.html` has the tables and charts; it leads to
a page for each dataset in `report_pages/`, with example queries and their top targets as pictures.
Pages open offline, load nothing and run nothing: pictures are inside them. The tables stand beside
them as markdown (`report.md`). Published scores are shown beside ours where the data is MMEB's own;
`--compare` (once per model, or `all`) chooses other models than VLM2Vec's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import charts, compare, html, mmeb, pages, store, tables
from vlm2vec_jax.flags import run
from vlm2vec_jax.training import metrics

CURVES = (("Loss", "loss"), ("In-batch accuracy", "accuracy"), ("Learning rate", "lr"))
EXAMPLES = 12

Scores = dict[str, Any]


def write_report(
    output: str | os.PathLike,
    *,
    trained: str | os.PathLike | None = None,
    untrained: str | os.PathLike | None = None,
    train: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    count: int = EXAMPLES,
    models: Sequence[str] | None = None,
) -> Path:
    """Write the report.

    Args:
      output: the HTML file; the markdown has its name with another ending, and the pages of the
        datasets lie in a folder beside it (`pages.folder_of`).
      trained: evaluation folder of the model that is shown.
      untrained: evaluation folder of the model to compare with.
      train: training folder, for the curves of its `metrics.jsonl`.
      data: the data folder, for pictures.
      image_root: what image paths are relative to, `data` by default.
      count: queries to show per dataset; half of them wrong where there are as many.
      models: published models to compare with (`compare.models`).

    Returns:
      The path of the file.

    Raises:
      UserError: no evaluation folder, or one without a readable `scores.json`; a file that
        cannot be written.
    """
    runs = {
        name: _scores(folder)
        for name, folder in (("untrained", untrained), ("trained", trained))
        if folder is not None
    }
    if not runs:
        raise UserError("a report needs an evaluation folder: --trained, --untrained, or both")
    folders = {"untrained": untrained, "trained": trained}
    scores, chosen, output = list(runs.values())[-1], compare.models(models), Path(output)
    lines = compare.lines(scores, chosen) if chosen else []
    links = pages.write(
        output,
        runs,
        {label: folder for label, folder in folders.items() if folder is not None},
        image_root if image_root is not None else data,
        count,
        lines,
        [p.model for p in chosen],
    )
    parts = [
        _head(scores, runs),
        _averages(runs),
        _radar(runs, scores, chosen),
        _training(train),
        _subsets(runs, links),
        _published(scores, chosen, lines, links),
    ]
    store.write_text(output.with_suffix(".md"), _markdown(runs, scores, chosen))
    store.write_text(output, html.page("Evaluation report", "\n".join(parts)))
    return output


def _markdown(runs: Mapping[str, Scores], scores: Scores, chosen) -> str:
    """The tables as markdown: the model that is shown, what it gained, and published models."""
    parts = [tables.markdown(_complete(scores))]
    if len(runs) > 1:
        head, rows = _subset_rows(runs)
        lines = ["## Before and after", "", "| " + " | ".join(head) + " |"]
        lines.append("|" + "---|" * 3 + "---:|" * (len(head) - 3))
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for _, row in rows]
        parts.append("\n".join(lines) + "\n")
    parts += [compare.markdown(scores, chosen), compare.note(scores)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _scores(folder: str | os.PathLike) -> Scores:
    path = Path(folder) / "scores.json"
    scores = store.read_json(path)
    if scores is None or "subsets" not in scores or "averages" not in scores:
        what = "cannot be read as scores" if path.exists() else "is not there"
        raise UserError(f"{path} {what}; run `python -m vlm2vec_jax.evaluate` first")
    return scores


# ------------------------------------------------------------------------------------ the numbers


def _head(main: Scores, runs: Mapping[str, Scores]) -> str:
    rows = sum(s.get("num_pred", 0) for s in main["subsets"].values())
    count = len(main["subsets"])
    tiles = []
    for name in tables.AVERAGES:
        now = main["averages"].get(name)
        if now is None:
            continue
        line = f"{tables.TITLES[name]}"
        then = runs["untrained"]["averages"].get(name) if len(runs) > 1 else None
        change = f"<span>untrained {tables.percent(then)}</span>" if then is not None else ""
        tiles.append(
            f'<div class="tile"><span>{html.text(line)}</span>'
            f"<b>{tables.percent(now)}</b>{change}</div>"
        )
    notes = "".join(f"<p>{html.text(note)}</p>" for note in tables.notes(_complete(main)))
    return (
        f"<h1>Evaluation report</h1><p>hit@1 in percent over {count} "
        f"subset{'s' if count != 1 else ''} and {rows} queries; averages are unweighted means "
        f'over subsets.</p><div class="tiles">{"".join(tiles)}</div>{notes}'
    )


def _complete(scores: Scores) -> Scores:
    """The scores with fields that other writers of the contract may leave out."""
    subsets = {
        name: {"meta_task": mmeb.OTHER, "split": None, "acc_reference": s["acc"], **s}
        for name, s in scores["subsets"].items()
    }
    return {**scores, "subsets": subsets}


def _averages(runs: Mapping[str, Scores]) -> str:
    present = [
        a for a in tables.AVERAGES if any(r["averages"].get(a) is not None for r in runs.values())
    ]
    if not present:
        return ""
    series = {label: [r["averages"].get(a) for a in present] for label, r in runs.items()}
    svg = charts.bars([tables.TITLES[a] for a in present], series)
    return f"<h2>Averages</h2>{html.chart(svg, 'bars of the average scores')}"


def _radar(runs: Mapping[str, Scores], scores: Scores, chosen) -> str:
    """All datasets at a glance, with two published models where they compare."""
    names = mmeb.in_order(list(scores["subsets"]))
    if len(names) < 3:
        return ""
    series: dict[str, list[float | None]] = {
        label: [r["subsets"].get(n, {}).get("acc") for n in names] for label, r in runs.items()
    }
    if compare.comparable(scores) == names:
        for entry in [p for p in chosen if all(n in p.scores for n in names)][:2]:
            series[entry.model] = [entry.scores[n] / 100 for n in names]
    svg = charts.radar(names, series)
    return f"<h2>Datasets</h2>{html.chart(svg, 'radar of the scores of all datasets')}"


def _published(scores: Scores, chosen, rows: Sequence[compare.Line], links) -> str:
    """The table beside published models, higher and lower scores marked."""
    note = compare.note(scores)
    if not rows:
        return f"<h2>Published models</h2><p>{html.text(note)}</p>" if note else ""
    head = ["dataset", "ours", *(p.model for p in chosen)]
    cells, marks = [], []
    for row in rows:
        values = [compare.difference(row.ours, t) for t in row.theirs]
        cells.append(("mean" if row.average else "", [row.name, f"{row.ours:.1f}", *values]))
        marks.append(["", "", *(compare.mark(row.ours, t) for t in row.theirs)])
    means = [row for row in rows if row.average]
    chart = ""
    if means:
        series: dict[str, list[float | None]] = {"ours": [m.ours / 100 for m in means]}
        with_all = [k for k in range(len(chosen)) if all(m.theirs[k] is not None for m in means)]
        for k in with_all[:4]:
            series[chosen[k].model] = [(m.theirs[k] or 0.0) / 100 for m in means]
        svg = charts.bars([m.name.split(":")[0] for m in means], series)
        chart = html.chart(svg, "bars of our averages beside published ones")
    sources = "; ".join({p.source: None for p in chosen})
    return (
        "<h2>Published models</h2><p>Percent; in brackets how far ours is above (+) or below (-) "
        f"the published score.</p>{chart}{html.table(head, cells, 1, marks, links)}"
        f"<p>{html.text(note)}</p><p>Sources: {html.text(sources)}.</p>"
    )


def _training(train: str | os.PathLike | None) -> str:
    if train is None:
        return ""
    rows = _metrics(Path(train) / metrics.FILE)
    if not rows:
        return "<h2>Training</h2><p>There are no metrics of the training.</p>"
    panels = []
    for title, name in CURVES:
        points = [(r["step"], _number(r.get(name))) for r in rows if name in r]
        if any(math.isfinite(v) for _, v in points):
            panels.append((title, [p[0] for p in points], [p[1] for p in points]))
    if not panels:
        return "<h2>Training</h2><p>There are no metrics of the training.</p>"
    last = ", ".join(f"{title.lower()} {values[-1]:.4g}" for title, _, values in panels)
    return (
        f"<h2>Training</h2><p>{rows[-1]['step']} steps; at the end {html.text(last)}.</p>"
        f"{html.chart(charts.curves(panels), 'training curves')}"
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Steps of a training; none if there is no such file."""
    try:
        rows = metrics.read_metrics(path)
    except UserError:
        return []
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _subsets(runs: Mapping[str, Scores], links: Mapping[str, str]) -> str:
    """The table of all datasets by meta-task; a name leads to the dataset's page."""
    head, rows = _subset_rows(runs)
    return (
        "<h2>Scores</h2><p>A dataset's name leads to its page: example queries with their top "
        f"targets, wrong ones first.</p>{html.table(head, rows, left=3, links=links)}"
    )


def _subset_rows(runs: Mapping[str, Scores]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles and rows of the table of all subsets."""
    everything = {n: s for r in runs.values() for n, s in _complete(r)["subsets"].items()}
    labels = list(runs)
    both = len(labels) > 1
    head = ["subset", "meta-task", "split", *labels, *(["gain"] if both else []), "queries"]

    def line(name: str, task: str, split: str, values: list[float | None], queries: str):
        gain = []
        if both:
            known = None not in values
            gain = [f"{100 * (values[1] - values[0]):+.1f}" if known else tables.NO_SCORE]  # type: ignore[operator]
        return [name, task, split, *(tables.percent(v) for v in values), *gain, queries]

    rows = []
    for task, names in tables.grouped(everything):
        for name in names:
            s = everything[name]
            values = [r["subsets"].get(name, {}).get("acc") for r in runs.values()]
            split = tables.TITLES.get(s["split"] or "", tables.NO_SCORE)
            queries = str(s.get("num_pred", ""))
            rows.append(("", line(name, tables.TITLES[task], split, values, queries)))
    behind = tables.counts(everything)
    for name in tables.AVERAGES:
        values = [r["averages"].get(name) for r in runs.values()]
        if any(v is not None for v in values):
            title = f"{tables.TITLES[name]}: mean of {behind[name]}"
            rows.append(("mean", line(title, "", "", values, "")))
    return head, rows


# --------------------------------------------------------------------------------- the command


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    for name, words in (
        ("trained", "evaluation folder of the model that is shown"),
        ("untrained", "evaluation folder of the model to compare with"),
        ("train", "training folder, for its curves"),
        ("data", "data folder of the evaluation, for pictures"),
        ("image_root", "what image paths in the data are relative to; --data by default"),
    ):
        flags.DEFINE_string(name, None, words, flag_values=values)
    flags.DEFINE_multi_string(
        "compare", None, "a published model to compare with; repeat it, or all", flag_values=values
    )
    flags.DEFINE_string("output", None, "the HTML file", required=True, flag_values=values)
    flags.DEFINE_integer(
        "examples", EXAMPLES, "queries per dataset", lower_bound=0, flag_values=values
    )


def main(args: Any) -> None:
    """Write the report and say where it is."""
    path = write_report(
        args.output,
        trained=args.trained,
        untrained=args.untrained,
        train=args.train,
        data=args.data,
        image_root=args.image_root,
        count=args.examples,
        models=args.compare,
    )
    folder = pages.folder_of(path)
    print(f"report: {path}, and a page for each dataset in {folder}")


if __name__ == "__main__":
    run(main, define)
