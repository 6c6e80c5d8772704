# SPDX-License-Identifier: Apache-2.0
"""Command lines and files for the tests of `python -m vlm2vec_jax.embed`."""

import json
from pathlib import Path

import numpy as np
from small_models import label

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def argv(base, source, output, *more) -> list[str]:
    given = ["--model", base, "--input", source, "--output", output, "--dtype", "float32"]
    return ["embed", *map(str, given), *map(str, more)]


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(n: int) -> list[dict]:
    return [{"text": label(k), "id": f"t{k}"} for k in range(n)]


def load(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["embeddings"]


def wanted(model, lines) -> np.ndarray:
    return model.encode([{k: v for k, v in line.items() if k != "id"} for line in lines])
