# SPDX-License-Identifier: Apache-2.0
"""What transformers' Pillow image processors make of odd images, as checksums and size tables."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import transformers
from golden_forward import llava_tokens
from PIL import Image

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
CLIP["image_std"] = [0.26862954, 0.26130258, 0.27577711]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# (patch size, fewest pixels, most pixels, mean and standard deviation)
QWEN_SETTINGS = {
    "stock": (14, 56 * 56, 28 * 28 * 1280, CLIP),
    "v1_train": (14, 256 * 28 * 28, 1280 * 28 * 28, CLIP),
    "small": (14, 4 * 28 * 28, 16 * 28 * 28, CLIP),
    "qwen3": (16, 64 * 32 * 32, 1280 * 32 * 32, HALF),
}
LLAVA = {
    "real": (336, 14, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))),
    "wide": (28, 7, ((1, 1), (1, 4), (4, 1), (2, 3))),
}
_SIDES = (1, 2, 13, 14, 27, 28, 29, 41, 42, 43, 56, 70, 98, 100, 255, 337, 672, 1000, 1365, 4000)


def qwen() -> dict:
    """Sizes that `smart_resize` gives: rows height, width, resized height and width or null."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    tables = {}
    for name, (patch, fewest, most, _) in QWEN_SETTINGS.items():
        rows = []
        for height, width in itertools.product(_SIDES, _SIDES):
            try:
                size = smart_resize(height, width, 2 * patch, fewest, most)
            except ValueError:
                size = (None, None)
            rows.append([height, width, *size])
        tables[name] = rows
    return tables


def qwen_images(images: Path) -> dict:
    """Checksums of patches, as u8 before and float32 after normalising, with alpha either way."""
    out: dict[str, dict] = {}
    for name, (patch, fewest, most, norm) in QWEN_SETTINGS.items():
        size = {"shortest_edge": fewest, "longest_edge": most}
        processor = transformers.Qwen2VLImageProcessorPil(size=size, patch_size=patch, **norm)
        out[name] = {
            "patch_size": patch,
            "min_pixels": fewest,
            "max_pixels": most,
            **norm,
            "images": _sums(images, lambda image, p=processor: _qwen_one(p, image)),
        }
    return out


def _qwen_one(processor, image: Image.Image) -> dict:
    raw = processor(images=image, do_rescale=False, do_normalize=False)
    done = processor(images=image)
    return {
        "grid": np.asarray(raw["image_grid_thw"])[0].tolist(),
        "u8": _sha(np.asarray(raw["pixel_values"]).astype(np.uint8)),
        "f32": _sha(np.asarray(done["pixel_values"], np.float32)),
    }


def llava() -> dict:
    """For each setting: pinpoints and rows height, width, best height and width, tokens."""
    from transformers.image_processing_utils import select_best_resolution

    out = {}
    for name, (side, patch, grid) in LLAVA.items():
        pinpoints = [[side * h, side * w] for h, w in grid]
        processor = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints)
        config = {"vision_config": {"image_size": side, "patch_size": patch}}
        rows = []
        for height, width in itertools.product(_SIDES, _SIDES):
            best = select_best_resolution((height, width), pinpoints)
            rows.append([height, width, *best, llava_tokens(processor, config, height, width)])
        out[name] = {"side": side, "patch": patch, "pinpoints": pinpoints, "rows": rows}
    return out


def llava_images(images: Path) -> dict:
    """Checksums of tiles, as u8 before and float32 after normalising, with alpha either way."""
    out: dict[str, dict] = {}
    for name, (side, _, grid) in LLAVA.items():
        processor = transformers.LlavaNextImageProcessorPil(
            image_grid_pinpoints=[[side * h, side * w] for h, w in grid],
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            **CLIP,
        )
        out[name] = _sums(images, lambda image, p=processor: _llava_one(p, image))
    return out


def _llava_one(processor, image: Image.Image) -> dict:
    raw = processor(images=image, do_rescale=False, do_normalize=False)
    done = processor(images=image)
    tiles = np.asarray(raw["pixel_values"])[0]
    return {
        "tiles": len(tiles),
        "u8": _sha(tiles.astype(np.uint8)),
        "f32": _sha(np.asarray(done["pixel_values"], np.float32)[0]),
    }


def _sums(images: Path, one) -> dict:
    """`one` of every image; where that differs, of the image with its alpha dropped, too."""
    out = {}
    for path in sorted(images.glob("*.png")):
        with Image.open(path) as image:
            try:
                out[path.stem] = one(image)
            except ValueError as error:
                out[path.stem] = {"error": str(error)}
                continue
            dropped = one(image.convert("RGB"))
            if dropped != out[path.stem]:
                out[path.stem]["alpha_dropped"] = dropped
    return out


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
