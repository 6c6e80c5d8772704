# SPDX-License-Identifier: Apache-2.0
"""The goldens' padded batches as packed ones: a row each, pixels given as they were recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm2vec_jax.models.phi3v.hd_transform import image_feature_index
from vlm2vec_jax.packing import PackedBatch


def load_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return dict(data)


def golden_batch(config, golden: dict[str, np.ndarray], rows=None) -> PackedBatch:
    """One sequence per row, padding where the reference had it; features by its image order."""
    ids, mask = golden["input_ids"], golden["attention_mask"]
    count, length = ids.shape
    feature_index = np.full((count, length), -1, np.int32)
    visual = {}
    if "image_row" in golden:
        pixels = [
            np.stack([np.kron(b, t) for b, t in zip(blocks, tiles, strict=True)], axis=-1)
            for blocks, tiles in zip(golden["pixel_blocks"], golden["pixel_tile"], strict=True)
        ]
        used = [0] * count
        features: list[list[np.ndarray]] = [[] for _ in range(count)]
        crops: list[list[np.ndarray]] = [[] for _ in range(count)]
        for image, row in enumerate(golden["image_row"]):
            h, w = golden["image_sizes"][image] // config.crop_size
            side, order = config.merged_side, config.hd_order
            index = image_feature_index(int(h), int(w), side, order, views=1)
            shift = used[row] * config.tokens_per_crop
            features[row].append(np.where(index >= 2, index + shift, index))
            crops[row] += [pixels.pop(0) for _ in range(golden["crops_used"][image])]
            used[row] = len(crops[row])
        table = np.zeros((count, max(used), config.crop_size, config.crop_size, 3), np.float32)
        for row in range(count):
            if crops[row]:
                table[row, : used[row]] = crops[row]
                feature_index[row][ids[row] < 0] = np.concatenate(features[row])
        visual = {"pixels": table}
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    last = np.array([np.flatnonzero(m)[-1] for m in mask], np.int32)[:, None]
    batch = PackedBatch(
        np.maximum(ids, 0).astype(np.int32),
        feature_index,
        positions,
        mask.astype(np.int32),
        last,
        np.arange(count, dtype=np.int32)[:, None],
        visual,
    )
    if rows is None:
        return batch
    picked = [leaf[rows] for leaf in batch[:-1]]
    return PackedBatch(*picked, {name: leaf[rows] for name, leaf in visual.items()})


def rope_table(config, golden: dict[str, np.ndarray]) -> str:
    """The table that the reference took for this whole batch: by its padded length."""
    long = golden["input_ids"].shape[1] > config.rope.original_max_position_embeddings
    return "long" if long else "short"
