# SPDX-License-Identifier: Apache-2.0
"""The HD transform on the host: sizes, crops and token counts are the reference's, bit by bit."""

import hashlib
import json
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from vlm2vec_jax.images import ImageError
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.phi3v.hd_transform import (
    NEWLINE,
    SEPARATOR,
    assemble_image,
    bicubic_matrix,
    crop_info,
    cut_crops,
    global_view_numpy,
    hd_geometry,
    image_feature_index,
    normalise,
)
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(goldens):
    return load_tokenizer(goldens / "tiny_mha")


@pytest.fixture(scope="module")
def image_meta(goldens):
    return json.loads((goldens / "image_processing/meta.json").read_text())


def golden_image(goldens, name):
    return goldens / "image_processing" / "images" / f"{name}.png"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((width, height, seed))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- Images against the reference.


def test_size_table(image_meta):
    assert len(image_meta["size_table"]) == 730
    for width, height, num_crops, padded_width, padded_height, tokens in image_meta["size_table"]:
        geometry = hd_geometry(width, height, num_crops, 336)
        assert geometry is not None
        assert geometry.padded == (padded_width, padded_height)
        assert geometry.tokens(12) == tokens


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_crops_are_the_reference_s(goldens, tokenizer, image_meta, num_crops):
    processor = Phi3VProcessor(tokenizer, num_crops=num_crops)
    processed = np.load(goldens / "image_processing/processed.npz")
    checked = 0
    for name, meta in image_meta["images"].items():
        result = meta["results"][str(num_crops)]
        item = MultimodalInput(images=(golden_image(goldens, name),))
        if "error" in result:
            with pytest.raises(ImageError, match=name):
                processor.encode(item)
            continue
        encoded = processor.encode(item)
        crops, info = encoded.visual["crops"], encoded.visual["crop_info"]
        image = assemble_image(crops, info)
        assert image.shape[:2] == tuple(result["image_size_hw"]), name
        digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
        assert digest == result["hd_uint8_sha256"], name
        # The reference's global view of a single crop is that crop once more.
        used = result["crops_used_incl_global"]
        assert encoded.units == len(crops) == (used if used > 2 else 1)
        assert np.count_nonzero(encoded.feature_index >= 0) == result["num_img_tokens"]
        assert processor.length(item) == (len(encoded), encoded.units)

        golden = {part: processed[f"{name}__nc{num_crops}__{part}"] for part in ("sub", "mean")}
        golden["sub"] = golden["sub"].transpose(0, 2, 3, 1)
        local = normalise(crops[1 - used :, 5::16, 3::16])
        np.testing.assert_allclose(local, golden["sub"][1:], atol=2e-6, rtol=0)
        whole = global_view_numpy(crops, info)
        np.testing.assert_allclose(whole[5::16, 3::16], golden["sub"][0], atol=2e-5, rtol=0)
        np.testing.assert_allclose(whole.mean((0, 1)), golden["mean"][0], atol=1e-5, rtol=0)
        checked += 1
    assert checked >= 18


@pytest.mark.parametrize("name", ["noise_37x51", "photo_astronaut_300x200"])
def test_complete_pixels(goldens, tokenizer, name):
    golden = np.load(goldens / f"image_processing/full__{name}__nc1.npz")
    processor = Phi3VProcessor(tokenizer, num_crops=1)
    visual = processor.encode(MultimodalInput(images=(golden_image(goldens, name),))).visual
    crops, info = visual["crops"], visual["crop_info"]
    np.testing.assert_array_equal(assemble_image(crops, info), golden["hd_uint8"])
    expected = golden["pixel_values"][0].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(normalise(crops), expected[1:], atol=2e-6, rtol=0)
    np.testing.assert_allclose(global_view_numpy(crops, info), expected[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["gray_200x300", "rgba_400x150", "palette_250x190", "palette_transp_120x240", "bilevel_90x130"],
)
def test_unusual_modes_pixel_by_pixel(goldens, tokenizer, name):
    golden = np.asarray(Image.open(goldens / f"image_processing/hd__{name}__nc1.png"))
    processor = Phi3VProcessor(tokenizer, num_crops=1)
    visual = processor.encode(MultimodalInput(images=(golden_image(goldens, name),))).visual
    np.testing.assert_array_equal(assemble_image(visual["crops"], visual["crop_info"]), golden)


def test_extreme_sizes_work_or_are_refused_in_words(tokenizer, image_meta):
    outcomes = set()
    for case in image_meta["extreme"]:
        processor = Phi3VProcessor(tokenizer, num_crops=case["num_crops"])
        item = MultimodalInput(images=(picture(case["w"], case["h"]),))
        outcomes.add(case["ok"])
        if case["ok"]:
            encoded = processor.encode(item)
            assert np.count_nonzero(encoded.feature_index >= 0) == case["num_img_tokens"]
            image = assemble_image(encoded.visual["crops"], encoded.visual["crop_info"])
            assert list(image.shape[:2]) == case["image_size_hw"]
        else:
            for function in (processor.encode, processor.length):
                with pytest.raises(ImageError, match="too narrow.*num_crops=.*crop or pad"):
                    function(item)
    assert outcomes == {True, False}


@pytest.mark.parametrize(("width", "height"), [(2000, 10), (10, 2000)])
def test_a_strip_works(tokenizer, width, height):
    processor = Phi3VProcessor(tokenizer, num_crops=4)
    encoded = processor.encode(MultimodalInput(images=(picture(width, height),)))
    assert encoded.units == 5
    image = assemble_image(encoded.visual["crops"], encoded.visual["crop_info"])
    assert image.shape[:2] == ((336, 1344) if width > height else (1344, 336))
    assert (image == 255).mean() > 0.9


def test_narrow_images_name_their_file(tokenizer, tmp_path):
    picture(3000, 2).save(tmp_path / "thread.png")
    processor = Phi3VProcessor(tokenizer, num_crops=4)
    with pytest.raises(ImageError, match=r"thread\.png: 3000 x 2 pixels"):
        processor.length(MultimodalInput(images=(tmp_path / "thread.png",)))


# ---- The oracle of the device's global view.


def test_bicubic_matrix_values():
    # Halving: every output pixel lies between two inputs, the taps of t = 1/2 with a = -3/4.
    row = bicubic_matrix(16, 8)[3]
    np.testing.assert_allclose(row[5:9], [-0.09375, 0.59375, 0.59375, -0.09375], atol=1e-15)
    assert np.count_nonzero(row) == 4
    # At the border the taps beyond it fall on the border pixel.
    np.testing.assert_allclose(bicubic_matrix(16, 8)[0, :3], [0.5, 0.59375, -0.09375])
    # A third: every output pixel lies on an input.
    np.testing.assert_array_equal(bicubic_matrix(9, 3), np.eye(9)[1::3])
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5))
    np.testing.assert_allclose(bicubic_matrix(13, 7).sum(axis=1), 1.0)


def test_the_global_view_of_one_crop_is_the_crop(tokenizer):
    geometry = hd_geometry(336, 336, 1, 336)
    crops = cut_crops(picture(336, 336), geometry)
    info = crop_info(geometry)
    assert (len(crops), info.tolist()) == (1, [[1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(global_view_numpy(crops, info), normalise(crops[0]))
    grid = [2, 3, NEWLINE, 4, 5, NEWLINE]
    assert image_feature_index(1, 1, 2, "sub_glb").tolist() == [*grid, SEPARATOR, *grid]


# ---- The feature index and the geometry.


def test_feature_index_of_two_crops_written_out():
    """One row of two crops, 2 x 2 cells each: units 0 (global), 1 (left), 2 (right)."""
    local = [6, 7, 10, 11, NEWLINE, 8, 9, 12, 13, NEWLINE]
    whole = [2, 3, NEWLINE, 4, 5, NEWLINE]
    locals_first = image_feature_index(1, 2, 2, "sub_glb")
    global_first = image_feature_index(1, 2, 2, "glb_sub")
    assert locals_first.tolist() == [*local, SEPARATOR, *whole]
    assert global_first.tolist() == [*whole, SEPARATOR, *local]


@hypothesis.given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    num_crops=st.integers(1, 40),
    crop=st.sampled_from([28, 56, 336]),
)
def test_geometry_follows_the_reference_s_loop(width, height, num_crops, crop):
    geometry = hd_geometry(width, height, num_crops, crop)
    wide, narrow = max(width, height), min(width, height)
    ratio = wide / narrow
    scale = 1
    while scale * np.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    scaled = (scale * crop, int(scale * crop / ratio))
    if scaled[1] == 0:
        assert geometry is None
        return
    assert geometry is not None
    assert geometry.scaled == scaled
    padded = (scaled[0], int(np.ceil(scaled[1] / crop) * crop))
    assert geometry.padded == (padded[::-1] if width < height else padded)
    # The transposed image is cut into the transposed grid.
    turned = hd_geometry(height, width, num_crops, crop)
    assert turned is not None
    assert (turned.rows, turned.columns) == (geometry.columns, geometry.rows)


def test_cutting_costs_little_beside_decoding():
    """About 1 ms on an idle core; the bound is loose, for busy machines, and catches float work."""
    image = picture(1344, 1008)
    geometry = hd_geometry(1344, 1008, 16, 336)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        cut_crops(image, geometry)
        best = min(best, time.perf_counter() - start)
    assert best < 0.015
