# SPDX-License-Identifier: Apache-2.0
"""The baseline of the image benchmarks is what the reference computes, and the benchmarks run."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import image_path, image_preprocess, input_pipeline
from benchmarks.common import How
from benchmarks.reference_eval import ReferenceProcessor
from benchmarks.reference_shaped import right_padded
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.phi3v.hd_transform import global_view_numpy, image_feature_index, normalise
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.tokenizer import load_tokenizer


@pytest.mark.parametrize(("size", "crops"), [((640, 480), 4), ((300, 700), 6), ((336, 336), 1)])
def test_the_reference_shaped_path(size, crops):
    image = image_path.photograph(*size)
    image_preprocess.check(image, crops)
    found = image_path.process(image, crops)
    assert found.pixels.shape == (crops + 1, 3, 336, 336) and found.pixels.dtype == np.float32
    ours, info, _ = image_preprocess.prepare(image, crops)
    view = global_view_numpy(ours, info).transpose(2, 0, 1)
    np.testing.assert_allclose(found.pixels[0], view, atol=2e-6)


@pytest.mark.parametrize(("size", "num_crops", "cut"), [((70, 30), 2, (1, 2)), ((9, 9), 1, (1, 1))])
def test_inputs_of_the_evaluation_s_baseline(goldens, tmp_path, size, num_crops, cut):
    tokenizer = load_tokenizer(goldens / "tiny_mha")
    ours = Phi3VProcessor(tokenizer, num_crops=num_crops, crop_size=28)
    image_path.photograph(*size).save(tmp_path / "a.png")
    item = MultimodalInput("<|image_1|> What is it?\n", (tmp_path / "a.png",))
    processor = ReferenceProcessor.like(ours)
    theirs, expected = processor.encode(item), ours.encode(item)
    np.testing.assert_array_equal(theirs.tokens, expected.tokens)
    index = theirs.feature_index[theirs.feature_index >= 0]
    np.testing.assert_array_equal(index, image_feature_index(*cut, 1, "sub_glb", views=1))
    pixels = theirs.visual["pixels"].transpose(0, 2, 3, 1)
    assert len(pixels) == num_crops + 1 == theirs.units
    crops, info = expected.visual["crops"], expected.visual["crop_info"]
    np.testing.assert_array_equal(pixels[1:], normalise(crops[-num_crops:]))
    np.testing.assert_allclose(pixels[0], global_view_numpy(crops, info), atol=2e-6)
    batch = right_padded([theirs], processor.visual_layout, 2)
    np.testing.assert_array_equal(batch.visual["pixels"][0], theirs.visual["pixels"])


@pytest.mark.parametrize(("late", "share"), [(0.0, 0.0), (0.5, 0.3 / 0.7)])
def test_a_device_without_a_batch_is_idle(late, share):
    device = input_pipeline.Device(0.2)
    for step in range(4):
        time.sleep((0.4 + late) * (step == 3))  # the third ends at 0.6
        numbers = device(None, None, SimpleNamespace(groups=np.zeros(3)), None)[1]
    assert np.asarray(numbers["loss"]) == 0 and len(device.spans) == 4
    assert device.idle_share() == pytest.approx(share, abs=0.1)


@pytest.mark.slow
def test_the_benchmarks_run():
    for benchmark in (image_preprocess, input_pipeline):
        result = benchmark.measure(How(rounds=1, quick=True))
        assert result.rows and all(np.isfinite(row.ours) for row in result.rows)
        result.record()
