# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT's own parts: tiles bit by bit, token counts, configurations, what it refuses.

Parity of the model is in test_backbones_parity.py.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
from backbone_goldens import GOLDENS, IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import load_image
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.llava_next.config import from_dicts, from_hf
from vlm2vec_jax.models.llava_next.processor import LlavaNextProcessor, planned_image_size
from vlm2vec_jax.models.llava_next.tiles import (
    NEWLINE,
    SHARED_FEATURES,
    cut_tiles,
    feature_index,
    pixel_values,
    tiling,
)
from vlm2vec_jax.models.shared.clip_config import IMAGE_MEAN, IMAGE_STD

FOLDER = GOLDENS / "llava_next"
SIZES = json.loads((FOLDER / "sizes.json").read_text())
SUMS = json.loads((FOLDER / "images.json").read_text())
REAL = json.loads((GOLDENS / "names" / "llava-v1.6-mistral-7b" / "config.json").read_text())


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("setting", SIZES)
def test_sizes_are_transformers(setting):
    said = SIZES[setting]
    pinpoints = tuple(map(tuple, said["pinpoints"]))
    side = said["side"] // said["patch"]
    for height, width, high, wide, tokens in said["rows"]:
        cut = tiling(width, height, pinpoints, said["side"])
        assert (cut.rows * cut.tile, cut.columns * cut.tile) == (high, wide), (height, width)
        assert cut.tokens(side) == tokens == len(feature_index(cut, side)), (height, width)


@pytest.mark.parametrize("setting", SIZES)
def test_tiles_are_transformers_bit_by_bit(setting):
    side = SIZES[setting]["side"]
    pinpoints = tuple(map(tuple, SIZES[setting]["pinpoints"]))
    for name, said in SUMS[setting].items():
        forms = {"white": said, "drop": said.get("alpha_dropped", said)}
        if "alpha_dropped" not in said:
            del forms["drop"]
        for transparency, wanted in forms.items():
            image = load_image(IMAGES / f"{name}.png", transparency=transparency)
            tiles = cut_tiles(image, tiling(*image.size, pinpoints, side))
            assert len(tiles) == wanted["tiles"]
            assert sha(tiles.transpose(0, 3, 1, 2)) == wanted["u8"], (name, transparency)
            values = pixel_values(tiles, IMAGE_MEAN, IMAGE_STD)
            assert sha(values) == wanted["f32"], (name, transparency)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 24))
def test_index_reads_each_kept_feature_once(width, height, side):
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    cut = tiling(width, height, pinpoints, 336)
    index = feature_index(cut, side)
    read = index[index >= SHARED_FEATURES]
    assert len(np.unique(read)) == len(read) and read.max() < SHARED_FEATURES + cut.units * side**2
    assert (index[: side**2] == np.arange(side**2) + SHARED_FEATURES).all()
    top, bottom, left, right = cut.unpadded(side)
    assert (index == NEWLINE).sum() == bottom - top
    # Unpadding takes the same off both sides, and never from both directions.
    assert top == cut.rows * side - bottom and left == cut.columns * side - right
    assert top == 0 or left == 0


def test_defaults_of_published_files():
    """The real file leaves out what MistralConfig has by default; a window among it counts."""
    short = {k: v for k, v in REAL["text_config"].items() if k not in ("hidden_size",)}
    for name in ("num_attention_heads", "num_hidden_layers"):
        del short[name]
    config = from_dicts({**REAL, "text_config": short})
    assert config == from_dicts(REAL)
    assert (config.text.head_size, config.text.window, config.features_per_tile) == (128, None, 576)
    del short["sliding_window"]
    assert from_dicts({**REAL, "text_config": short}).text.window == 4095
    vicuna = {"model_type": "llama", "vocab_size": 32064}
    config = from_dicts({**REAL, "text_config": vicuna})
    assert (config.text.num_kv_heads, config.text.mlp_size, config.text.window) == (32, 11008, None)
    # From the paper: 2880 features at most, here without padding and with its newlines.
    assert planned_image_size(config, {"resolution": "high"}, 10, 900) == (576 + 48 * 49, 5)


def test_configurations_that_are_not_implemented_are_named_together():
    bad = {
        **REAL,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-2, -5],
        "image_grid_pinpoints": [[336, 600]],
        "text_config": {
            **REAL["text_config"],
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
            "num_key_value_heads": 5,
        },
    }
    with pytest.raises(UserError) as error:
        from_dicts(bad, {"size": {"shortest_edge": 224}, "resample": 2})
    for words in ("full", "[-2, -5]", "[[336, 600]]", "llama3", "5 of keys", "224", "resample"):
        assert words in str(error.value)


@pytest.fixture(scope="module")
def processor():
    return LlavaNextProcessor.from_pretrained(FOLDER / "gqa", from_hf(FOLDER / "gqa"))


def test_unusable_inputs(processor):
    picture = Image.new("RGB", (9, 5))
    for item, words in (
        (MultimodalInput("what is <image>"), "holds <image> itself"),
        (MultimodalInput("<|image_1|> is <image>", (picture,)), "holds <image> itself"),
        (MultimodalInput("no marker", (picture,)), "1 image(s) but markers none"),
    ):
        for use in (processor.encode, processor.length):
            with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
                use(item)


def test_markers_stand_for_their_images(processor):
    wide, tall = Image.new("RGB", (60, 10)), Image.new("RGB", (10, 60), (255, 0, 0))
    ahead = processor.encode(MultimodalInput("<|image_1|><|image_2|>", (wide, tall)))
    swapped = processor.encode(MultimodalInput("<|image_2|><|image_1|>", (wide, tall)))
    assert sorted(ahead.feature_index) == sorted(swapped.feature_index)
    assert (ahead.feature_index != swapped.feature_index).any()
    np.testing.assert_array_equal(ahead.visual["tiles"], swapped.visual["tiles"])


def test_options(tmp_path):
    config = from_hf(FOLDER / "gqa")
    square = LlavaNextProcessor.from_pretrained(
        FOLDER / "gqa", config, resolution="low", transparency="drop", max_len=4
    )
    item = MultimodalInput("<|image_1|> a", (Image.new("RGBA", (300, 20), (5, 6, 7, 255)),))
    tiles = square.encode(item).visual["tiles"]
    assert tiles.shape[0] == 5 and (tiles == (5, 6, 7)).all()  # a square: nothing is padded
    clear = MultimodalInput("", (Image.new("RGBA", (4, 4), (5, 6, 7, 0)),))
    seen = {
        word: LlavaNextProcessor.from_pretrained(FOLDER / "gqa", config, transparency=word)
        for word in ("drop", "white")
    }
    tiles = {word: one.encode(clear).visual["tiles"][0] for word, one in seen.items()}
    assert (tiles["drop"] == (5, 6, 7)).all() and (tiles["white"] == 255).all()
    assert square.length(item) == (len(square.encode(item)), 5)
    assert len(square.encode(MultimodalInput("a long text of many words"))) == 4
    with pytest.raises(UserError, match="resolution must be one of"):
        LlavaNextProcessor.from_pretrained(FOLDER / "gqa", config, resolution="huge")
    shutil.copytree(FOLDER / "gqa", tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").write_text('{"image_token": "<pad>"}')
    with pytest.raises(UserError, match="does not read '<pad>' as id 640"):
        LlavaNextProcessor.from_pretrained(tmp_path / "model", config)
