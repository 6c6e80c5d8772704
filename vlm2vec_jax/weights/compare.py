# SPDX-License-Identifier: Apache-2.0
"""Compare two models: every tensor, and the embeddings of some inputs.

    python -m vlm2vec_jax.weights.compare A B [--input FILE.jsonl] [--tolerance 1e-5]
        [--tensor_tolerance 1e-6] [--json FILE]

A and B are each a Hugging Face folder, a training output, an adapter folder (on the base that it
names), a hub id, or BASE+ADAPTER: a base with an adapter on top. Tensors are those of the full
model, with the adapter merged in float32. A line of FILE is `{"text": "...", "images": ["path"]}`;
embeddings are computed in float32. Exit code 0: the same within the tolerances; 1: not; 2: a
mistake in what was asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from vlm2vec_jax.embedding.loading import load_source
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.flags import (
    define_compilation_cache,
    run,
    take_arguments,
    use_compilation_cache,
)
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.folders import locate
from vlm2vec_jax.models.loading import abstract_model, flatten
from vlm2vec_jax.weights.adapters import Adapter, is_adapter_leaf, load_adapter, merge_leaf
from vlm2vec_jax.weights.rules import Table
from vlm2vec_jax.weights.safetensors import Checkpoint

SHOWN = 20
DIFFERENT = 1
"""Exit code of models that are not the same."""


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    take_arguments(values)
    flags.DEFINE_string("input", None, "inputs to embed with both, jsonl", flag_values=values)
    for name, default, words in (
        ("tolerance", 1e-5, "largest difference of an embedding's element"),
        ("tensor_tolerance", 1e-6, "largest difference of a tensor's element"),
    ):
        flags.DEFINE_float(name, default, words, lower_bound=0, flag_values=values)
    for name, words in (
        ("num_crops", "most sub-images, for both; by default what each says"),
        ("max_len", "most tokens of a text, for both; by default what each says"),
    ):
        flags.DEFINE_integer(name, None, words, lower_bound=1, flag_values=values)
    flags.DEFINE_string("json", None, "a file for all numbers", flag_values=values)
    define_compilation_cache(values)


def main(args: Any) -> int:
    """Compare, print, and return the exit code."""
    if len(args.arguments) != 2:
        raise UserError(f"two models must be given, A and B; here are {len(args.arguments)}")
    use_compilation_cache(args)
    a, b = args.arguments
    items = None if args.input is None else read_inputs(Path(args.input))
    tensors = compare_tensors(a, b)
    embeddings = None
    if items is not None:
        options = {"num_crops": args.num_crops, "max_len": args.max_len}
        embeddings = compare_embeddings(a, b, items, **options)
    same = report(tensors, embeddings, args.tensor_tolerance, args.tolerance)
    if args.json:
        from vlm2vec_jax.record import write_json

        write_json(
            args.json,
            {
                "a": a,
                "b": b,
                "same": same,
                "tensors": [dataclasses.asdict(line) for line in tensors],
                "embeddings": None if embeddings is None else dataclasses.asdict(embeddings),
            },
        )
    return 0 if same else DIFFERENT


@dataclasses.dataclass(frozen=True)
class Line:
    """One tensor on both sides.

    Attributes:
      name: HF's, in the backbone's spelling.
      a, b: `dtype [shape]` on each side; None where it is absent.
      difference: largest absolute difference, in float32; None where there is nothing to subtract.
      why: what makes the two different besides numbers; "" if nothing does.
    """

    name: str
    a: str | None
    b: str | None
    difference: float | None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Both sides' embeddings, input by input.

    Attributes:
      cosine: of A's with B's.
      difference: largest absolute difference of an element.
      settings: processor settings that differ, in words.
    """

    cosine: list[float]
    difference: list[float]
    settings: list[str]


def compare_tensors(a: str, b: str) -> list[Line]:
    """Hold every tensor of two models side by side; one is in memory at a time.

    Raises:
      UserError: if a model cannot be read, or they are of different families.
    """
    with open_side(a) as left, open_side(b) as right:
        if left.backbone != right.backbone:
            raise UserError(f"{a} is {left.backbone}, {b} is {right.backbone}: no tensor in common")
        lines = []
        for name in dict.fromkeys([*left.names, *right.names]):
            if name not in left.names or name not in right.names:
                only = "A" if name in left.names else "B"
                where = {side: _shown(side, name) for side in (left, right) if name in side.names}
                shown = [where.get(side) for side in (left, right)]
                lines.append(Line(name, shown[0], shown[1], None, f"only in {only}"))
                continue
            shown = [_shown(side, name) for side in (left, right)]
            if left.names[name][0] != right.names[name][0]:
                lines.append(Line(name, shown[0], shown[1], None, "shapes differ"))
                continue
            x, y = (side.read(name).astype(np.float32) for side in (left, right))
            lines.append(Line(name, shown[0], shown[1], _largest(x, y)))
        return lines


def _largest(x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference; equal bits (NaN and infinities too) differ by nothing."""
    if x.tobytes() == y.tobytes():
        return 0.0
    with np.errstate(invalid="ignore"):
        gap = np.abs(x - y)
    return float("inf") if np.isnan(gap).any() else float(gap.max(initial=0.0))


def compare_embeddings(a: str, b: str, items: list[MultimodalInput], **options: Any) -> Embeddings:
    """Embed the inputs with both models, one after the other, in float32."""
    from vlm2vec_jax.embedder import Embedder

    found, settings = [], []
    for named in (a, b):
        base, adapter = split(named)
        given = {name: value for name, value in options.items() if value is not None}
        embedder = Embedder.from_pretrained(base, adapter, dtype="float32", **given)
        found.append(embedder.encode(items))
        settings.append(embedder.processor.settings)
        del embedder
    x, y = found
    if x.shape != y.shape:
        raise UserError(f"embeddings of {a} have {x.shape[1]} numbers, those of {b} {y.shape[1]}")
    return Embeddings(
        [float(v) for v in np.sum(x * y, axis=-1)],
        [float(v) for v in np.abs(x - y).max(axis=-1)],
        [
            f"{name}: {settings[0].get(name)} in A, {settings[1].get(name)} in B"
            for name in dict.fromkeys([*settings[0], *settings[1]])
            if settings[0].get(name) != settings[1].get(name)
        ],
    )


def report(
    tensors: list[Line],
    embeddings: Embeddings | None,
    tensor_tolerance: float,
    tolerance: float,
) -> bool:
    """Print what differs; returns whether all is within the tolerances."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(width=160, highlight=False)
    bad = [t for t in tensors if t.why or (t.difference or 0.0) > tensor_tolerance]
    unequal = [t for t in tensors if t.why or t.difference or t.a != t.b]
    if unequal:
        grid = Grid("tensor", "A", "B", "largest difference", title="tensors that are not equal")
        order = sorted(unequal, key=lambda t: (not t.why, -(t.difference or 0.0)))
        for line in order[:SHOWN]:
            gap = line.why or f"{line.difference:.3e}"
            grid.add_row(line.name, line.a or "-", line.b or "-", gap)
        console.print(grid)
        if len(unequal) > SHOWN:
            console.print(f"... and {len(unequal) - SHOWN} more (--json FILE has all)")
    largest = max((t.difference or 0.0 for t in tensors), default=0.0)
    print(
        f"{len(tensors)} tensors: {len(tensors) - len(unequal)} equal, {len(unequal)} not, "
        f"{len(bad)} of them beyond {tensor_tolerance:g}; largest difference {largest:.3e}"
    )
    if embeddings is None:
        return not bad
    for line in embeddings.settings:
        print(f"the processors differ: {line}")
    grid = Grid("input", "cosine", "largest difference", title="embeddings")
    worst = sorted(range(len(embeddings.cosine)), key=lambda n: -embeddings.difference[n])
    for n in worst[:SHOWN]:
        grid.add_row(str(n), f"{embeddings.cosine[n]:.7f}", f"{embeddings.difference[n]:.3e}")
    console.print(grid)
    gap = max(embeddings.difference)
    print(
        f"{len(embeddings.cosine)} embeddings: smallest cosine {min(embeddings.cosine):.7f}, "
        f"largest difference {gap:.3e}, {'within' if gap <= tolerance else 'beyond'} {tolerance:g}"
    )
    return not bad and gap <= tolerance


class Side:
    """One of the two models: its tensors by HF name, read when asked for.

    Attributes:
      backbone: its family.
      names: name -> (shape, element type).
    """

    def __init__(
        self, backbone: str, table: Table, checkpoint: Checkpoint, adapter: Adapter | None
    ):
        self.backbone, self._table, self._checkpoint = backbone, table, checkpoint
        self._adapter = adapter
        self._flat: dict[str, Any] = {}
        self._file = table.canonical_names(checkpoint.names)
        self.names: dict[str, tuple[tuple[int, ...], str]] = {
            name: (checkpoint.shape(file), checkpoint.dtype_name(file))
            for name, file in self._file.items()
        }

    def use(self, flat: dict[str, Any]) -> None:
        """Take leaves in memory (what was trained) instead of the file's tensors."""
        self._flat = {path: leaf for path, leaf in flat.items() if not is_adapter_leaf(path)}

    def read(self, name: str) -> np.ndarray:
        """A tensor, with the adapter merged in float32."""
        slot = self._table.slots.get(name)
        original = self._table.copies.get(name)
        if original is not None and (self._flat or self._adapter):
            return self.read(original)
        if slot is not None and slot.rule.ours in self._flat:
            leaf = np.asarray(self._flat[slot.rule.ours])
            return slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
        adapter = self._adapter
        if adapter is None or slot is None:
            return self._checkpoint.read(self._file[name])
        if name in adapter.saved:
            return adapter.saved[name]
        tensor = self._checkpoint.read(self._file[name])
        linear = slot.rule.ours.removesuffix("/kernel")
        if linear == slot.rule.ours or linear not in adapter.linears:
            return tensor
        layer = 0 if slot.layer is None else slot.layer
        spec = adapter.linears[linear]
        if not spec.ranks[layer]:
            return tensor
        parts = [adapter.tensors.get(f"{linear}/{n}") for n in ("lora_a", "lora_b", "magnitude")]
        if slot.layer is not None:
            parts = [None if part is None else part[layer] for part in parts]
        merged = merge_leaf(slot.rule.to_ours(tensor), *parts, spec.scalings[layer])
        return slot.rule.to_hf(merged)


@contextlib.contextmanager
def open_side(named: str) -> Iterator[Side]:
    """Open a model for comparison.

    Raises:
      UserError: for whatever is wrong with its folders.
    """
    source = locate(*split(named))
    model = abstract_model(source.base)
    with Checkpoint(source.base) as checkpoint:
        adapter = None
        if source.adapter is not None:
            adapter = load_adapter(source.adapter, model.table, flatten(model.module))
        side = Side(model.backbone.name, model.table, checkpoint, adapter)
        if source.trained is not None:
            side.use(_trained(source))
        yield side


def _trained(source: Any) -> dict[str, Any]:
    """All leaves of a training output, its adapter merged, float32."""
    from vlm2vec_jax.weights.adapter_config import config_from_dict, resolve
    from vlm2vec_jax.weights.adapters import merge

    model, _ = load_source(source, dtype="float32", mesh=None)
    flat = flatten(model.module)
    spec = (source.record or {})["adapter"]
    if spec is None:
        return flat
    scaling = {p: x.scaling for p, x in resolve(config_from_dict(spec), model.table).items()}
    return merge(flat, flat, scaling)


def split(named: str) -> tuple[str, str | None]:
    """`BASE+ADAPTER` in two; a folder whose own name has a plus is one."""
    if "+" not in named or Path(named).exists():
        return named, None
    for at in (i for i, letter in enumerate(named) if letter == "+"):
        if Path(named[:at]).exists() or Path(named[at + 1 :]).exists():
            return named[:at], named[at + 1 :]
    base, _, adapter = named.partition("+")
    return base, adapter


def read_inputs(file: Path) -> list[MultimodalInput]:
    """Inputs of a jsonl file, as `embed` takes them.

    Raises:
      UserError: if it cannot be read, holds none, or listing the lines that are no inputs.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {file} cannot be read: {error}") from None
    items, problems = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise UserError("no JSON object with text and/or images")
            item = MultimodalInput.of(value).relative_to(file.parent)
            if trouble := item.problem():
                raise UserError(trouble)
            items.append(item)
        except (UserError, ValueError) as error:
            problems.append(f"line {number}: {error}")
    raise_problems(f"{file} has bad lines", problems)
    if not items:
        raise UserError(f"--input {file} holds no inputs")
    return items


def _shown(side: Side, name: str) -> str:
    shape, kind = side.names[name]
    return f"{kind} {list(shape)}"


if __name__ == "__main__":
    run(main, define)
