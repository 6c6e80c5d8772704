# SPDX-License-Identifier: Apache-2.0
"""8-bit weights: what each number becomes, what embeddings become, and where they are refused."""

import json

import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax import embed
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import call
from vlm2vec_jax.models.loading import load_model, split_trainable
from vlm2vec_jax.nn import quantization
from vlm2vec_jax.nn.linear import Linear, linears, refresh_dora_norms
from vlm2vec_jax.nn.quantization import dequantize, quantized

KINDS = ("int8", "fp8")
TEXTS = ["a red circle", "a blue square beside a green line", "x", "one two three four five six"]
kernels = hnp.arrays(np.float32, (2, 6, 5), elements=st.floats(-1e4, 1e4, width=32))


@pytest.mark.parametrize("kind", KINDS)
@given(kernel=kernels)
def test_each_number_is_off_by_half_a_step(kind, kernel):
    narrow, scale = quantized(jnp.asarray(kernel), kind)
    assert narrow.dtype == quantization.TYPES[kind] and narrow.shape == kernel.shape
    assert scale.dtype == jnp.float32 and scale.shape == (kernel.shape[0], kernel.shape[2])
    back, step = np.asarray(dequantize(narrow, scale)), np.asarray(scale)[:, None]
    assert np.isfinite(back).all()
    error = np.abs(back.astype(np.float64) - kernel)
    if kind == "int8":
        assert (error <= step * 0.501).all()
    else:  # 3 bits of mantissa; the smallest numbers are 2^-9 apart
        assert (error <= np.maximum(np.abs(kernel) / 16 * 1.001, step * 2.0**-10 * 1.01)).all()
    # The largest of each column is what decides the scale, and is kept.
    top = np.abs(kernel).max(axis=1)
    np.testing.assert_allclose(np.abs(back).max(axis=1), top, rtol=1e-6, atol=1e-37)


def test_float8_is_the_nearest_of_that_type():
    kernel = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    narrow, scale = map(np.asarray, quantized(jnp.asarray(kernel), "fp8"))
    wanted = (kernel / scale).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(narrow.astype(np.float32), wanted.astype(np.float32))
    assert np.abs(narrow.astype(np.float32)).max() == 448


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_computes_with_what_its_numbers_stand_for(kind, dora):
    rng = np.random.default_rng(1)
    layer = Linear(24, 16, bias=True, rngs=nnx.Rngs(0))
    leaves = {"lora_a": rng.normal(size=(24, 4)), "lora_b": rng.normal(size=(4, 16))}
    if dora:
        leaves["magnitude"] = rng.uniform(1, 2, 16)
    leaves = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}
    layer.set_adapter(leaves, scale=0.5, dropout=0.0)
    refresh_dora_norms(layer)
    plain, exact = nnx.clone(layer), nnx.clone(layer)
    saved = quantization.quantize(layer, kind)
    assert saved.before == 24 * 16 * 4 and saved.after == 24 * 16 + 16 * 4
    plain.kernel = nnx.Param(dequantize(layer.kernel[...], layer.kernel_scale[...]))
    x = jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    gap = jnp.abs(layer(x) - exact(x)).max() / jnp.abs(exact(x)).max()
    assert 0 < gap < (0.02 if kind == "int8" else 0.1)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    if dora:  # a norm computed afterwards is of the narrow weights
        np.testing.assert_allclose(layer.dora_norm(), plain.dora_norm(), rtol=1e-5)


@pytest.fixture(scope="module")
def plain(goldens):
    model = Embedder.from_pretrained(goldens / "tiny_gqa", dtype="float32")
    return model, model.encode(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_close_and_told_apart(kind, plain, goldens):
    model, exact = plain
    other = Embedder.from_pretrained(goldens / "tiny_gqa", dtype="float32", quantize=kind)
    found = other.encode(TEXTS)
    cosine = (found * exact).sum(-1)
    assert (cosine > (0.999 if kind == "int8" else 0.99)).all() and np.abs(found - exact).max() > 0
    # Stored vectors of one are never taken for the other's.
    assert other.fingerprint() == {**model.fingerprint(), "quantize": kind}
    assert any(f"linear layers in {kind}" in remark for remark in other.remarks)


def test_the_command_quantizes_and_its_index_remembers(goldens, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["embed", "--model", goldens / "tiny_gqa", "--input", source, "--dtype", "float32"]
    command += ["--output", tmp_path / "out.npz", "--quantize", "int8"]
    assert call(embed.main, embed.define, list(map(str, command))) == 0
    model = Embedder.from_pretrained(goldens / "tiny_gqa", dtype="float32", quantize="int8")
    with np.load(tmp_path / "out.npz") as made:
        np.testing.assert_allclose(made["embeddings"], model.encode(TEXTS), atol=1e-6)

    from vlm2vec_jax import search

    found = ["search", "--index", tmp_path / "out.npz", "--query", TEXTS[1], "--json"]
    assert call(search.main, search.define, list(map(str, found))) == 0


def test_refusals(goldens, tmp_path):
    with pytest.raises(UserError, match="quantize 'int4' is not known; known: int8, fp8"):
        Embedder.from_pretrained(goldens / "tiny_gqa", quantize="int4")
    model = load_model(goldens / "tiny_gqa", dtype_of=lambda path: jnp.float32)
    quantization.quantize(model.module, "int8")
    kept = {path: layer.kernel[...] for path, layer in linears(model.module).items()}
    quantization.quantize(model.module, "fp8")  # what is narrow stays as it is
    assert all(linears(model.module)[path].kernel[...] is old for path, old in kept.items())
    for full in (False, True):
        with pytest.raises(UserError, match="for inference and cannot be trained"):
            split_trainable(model, full=full)

    from vlm2vec_jax import config

    wrong = config.Config()
    wrong.model.dtype = "int8"
    with pytest.raises(UserError, match="8-bit weights are for inference: --quantize"):
        config.check(wrong)
