# SPDX-License-Identifier: Apache-2.0
"""The model against the reference, sub-module by sub-module, on every forward golden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_batches import golden_batch, load_npz, rope_table

from vlm2vec_jax.models.loading import abstract_model, flatten, load_model
from vlm2vec_jax.models.phi3v.global_view import by_products, by_taps
from vlm2vec_jax.models.phi3v.hd_transform import (
    crop_info,
    global_view_numpy,
    hd_geometry,
    normalise,
)
from vlm2vec_jax.models.phi3v.vision import merge_patches
from vlm2vec_jax.nn.compute import Compute

BATCHES = [
    ("tiny_mha", name)
    for name in (
        "image_pair_long", "image_single_short", "mixed", "text_at_orig_max", "text_leftpad",
        "text_over_orig_max", "text_rightpad", "text_single", "two_images_one_row",
    )
] + [
    ("tiny_gqa", name)
    for name in (
        "image_single_short", "mixed_long", "text_at_orig_max", "text_leftpad",
        "text_over_orig_max", "text_rightpad", "text_single",
    )
]  # fmt: skip
EXACT = Compute("float32")


@pytest.fixture(scope="module")
def models(goldens):
    return {
        name: load_model(goldens / name, dtype_of=lambda path: jnp.float32)
        for name in ("tiny_mha", "tiny_gqa")
    }


@pytest.fixture(params=BATCHES, ids=lambda p: "-".join(p), scope="module")
def case(request, models, goldens):
    model = models[request.param[0]]
    golden = load_npz(goldens / "forward" / request.param[0] / f"{request.param[1]}.npz")
    return model, golden, golden_batch(model.config, golden), rope_table(model.config, golden)


@functools.partial(jax.jit, static_argnames=("compute", "table"))
def embed(module, batch, compute=EXACT, table="auto"):
    return module(batch, compute, rope_table=table)


def close(found, golden, key, tolerance):
    if key in golden:
        np.testing.assert_allclose(np.asarray(found), golden[key], rtol=0, atol=tolerance)


@functools.partial(jax.jit, static_argnames="table")
def forward(module, batch, table):
    """Everything that a golden may hold of the forward pass, in one program."""
    x = module.input_embeddings(batch, EXACT)
    places = module.decoder.places(batch, table)
    states = module.decoder.hidden_states(x, places, EXACT)
    normed = module.decoder.norm(states[-1])
    return {
        "x": x,
        "rope": (places.cos, places.sin),
        "states": states,
        "normed": normed,
        "logits": module.lm_head(normed),
        "pooled": module.pooled(batch, EXACT, rope_table=table)[:, 0],
        "embedding": module(batch, EXACT, rope_table=table)[:, 0],
    }


def test_forward(case):
    model, golden, batch, table = case
    found, mask = forward(model.module, batch, table), golden["attention_mask"][..., None]
    close(found["x"] * mask, golden, "inputs_embeds", 2e-5)
    cos, sin = found["rope"]
    close(cos[:1], golden, "rope_cos", 1e-6)
    close(sin[:1], golden, "rope_sin", 1e-6)
    states = found["states"]
    for number, state in enumerate(states[:-1], start=1):
        close(state * mask, golden, f"hidden_after_layer_{number}", 2e-5)
    last = f"hidden_after_layer_{len(states)}_prenorm"
    close(states[-1] * mask, golden, last, 2e-5)
    close(found["normed"] * mask, golden, "last_hidden_state", 2e-5)
    if "logits" in golden:
        close(found["logits"] * mask, {"logits": golden["logits"] * mask}, "logits", 1e-4)
    close(found["pooled"], golden, "pooled", 2e-5)
    close(found["embedding"], golden, "embedding", 2e-6)


def test_first_layer(case):
    model, golden, batch, table = case
    if "layer1_attn_out" not in golden:
        return
    decoder, mask = model.module.decoder, golden["attention_mask"][..., None]
    x = forward(model.module, batch, table)["x"]
    from vlm2vec_jax.nn.compute import layer_at

    layer = layer_at(decoder.layers, 0)
    places = decoder.places(batch, table)

    @jax.jit
    def first(x):
        attended = layer.attn(layer.input_norm(x), places, None, EXACT, None)
        return attended, layer.mlp(layer.post_norm(x + attended), None)

    for part, name in zip(first(x), ("attn", "mlp")):
        close(part * mask, golden, f"layer1_{name}_out", 2e-5)


def test_vision(case):
    model, golden, batch, _ = case
    if not batch.visual:
        return
    vision = model.module.vision
    used = [
        batch.visual["pixels"][row, c]
        for row in range(len(batch.tokens))
        for c in range(sum(golden["crops_used"][golden["image_row"] == row]))
    ]
    features = jax.jit(lambda crops: vision.clip(crops, EXACT))(np.stack(used))
    close(features, golden, "clip_features", 2e-5)
    if "clip_hidden_0_crop0" in golden:
        for i, state in enumerate(vision.clip.hidden_states(jnp.asarray(used[0])[None], EXACT)):
            close(state[0], golden, f"clip_hidden_{i}_crop0", 2e-5)
    table = jax.jit(lambda visual: vision.table(visual, EXACT))(batch.visual)
    rows, at = np.nonzero(batch.feature_index >= 0)
    close(np.asarray(table)[rows, batch.feature_index[rows, at]], golden, "image_embeds", 2e-5)
    if "hd_features_before_projection" in golden:
        merged = np.asarray(merge_patches(features)).reshape(-1, 4 * model.config.clip.hidden_size)
        raw = np.concatenate([np.stack([vision.newline[...], vision.separator[...]]), merged])
        found = raw[batch.feature_index[rows, at]]
        close(found, golden, "hd_features_before_projection", 2e-5)


def test_bf16_stays_near_float32(case):
    model, golden, batch, table = case
    found = embed(model.module, batch, Compute("bfloat16"), table)[:, 0]
    cosine = np.sum(np.asarray(found) * golden["embedding"], axis=-1)
    assert cosine.min() > 0.999


def test_remat_changes_nothing(models, goldens):
    model = models["tiny_mha"]
    golden = load_npz(goldens / "forward/tiny_mha/text_rightpad.npz")
    batch = golden_batch(model.config, golden)
    plain = embed(model.module, batch)
    for remat in ("dots", "full"):
        again = embed(model.module, batch, Compute("float32", remat=remat))
        np.testing.assert_allclose(np.asarray(again), np.asarray(plain), atol=1e-6)


def test_rope_table_follows_each_sequence(models, goldens):
    """A short row beside a long one is embedded as it is alone, unlike in the reference."""
    model = models["tiny_mha"]
    golden = load_npz(goldens / "forward/tiny_mha/text_over_orig_max.npz")
    both = embed(model.module, golden_batch(model.config, golden))
    alone = load_npz(goldens / "forward/tiny_mha/text_rightpad.npz")["embedding"][0]
    np.testing.assert_allclose(np.asarray(both[1, 0]), alone, atol=2e-6)
    np.testing.assert_allclose(np.asarray(both[0, 0]), golden["embedding"][0], atol=2e-6)


@pytest.mark.parametrize("form", [by_products, by_taps])
@pytest.mark.parametrize("width, height, crops", [(640, 480, 4), (100, 700, 16), (336, 336, 1)])
def test_global_view_on_the_device(width, height, crops, form):
    rng = np.random.default_rng(0)
    geometry = hd_geometry(width, height, crops, 28)
    assert geometry is not None
    info = crop_info(geometry)
    pixels = rng.integers(0, 256, (len(info), 28, 28, 3), np.uint8)
    pixels[: geometry.views] = 0
    # A second image in the row, and an empty crop behind it.
    other = crop_info(hd_geometry(28, 28, 1, 28))
    row_info = np.concatenate([info, other, np.zeros((1, 5), np.int32)])
    row = np.concatenate([pixels, pixels[: len(other)], np.zeros((1, 28, 28, 3), np.uint8)])
    # Two rows, of which the first ends with a crop.
    rows = np.stack([np.roll(row, 1, axis=0), row])
    both = np.asarray(jax.jit(form)(rows, np.stack([np.roll(row_info, 1, axis=0), row_info])))
    found = both[1]
    np.testing.assert_allclose(np.roll(both[0], -1, axis=0), found, atol=1e-6)
    assert not found[-1].any()
    np.testing.assert_allclose(found[1 : len(info)], normalise(pixels[1:]), atol=2e-6)
    expected = global_view_numpy(pixels, info)
    np.testing.assert_allclose(found[0], np.asarray(expected).reshape(found[0].shape), atol=2e-6)
    second = global_view_numpy(row[len(info) : len(info) + 1], other)
    np.testing.assert_allclose(found[len(info)], np.asarray(second).reshape(28, 28, 3), atol=2e-6)


def test_full_size_parameter_count(goldens):
    import json

    config = json.loads((goldens / "tiny_mha/config.json").read_text())
    config |= {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "pad_token_id": 32000, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    config["img_processor"] |= {"image_dim_out": 1024}
    config["rope_scaling"] |= {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    from flax import nnx

    from vlm2vec_jax.models.phi3v.config import from_dicts
    from vlm2vec_jax.models.phi3v.model import Phi3V

    real = from_dicts(config)
    module = nnx.eval_shape(lambda: Phi3V(real, rngs=nnx.Rngs(0)))
    sizes = {path: np.prod(leaf.shape, dtype=int) for path, leaf in flatten(module).items()}
    assert sum(sizes.values()) == 4_146_621_440
    assert sizes["lm_head/kernel"] == sizes["embed/table"] == 98_500_608


def test_abstract_model_takes_no_memory(goldens):
    for leaf in flatten(abstract_model(goldens / "tiny_mha").module).values():
        assert not hasattr(leaf, "devices")
