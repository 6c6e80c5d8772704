# SPDX-License-Identifier: Apache-2.0
"""The commands called in this process, and what they say: for tests of bad input."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_files import write_parquet
from small_models import quick_compiler

from vlm2vec_jax import flags
from vlm2vec_jax.embedder import Embedder


@contextlib.contextmanager
def one_embedder() -> Iterator[None]:
    """Commands of one process share the model, so that each shape compiles once."""
    with pytest.MonkeyPatch.context() as patch:
        load = Embedder.from_pretrained
        patch.setattr(Embedder, "from_pretrained", staticmethod(functools.cache(load)))
        with quick_compiler():
            yield


def call(module, *argv) -> int:
    return flags.call(module.main, module.define, [module.__name__, *map(str, argv)])


def train_argv(base, data, output, *more) -> list[str]:
    fields = {
        "model.path": base, "data.path": data, "output": output, "batch_size": 4, "steps": 6,
        "optim.warmup_steps": 1, "checkpoint.every": 2, "mesh.data": 1, "log_every": 1,
        "grad_cache": "off", "packing.row_tokens": 512,
    }  # fmt: skip
    config = Path(__file__).parent.parent / "configs" / "mini.py"
    return ["--config", str(config), *(f"--config.{k}={v}" for k, v in fields.items()), *more]


def evaluate_argv(base, data, output, *more) -> list[str]:
    flags_ = ["--model", base, "--data", data, "--output", output, "--dtype", "float32"]
    return [*map(str, flags_), *more]


def embed_argv(base, lines, output, *more) -> list[str]:
    flags_ = ["--model", base, "--input", lines, "--output", output, "--dtype", "float32"]
    return [*map(str, flags_), *more]


def write_lines(folder: Path, *lines) -> Path:
    """A file of inputs; what is no string already is written as json."""
    path = folder / "inputs.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def tear(path: Path) -> bytes:
    """Cut the end off an image file, behind its header; returns what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    return whole


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def refused(capsys, *words) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lost = [word for word in words if str(word) not in said]
    assert not lost, f"{lost} not in\n{said}"
    return said


def text_data(root: Path, count: int = 40) -> Path:
    """Pairs of texts: the cheapest that can be trained on."""
    rows = [
        {"qry": f"which number is {n}", "qry_image_path": "", "pos_text": f"it is {n}",
         "pos_image_path": ""} for n in range(count)
    ]  # fmt: skip
    write_parquet(root / "WebQA", "original", rows)
    return root
