# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision's processor: the reference's ids and lengths, and what must always hold."""

import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import ImageError
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.phi3v.hd_transform import (
    NEWLINE,
    SEPARATOR,
    assemble_image,
    hd_geometry,
)
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.tokenizer import load_tokenizer

REAL = SimpleNamespace(crop_size=336, clip=SimpleNamespace(patch_size=14), hd_order="sub_glb")
# Two cells along a crop, so that properties are checked in microseconds.
SMALL = {"crop_size": 8, "patch_size": 2}
SIDE = 2


@pytest.fixture(scope="module")
def tokenizer(goldens):
    return load_tokenizer(goldens / "tiny_mha")


@pytest.fixture(scope="module")
def text_cases(goldens):
    return json.loads((goldens / "text_processing/text_processing.json").read_text())


def golden_image(goldens, name):
    return goldens / "image_processing" / "images" / f"{name}.png"


def expand(runs):
    return [i for run in runs for i in ([run[0]] * run[1] if isinstance(run, list) else [run])]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((width, height, seed))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- Text and images against the reference.


def test_processor_cases(goldens, tokenizer, text_cases):
    errors = 0
    for case in text_cases["processor_cases"]:
        processor = Phi3VProcessor(tokenizer, num_crops=case["num_crops"], max_len=case["max_len"])
        images = tuple(golden_image(goldens, name) for name in case["images"])
        item = MultimodalInput(case["text"], images)
        if "error" in case:
            errors += 1
            for function in (processor.encode, processor.length):
                with pytest.raises(UserError, match="image.s. but markers"):
                    function(item)
            continue
        encoded = processor.encode(item)
        golden = np.array(expand(case["input_ids_rle"]))
        assert len(encoded) == case["length"], case["text"]
        np.testing.assert_array_equal(encoded.tokens, np.maximum(golden, 0))
        np.testing.assert_array_equal(encoded.feature_index >= 0, golden < 0)
        assert processor.length(item) == (len(encoded), encoded.units)
    assert errors == 3


def test_batches(goldens, tokenizer, text_cases):
    arrays = np.load(goldens / "text_processing/batches.npz")
    for name, batch in text_cases["batches"].items():
        processor = Phi3VProcessor(
            tokenizer, num_crops=batch["num_crops"], max_len=batch["max_len"]
        )
        golden_ids, golden_mask = arrays[f"{name}__input_ids"], arrays[f"{name}__attention_mask"]
        longest = 0
        for row, (text, image) in enumerate(zip(batch["texts"], batch["images"], strict=True)):
            images = () if image is None else (golden_image(goldens, image),)
            encoded = processor.encode(MultimodalInput(text, images))
            length = len(encoded)
            longest = max(longest, length)
            assert golden_mask[row].sum() == length
            np.testing.assert_array_equal(encoded.tokens, np.maximum(golden_ids[row, :length], 0))
            np.testing.assert_array_equal(encoded.feature_index >= 0, golden_ids[row, :length] < 0)
            assert (golden_ids[row, length:] == 640).all()
        assert longest == golden_ids.shape[1]


def test_end_to_end_lengths(goldens):
    folder = goldens / "end_to_end"
    processor = Phi3VProcessor.from_pretrained(goldens / "tiny_gqa", REAL)
    lengths = np.load(folder / "expected_embeddings.npz")["lengths"]
    lines = (folder / "inputs.jsonl").read_text().splitlines()
    for line, expected in zip(lines, lengths, strict=True):
        item = MultimodalInput.of(json.loads(line)).relative_to(folder)
        assert processor.length(item)[0] == expected


# ---- The visual convention.


def feature_positions(encoded):
    return encoded.feature_index[encoded.feature_index >= 0]


def test_a_text_has_no_visual_part(tokenizer):
    encoded = Phi3VProcessor(tokenizer, **SMALL).encode(MultimodalInput("A cat"))
    assert encoded.visual == {}
    assert encoded.units == 0
    assert (encoded.feature_index == -1).all()
    assert encoded.positions.tolist() == list(range(len(encoded)))
    types = {a.dtype for a in (encoded.tokens, encoded.feature_index, encoded.positions)}
    assert types == {np.dtype(np.int32)}


def test_the_layout_describes_what_encode_gives(tokenizer):
    processor = Phi3VProcessor(tokenizer, num_crops=4, **SMALL)
    layout = processor.visual_layout
    encoded = processor.encode(MultimodalInput(images=(picture(20, 10),)))
    assert (layout.shared_features, layout.features_per_unit) == (2, SIDE * SIDE)
    assert set(encoded.visual) == set(layout.units)
    for name, (shape, dtype) in layout.units.items():
        assert encoded.visual[name].shape == (encoded.units, *shape)
        assert encoded.visual[name].dtype == dtype
    assert encoded.feature_index.max() < 2 + encoded.units * SIDE * SIDE
    assert Phi3VProcessor(tokenizer).visual_layout.features_per_unit == 144


def test_crop_info_written_out(tokenizer):
    processor = Phi3VProcessor(tokenizer, num_crops=4, **SMALL)
    visual = processor.encode(MultimodalInput(images=(picture(12, 12), picture(8, 17)))).visual
    square = [[0, 0, 0, 0, 0], [2, 0, 2, 0, 1], [2, 0, 2, 1, 2], [2, 1, 2, 0, 3], [2, 1, 2, 1, 4]]
    tall = [[0, 0, 0, 0, 0], [2, 0, 1, 0, 1], [2, 1, 1, 0, 2]]
    assert visual["crop_info"].tolist() == square + tall
    assert not visual["crops"][[0, 5]].any()
    assert visual["crops"][[1, 2, 3, 4, 6, 7]].any(axis=(1, 2, 3)).all()


def test_marker_k_means_image_k(tokenizer):
    """Also with images of different sizes, where the reference mixes features up."""
    processor = Phi3VProcessor(tokenizer, num_crops=4, **SMALL)
    images = (picture(12, 12), picture(8, 17))
    forward = processor.encode(MultimodalInput("<|image_1|><|image_2|>", images))
    reverse = processor.encode(MultimodalInput("<|image_2|><|image_1|>", images))
    for name in forward.visual:
        np.testing.assert_array_equal(forward.visual[name], reverse.visual[name])
    first = processor.encode(MultimodalInput(images=images[:1]))
    split = np.count_nonzero(first.feature_index >= 0)
    index = feature_positions(forward)
    expected = np.concatenate([index[split:], index[:split]])
    np.testing.assert_array_equal(feature_positions(reverse), expected)
    assert set(index[:split][index[:split] > 1]) == set(range(2, 2 + 5 * SIDE * SIDE))


def test_a_marker_twice_repeats_the_features(tokenizer):
    processor = Phi3VProcessor(tokenizer, num_crops=4, **SMALL)
    image = picture(8, 17)
    once = processor.encode(MultimodalInput("<|image_1|>", (image,)))
    twice = processor.encode(MultimodalInput("<|image_1|> x <|image_1|>", (image,)))
    assert twice.units == once.units == len(twice.visual["crops"])
    np.testing.assert_array_equal(feature_positions(twice), np.tile(feature_positions(once), 2))


def test_max_len_cuts_texts_and_never_an_input_with_an_image(tokenizer):
    processor = Phi3VProcessor(tokenizer, max_len=4, **SMALL)
    assert processor.encode(MultimodalInput("A cat and a dog")).tokens.tolist() == [
        1,
        391,
        411,
        407,
    ]
    item = MultimodalInput("<|image_1|> A cat and a dog", (picture(8, 8),))
    whole = Phi3VProcessor(tokenizer, **SMALL).encode(item)
    np.testing.assert_array_equal(processor.encode(item).tokens, whole.tokens)
    assert processor.length(item)[0] == len(whole)


def test_exif_orientation_reaches_length_and_crops(tokenizer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, 10).save(tmp_path / "turned.png", exif=exif)
    item = MultimodalInput(images=(tmp_path / "turned.png",))
    shapes = {}
    for mode in ("ignore", "apply"):
        processor = Phi3VProcessor(tokenizer, num_crops=4, exif=mode, **SMALL)
        encoded = processor.encode(item)
        assert processor.length(item) == (len(encoded), encoded.units)
        shapes[mode] = encoded.visual["crop_info"][1, [0, 2]].tolist()
    assert shapes == {"ignore": [1, 2], "apply": [2, 1]}


# ---- Properties.

sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))


@hypothesis.given(
    images=st.lists(sizes, min_size=1, max_size=3),
    num_crops=st.integers(1, 17),
    order=st.sampled_from(["sub_glb", "glb_sub"]),
    texts=st.lists(st.text("ab \n", max_size=5), min_size=4, max_size=4),
    shuffle=st.randoms(use_true_random=False),
)
def test_every_encoding_is_consistent(tokenizer, images, num_crops, order, texts, shuffle):
    processor = Phi3VProcessor(tokenizer, num_crops=num_crops, hd_order=order, **SMALL)
    numbers = list(range(1, len(images) + 1))
    shuffle.shuffle(numbers)
    text = "".join(f"{t}<|image_{k}|>" for t, k in zip(texts, numbers)) + texts[-1]
    pictures = tuple(picture(*size) for size in images)
    item = MultimodalInput(text, pictures)
    geometries = [hd_geometry(*size, num_crops, SMALL["crop_size"]) for size in images]
    if None in geometries:
        with pytest.raises(ImageError):
            processor.encode(item)
        with pytest.raises(ImageError):
            processor.length(item)
        return
    encoded = processor.encode(item)
    visual = encoded.visual
    assert processor.length(item) == (len(encoded), encoded.units)
    assert encoded.units == len(visual["crops"]) == len(visual["crop_info"])
    assert encoded.positions.tolist() == list(range(len(encoded)))
    assert not encoded.tokens[encoded.feature_index >= 0].any()

    # Every cell of every crop stands once, of a single crop twice (it is its own global view);
    # newlines and separators as often as rows say.
    counts = np.bincount(feature_positions(encoded), minlength=2 + encoded.units * SIDE * SIDE)
    assert counts[NEWLINE] == sum((g.rows + 1) * SIDE for g in geometries)
    assert counts[SEPARATOR] == len(images)
    times = [2 if g.units == 1 else 1 for g in geometries for _ in range(g.units)]
    np.testing.assert_array_equal(counts[2:], np.repeat(times, SIDE * SIDE))

    first = 0
    for image, geometry in zip(pictures, geometries):
        assert geometry.rows * geometry.columns <= num_crops
        part = slice(first, first + geometry.units)
        crops, info = visual["crops"][part], visual["crop_info"][part]
        assert info[:, 4].tolist() == list(range(geometry.units))
        assert info[0].any() == (geometry.units == 1)
        np.testing.assert_array_equal(assemble_image(crops, info), reference_hd(image, geometry))
        first += geometry.units


def reference_hd(image, geometry):
    """Scale and pad the plain way: Pillow only, no views, padding by paste."""
    tall = image.width < image.height
    image = image.transpose(Image.Transpose.TRANSPOSE) if tall else image
    image = image.resize(geometry.scaled, Image.Resampling.BILINEAR)
    crop = geometry.crop
    height = int(np.ceil(image.height / crop) * crop)
    canvas = Image.new("RGB", (image.width, height), (255, 255, 255))
    canvas.paste(image, (0, int((height - image.height) / 2)))
    return np.asarray(canvas.transpose(Image.Transpose.TRANSPOSE) if tall else canvas)


# ---- Settings and files.


def test_from_pretrained_reads_the_folder(goldens, tmp_path):
    processor = Phi3VProcessor.from_pretrained(goldens / "tiny_mha", REAL)
    assert processor.num_crops == 4
    assert processor.settings["num_crops"] == 4
    data = (goldens / "tiny_mha/tokenizer.json").read_bytes()
    assert processor.tokenizer_hash == hashlib.sha256(data).hexdigest()
    other = Phi3VProcessor.from_pretrained(goldens / "tiny_mha", REAL, num_crops=2, max_len=7)
    assert (other.num_crops, other.max_len) == (2, 7)
    assert json.loads(json.dumps(other.settings)) == other.settings
    assert other.settings != processor.settings

    (tmp_path / "tokenizer.json").write_bytes(data)
    assert Phi3VProcessor.from_pretrained(tmp_path, REAL).num_crops == 16
    config = tmp_path / "processor_config.json"
    config.write_text(json.dumps({"num_crops": 9}))
    assert Phi3VProcessor.from_pretrained(tmp_path, REAL).num_crops == 9
    config.write_text(json.dumps({"image_processor": {"num_crops": 8}}))
    assert Phi3VProcessor.from_pretrained(tmp_path, REAL).num_crops == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .0.5"),
        ({"image_std": [1, 1]}, "image_std"),
        ({"num_crops": 0}, "num_crops must be an integer of at least 1, not 0"),
        ({"num_crops": "4"}, "num_crops must be"),
    ],
)
def test_settings_that_are_not_implemented(goldens, tmp_path, settings, said):
    (tmp_path / "tokenizer.json").write_bytes((goldens / "tiny_mha/tokenizer.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=said):
        Phi3VProcessor.from_pretrained(tmp_path, REAL)


def test_all_unusable_arguments_are_listed_at_once(tokenizer):
    with pytest.raises(UserError) as caught:
        Phi3VProcessor(tokenizer, num_crops=0, max_len=-1, hd_order="x", exif="y")  # pyright: ignore
    for word in ("num_crops", "max_len", "hd_order", "exif", "4 problems"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match="two patches of 3 do not divide a crop of 8"):
        Phi3VProcessor(tokenizer, crop_size=8, patch_size=3)


def test_the_processor_loads_no_jax(repository):
    code = (
        "import sys, vlm2vec_jax.models.phi3v.processor\n"
        "bad = {'jax', 'flax', 'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)
