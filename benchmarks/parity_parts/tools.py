# SPDX-License-Identifier: Apache-2.0
"""What the measurements of parity share: lines of the table, comparisons, the goldens' files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
GOLDENS = ROOT / "tests" / "goldens"
MODELS = ("tiny_mha", "tiny_gqa")

SHARE = "share of 1e-5 x max abs gradient + 2e-5, the worst tensor"


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
      what: is compared.
      golden: where the expected numbers lie, below tests/goldens.
      measured: the largest difference, or a share, or a cosine.
      required: limit; the measured number must not exceed it.
      note: how it is measured, where that is not the largest absolute difference.
      at_least: the measured number must reach the limit instead.
    """

    what: str
    golden: str
    measured: float
    required: float
    note: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the limit is kept."""
        if self.at_least:
            return self.measured >= self.required
        return self.measured <= self.required


class Largest(dict):
    """Key -> largest difference seen."""

    def see(self, key: str, found, expected) -> None:
        """Compare two arrays."""
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape, (key, found.shape, expected.shape)
        self[key] = max(self.get(key, 0.0), float(np.abs(found - expected).max(initial=0)))


def share_of_tolerance(found: dict, expected: dict) -> float:
    """Largest |difference| / (1e-5 max |gradient| + 2e-5) over the tensors."""
    assert set(found) == set(expected)
    return max(
        float(np.abs(found[n] - g).max(initial=0) / (1e-5 * np.abs(g).max(initial=0) + 2e-5))
        for n, g in expected.items()
    )


def by_hf_name(leaves, table) -> dict[str, np.ndarray]:
    """HF name -> array in HF's layout, of the leaves that are there."""
    out = {}
    for name, slot in table.slots.items():
        if slot.rule.ours in leaves:
            leaf = np.asarray(leaves[slot.rule.ours])
            out[name] = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
    return out


def load(name: str, mesh=None):
    import jax.numpy as jnp

    from vlm2vec_jax.models.loading import load_model

    return load_model(GOLDENS / name, dtype_of=lambda path: jnp.float32, mesh=mesh)


def relative(found, expected) -> float:
    return abs(float(found) - float(expected)) / abs(float(expected))


def image_file(name: str) -> Path:
    return GOLDENS / "image_processing/images" / f"{name}.png"


def read_json(path: str):
    return json.loads((GOLDENS / path).read_text())


def read_npz(path: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / path) as data:
        return dict(data)


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(GOLDENS / path)
