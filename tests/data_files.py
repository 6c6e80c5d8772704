# SPDX-License-Identifier: Apache-2.0
"""Small MMEB folders for the data tests, in the real on-disk layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def write_image(path: Path, size=(8, 6), value=0) -> None:
    """A small PNG of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, 20, 30)).save(path)


def write_parquet(folder: Path, split: str, rows: list[dict], shards: int | None = 1) -> list[Path]:
    """Rows as `<split>-0000k-of-0000n.parquet` (or `<split>.parquet` for shards=None)."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if shards is None:
        pq.write_table(table, folder / f"{split}.parquet")
        return [folder / f"{split}.parquet"]
    out = []
    for k, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        out.append(folder / f"{split}-{k:05d}-of-{shards:05d}.parquet")
        pq.write_table(table.take(pa.array(part, pa.int64())), out[-1])
    return out


def train_rows(subset: str, count: int, images: int = 0) -> list[dict]:
    """Text rows, of which the first `images` have an image on the query side."""
    return [
        {
            "qry": f"<|image_1|> {subset} query {i}\n" if i < images else f"{subset} query {i} ",
            "qry_image_path": f"images/{subset}/{i}.png" if i < images else "",
            "pos_text": f"{subset} target {i % 7}\n",
            "pos_image_path": "",
        }
        for i in range(count)
    ]


def make_train(root: Path, sizes: dict[str, int], images: int = 0, **keywords) -> Path:
    """A training folder with subsets of the given sizes."""
    for subset, count in sizes.items():
        write_parquet(root / subset, "original", train_rows(subset, count, images), **keywords)
        for i in range(min(images, count)):
            write_image(root / "images" / subset / f"{i}.png", value=i)
    return root


def eval_row(i: int, candidates: int, **changes) -> dict:
    """A query with an image, and text candidates of which the first is the truth."""
    row = {
        "qry_text": f"<|image_1|> What is it? {i}\n",
        "qry_img_path": "images/0.png",
        "tgt_text": [f"label {(i + k) % candidates}" for k in range(candidates)],
        "tgt_img_path": [""] * candidates,
    }
    return {**row, **changes}
