# SPDX-License-Identifier: Apache-2.0
"""Writes mini-MMEB: a small MMEB that a small model learns in minutes, in MMEB's on-disk layout.

    python -m vlm2vec_jax.data.mini_mmeb --output DIR --seed 0 [--scale 1.0] [--force]

    DIR/train/<Subset>/original-00000-of-00001.parquet              qry, qry_image_path, pos_text,
    DIR/train/<Subset>/diverse_instruction-00000-of-00001.parquet   pos_image_path[, neg_*]
    DIR/train/images/...                                            paths relative to DIR/train
    DIR/eval/<Subset>/test-00000-of-00001.parquet                   qry_text, qry_img_path,
    DIR/eval/eval_images/...                                        tgt_text[], tgt_img_path[]

`--layout hub` (or `hub_v2`) writes what the hub serves instead, archives included
(`mini_layout.py`). `mini_tasks.TASKS` lists the subsets. The same seed and scale give the same
bytes on the same versions of the libraries. The folder appears under its name only when it is
complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec_jax.data import mini_builders as b
from vlm2vec_jax.data.mini_layout import LAYOUTS, to_hub
from vlm2vec_jax.data.mini_tasks import TASKS, Task, paraphrase
from vlm2vec_jax.errors import UserError

VERSION = 1
MANIFEST = "mini_mmeb.json"
QUERIES = 120
CANDIDATES = 300
POOL = (3000, 4000)
"""Scenes of one thing and of two things that the training subsets share."""
NEGATIVES = ("CIRR", "MSCOCO")
"""Subsets whose training rows carry a hard negative: the near miss of their builder."""


def write_mini_mmeb(
    output: str | Path,
    seed: int = 0,
    scale: float = 1.0,
    *,
    subsets: Sequence[str] | None = None,
    force: bool = False,
    layout: str = "plain",
) -> dict:
    """Write mini-MMEB below `output`, or leave it alone if it is there already.

    Args:
      output: the folder; made if missing.
      seed: everything random follows from it.
      scale: factor on training rows, shared scenes and queries (at least 8 of each); the candidate
        lists keep their length.
      subsets: names (MMEB-eval's spelling) to restrict to; None for all.
      force: replace other data in `output` (only `train`, `eval` and the manifest are removed).
      layout: "plain", or "hub" or "hub_v2" for what the hub serves.

    Returns:
      The manifest: version, seed, scale, and rows per subset.

    Raises:
      UserError: if `output` holds something else, or an argument is out of range.
    """
    output = Path(output)
    if not 0 < scale <= 10:
        raise UserError(f"--scale must lie between 0 and 10, not {scale}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie between 0 and 2**32 - 1, not {seed}")
    if layout not in LAYOUTS:
        raise UserError(f"--layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    tasks = _select(subsets)
    wanted = {
        "version": VERSION, "seed": seed, "scale": scale, "subsets": [t.name for t in tasks],
    }  # fmt: skip
    if layout != "plain":
        wanted["layout"] = layout
    done = _read_manifest(output)
    told = {k: v for k, v in (done or {}).items() if k != "rows"}
    if done is not None and told == wanted:
        return {**done, "fresh": False}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not force or not output.is_dir():
            raise UserError(
                f"{output} exists and holds something else than this data set "
                f"(seed {seed}, scale {scale:g}, version {VERSION}); "
                f"choose another folder or replace its data with --force"
            )
    partial = output.parent / f"{output.name}.partial"
    if partial.exists():
        if not (partial / MANIFEST).is_file():
            raise UserError(f"{partial} is in the way; remove it")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / MANIFEST).write_text("{}\n")  # marks the folder as ours while it is unfinished
    counts = {
        "train": _write_train(partial / "train", tasks, seed, scale),
        "eval": _write_eval(partial / "eval", tasks, seed, scale),
    }
    if layout != "plain":
        to_hub(partial, instructions=layout == "hub_v2")
    manifest = {**wanted, "rows": counts}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _move_in(partial, output)
    return {**manifest, "fresh": True}


def _select(subsets: Sequence[str] | None) -> tuple[Task, ...]:
    if subsets is None:
        return TASKS
    unknown = sorted(set(subsets) - {task.name for task in TASKS})
    if unknown:
        known = ", ".join(task.name for task in TASKS)
        raise UserError(f"unknown subset(s) {', '.join(unknown)}; mini-MMEB has {known}")
    return tuple(task for task in TASKS if task.name in subsets)


def _read_manifest(output: Path) -> dict | None:
    try:
        return json.loads((output / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def _move_in(partial: Path, output: Path) -> None:
    """Put the finished parts in place; the manifest goes last, so that it vouches for the rest."""
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST).unlink(missing_ok=True)
    for part in ("train", "eval", MANIFEST):
        old = output / part
        if old.is_dir():
            shutil.rmtree(old)
        (partial / part).replace(old)
    partial.rmdir()


def _write_train(root: Path, tasks: Sequence[Task], seed: int, scale: float) -> dict[str, int]:
    world = b.World(seed, "train", (_scaled(POOL[0], scale), _scaled(POOL[1], scale)))
    counts, used = {}, set()
    for task in tasks:
        if task.split != "ind":
            continue
        examples = task.examples(world, _scaled(task.rows, scale))
        counts[task.train_name] = len(examples)
        columns = {
            "qry_image_path": [e.image for e in examples],
            "pos_text": [e.truth.side.text for e in examples],
            "pos_image_path": [e.truth.side.image for e in examples],
        }
        if task.name in NEGATIVES:
            columns["neg_text"] = [e.near[0].side.text for e in examples]
            columns["neg_image_path"] = [e.near[0].side.image for e in examples]
        used.update(*(v for name, v in columns.items() if name.endswith("image_path")))
        rng = world.rng(f"{task.name}/paraphrases")
        queries = {
            "original": [task.phrase(e.text) for e in examples],
            "diverse_instruction": [paraphrase(task, e.text, rng) for e in examples],
        }
        for split, texts in queries.items():
            table = pa.table({"qry": texts, **columns})
            _write_table(root / task.train_name / f"{split}-00000-of-00001.parquet", table)
    _write_pictures(root, world, used)
    return counts


def _write_eval(root: Path, tasks: Sequence[Task], seed: int, scale: float) -> dict[str, int]:
    world = b.World(seed, "eval")
    counts, used = {}, set()
    for task in tasks:
        examples = task.examples(world, _scaled(QUERIES, min(scale, 1.0)))
        candidates = task.candidates(world, examples, CANDIDATES)
        counts[task.name] = len(examples)
        used.update(e.image for e in examples)
        used.update(c.side.image for row in candidates for c in row)
        strings = pa.list_(pa.string())
        table = pa.table(
            {
                "qry_text": [task.phrase(e.text) for e in examples],
                "qry_img_path": [e.image for e in examples],
                "tgt_text": pa.array([[c.side.text for c in r] for r in candidates], strings),
                "tgt_img_path": pa.array([[c.side.image for c in r] for r in candidates], strings),
            }
        )
        _write_table(root / task.name / "test-00000-of-00001.parquet", table)
    _write_pictures(root, world, used)
    return counts


def _scaled(count: int, scale: float) -> int:
    return max(8, round(count * scale))


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _write_pictures(root: Path, world: b.World, used: set[str]) -> None:
    """Write the pictures that some row names; others were drawn while lists were filled."""
    folders = set()
    for path, image in world.pictures.items():
        if path not in used:
            continue
        target = root / path
        if target.parent not in folders:
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)
        image.save(target, compress_level=3)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on rows and queries")
    parser.add_argument("--subsets", help="names as MMEB-eval writes them, separated by commas")
    parser.add_argument(
        "--layout", default="plain", choices=LAYOUTS, help="plain, or as the hub serves it"
    )
    parser.add_argument("--force", action="store_true", help="replace other data in the folder")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    subsets = args.subsets.split(",") if args.subsets else None
    try:
        manifest = write_mini_mmeb(
            args.output,
            args.seed,
            args.scale,
            subsets=subsets,
            force=args.force,
            layout=args.layout,
        )
    except (UserError, OSError) as error:
        print(f"mini_mmeb: {error}", file=sys.stderr)
        return 2
    rows = manifest["rows"]
    what = (
        f"{len(rows['train'])} training subsets with {sum(rows['train'].values())} rows, "
        f"{len(rows['eval'])} evaluation subsets with {sum(rows['eval'].values())} queries"
    )
    if manifest["fresh"]:
        print(f"wrote {args.output}: {what} ({time.perf_counter() - start:.1f} s)")
    else:
        print(f"{args.output} is complete already: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
