# SPDX-License-Identifier: Apache-2.0
"""A model of a few thousand parameters and data to train and score it, for tests of whole roads."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from data_files import write_parquet
from PIL import Image

from vlm2vec_jax.models.phi3v.mini import MiniSizes, write_mini_model

SIZES = MiniSizes(
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    vision_size=16,
    vision_intermediate=32,
    vision_layers=3,
    vision_heads=2,
    image_size=56,
    num_crops=4,
    pieces=420,
)

COLOURS = ("red", "green", "blue", "grey", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PROMPT = "<|image_1|> Represent the given image for classification\n"


def picture(number: int, size: tuple[int, int] = (60, 44)) -> Image.Image:
    """A picture that no other number gives."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def label(number: int) -> str:
    return f"a {COLOURS[number % 6]} {SHAPES[number // 6 % 6]} number {number}\n"


def train_row(number: int, image: str) -> dict:
    return {
        "qry": PROMPT,
        "qry_image_path": image,
        "pos_text": label(number),
        "pos_image_path": "",
    }


def write_train(root: Path, subset: str = "ImageNet_1K", count: int = 16) -> Path:
    """A training folder: pictures to labels, and half as many labels to pictures."""
    rows = []
    for n in range(count):
        path = root / "images" / subset / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(path)
        rows.append(train_row(n, f"images/{subset}/{n}.png"))
    for n in range(count // 2):
        image = f"images/{subset}/{n}.png"
        rows.append(
            {
                "qry": f"Find me a picture of {label(n)}",
                "qry_image_path": "",
                "pos_text": "<|image_1|> Represent the given image\n",
                "pos_image_path": image,
            }
        )
    write_parquet(root / subset, "original", rows)
    return root


def write_model(data: Path, output: Path, seed: int = 0) -> Path:
    """The HF folder of an untrained model that knows the texts of `data`."""
    write_mini_model(data, output, seed, SIZES)
    return output


@contextlib.contextmanager
def quick_compiler() -> Iterator[None]:
    """Programs that run for a moment are not worth the time that optimizing them takes."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)
