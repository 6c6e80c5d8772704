# SPDX-License-Identifier: Apache-2.0
"""The baseline of the image benchmarks is what the reference computes, and the benchmarks run."""

import numpy as np
import pytest

from benchmarks import image_path, image_preprocess, input_pipeline
from benchmarks.common import How
from vlm2vec_jax.models.phi3v.hd_transform import global_view_numpy


@pytest.mark.parametrize(("size", "crops"), [((640, 480), 4), ((300, 700), 6), ((336, 336), 1)])
def test_the_reference_shaped_path(size, crops):
    image = image_path.photograph(*size)
    image_preprocess.check(image, crops)
    found = image_path.process(image, crops)
    assert found.pixels.shape == (crops + 1, 3, 336, 336) and found.pixels.dtype == np.float32
    ours, info, _ = image_preprocess.prepare(image, crops)
    view = global_view_numpy(ours, info).transpose(2, 0, 1)
    np.testing.assert_allclose(found.pixels[0], view, atol=2e-6)


@pytest.mark.slow
def test_the_benchmarks_run():
    for benchmark in (image_preprocess, input_pipeline):
        result = benchmark.measure(How(rounds=1, quick=True))
        assert result.rows and all(np.isfinite(row.ours) for row in result.rows)
        result.record()
