# SPDX-License-Identifier: Apache-2.0
"""Reads the goldens of the backbones beside phi3_v (tests/goldens/README.md says what they are)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
IMAGES = GOLDENS / "image_processing" / "images"
VARIANTS = {
    "qwen2_vl": ("tied", "untied"),
    "qwen2_5_vl": ("tied", "untied"),
    "qwen3_vl": ("tied", "untied"),
    "llava_next": ("gqa", "window"),
}
ADAPTERS = (("lora", 0), ("dora", 0), ("dora_4", 1))
"""Name and the place of its checkpoint among the variants."""


def cases(backbone: str, variant: str) -> list[dict]:
    """The cases of a checkpoint; `ids` i32 [T] and `images` as paths."""
    path = GOLDENS / backbone / f"{variant}_cases.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
    for row in rows:
        ids = [[x, 1] if isinstance(x, int) else x for x in row["input_ids"]]
        row["ids"] = np.repeat(*np.array(ids, np.int32).T).astype(np.int32)
        row["images"] = [str(IMAGES / f"{name}.png") for name in row["images"]]
    return rows


def arrays(backbone: str, variant: str) -> dict[str, np.ndarray]:
    """`<case>/<what>` to array."""
    with np.load(GOLDENS / backbone / f"{variant}_arrays.npz") as data:
        return dict(data)


def kept_rows(count: int, most: int = 6) -> np.ndarray:
    """Which rows of a long array the goldens keep."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def names(model: str, generation: int = 4) -> dict[str, tuple[int, ...]]:
    """Every parameter of a published model by its name in transformers 4.x or 5.x: its shape."""
    out = {}
    for line in (GOLDENS / "names" / model / "names.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        shape, *both = line.split()
        name = both[generation - 4]
        span = re.search(r"\{0\.\.(\d+)\}", name)
        layers = range(int(span.group(1)) + 1) if span else [0]
        for layer in layers:
            full = name[: span.start()] + str(layer) + name[span.end() :] if span else name
            out[full] = tuple(map(int, shape.split("x")))
    return out


def gradient_sketch(name: str, gradient: np.ndarray, seed: int = 72) -> tuple[float, float]:
    """Norm and seeded projection of a gradient in torch's layout, as the goldens hold them."""
    import zlib

    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(gradient.shape)
    gradient = gradient.astype(np.float64)
    return float(np.linalg.norm(gradient)), float((gradient * noise).sum())
