# SPDX-License-Identifier: Apache-2.0
"""Turns a finished mini-MMEB into the layouts that the hub serves, archives included.

    hub      train/<Subset>/*.parquet, train/images_zip/<Subset>.zip whose members lack the
             `images/` that rows have; eval/<Subset>/*.parquet with paths relative to
             `eval_images`, and one eval/images.zip that holds that folder
    hub_v2   the same with the evaluation's instructions in columns of their own (MMEB-V2)

Training pictures that several subsets share are in each one's archive, under its name.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec_jax.data.mini_tasks import MARKER, TASKS, Task

LAYOUTS = ("plain", "hub", "hub_v2")

_EPOCH = (1980, 1, 1, 0, 0, 0)


def to_hub(root: Path, *, instructions: bool) -> None:
    """Rewrite `root/train` and `root/eval` in place.

    Args:
      root: a folder that `mini_mmeb` wrote in its plain layout.
      instructions: give the evaluation's instructions columns of their own.
    """
    tasks = {name: task for task in TASKS for name in (task.name, task.train_name)}
    for folder in sorted((root / "train").iterdir()):
        if folder.name in tasks:
            _train_subset(root / "train", folder)
    shutil.rmtree(root / "train" / "images", ignore_errors=True)
    for folder in sorted((root / "eval").iterdir()):
        if folder.name in tasks:
            _eval_subset(folder, tasks[folder.name], instructions)
    images = root / "eval" / "eval_images"
    files = sorted(p for p in images.rglob("*") if p.is_file()) if images.is_dir() else []
    _zip(root / "eval" / "images.zip", ((p, str(p.relative_to(root / "eval"))) for p in files))
    shutil.rmtree(images, ignore_errors=True)


def _train_subset(root: Path, folder: Path) -> None:
    own: dict[str, str] = {}  # path in the plain layout -> name in the archive

    def moved(path: str) -> str:
        if not path:
            return path
        own[path] = f"{folder.name}/{path.removeprefix('images/')}"
        return f"images/{own[path]}"

    for file in sorted(folder.glob("*.parquet")):
        table = pq.read_table(file)
        for k, name in enumerate(table.column_names):
            if name.endswith("image_path"):
                values = [moved(path) for path in table.column(k).to_pylist()]
                table = table.set_column(k, name, pa.array(values, pa.string()))
        pq.write_table(table, file)
    (root / "images_zip").mkdir(exist_ok=True)
    members = ((root / path, name) for path, name in sorted(own.items(), key=lambda m: m[1]))
    _zip(root / "images_zip" / f"{folder.name}.zip", members)


def _eval_subset(folder: Path, task: Task, instructions: bool) -> None:
    def inner(path: str) -> str:
        return path.removeprefix("eval_images/")

    for file in sorted(folder.glob("*.parquet")):
        rows = []
        for row in pq.read_table(file).to_pylist():
            row["qry_img_path"] = inner(row["qry_img_path"])
            row["tgt_img_path"] = [inner(path) for path in row["tgt_img_path"]]
            rows.append(split_row(task, row) if instructions else row)
        pq.write_table(pa.Table.from_pylist(rows), file)


def split_row(task: Task, row: dict) -> dict:
    """An evaluation row with its instructions taken out of its texts, as MMEB-V2 has them."""
    query = task.instruction.partition(' "{}"')[0]
    target = task.target_text.partition(" {}")[0].removesuffix("\n")
    texts = row["tgt_text"]
    if "I" in task.target:
        texts = [text.removesuffix("\n")[len(target) :].removeprefix(" ") for text in texts]
    own = row["qry_text"].removesuffix("\n").removeprefix(MARKER)
    own = own[1:] if "I" in task.query else own  # the space or newline behind the marker
    marker = (f"{MARKER}\n" if task.line else f"{MARKER} ") if "I" in task.query else ""
    return {
        "qry_inst": f"{marker}{query}",
        "qry_text": own[len(query) :].removeprefix(" "),
        "qry_img_path": row["qry_img_path"],
        "tgt_inst": target if "I" in task.target else "",
        "tgt_text": texts,
        "tgt_img_path": row["tgt_img_path"],
    }


def _zip(path: Path, members: Iterable[tuple[Path, str]]) -> None:
    """Store files uncompressed (images do not shrink), with one date, so that bytes repeat."""
    with zipfile.ZipFile(path, "w") as archive:
        for file, name in members:
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o100644 << 16
            archive.writestr(info, file.read_bytes())
