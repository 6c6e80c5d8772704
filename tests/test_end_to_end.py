# SPDX-License-Identifier: Apache-2.0
"""The goldens' end-to-end embeddings through the command line, and the Embedder's promises."""

import numpy as np
import pytest
from PIL import Image

from vlm2vec_jax import embed
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.flags import call
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.parallel.mesh import make_mesh

NAMES = [
    "tiny_mha", "tiny_gqa", "tiny_gqa_dora_r8", "tiny_mha_dora_r16", "tiny_mha_dora_r8",
    "tiny_mha_lora_r16", "tiny_mha_lora_r8",
]  # fmt: skip


def model_flags(goldens, name):
    base = "_".join(name.split("_")[:2])
    flags = ["--model", str(goldens / base)]
    return flags + ([] if name == base else ["--adapter", str(goldens / "adapters" / name)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_goldens_through_the_command_line(name, goldens, tmp_path):
    out = tmp_path / "out.npz"
    folder = goldens / "end_to_end"
    argv = ["embed", *model_flags(goldens, name), "--dtype", "float32"]
    argv += ["--input", str(folder / "inputs.jsonl"), "--output", str(out)]
    assert call(embed.main, embed.define, argv) == 0
    with np.load(out) as found, np.load(folder / "expected_embeddings.npz") as expected:
        assert found["embeddings"].dtype == np.float32
        np.testing.assert_allclose(found["embeddings"], expected[name], rtol=0, atol=2e-5)
