# SPDX-License-Identifier: Apache-2.0
"""The published model's tensors, and those of adapters on it, from its configuration alone.

The lists are text, so that a change of a name, a shape or a count shows in review. To write them
anew after a change that is meant: `python tests/test_golden_names.py`.
"""

from pathlib import Path

import numpy as np
import pytest

from vlm2vec_jax.models.loading import abstract_model, flatten
from vlm2vec_jax.weights.adapter_config import AdapterConfig
from vlm2vec_jax.weights.adapters import adapter_tensors
from vlm2vec_jax.weights.rules import collapse
from vlm2vec_jax.weights.targets import resolve

FOLDER = Path(__file__).parent / "golden_names"
REAL = Path(__file__).parent / "goldens" / "phi-3.5-vision"
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj")
TARGETS = (*TARGETS, "v_proj")
"""The reference's default, as published adapters have it."""


def listed(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """A line per tensor: name, type, shape; layers that differ in their number only are one."""
    groups: dict[tuple, list[str]] = {}
    for name, what in tensors.items():
        groups.setdefault(what, []).append(name)
    lines = [
        f"{label} {kind} {list(shape)}"
        for (kind, shape), names in groups.items()
        for label, _ in collapse(names)
    ]
    numbers = sum(int(np.prod(shape)) for _, shape in tensors.values())
    return "\n".join([f"# {len(tensors)} tensors, {numbers} numbers", *sorted(lines)]) + "\n"


def full() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of every tensor that an export of the model holds."""
    model = abstract_model(REAL)
    leaves = flatten(model.module)
    out = {}
    for name, slot in model.table.written():
        shape = tuple(leaves[slot.rule.ours].shape)
        out[name] = ("BF16", slot.rule.hf_shape(shape if slot.layer is None else shape[1:]))
    return out


def adapter(dora: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of an adapter of rank 8."""
    model = abstract_model(REAL)
    leaves = flatten(model.module)
    config = AdapterConfig(rank=8, alpha=64, targets=TARGETS, dora=dora)
    flat = {}
    for path in resolve(config, model.table):
        *stack, fan_in, fan_out = leaves[f"{path}/kernel"].shape
        shapes = {"lora_a": (fan_in, 8), "lora_b": (8, fan_out), "magnitude": (fan_out,)}
        for leaf, shape in shapes.items():
            if dora or leaf != "magnitude":
                # No numbers are needed, and no memory is taken.
                flat[f"{path}/{leaf}"] = np.broadcast_to(np.float32(0), (*stack, *shape))
    tensors = adapter_tensors(flat, model.table, config)
    return {name: ("F32", array.shape) for name, array in tensors}


CASES = {
    "phi-3.5-vision.txt": full,
    "phi-3.5-vision-lora-r8.txt": lambda: adapter(False),
    "phi-3.5-vision-dora-r8.txt": lambda: adapter(True),
}


@pytest.mark.parametrize("file", CASES)
def test_names_shapes_and_types(file):
    assert listed(CASES[file]()) == (FOLDER / file).read_text()


def test_counts_of_the_published_model():
    """From the model card and the reference's own adapters: 4.15 billion, 2 or 3 per module."""
    head = (FOLDER / "phi-3.5-vision.txt").read_text().splitlines()[0]
    assert head == f"# {32 * 6 + 24 * 16 + 7 + 3 + 6} tensors, 4146621440 numbers"
    modules = 32 * 4 + 24 * 4
    for kind, parts in (("lora", 2), ("dora", 3)):
        head = (FOLDER / f"phi-3.5-vision-{kind}-r8.txt").read_text()
        assert head.startswith(f"# {modules * parts} tensors, ")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in CASES.items():
        (FOLDER / name).write_text(listed(make()))
