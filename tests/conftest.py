# SPDX-License-Identifier: Apache-2.0
"""What every test relies on: eight simulated CPU devices, exact float32 products, the goldens.

The environment is set here, before any test module imports jax, so that subprocesses inherit it.
A GPU or TPU run overrides the platform from outside: `JAX_PLATFORMS=cuda pytest -m gpu`.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from simulated import CHEAP, COUNT

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
for _flag, _value in {COUNT: "8", **CHEAP}.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Many tests compile the same programs, in processes of their own too: one cache for all of a run.
# The first process makes it; those of xdist, and commands that tests start, inherit the names.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="vlm2vec_jax_compiled_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402  (after the environment: a plugin of it may import numpy or jax)
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "small",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("small")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of the reference's numbers (tests/goldens, see the README in it)."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """Programs of the module are compiled without most of the optimizing."""
    from small_models import quick_compiler

    with quick_compiler():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of a small untrained model."""
    from small_models import write_model, write_train

    root = tmp_path_factory.mktemp("small_model")
    return write_model(write_train(root / "data"), root / "base")
