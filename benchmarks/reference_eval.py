# SPDX-License-Identifier: Apache-2.0
"""What VLM2Vec's `eval.py` (v1) does from files to scores, in our own code: a benchmark's baseline.

For each subset, queries first and then targets, on one thread and without worker processes (the
reference's default):

* the distinct pairs of text and image path, in the order of a set, that is of chance;
* one after the other, each image opened and decoded again for every pair that names it, and
  prepared as the reference's processor does it (`image_path.process`): normalised float32 crops
  and the global view by a bicubic resize on the host, zeros up to `num_crops + 1`;
* texts tokenised one by one, with an image the pieces around it;
* batches of 16 (its command's `per_device_eval_batch_size`), right-padded, pixels stacked;
* `reference_shaped.embed` in its reference form: texts spared the vision tower, all crops and
  every layer computed, dense attention, the language model's head at every token;
* the matrix and the keys written to files (`.npy` and JSON, where the reference pickles).

When all subsets are embedded, the files are read again, and for each query its candidates are
looked up, stacked, normalised, multiplied, and the first largest taken; a file of predictions and
one of the score are written for each subset.

It is kinder than the reference in three things: the model is a compiled program (lengths of a batch
rounded up to even ones and batch sizes to multiples of four, so that programs are few), images are
put in place by one gather instead of a loop over them, and weights are not cast or merged first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from flax import nnx
from PIL import Image

from benchmarks import image_path
from benchmarks.reference_shaped import REFERENCE, embed, right_padded
from vlm2vec_jax.data.source import to_input
from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.models.phi3v.hd_transform import (
    SHARED_FEATURES,
    hd_geometry,
    image_feature_index,
)
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.shared.processor import ImageParts
from vlm2vec_jax.nn.compute import Compute

BATCH = 16
EVEN = 2
"""Lengths of batches are rounded up to a multiple of this, each being a program ..."""
SIZES = 4
"""... and the size of a last batch to a multiple of this."""


class ReferenceProcessor(Phi3VProcessor):
    """Our tokenizer, and images as the reference's processor hands them to its model."""

    @classmethod
    def like(cls, processor: Phi3VProcessor) -> ReferenceProcessor:
        """One with the settings of ours."""
        told = processor.settings
        made = cls(
            processor.tokenizer,
            crop_size=told["crop_size"],
            patch_size=told["patch_size"],
            hd_order=told["hd_order"],
            num_crops=told["num_crops"],
            max_len=told["max_len"],
        )
        side = made._crop
        pixels = {"pixels": ((3, side, side), "float32")}
        made._layout = VisualLayout(SHARED_FEATURES, made._side**2, pixels)
        return made

    def _image(self, image) -> ImageParts:
        assert not isinstance(image, Image.Image)
        with Image.open(image) as opened:
            rgb = opened.convert("RGB")
        made = image_path.process(rgb, self._num_crops, self._crop)
        geometry = hd_geometry(*rgb.size, self._num_crops, self._crop)
        assert geometry is not None
        cut = (geometry.rows, geometry.columns, self._side, self._order)
        return ImageParts({"pixels": made.pixels}, image_feature_index(*cut, views=1))


class Loop:
    """The evaluation.

    Attributes:
      embedded: pairs that the last call embedded.
    """

    def __init__(self, module: nnx.Module, processor: Phi3VProcessor, data: Path, seed: int):
        """Take our model and settings, and the folder to evaluate on."""
        self._processor = ReferenceProcessor.like(processor)
        self._data, self._seed, self.embedded = data, seed, 0
        graphdef, self._state = nnx.split(module)
        compute = Compute("float32")

        def run(state, batch):
            visual = {name: jnp.moveaxis(leaf, 2, -1) for name, leaf in batch.visual.items()}
            model = nnx.merge(graphdef, state)
            return embed(model, batch._replace(visual=visual), compute, REFERENCE)

        self._run = jax.jit(run)

    def __call__(self, output: Path) -> dict[str, list]:
        """Evaluate; the predicted keys of each subset, also left in `output`."""
        order, self.embedded = random.Random(self._seed), 0
        files = {f.parent.name: f for f in sorted(self._data.glob("*/test-*.parquet"))}
        for subset, file in files.items():
            for side, keys in zip(("qry", "tgt"), _distinct(_rows(file)), strict=True):
                pairs = sorted(keys)  # a set's own order would differ from run to run
                order.shuffle(pairs)
                vectors = self._embed(pairs, self._data)
                self.embedded += len(pairs)
                np.save(output / f"{subset}_{side}.npy", vectors)
                (output / f"{subset}_{side}.json").write_text(json.dumps(pairs))
        return {subset: _score(subset, _rows(file), output) for subset, file in files.items()}

    def _embed(self, pairs: Sequence[tuple[str, str]], root: Path) -> np.ndarray:
        out = []
        for start in range(0, len(pairs), BATCH):
            keys = pairs[start : start + BATCH]
            items: list[EncodedInput] = [self._processor.encode(to_input(k, root)) for k in keys]
            items += items[:1] * (-len(items) % SIZES)
            batch = right_padded(items, self._processor.visual_layout, EVEN)
            found, _ = jax.block_until_ready(self._run(self._state, jax.tree.map(jnp.array, batch)))
            ordered = np.empty(found[:, 0].shape, np.float32)
            ordered[batch.slot[:, 0]] = found[:, 0]
            out.append(ordered[: len(keys)])
        return np.concatenate(out)


def distinct_pairs(data: Path) -> set[tuple[str, str]]:
    """(text, image path) of all queries and candidates in a folder of MMEB-eval's layout."""
    files = data.glob("*/test-*.parquet")
    return {pair for file in files for side in _distinct(_rows(file)) for pair in side}


def _rows(file: Path) -> list[dict]:
    return pq.read_table(file).to_pylist()


def _distinct(rows: list[dict]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Pairs of queries and of targets."""
    queries = {(row["qry_text"], row["qry_img_path"]) for row in rows}
    return queries, {key for row in rows for key in _candidates(row)}


def _candidates(row: dict) -> list[tuple[str, str]]:
    return list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))


def _score(subset: str, rows: list[dict], folder: Path) -> list[tuple[str, str]]:
    """Predicted keys of a subset, from its files."""
    vectors = {}
    for side in ("qry", "tgt"):
        keys = json.loads((folder / f"{subset}_{side}.json").read_text())
        matrix = np.load(folder / f"{subset}_{side}.npy")
        vectors[side] = {tuple(k): v for k, v in zip(keys, matrix, strict=True)}
    predicted, correct = [], 0
    for row in rows:
        query = vectors["qry"][row["qry_text"], row["qry_img_path"]]
        candidates = _candidates(row)
        targets = np.stack([vectors["tgt"][key] for key in candidates])
        scores = (targets @ query) / (np.linalg.norm(targets, axis=1) * np.linalg.norm(query))
        best = int(np.argmax(scores))
        correct += best == 0
        predicted.append(candidates[best])
    lines = "\n".join(json.dumps(key) for key in predicted)
    (folder / f"{subset}_pred.txt").write_text(lines)
    score = {"acc": correct / len(predicted), "num_correct": correct, "num_pred": len(predicted)}
    (folder / f"{subset}_score.json").write_text(json.dumps(score))
    return predicted
