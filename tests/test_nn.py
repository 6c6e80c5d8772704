# SPDX-License-Identifier: Apache-2.0
"""The building blocks against their definitions, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.nn.attention import Visibility, attend
from vlm2vec_jax.nn.compute import Compute, scan_layers
from vlm2vec_jax.nn.dropout import keep_mask
from vlm2vec_jax.nn.linear import (
    Linear,
    columns_scaled,
    linears,
    low_rank,
    refresh_dora_norms,
)
from vlm2vec_jax.nn.norm import LayerNorm, RMSNorm, l2_normalize
from vlm2vec_jax.nn.rope import cos_sin, inverse_frequencies, rotate
from vlm2vec_jax.parallel.mesh import make_mesh


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attention_by_hand(q, k, v, seen):
    rows, queries, heads, width = q.shape
    out = np.zeros_like(q)
    for r in range(rows):
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            for t in range(queries):
                keys = np.flatnonzero(seen[r, t])
                logits = k[r, keys, kv] @ q[r, t, h] / np.sqrt(width)
                weights = np.exp(logits - logits.max())
                out[r, t, h] = (weights / weights.sum()) @ v[r, keys, kv]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_attention(kv_heads, window):
    q, k, v = normal(2, 9, 4, 8), normal(2, 9, kv_heads, 8, seed=1), normal(2, 9, kv_heads, 8)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2]], np.int32)
    index = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    seen = (segments[:, :, None] == segments[:, None]) & (index[:, :, None] >= index[:, None])
    if window is not None:
        seen &= index[:, :, None] - index[:, None] <= window
    ids = jnp.asarray(segments)
    places = Visibility(ids, ids, True, jnp.asarray(index), window)
    np.testing.assert_array_equal(np.asarray(places.mask()), seen)
    found = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), places)
    np.testing.assert_allclose(np.asarray(found), attention_by_hand(q, k, v, seen), atol=2e-6)
    in_order = Visibility(ids, ids, True, window=window)
    np.testing.assert_array_equal(np.asarray(in_order.mask()), seen)


def test_attention_without_a_mask():
    q, k, v = normal(1, 3, 2, 4), normal(1, 5, 2, 4, seed=1), normal(1, 5, 2, 4, seed=2)
    expected = attention_by_hand(q, k, v, np.ones((1, 3, 5), bool))
    found = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-6)


def test_attention_of_some_queries_is_the_same():
    q, k, v = normal(1, 6, 2, 4), normal(1, 6, 2, 4, seed=1), normal(1, 6, 2, 4, seed=2)
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    whole = attend(q, k, v, Visibility(segments, segments, True))
    some = jnp.array([[2, 5]])
    picked = attend(q[:, [2, 5]], k, v, Visibility(segments[:, [2, 5]], segments, True, some))
    np.testing.assert_allclose(np.asarray(picked), np.asarray(whole)[:, [2, 5]], atol=1e-6)


def test_rope():
    frequencies = inverse_frequencies(8, 10000.0, (1.0, 2.0, 3.0, 4.0))
    np.testing.assert_allclose(frequencies, [1, 0.1 / 2, 0.01 / 3, 0.001 / 4], rtol=1e-6)
    cos, sin = cos_sin(jnp.array([[0, 3]]), frequencies, 1.5)
    angles = np.concatenate([3 * frequencies] * 2)
    np.testing.assert_allclose(np.asarray(cos[0, 1]), 1.5 * np.cos(angles), atol=1e-6)
    x = normal(1, 2, 3, 8)
    found = np.asarray(rotate(jnp.asarray(x), cos, sin))
    pair = x[0, 1, :, 1] * np.cos(angles[1]) - x[0, 1, :, 5] * np.sin(angles[1])
    np.testing.assert_allclose(found[0, 1, :, 1], 1.5 * pair, atol=1e-6)
    np.testing.assert_allclose(found[0, 0], 1.5 * x[0, 0], atol=1e-6)


def test_norms():
    x = normal(3, 5) * 3 + 1
    rms, layer = RMSNorm(5, eps=1e-3), LayerNorm(5, eps=1e-3)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(np.asarray(rms(jnp.asarray(x))), expected, atol=1e-6)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x))), expected, atol=2e-6)
    assert rms(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_l2_normalize_of_zero_has_no_nan():
    value, grad = jax.value_and_grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 4)))
    assert value == 0 and np.isfinite(np.asarray(grad)).all()
    unit = l2_normalize(jnp.asarray(normal(3, 4), jnp.bfloat16))
    assert unit.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-6)


def adapted(rank=3, *, dora, dropout=0.0, stack=(), fused=False):
    linear = Linear(6, 4, bias=True, rngs=nnx.Rngs(0))
    linear.kernel = nnx.Param(jnp.asarray(normal(*stack, 6, 4)))
    leaves = {
        "lora_a": jnp.asarray(normal(*stack, 6, rank, seed=1)),
        "lora_b": jnp.asarray(normal(*stack, rank, 4, seed=2)),
    }
    if dora:
        leaves["magnitude"] = jnp.abs(jnp.asarray(normal(*stack, 4, seed=3))) + 0.5
    linear.set_adapter(leaves, scale=2.0, dropout=dropout, fused_dropout=fused)
    return linear


def test_lora_and_dora():
    x = normal(5, 6, seed=9)
    for dora in (False, True):
        linear = adapted(dora=dora)
        w = np.asarray(linear.kernel[...], np.float64)
        a, b = np.asarray(linear.lora_a[...]), np.asarray(linear.lora_b[...])
        merged = w + 2.0 * a @ b
        if dora:
            merged = merged / np.linalg.norm(merged, axis=0) * np.asarray(linear.magnitude[...])
        np.testing.assert_allclose(np.asarray(linear(jnp.asarray(x))), x @ merged, atol=2e-5)


def test_dora_norm_by_low_rank_products():
    linear = adapted(dora=True, stack=(3,))
    w, a, b = (
        np.asarray(p[...], np.float64) for p in (linear.kernel, linear.lora_a, linear.lora_b)
    )
    expected = np.linalg.norm(w + 2.0 * a @ b, axis=-2)
    np.testing.assert_allclose(np.asarray(linear.dora_norm()), expected, rtol=1e-5)


def test_dora_norm_is_a_constant_for_the_gradient():
    linear = adapted(dora=True)
    x = jnp.asarray(normal(5, 6, seed=9))

    def value(b):
        layer = adapted(dora=True)
        layer.lora_b = nnx.LoRAParam(b)
        return layer(x).sum()

    def with_fixed_norm(b, norm):
        y = x @ linear.kernel[...] + 2.0 * (x @ linear.lora_a[...]) @ b
        return (linear.magnitude[...] / norm * y).sum()

    b = linear.lora_b[...]
    norm = linear.dora_norm()
    expected = jax.grad(with_fixed_norm)(b, norm)
    np.testing.assert_allclose(np.asarray(jax.grad(value)(b)), np.asarray(expected), rtol=1e-4)


def test_refreshed_norms_are_used_and_found():
    linear = adapted(dora=True)
    x = jnp.asarray(normal(5, 6))
    before = linear(x)
    refresh_dora_norms(linear)
    assert linear.column_norm is not None
    np.testing.assert_allclose(np.asarray(linear(x)), np.asarray(before), atol=1e-6)
    assert list(linears(linear).values()) == [linear]


def test_dropout_touches_the_correction_only():
    """PEFT: out = x W + (m/n - 1) x' W + (m/n) s x' A B; the mean over draws is the plain one."""
    x = jnp.asarray(normal(4, 6))
    for dora, fused in ((False, False), (True, False), (True, True)):
        linear = adapted(dora=dora, dropout=0.5, fused=fused)
        same = jax.random.key(3)
        np.testing.assert_array_equal(linear(x, same), linear(x, same))
        assert not np.allclose(linear(x, same), linear(x, jax.random.key(4)))
        keys = jax.random.split(jax.random.key(0), 4000)
        mean = jax.vmap(lambda k, layer=linear: layer(x, k))(keys).mean(0)
        np.testing.assert_allclose(np.asarray(mean), np.asarray(linear(x)), atol=0.25)
    # With everything dropped only x W stays.
    gone = adapted(dora=True, dropout=1 - 1e-7)
    expected = x @ gone.kernel[...]
    np.testing.assert_allclose(np.asarray(gone(x, same)), np.asarray(expected), atol=1e-5)
    # Fused, the length of each column is still the magnitude's affair.
    gone = adapted(dora=True, dropout=1 - 1e-7, fused=True)
    expected = x @ gone.kernel[...] * gone.magnitude[...] / gone.dora_norm()
    np.testing.assert_allclose(np.asarray(gone(x, same)), np.asarray(expected), atol=1e-5)


def test_fused_dropout_of_dora_multiplies_with_the_weight_once():
    x, key = jnp.asarray(normal(4, 6)), jax.random.key(0)

    def products(fused):
        layer = adapted(dora=True, dropout=0.5, fused=fused)
        refresh_dora_norms(layer)
        lines = str(jax.make_jaxpr(lambda x: layer(x, key))(x)).splitlines()
        return sum("dot_general" in line for line in lines)

    assert (products(True), products(False)) == (3, 4)


def test_scan_gives_each_layer_its_own_key():
    layers = jnp.arange(3.0)

    def body(x, layer, key):
        return x + layer + (0.0 if key is None else jax.random.normal(key))

    compute = Compute()
    assert scan_layers(body, jnp.float32(1), layers, compute=compute) == 4.0
    key = jax.random.key(0)
    expected = 4.0 + sum(jax.random.normal(k) for k in jax.random.split(key, 3))
    found = scan_layers(body, jnp.float32(1), layers, compute=compute, key=key)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_dropout_masks_are_as_good_as_random():
    """Share, independence of neighbours, of keys and of places; the same under any sharding."""
    shape = (16, 64, 96)
    keys = jax.random.split(jax.random.key(1), 8)
    masks = np.stack([np.asarray(keep_mask(key, 0.25, shape)) for key in keys])
    deviation = (0.25 * 0.75 / masks[0].size) ** 0.5
    assert np.abs(masks.mean(axis=(1, 2, 3)) - 0.75).max() < 5 * deviation
    flat = masks.reshape(8, -1).astype(np.float64) - 0.75
    size = flat.shape[1]
    for lag in (1, 2, 96, 64 * 96):
        assert np.abs((flat[:, lag:] * flat[:, :-lag]).mean(1) / 0.1875).max() < 5 * size**-0.5
    between = flat @ flat.T / size / 0.1875
    assert np.abs(between - np.eye(8)).max() < 0.02
    rows = masks.mean(axis=(0, 2, 3)), masks.mean(axis=(0, 1, 2))
    assert all(np.abs(share - 0.75).max() < 0.03 for share in rows)
    assert np.asarray(keep_mask(keys[0], 0.0, (5,))).all()
    spread = NamedSharding(make_mesh(4, 2), P(("data", "fsdp")))
    cut = jax.jit(lambda key: keep_mask(key, 0.25, shape), out_shardings=spread)(keys[0])
    assert (np.asarray(cut) == masks[0]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_adapted_layers_are_those_of_the_plain_form(dtype):
    rng = np.random.default_rng(0)
    x, a, b, gain = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 6), (6, 3), (3, 4), 4)
    )
    x, gain, scale = x.astype(dtype), gain.astype(dtype), jnp.float32(0.7)

    def ours(x, a, b, gain):
        return columns_scaled(low_rank(x, a, b, scale), gain)

    def plain(x, a, b, gain):
        return gain * (scale.astype(dtype) * ((x @ a.astype(dtype)) @ b.astype(dtype)))

    def both(form):
        total = lambda *args: (form(*args).astype(jnp.float32) ** 2).sum()  # noqa: E731
        return form(x, a, b, gain), *jax.grad(total, (0, 1, 2, 3))(x, a, b, gain)

    near = 1e-5 if dtype == "float32" else 0.05
    for found, expected in zip(both(ours), both(plain), strict=True):
        assert found.dtype == expected.dtype
        found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(found, expected, atol=near * np.abs(expected).max())
