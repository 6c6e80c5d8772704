# SPDX-License-Identifier: Apache-2.0
"""The goldens' end-to-end embeddings: through the command line, and in Python, packed together."""

import json

import numpy as np
import pytest

from vlm2vec_jax import embed
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.flags import call
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.parallel.mesh import make_mesh

NAMES = ["tiny_mha", "tiny_gqa_dora_r8", "tiny_mha_lora_r16"]
MORE = ["tiny_gqa", "tiny_mha_dora_r16", "tiny_mha_dora_r8", "tiny_mha_lora_r8"]
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def parts(goldens, name):
    """The base folder and the adapter folder, if any, of a golden."""
    base = "_".join(name.split("_")[:2])
    return goldens / base, None if name == base else goldens / "adapters" / name


def inputs(goldens) -> list[MultimodalInput]:
    folder = goldens / "end_to_end"
    lines = (folder / "inputs.jsonl").read_text(encoding="utf-8").splitlines()
    return [MultimodalInput.of(json.loads(line)).relative_to(folder) for line in lines]


@pytest.fixture(scope="module")
def expected(goldens):
    with np.load(goldens / "end_to_end" / "expected_embeddings.npz") as file:
        return dict(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
)
def test_goldens_through_the_command_line(name, goldens, expected, tmp_path):
    out = tmp_path / "out.npz"
    base, adapter = parts(goldens, name)
    argv = ["embed", "--model", str(base), "--dtype", "float32", "--output", str(out)]
    argv += ["--adapter", str(adapter)] if adapter else []
    argv += ["--input", str(goldens / "end_to_end" / "inputs.jsonl")]
    assert call(embed.main, embed.define, argv) == 0
    with np.load(out) as found:
        assert list(found) == ["embeddings"] and found["embeddings"].dtype == np.float32
        np.testing.assert_allclose(found["embeddings"], expected[name], **TOLERANCE)


def test_lengths_are_known_without_decoding(goldens, expected):
    from vlm2vec_jax.models.registry import backbone_of

    folder = goldens / "tiny_mha"
    backbone = backbone_of(folder)
    processor = backbone.processor(folder, backbone.read_config(folder))
    sizes = [processor.length(item) for item in inputs(goldens)]
    assert [tokens for tokens, _ in sizes] == expected["lengths"].tolist()
    assert [units for _, units in sizes] == [processor.encode(i).units for i in inputs(goldens)]


@pytest.mark.slow
def test_goldens_in_other_orders_rows_and_meshes(goldens, expected):
    items = inputs(goldens)
    order = [*reversed(range(len(items))), 0, len(items) - 1]
    for mesh in (None, make_mesh(2, 2, 2)):
        embedder = Embedder.from_pretrained(goldens / "tiny_gqa", dtype="float32", mesh=mesh)
        found = embedder.encode([items[k] for k in order], batch_tokens=2048)
        np.testing.assert_allclose(found, expected["tiny_gqa"][order], **TOLERANCE)
