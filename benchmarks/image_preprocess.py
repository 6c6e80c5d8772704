# SPDX-License-Identifier: Apache-2.0
"""Preparing an image for the model: ours against the reference's path.

Ours is what a run does to a decoded image: scale, pad, cut into 8-bit crops. The reference's path
(`image_path`) also normalises, makes the global view, and pads with empty crops; ours leaves the
first two to the device and needs no third. Decoding is the same for both and is given beside it.
Before anything is timed, our crops normalised must be the reference's local crops, bit by bit.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from benchmarks import image_path
from benchmarks.common import How, Result, alternate, compared
from vlm2vec_jax.images import load_image
from vlm2vec_jax.models.phi3v.hd_transform import (
    crop_info,
    cut_crops,
    hd_geometry,
    image_feature_index,
    normalise,
)

CASES = {
    # (width, height, num_crops): the target of the ratio
    (1344, 1008, 16): 20.0,
    (640, 480, 16): None,
    (640, 480, 4): 3.0,
    (1024, 1024, 4): None,
    (1700, 2200, 16): None,
}
AT_ONCE = 4
"""Images of a turn, different ones, so that none is in a cache for the other's sake."""


def prepare(image: Image.Image, num_crops: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Phi3VProcessor.encode` does to an image: crops, where they belong, and the index."""
    rgb = load_image(image)
    geometry = hd_geometry(*rgb.size, num_crops, image_path.CROP)
    assert geometry is not None
    index = image_feature_index(geometry.rows, geometry.columns, 12, "sub_glb")
    return cut_crops(rgb, geometry), crop_info(geometry), index


def check(image: Image.Image, num_crops: int) -> None:
    """Our crops, normalised, are the reference's to the bit.

    Raises:
      AssertionError: if they are not.
    """
    theirs = image_path.process(image, num_crops)
    crops, info, index = prepare(image, num_crops)
    local = normalise(crops[1 - theirs.count :]).transpose(0, 3, 1, 2)
    count = theirs.count if theirs.count > 2 else 1  # a single crop is its own global view
    assert len(crops) == len(info) == count and len(index) == theirs.tokens
    assert np.array_equal(local, theirs.pixels[1 : theirs.count])
    assert not theirs.pixels[theirs.count :].any()


def measure(how: How) -> Result:
    """Milliseconds an image, one thread."""
    rows, timings, more = [], {}, {}
    for (width, height, num_crops), target in CASES.items():
        width, height = how.pick((width, height), (width // 4, height // 4))
        name = f"{width}x{height} num_crops {num_crops}"
        images = [
            image_path.photograph(width, height, how.seed + i) for i in range(how.pick(AT_ONCE, 1))
        ]
        for image in images:
            check(image, num_crops)

        def ours(images=images, num_crops=num_crops):
            for image in images:
                prepare(image, num_crops)

        def theirs(images=images, num_crops=num_crops):
            for image in images:
                image_path.process(image, num_crops)

        timing = alternate({"ours": ours, "reference": theirs}, max(how.rounds, how.pick(5, 1)))
        row = compared(
            name,
            "the reference's path in numpy and Pillow",
            timing,
            "ours",
            "reference",
            target,
            {"images": len(images)},
        )
        row.ours, row.unit = 1000 * row.ours / len(images), "ms"
        row.baseline = 1000 * (row.baseline or 0) / len(images)
        rows.append(row)
        timings[name] = timing
        crops, _, _ = prepare(images[0], num_crops)
        more[name] = {
            "bytes": crops.nbytes,
            "reference_bytes": image_path.process(images[0], num_crops).pixels.nbytes,
            "jpeg_decode_ms": _decode_ms(images),
        }
    return Result(rows, timings, {"sizes": more})


def _decode_ms(images: list[Image.Image]) -> float:
    """Of the same images as JPEG files of quality 90, in memory."""
    import time

    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    start = time.process_time()
    for data in files:
        Image.open(io.BytesIO(data)).load()
    return 1000 * (time.process_time() - start) / len(files)
