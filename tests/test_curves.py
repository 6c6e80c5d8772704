# SPDX-License-Identifier: Apache-2.0
"""The same loss curve on every mesh, with GradCache and without, for LoRA, DoRA and full training.

Not all thirty combinations. `make test` runs every mesh and every kind once, with GradCache;
`make test-long` lets every mesh and every kind meet the plain step as well. Each is held to the
plain step of its kind on one device. Two processes of four devices are in `test_multiprocess.py`.
"""

import functools

import numpy as np
import pytest
from curves import curve
from small_models import quick_compiler
from training_tools import mini_model

ALONE = (1, 1, 1)
COVER = [
    ("lora", (8, 1, 1), True),
    ("dora", (2, 2, 2), True),
    ("full", (2, 4, 1), True),
    pytest.param("full", ALONE, True, marks=pytest.mark.long),
    pytest.param("lora", (2, 4, 1), False, marks=pytest.mark.long),
    pytest.param("dora", (8, 1, 1), False, marks=pytest.mark.long),
    pytest.param("full", (2, 2, 2), False, marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The plain step on one device by kind: a function, and the model's folder."""
    folder = mini_model(tmp_path_factory.mktemp("curves"))
    return folder, functools.cache(lambda kind: curve(folder, kind, ALONE, cached=False))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mesh", "cached"), COVER)
def test_every_mesh_gives_the_same_twenty_losses(alone, kind, mesh, cached):
    folder, expected = alone
    with quick_compiler():
        wanted = expected(kind)
        found = curve(folder, kind, mesh, cached=cached)
    assert wanted[0] - wanted[18] > 0.01  # the same batch: it learns, the curve is no constant
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
