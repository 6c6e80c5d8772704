# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share: HF names for our leaves, the goldens' tolerance, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data_files import make_train
from PIL import Image

from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.phi3v.mini import MiniSizes, write_mini_model
from vlm2vec_jax.training.batching import BatchPacker, choose_rows
from vlm2vec_jax.training.step import TrainBatch

MINI = MiniSizes(
    hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, vision_size=16,
    vision_intermediate=32, vision_layers=2, vision_heads=2, image_size=56, num_crops=2, pieces=400,
)  # fmt: skip
"""A model of every part whose dimensions divide by 8, for meshes."""

QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options where compiling takes most of a test's time."""


def mini_model(folder: Path) -> Path:
    """An untrained model folder that learned its tokenizer from a few lines."""
    if not (folder / "model").exists():
        make_train(folder / "texts", {"Lines": 40})
        write_mini_model(folder / "texts", folder / "model", 0, MINI)
    return folder / "model"


def pairs(count: int, *, images: bool = True, seed: int = 0):
    """Pairs of texts of several lengths and, in places, images of one and of two crops."""
    rng = np.random.default_rng(seed)
    words = "a red circle over the small blue square beside one green line query target".split()

    def text(longest: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, longest)))

    def picture(crops: int):
        pixels = rng.integers(0, 256, (56, 56 * crops, 3), np.uint8)
        return Image.fromarray(pixels)

    queries, targets = [], []
    for i in range(count):
        with_image = images and i % 2 == 0
        queries.append(
            MultimodalInput(f"<|image_1|> {text(6)}", (picture(1 + i % 4 // 2),))
            if with_image
            else MultimodalInput(text(30))
        )
        targets.append(
            MultimodalInput("<|image_1|> thing", (picture(1),))
            if images and i % 3 == 1
            else MultimodalInput(f"{text(12)} {i}")
        )
    return queries, targets


def encode(processor, queries, targets):
    return [processor.encode(q) for q in queries], [processor.encode(t) for t in targets]


def packer_for(processor, sizes, *, chunk_tokens=None, row_multiple=1, row_tokens=0):
    rows = choose_rows(sizes, longest=4096, row_tokens=row_tokens)
    return BatchPacker(
        rows, processor.visual_layout, chunk_tokens=chunk_tokens, row_multiple=row_multiple
    )


def train_batch(processor, encoded, *, chunk_tokens=None, row_multiple=1, row_tokens=0, ids=None):
    """A `TrainBatch` of encoded (queries, targets); every target a thing of its own by default."""
    sizes = [(len(item), item.units) for side in encoded for item in side]
    packer = packer_for(
        processor,
        sizes,
        chunk_tokens=chunk_tokens,
        row_multiple=row_multiple,
        row_tokens=row_tokens,
    )
    ids = np.arange(len(encoded[0])) if ids is None else np.asarray(ids)
    return TrainBatch(packer(*encoded).groups, ids.astype(np.int32))


def by_hf_name(leaves, table) -> dict[str, np.ndarray]:
    """HF name -> array in HF's layout, of the leaves that are there."""
    out = {}
    for name, slot in table.slots.items():
        if slot.rule.ours in leaves:
            leaf = np.asarray(leaves[slot.rule.ours])
            out[name] = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
    return out


def check_gradients(found, expected, *, relative=1e-5, absolute=2e-5) -> float:
    """The goldens' rule, tensor by tensor; returns the largest share of the tolerance used."""
    assert set(found) == set(expected)
    used = {}
    for name, wanted in expected.items():
        wanted, got = np.asarray(wanted), np.asarray(found[name])
        assert got.shape == wanted.shape, name
        allowed = relative * np.abs(wanted).max(initial=0) + absolute
        used[name] = float(np.abs(got - wanted).max(initial=0) / allowed)
    wrong = {name: share for name, share in used.items() if not share <= 1}
    assert not wrong, f"gradients off by so many tolerances: {wrong}"
    return max(used.values())
