# SPDX-License-Identifier: Apache-2.0
# pyarrow.compute makes its functions at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false
"""Check a data set: every row and every image, before a run.

    python -m vlm2vec_jax.data.verify --data DIR [--output DIR] [--quick] [--against MANIFEST]

DIR is whatever training or evaluation reads. The output folder (DIR/.verify) receives report.json,
report.md, problems.jsonl (a line per problem) and manifest.jsonl (every file with its hash). Exit
code 0: no errors; 2: errors, all of them listed. Warnings (targets that come twice) stop nothing.
--quick looks at rows and lists image folders only; --nodecode opens images without decoding them.

`train` and `evaluate` run the quick form first: columns are scanned as Arrow arrays and image
folders listed once each. What is found is a list with file and row, either raised together before
the first step or, with `on_bad_example = skip`, taken out and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from absl import flags

from vlm2vec_jax.data.checks import (
    EMPTY,
    MARKERS,
    MISSING,
    NO_CANDIDATES,
    UNEQUAL,
    UNREADABLE,
    UNSAFE,
    Finding,
    ImageFolder,
    eval_findings,
    flat,
    train_findings,
)
from vlm2vec_jax.data.folders import EVAL_COLUMNS, NEGATIVE_COLUMNS, TRAIN_COLUMNS
from vlm2vec_jax.data.mmeb import EvalSource, TrainSource
from vlm2vec_jax.data.paths import SEPARATOR
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.flags import run

__all__ = [
    "EMPTY", "MARKERS", "MISSING", "NO_CANDIDATES", "UNEQUAL", "UNREADABLE", "UNSAFE",
    "GoodRows", "Problem", "good_rows", "report", "verify_eval", "verify_train",
]  # fmt: skip


class Problem(NamedTuple):
    """Something wrong with one row.

    Attributes:
      file: the parquet file.
      row: row of that file, from 0.
      column: where in the row.
      message: what is wrong, in words.
      kind: one of this module's constants.
      subset: name of the subset.
      index: row of the subset, from 0 (differs from `row` after the first shard).
    """

    file: str
    row: int
    column: str
    message: str
    kind: str
    subset: str
    index: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}, {self.column}: {self.message}"


def verify_train(
    sources: Sequence[TrainSource],
    image_root: str | os.PathLike | None = None,
    *,
    headers: bool | int = False,
    workers: int = 4,
) -> list[Problem]:
    """Check every row in use: texts, markers, image files.

    Args:
      sources: opened subsets.
      image_root: check images below this folder instead of each source's own.
      headers: also open image files without decoding: all of them, or this many of them, spread
        evenly over the data.
      workers: threads that open image files.

    Returns:
      The problems in order of subset and row; empty if the data is good.
    """
    return _verify(sources, image_root, headers, workers)


def verify_eval(
    sources: Sequence[EvalSource],
    image_root: str | os.PathLike | None = None,
    *,
    headers: bool | int = False,
    workers: int = 4,
) -> list[Problem]:
    """The same for evaluation rows: also candidate lists that are empty or of unequal lengths."""
    return _verify(sources, image_root, headers, workers)


def report(problems: Sequence[Problem], *, advice: str = "") -> None:
    """Raise everything found as one message; nothing happens for an empty list.

    Raises:
      UserError: the first problems with file, row and column, and how many there are.
    """
    raise_problems("The data has bad rows", [str(p) for p in problems], advice=advice)


class GoodRows(NamedTuple):
    """What is left of each subset without its bad rows.

    Attributes:
      sources: the subsets restricted to good rows, in order; a subset may be empty.
      rows: subset -> int64 rows of its file that are good.
      skipped: subset -> reason -> number of rows (a row counts once, by its first problem).
    """

    sources: list[TrainSource]
    rows: dict[str, np.ndarray]
    skipped: dict[str, dict[str, int]]


def good_rows(
    sources: Sequence[TrainSource],
    image_root: str | os.PathLike | None = None,
    *,
    headers: bool | int = False,
    workers: int = 4,
) -> GoodRows:
    """Take bad rows out (`on_bad_example = skip`); arguments as in `verify_train`.

    Raises:
      UserError: if no row at all is left.
    """
    problems = verify_train(sources, image_root, headers=headers, workers=workers)
    first: dict[str, dict[int, str]] = {source.subset: {} for source in sources}
    for problem in problems:
        first[problem.subset].setdefault(problem.index, problem.kind)
    rows, kept = {}, []
    for source in sources:
        bad = np.fromiter(first[source.subset], np.int64, len(first[source.subset]))
        rows[source.subset] = source.rows[~np.isin(source.rows, bad)]
        kept.append(source.select(rows[source.subset]))
    if sources and not any(len(source) for source in kept):
        report(problems, advice="No row is good; is the image root right?")
        raise UserError("No training row at all")
    skipped = {name: dict(Counter(kinds.values())) for name, kinds in first.items() if kinds}
    return GoodRows(kept, rows, skipped)


_TRAIN_PATHS = (TRAIN_COLUMNS[1], TRAIN_COLUMNS[3], NEGATIVE_COLUMNS[1])
_EVAL_PATHS = (EVAL_COLUMNS[1], EVAL_COLUMNS[3])


def _verify(
    sources: Sequence,
    image_root: str | os.PathLike | None,
    headers: bool | int,
    workers: int,
) -> list[Problem]:
    problems: list[Problem] = []
    chosen = image_folders(sources, image_root)
    if headers:
        _check_headers(sources, chosen, headers, workers)
    for source, images in zip(sources, chosen, strict=True):
        problems += scan(source, images)
    return problems


def scan(source: EvalSource | TrainSource, images: ImageFolder) -> list[Problem]:
    """Check the rows in use of one subset, with what is known of its images."""
    findings = eval_findings if isinstance(source, EvalSource) else train_findings
    problems: list[Problem] = []
    for rows, batch in source.table.scan(source.rows):
        # Stable: the columns of a row stay in the order of the check.
        ordered = sorted(findings(rows, batch, images), key=lambda f: f.index)
        problems += [problem_of(source, found) for found in ordered]
    return problems


def problem_of(source: EvalSource | TrainSource, found: Finding) -> Problem:
    """A finding with the file and row where it stands."""
    file, row = source.where(found.index)
    return Problem(
        file, row, found.column, found.message, found.kind, source.subset, found.index
    )  # fmt: skip


def image_folders(
    sources: Sequence, image_root: str | os.PathLike | None = None
) -> list[ImageFolder]:
    """The image folder of each source, one object for sources that share one."""
    folders: dict[tuple[Path, bool, Path], ImageFolder] = {}
    chosen = []
    for source in sources:
        own = getattr(source, "image_folder", None)
        if own is not None:  # images that are no files (`tfds.py`)
            chosen.append(own())
            continue
        root, links, kept = (
            Path(image_root or source.image_root), source.follow_symlinks, source.kept
        )  # fmt: skip
        new = ImageFolder(root, follow_symlinks=links, kept=kept)
        chosen.append(folders.setdefault((root, links, kept), new))
    return chosen


def image_paths(source: EvalSource | TrainSource) -> Iterator[str]:
    """The image paths of the rows in use, each once per stored batch."""
    for _, batch in source.table.scan(source.rows):
        for name in {*_TRAIN_PATHS, *_EVAL_PATHS} & set(batch.schema.names):
            for path in pc.unique(flat(batch.column(name))).to_pylist():
                yield from path.split(SEPARATOR) if path else ()


def _check_headers(
    sources: Sequence,
    chosen: Sequence[ImageFolder],
    headers: bool | int,
    workers: int,
) -> None:
    unique: dict[tuple[int, str], None] = {}
    for source, images in zip(sources, chosen, strict=True):
        for path in image_paths(source):
            unique.setdefault((id(images), path))
    wanted = sorted(unique)
    if headers is not True and len(wanted) > headers:
        wanted = [wanted[i * len(wanted) // headers] for i in range(headers)]
    for images in {id(i): i for i in chosen}.values():
        images.check_headers([path for owner, path in wanted if owner == id(images)], workers)


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""

    def text(name: str, about: str, required: bool = False) -> None:
        flags.DEFINE_string(name, None, about, required=required, flag_values=values)

    def switch(name: str, default: bool, about: str) -> None:
        flags.DEFINE_boolean(name, default, about, flag_values=values)

    text("data", "data folder or file", required=True)
    text("output", "where the report goes; <data>/.verify by default")
    flags.DEFINE_list("subsets", [], "only these subsets; all by default", flag_values=values)
    flags.DEFINE_list("splits", [], "only these splits; all by default", flag_values=values)
    text("image_root", "what image paths are relative to; found beside the rows by default")
    text("cache_dir", "where converted tables go; <data>/.arrow_cache by default")
    text("against", "an earlier manifest.jsonl: tell every file that is not as it was")
    switch("quick", False, "rows and image folders only; no image opened, no manifest")
    switch("decode", True, "decode every image, not only its header")
    switch("follow_symlinks", False, "allow links that lead out of the image root")
    flags.DEFINE_integer("workers", 0, "processes; 0 for one per CPU", 0, flag_values=values)
    flags.DEFINE_integer(
        "min_side", 2, "fewest pixels of an image's shorter side", 1, flag_values=values
    )
    flags.DEFINE_float(
        "max_aspect", 200.0, "most pixels of the longer side per pixel of the shorter", 1.0,
        flag_values=values,
    )  # fmt: skip


def main(args: Any) -> None:
    """Check, write the report, and fail if there are errors."""
    from rich.console import Console

    from vlm2vec_jax.data import inspection

    console = Console()
    found = inspection.inspect(
        Path(args.data),
        subsets=args.subsets,
        splits=args.splits,
        image_root=args.image_root,
        cache_dir=args.cache_dir,
        follow_symlinks=args.follow_symlinks,
        images=not args.quick,
        decode=args.decode,
        workers=args.workers or len(os.sched_getaffinity(0)),
        sizes=inspection.Sizes(args.min_side, args.max_aspect),
        against=args.against,
    )
    folder = Path(args.data).parent if Path(args.data).is_file() else Path(args.data)
    output = inspection.write(found, Path(args.output) if args.output else folder / ".verify")
    console.print(inspection.table(found))
    where = f"all of it: {output / 'report.md'} and problems.jsonl"
    if found.errors:
        raise_problems("The data has errors", [str(e) for e in found.errors], advice=where)
    console.print(f"no errors; {where}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main, define)
