# SPDX-License-Identifier: Apache-2.0
"""An evaluation as one HTML file: scores, training curves, and queries with their top targets.

    python -m vlm2vec_jax.evaluation.report --trained DIR [--untrained DIR] [--train DIR]
        [--data DIR] --output report.html

`--trained` and `--untrained` are output folders of `evaluate`, `--train` is one of `train`; each
may be left out, but not both of the first two. The file opens offline, loads nothing and runs
nothing: pictures are inside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import charts, html, mmeb, store, tables
from vlm2vec_jax.flags import run
from vlm2vec_jax.training import metrics

CURVES = (("Loss", "loss"), ("In-batch accuracy", "accuracy"), ("Learning rate", "lr"))
EXAMPLES = 6

Scores = dict[str, Any]


def write_report(
    output: str | os.PathLike,
    *,
    trained: str | os.PathLike | None = None,
    untrained: str | os.PathLike | None = None,
    train: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    examples: int = EXAMPLES,
) -> Path:
    """Write the report.

    Args:
      output: the HTML file.
      trained: evaluation folder of the model that is shown.
      untrained: evaluation folder of the model to compare with.
      train: training folder, for the curves of its `metrics.jsonl`.
      data: the data folder, for pictures.
      image_root: what image paths are relative to, `data` by default.
      examples: queries per subset; half of them wrong where there are as many.

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
    shown = Path(trained if trained is not None else untrained)  # type: ignore[arg-type]
    before = Path(untrained) if trained is not None and untrained is not None else None
    scores = runs["trained" if trained is not None else "untrained"]
    pictures = html.Pictures(image_root if image_root is not None else data)

    names = mmeb.in_order(list(scores["subsets"]))
    anchors = {name: f"subset-{k}" for k, name in enumerate(names)}
    parts = [
        _head(scores, runs),
        _averages(runs),
        _training(train),
        _subsets(runs, anchors),
        "<h2>Queries and their top targets</h2>",
        f"<p>Up to {examples} queries of each subset, spread evenly through the file, half of "
        "them wrong where there are as many. Targets stand in the order of the model's scores. "
        "Green is the truth, red is what a wrong row took for it.</p>",
    ]
    for name in names:
        parts.append(_examples(name, anchors[name], scores, shown, before, pictures, examples))
    output = Path(output)
    store.write_text(output, html.page("Evaluation report", "\n".join(parts)))
    return output


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


def _subsets(runs: Mapping[str, Scores], anchors: Mapping[str, str]) -> str:
    """The table of all subsets by meta-task, and an index of the examples below."""
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
    index = "".join(f'<a href="#{a}">{html.text(n)}</a>' for n, a in anchors.items())
    return f"<h2>Scores</h2>{html.table(head, rows, left=3)}<h3>Examples</h3><nav>{index}</nav>"


# ----------------------------------------------------------------------------------- the examples


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
    """Rows to show: half wrong ones, half right ones, each spread evenly; in order of the file.

    Where there are too few of one kind the other fills up.
    """
    wrong = [n for n, c in enumerate(correct) if not c]
    right = [n for n, c in enumerate(correct) if c]
    few = min(len(wrong), max(count - count // 2, count - len(right)))
    return sorted([*_spread(wrong, few), *_spread(right, count - few)])


def _spread(rows: list[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[(2 * k + 1) * len(rows) // (2 * count)] for k in range(count)]


def _examples(
    subset: str,
    anchor: str,
    main: Scores,
    shown: Path,
    before: Path | None,
    pictures: html.Pictures,
    count: int,
) -> str:
    score = _complete(main)["subsets"][subset]
    about = [tables.TITLES[score["meta_task"]], tables.TITLES.get(score["split"] or "", "")]
    head = (
        f'<h3 id="{anchor}">{html.text(subset)} <span class="muted">'
        f"{html.text(', '.join(a for a in about if a))} · {tables.percent(score['acc'])} %"
        "</span></h3>"
    )
    rows = _predictions(shown, subset)
    if not rows:
        return f"{head}<p>There are no predictions of this subset to show.</p>"
    earlier = {} if before is None else {r["row"]: r for r in _predictions(before, subset)}
    cards = []
    for n in choose([bool(r["correct"]) for r in rows], count):
        row = rows[n]
        then = earlier.get(row["row"])
        if then is not None and then["query"] != row["query"]:
            then = None
        cards.append(_card(row, then, pictures))
    return head + "".join(cards)


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
    flags.DEFINE_string("output", None, "the HTML file", required=True, flag_values=values)
    flags.DEFINE_integer(
        "examples", EXAMPLES, "queries per subset", lower_bound=0, flag_values=values
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
        examples=args.examples,
    )
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main, define)
