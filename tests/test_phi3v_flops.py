# SPDX-License-Identifier: Apache-2.0
"""Useful FLOPs against figures worked out by hand for the real model, and an image's size."""

import json

import numpy as np
import pytest
from full_size import CONFIG

from vlm2vec_jax.models.phi3v.config import from_dicts
from vlm2vec_jax.models.phi3v.flops import crop_flops, forward_flops, image_size
from vlm2vec_jax.training.assumed import IMAGES, Mix


@pytest.fixture(scope="module")
def config():
    return from_dicts(json.loads(CONFIG.read_text()))


@pytest.mark.parametrize(
    ("tokens", "crops", "tera"),
    [
        (32, 0, 0.23),
        (256, 0, 1.82),
        (345, 2, 3.20),
        (489, 3, 4.62),
        (789, 5, 7.55),
        (1953, 13, 19.4),
        (2541, 17, 25.5),
        (2 * 789, [5, 5], 15.1 + 0.197e-6 * 789**2),  # two images: the text sees both
    ],
)
def test_forward_flops_of_the_real_model(config, tokens, crops, tera):
    assert forward_flops(config, tokens, crops) / 1e12 == pytest.approx(tera, rel=0.02)


@pytest.mark.parametrize("tokens", [1, 32, 4096])
def test_the_decoder_by_its_formula(config, tokens):
    """Linears 2 L (4 d^2 + 3 d f) a token, causal attention 2 L d S^2; the last layer once."""
    d, f, layers = 3072, 8192, 32
    linear = 2 * (4 * d * d + 3 * d * f)
    pairs = tokens * (tokens + 1) / 2
    keys_values = 2 * 2 * d * d
    last = linear - keys_values + tokens * keys_values + 4 * d * tokens
    expected = (layers - 1) * (tokens * linear + 4 * d * pairs) + last
    assert forward_flops(config, tokens) == pytest.approx(expected, rel=1e-12)
    assert 32 * linear / 1e9 == pytest.approx(7.248, abs=1e-3)


def test_each_image_of_a_sequence_is_counted(config):
    one = forward_flops(config, 900, 5) - forward_flops(config, 900)
    assert forward_flops(config, 900, [5, 5]) == forward_flops(config, 900) + 2 * one
    assert forward_flops(config, 900, 10) == forward_flops(config, 900, [5, 5])


def test_flops_of_a_crop(config):
    # 366 GF of CLIP's 23 layers, 0.7 of patches, 44 MF for each of 144 tokens.
    assert crop_flops(config) / 1e9 == pytest.approx(366 + 0.7 + 144 * 0.044, rel=0.01)


def test_flops_grow_with_the_square_of_the_length(config):
    lengths = np.array([1000, 2000, 3000])
    flops = np.array([forward_flops(config, n) for n in lengths])
    second = np.diff(flops, 2)[0] / 1000**2 / 2
    # q k^T and the values of 31 layers: 4 x 3072 per pair of tokens, half of the pairs.
    assert second == pytest.approx(31 * 2 * 3072, rel=1e-6)


def test_image_size(config):
    assert image_size(config, 4, 640, 480) == (757, 5)
    assert image_size(config, 16, 640, 480) == (1921, 13)
    with pytest.raises(ValueError, match="narrow"):
        image_size(config, 4, 4000, 1)


def test_assumed_mix_is_fixed_and_as_it_says():
    mix = Mix()
    sizes = mix.sizes(4000, lambda w, h: (100, 5))
    assert sizes == mix.sizes(4000, lambda w, h: (100, 5)) and len(sizes) == 8000
    units = np.array([u for _, u in sizes]).reshape(2, 4000)
    np.testing.assert_allclose((units > 0).mean(1), [0.8, 0.35], atol=0.03)
    texts = np.array([t - 100 * (u > 0) for t, u in sizes]).reshape(2, 4000)
    assert np.median(texts[0]) == pytest.approx(32, abs=2) and texts.max() <= 256
    assert sum(share for *_, share in IMAGES) == pytest.approx(1)
    assert "80%" in mix.words() and "640x480" in mix.words()
