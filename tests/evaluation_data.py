# SPDX-License-Identifier: Apache-2.0
"""A small MMEB-eval on disk and an encoder without a model, for the tests of the evaluation."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.evaluation import run


def write_subset(data: Path, name: str, rows: list[dict], image_seed: int = 0) -> None:
    """Write rows in MMEB-eval's layout, and every image that they name."""
    folder = data / name
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    for row in rows:
        for path in (row["qry_img_path"], *row["tgt_img_path"]):
            if path:
                write_image(data / path, image_seed)


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    number = int(hashlib.sha256(f"{path.name} {seed}".encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(path)


def row(query: tuple[str, str], *targets: tuple[str, str]) -> dict:
    return {
        "qry_text": query[0],
        "qry_img_path": query[1],
        "tgt_text": [text for text, _ in targets],
        "tgt_img_path": [path for _, path in targets],
    }


def labels(name: str = "ImageNet-1K", count: int = 6) -> list[dict]:
    """Image to text, each row with all labels, the truth first."""
    names = [f"label {k}" for k in range(count)]
    return [
        row(
            ("<|image_1|> Represent the given image for classification.\n", f"img/{name}_{k}.png"),
            *[(n, "") for n in (names[k:] + names[:k])],
        )
        for k in range(count)
    ]


def captions(name: str = "MSCOCO_t2i", count: int = 5) -> list[dict]:
    """Text to image with lists of unequal lengths."""
    pictures = [
        ("<|image_1|> Represent the given image.\n", f"img/{name}_{k}.png") for k in range(9)
    ]
    return [
        row((f"Find me: caption {k}\n", ""), pictures[k], *pictures[k + 1 : k + 2 + k % 3])
        for k in range(count)
    ]


def two_subsets(root: Path) -> Path:
    """A data folder of labels and captions."""
    write_subset(root, "ImageNet-1K", labels())
    write_subset(root, "MSCOCO_t2i", captions())
    return root


class FakeEncoder:
    """Vectors from a hash of text and image bytes.

    Attributes:
      seen: every input that was embedded, as (text, image file names).
      fail_at: the call of `encode`, counted from 1, that raises.
    """

    def __init__(self, model: str = "a", width: int = 8, fail_at: int | None = None):
        self.model, self.width, self.fail_at = model, width, fail_at
        self.seen: list[tuple] = []
        self.calls = 0

    def fingerprint(self) -> dict:
        return {"model": self.model, "processor": {"num_crops": 4, "max_len": 256}}

    def encode(self, inputs, *, progress: bool = False) -> np.ndarray:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the machine stopped here")
        self.seen += [(i.text, tuple(Path(p).name for p in i.images)) for i in inputs]
        return np.stack([self.vector(i.text, i.images) for i in inputs])

    def vector(self, text: str, images=()) -> np.ndarray:
        digest = hashlib.sha256(f"{self.model} {text}".encode())
        for path in images:
            digest.update(Path(path).read_bytes())
        rng = np.random.default_rng(int.from_bytes(digest.digest()[:8], "little"))
        return rng.standard_normal(self.width).astype(np.float32)


def evaluate(encoder, data, output, subsets=(), others=(), **options):
    """The scores, and what was said."""
    said: list[str] = []
    found = run.evaluate_sources(
        encoder,
        open_eval(data, list(subsets)),
        output=output,
        others=open_eval(data, list(others)) if others else (),
        say=said.append,
        **options,
    )
    return found, said
