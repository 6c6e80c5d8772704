# SPDX-License-Identifier: Apache-2.0
"""The whole check of a data set: rows, images, duplicates and hashes, and the report of it.

`verify.py` is the command. An error is what a run would stop at; a warning is what it would learn
from or be scored by without a word.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec_jax.data import manifest, verify
from vlm2vec_jax.data.checks import NO_CANDIDATES, UNEQUAL, UNREADABLE, ImageFolder
from vlm2vec_jax.data.duplicates import eval_duplicates, train_duplicates
from vlm2vec_jax.data.mmeb import EvalSource
from vlm2vec_jax.data.opening import AnySource, try_all
from vlm2vec_jax.errors import SHOWN_PROBLEMS, UserError

if TYPE_CHECKING:
    from rich.table import Table

UNREADABLE_TABLE = "unreadable data file"
WRONG_SIZE = "image of a wrong size"
CHANGED = "not as in the earlier manifest"

_LISTS = (UNEQUAL, NO_CANDIDATES)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which images are of a wrong size.

    Attributes:
      min_side: fewest pixels of the shorter side; an image of one pixel is a failed download.
      max_aspect: most pixels of the longer side per pixel of the shorter; Qwen2-VL's processor
        refuses more than 200.
    """

    min_side: int = 2
    max_aspect: float = 200.0

    def fault(self, width: int, height: int) -> str | None:
        """What is wrong with an image of this size."""
        short, long = sorted((width, height))
        if short < self.min_side:
            return f"{width} x {height} pixels; the shorter side has fewer than {self.min_side}"
        if long > self.max_aspect * short:
            return f"{width} x {height} pixels; more than {self.max_aspect:g} to 1"
        return None


@dataclasses.dataclass(frozen=True)
class Issue:
    """Something found: what kind, where, and in words."""

    kind: str
    subset: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


@dataclasses.dataclass
class Part:
    """One subset and split."""

    subset: str
    split: str
    rows: int
    targets: int = 0
    errors: int = 0
    warnings: int = 0


@dataclasses.dataclass
class Inspection:
    """Everything that was found.

    Attributes:
      data: what was looked at.
      parts: subsets and splits that could be opened.
      errors: what a run would stop at.
      warnings: what it would not.
      images: image files that rows name and that are there.
      files: lines of the manifest; empty if images were not opened.
      options: how it was looked at.
    """

    data: str
    parts: list[Part]
    errors: list[Issue]
    warnings: list[Issue]
    images: int
    files: list[dict[str, Any]]
    options: dict[str, Any]


def inspect(
    data: Path,
    *,
    subsets: Sequence[str] = (),
    splits: Sequence[str] = (),
    image_root: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    follow_symlinks: bool = False,
    images: bool = True,
    decode: bool = True,
    workers: int = 1,
    sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
    against: str | os.PathLike | None = None,
) -> Inspection:
    """Look at everything.

    Args:
      data: a data folder or file.
      subsets: only these; all if empty.
      splits: only these; all if empty.
      image_root: what image paths are relative to; found beside the rows if None.
      cache_dir: where converted tables go.
      follow_symlinks: allow links that lead out of the image root.
      images: open every image; otherwise folders are only listed.
      decode: decode images, too.
      workers: processes that open images.
      sizes: which images are of a wrong size.
      against: an earlier manifest.

    Raises:
      UserError: if there is nothing to look at, or `against` is no manifest.
    """
    before = manifest.read_manifest(against) if against else None
    if before is not None and not images:
        raise UserError("--against compares files by their content; it does not go with --quick")
    sources, closed = try_all(
        data, subsets, splits,
        image_root=image_root, cache_dir=cache_dir, follow_symlinks=follow_symlinks,
    )  # fmt: skip
    errors = [Issue(UNREADABLE_TABLE, "", "", message) for message in closed]
    options = {"images": images, "decode": images and decode, "follow_symlinks": follow_symlinks}
    found = Inspection(str(data), [], errors, [], 0, [], options)
    folders = verify.image_folders(sources)
    _look_at_images(found, sources, folders, images, decode, workers, sizes)
    for source, folder in zip(sources, folders, strict=True):
        _look_at_rows(found, source, folder)
    if images:
        base = data.parent if data.is_file() else data
        tables = dict.fromkeys(Path(file) for source in sources for file, _ in source.table.shards)
        found.files += [manifest.table_line(file, base) for file in tables]
    if before is not None:
        for path, message in manifest.differences(before, found.files):
            found.errors.append(Issue(CHANGED, "", path, message))
    return found


def _look_at_images(
    found: Inspection,
    sources: Sequence[AnySource],
    folders: Sequence[ImageFolder],
    images: bool,
    decode: bool,
    workers: int,
    sizes: Sizes,
) -> None:
    """Open each image once; what is wrong with it is then told for every row that names it."""
    for folder in {id(f): f for f in folders}.values():
        own = [s for s, f in zip(sources, folders, strict=True) if f is folder]
        paths = dict.fromkeys(path for source in own for path in verify.image_paths(source))
        there = [path for path in paths if folder.fault(path) is None]
        found.images += len(there)
        if not images:
            continue
        for facts in folder.examine(there, decode=decode, workers=workers):
            wrong = None if facts.problem else sizes.fault(facts.width, facts.height)
            if facts.problem:
                folder.mark(facts.path, UNREADABLE, facts.problem)
            elif wrong:
                folder.mark(facts.path, WRONG_SIZE, f"{folder.words(facts.path)}: {wrong}")
            if facts.bytes >= 0:
                found.files.append(facts.line())


def _look_at_rows(found: Inspection, source: AnySource, folder: ImageFolder) -> None:
    evaluation = isinstance(source, EvalSource)
    problems = verify.scan(source, folder)
    part = Part(source.subset, source.split, len(source))
    # Rows whose lists are broken have no sides to compare.
    broken = {p.index for p in problems if p.kind in _LISTS}
    sound = source.select(source.rows[~np.isin(source.rows, list(broken))])
    if evaluation:
        twice, part.targets = eval_duplicates(sound)  # pyright: ignore[reportArgumentType]
    else:
        twice, part.targets = train_duplicates(sound)  # pyright: ignore[reportArgumentType]
    warnings = [verify.problem_of(source, one) for one in twice]
    part.errors, part.warnings = len(problems), len(warnings)
    found.parts.append(part)
    found.errors += map(_issue, problems)
    found.warnings += map(_issue, warnings)


def _issue(problem: verify.Problem) -> Issue:
    where = f"{problem.file} row {problem.row}, {problem.column}"
    return Issue(problem.kind, problem.subset, where, problem.message)


def write(found: Inspection, output: Path) -> Path:
    """Write report.json, report.md, problems.jsonl and, if images were opened, manifest.jsonl.

    Raises:
      UserError: if the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"level": level, **dataclasses.asdict(issue)})
            for level, issues in (("error", found.errors), ("warning", found.warnings))
            for issue in issues
        ]
        _write(output / "problems.jsonl", "".join(f"{line}\n" for line in lines))
        summary = {
            "data": found.data,
            "options": found.options,
            "rows": sum(part.rows for part in found.parts),
            "images": found.images,
            "errors": dict(Counter(issue.kind for issue in found.errors)),
            "warnings": dict(Counter(issue.kind for issue in found.warnings)),
            "parts": [dataclasses.asdict(part) for part in found.parts],
        }
        if found.options["images"]:
            digest = manifest.write_manifest(output / "manifest.jsonl", found.files)
            summary["manifest"] = {"files": len(found.files), "sha256": digest}
        _write(output / "report.json", json.dumps(summary, indent=1) + "\n")
        _write(output / "report.md", markdown(found))
    except OSError as error:
        raise UserError(
            f"{output}: the report cannot be written ({error.strerror}); name a folder by --output"
        ) from None
    return output


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def markdown(found: Inspection) -> str:
    """The report for people."""
    rows = sum(part.rows for part in found.parts)
    lines = [
        f"# Check of {found.data}",
        "",
        f"{rows:,} rows, {found.images:,} images "
        + ("decoded" if found.options["decode"] else "opened" if found.options["images"]
           else "listed, not opened")
        + f"; {len(found.errors):,} errors, {len(found.warnings):,} warnings.",
        "",
        "| Subset | Split | Rows | Distinct targets | Errors | Warnings |",
        "|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {p.subset} | {p.split} | {p.rows} | {p.targets} | {p.errors} | {p.warnings} |"
        for p in found.parts
    ]
    for title, issues in (("Errors", found.errors), ("Warnings", found.warnings)):
        if issues:
            lines += ["", f"## {title}", *_listed(issues)]
    return "\n".join(lines) + "\n"


def _listed(issues: Iterable[Issue]) -> list[str]:
    by_kind: dict[str, list[Issue]] = {}
    for issue in issues:
        by_kind.setdefault(issue.kind, []).append(issue)
    lines = []
    for kind, some in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        lines += ["", f"### {kind} ({len(some):,})", ""]
        lines += [f"* {issue}" for issue in some[:SHOWN_PROBLEMS]]
        if len(some) > SHOWN_PROBLEMS:
            lines.append(f"* ... and {len(some) - SHOWN_PROBLEMS:,} more (problems.jsonl)")
    return lines


def table(found: Inspection) -> Table:
    """The parts as a table for the console."""
    from rich.table import Table

    shown = Table("subset", "split", "rows", "targets", "errors", "warnings")
    for part in found.parts:
        numbers = (part.rows, part.targets, part.errors, part.warnings)
        shown.add_row(part.subset, part.split, *(f"{n:,}" for n in numbers))
    return shown
