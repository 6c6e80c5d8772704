# SPDX-License-Identifier: Apache-2.0
"""The report's pages of single datasets: their scores, and queries with their top targets.

They lie in a folder beside the report, link to each other and back, and like it load and run
nothing: a page's pictures are inside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2vec_jax.evaluation import compare, examples, html, mmeb, store, tables

FOLDER = "_pages"
"""What the folder's name has behind the report's own."""

METRICS = ("hit@1", "hit@5", "hit@10", "mrr@10", "ndcg_linear@10")


def folder_of(report: Path) -> Path:
    """The folder of a report's pages: `report_pages` of `report.html`."""
    return report.with_name(report.stem + FOLDER)


def name_of(subset: str) -> str:
    """The file of a dataset's page; a name that is not plain gets a hash, so that none meet."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", subset).strip("-")
    if plain == subset and len(subset) <= 80:
        return f"{subset}.html"
    digest = hashlib.blake2b(subset.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{plain[:80] or 'dataset'}-{digest}.html"


def links(report: Path, subsets: Sequence[str]) -> dict[str, str]:
    """Dataset -> its page, relative to the report."""
    folder = html.quoted(folder_of(report).name)
    return {name: f"{folder}/{html.quoted(name_of(name))}" for name in subsets}


def write(
    report: Path,
    runs: Mapping[str, Mapping[str, Any]],
    folders: Mapping[str, str | os.PathLike],
    image_root: str | os.PathLike | None,
    count: int,
    lines: Sequence[compare.Line],
    models: Sequence[str],
) -> dict[str, str]:
    """Write a page for each dataset of the run that is shown, the last of `runs`.

    Args:
      report: the report's own file, to which the pages link.
      runs: label -> content of `scores.json`; another run in front is compared with.
      folders: label -> its evaluation folder.
      image_root: what image paths of the predictions are relative to.
      count: queries on a page.
      lines: the comparison with published models (`compare.lines`).
      models: names of these models.

    Returns:
      `links`.

    Raises:
      UserError: a page cannot be written.
    """
    label = list(runs)[-1]
    names = mmeb.in_order(list(runs[label]["subsets"]))
    folder, beside = folder_of(report), {line.name: line for line in lines if not line.average}
    before = Path(folders[list(runs)[0]]) if len(runs) > 1 else None
    for k, name in enumerate(names):
        pictures = html.Pictures(image_root)  # one of its own: few datasets share pictures
        body = [
            _navigation(report, names, k),
            _head(name, runs, beside.get(name), models),
            examples.cards(name, Path(folders[label]), before, pictures, count),
            _navigation(report, names, k),
        ]
        title = f"{name}: evaluation report"
        store.write_text(folder / name_of(name), html.page(title, "\n".join(body)))
    _tidy(folder, {name_of(name) for name in names})
    return links(report, names)


def _navigation(report: Path, names: Sequence[str], k: int) -> str:
    """Links to the report and to the datasets before and after."""
    found = [html.link(f"../{html.quoted(report.name)}", "All datasets")]
    for other, words in ((k - 1, "‹ {}"), (k + 1, "{} ›")):
        if 0 <= other < len(names):
            found.append(html.link(html.quoted(name_of(names[other])), words.format(names[other])))
    return f'<p class="pages">{" · ".join(found)}</p>'


def _head(
    name: str,
    runs: Mapping[str, Mapping[str, Any]],
    line: compare.Line | None,
    models: Sequence[str],
) -> str:
    score = list(runs.values())[-1]["subsets"][name]
    about = [
        tables.TITLES.get(score.get("meta_task") or mmeb.OTHER, ""),
        tables.TITLES.get(score.get("split") or "", ""),
        f"{score['num_pred']} queries" if "num_pred" in score else "",
    ]
    parts = [
        f"<h1>{html.text(name)}</h1><p>{html.text(', '.join(a for a in about if a))}</p>",
    ]
    rows = []
    for label, one in runs.items():
        found = one["subsets"].get(name)
        if found is not None:
            metrics = {"hit@1": found["acc"], **(found.get("metrics") or {})}
            rows.append(("", [label, *(tables.percent(metrics.get(m)) for m in METRICS)]))
    parts.append(html.table(["percent", *METRICS], rows))
    if line is not None:
        told = [
            f"{model} {compare.difference(line.ours, value)}"
            for model, value in zip(models, line.theirs, strict=True)
            if value is not None
        ]
        if told:
            parts.append(
                f"<p>Published, in brackets how far ours is from it: {html.text('; '.join(told))}."
                "</p>"
            )
    return "\n".join(parts)


def _tidy(folder: Path, names: set[str]) -> None:
    """Take away pages that an earlier report with other datasets has left."""
    with contextlib.suppress(OSError):
        for path in folder.glob("*.html"):
            if path.name not in names and html.GENERATOR in path.read_text("utf-8", "replace"):
                path.unlink()
