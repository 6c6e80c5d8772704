# SPDX-License-Identifier: Apache-2.0
"""Every attention kernel against the plain form, values and gradients, in an interpreter.

Tests marked `gpu` run the kernels of NVIDIA cards on one: `JAX_PLATFORMS=cuda pytest -m gpu`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.nn import attention, exact, splash
from vlm2vec_jax.nn.attention import Visibility, attend, interpreted
from vlm2vec_jax.parallel.mesh import make_mesh


def operands(rows, tokens, heads, kv_heads, width, *, keys=None, dtype="float32"):
    rng = np.random.default_rng(tokens + width)
    shapes = [(tokens, heads), (keys or tokens, kv_heads), (keys or tokens, kv_heads)]
    return [jnp.asarray(rng.normal(size=(rows, n, h, width)), jnp.dtype(dtype)) for n, h in shapes]


def packed(rows, tokens, *, causal=True, window=None, seed=0):
    """Rows of sequences of several lengths; the last tokens of the first row are padding."""
    rng = np.random.default_rng(seed)
    segments = 1 + np.sort(rng.integers(0, 4, (rows, tokens)), axis=1).astype(np.int32)
    segments[0, tokens - tokens // 5 :] = 0
    return Visibility(jnp.asarray(segments), jnp.asarray(segments), causal, window=window)


def results(q, k, v, visibility, kind):
    """The values and the gradients of q, k and v of a sum that knows one value from another."""

    def total(q, k, v):
        y = attend(q, k, v, visibility, implementation=kind)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (y.astype(jnp.float32) * weights).sum(), y

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, y), grads = run(q, k, v)
    return [np.asarray(x, np.float32) for x in (y, *grads)]


def check(found, expected, tolerance=2e-5):
    for name, a, b in zip(("values", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), err_msg=name)


needs_card = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no NVIDIA card here")

CASES = {
    # As Phi-3's decoder: width 96, a length that no block divides, a sliding window.
    "window": ((2, 200, 2, 2, 96), packed(2, 200, window=70)),
    # As Qwen's: several queries to a key head.
    "groups": ((1, 260, 4, 2, 64), packed(1, 260)),
    # As packed patches of images: no order.
    "patches": ((1, 150, 2, 2, 16), packed(1, 150, causal=False)),
    # As CLIP's crops: everything sees everything, one token too many.
    "crops": ((2, 129, 2, 2, 64), None),
}


EXACT = {
    # (rows, tokens, heads, key heads, width), who sees whom, logits that the cache holds.
    "pieces": ((1, 200, 2, 2, 16), packed(1, 200), 1 << 20),
    "window": ((2, 200, 2, 2, 16), packed(2, 200, window=70), 1 << 20),
    "rows of the cache": ((4, 150, 2, 2, 16), packed(4, 150), 2 * 2 * 64 * 150),
    "heads of the cache": ((2, 150, 4, 2, 16), packed(2, 150), 1),
    "patches": ((3, 90, 2, 2, 16), packed(3, 90, causal=False), 2 * 90 * 90),
    "crops": ((4, 65, 2, 2, 16), None, 2 * 2 * 65 * 65),
}


@pytest.mark.parametrize("case", EXACT)
def test_pieces_of_a_cpu_are_attention(case, monkeypatch):
    sizes, visibility, cached = EXACT[case]
    q, k, v = operands(*sizes)
    monkeypatch.setattr(exact, "_PIECE", 64)
    monkeypatch.setattr(exact, "_CACHED_LOGITS", cached)
    monkeypatch.setattr(exact, "_LOOP_LOGITS", 0)
    check(results(q, k, v, visibility, "xla"), results(q, k, v, visibility, "dense"))


@pytest.mark.parametrize("tokens", [1, 16, 255, 257, 832, 1984, 9000])
def test_pieces_hold_every_query_once_and_skip_almost_half(tokens):
    found = exact.pieces(tokens)
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == tokens and len(found) <= 8
    seen = sum((end - start) * end for start, end in found)
    assert seen <= (0.65 if tokens > 800 else 1) * tokens**2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_splash_is_attention(case):
    sizes, visibility = CASES[case]
    q, k, v = operands(*sizes)
    with interpreted():
        found = results(q, k, v, visibility, "splash")
    check(found, results(q, k, v, visibility, "xla"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["groups", "crops"])
def test_triton_is_attention(case):
    sizes, visibility = CASES[case]
    q, k, v = operands(*sizes)
    with interpreted():
        found = results(q, k, v, visibility, "triton")
    check(found, results(q, k, v, visibility, "xla"))


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (3, 3)])
def test_splash_on_a_mesh_stays_on_its_own_rows_and_heads(heads, kv_heads):
    """One key head for two partners; and heads that the partners do not divide."""
    q, k, v = operands(4, 130, heads, kv_heads, 16)
    visibility = packed(4, 130)
    expected = results(q, k, v, visibility, "xla")
    mesh = make_mesh(2, 2, 2)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh), interpreted():
        q, k, v = jax.device_put((q, k, v), rows)
        found = results(q, k, v, visibility, "splash")
    check(found, expected)


def test_blocks_cost_little():
    assert splash.block(128) == splash.block(1) == 128
    # One block without more padding than needed.
    assert splash.block(300) == 384 and splash.block(577) == 640
    # 13 x 128 has no other divisor: two blocks of 896 are cheaper than 91 steps.
    assert splash.block(1664, causal=True) == 896
    # A short window is not worth long blocks of which little is seen.
    assert splash.block(8192, causal=True, window=256) < splash.block(8192, causal=True)


def test_pooled_queries_and_cpus_take_the_plain_form(monkeypatch):
    q, k, v = operands(1, 2, 1, 1, 8, keys=5)
    segments = jnp.ones((1, 5), jnp.int32)
    pooled = Visibility(segments[:, :2], segments, True, jnp.array([[1, 4]]))
    assert attention.chosen("auto", q, k, None) == "xla"
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert attention.chosen("splash", q, k, pooled) == "xla"
    assert attention.chosen("splash", k, k, None) == "splash"
    assert attention.chosen("auto", k, k, None) == "xla"  # so few pairs
    long = jax.ShapeDtypeStruct((1, 1664, 32, 96), jnp.bfloat16)
    assert attention.chosen("auto", long, long, None) == "splash"
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert attention.chosen("cudnn", long, long, None) == "cudnn"
    assert attention.chosen("cudnn", long, long, packed(1, 8)) == "triton"
    assert attention.chosen("cudnn", long, long, packed(1, 8, window=3)) == "xla"
    assert attention.chosen("cudnn", k, k, None) == "triton"  # float32
    assert attention.chosen("auto", long, long, None) == "xla"  # no card to try it on


@pytest.mark.parametrize(("kind", "needs"), [("splash", "TPUs"), ("cudnn", "NVIDIA cards")])
def test_a_kernel_of_another_platform_is_a_users_error(kind, needs):
    x = jnp.zeros((1, 1, 1, 8))
    with pytest.raises(UserError, match=f"attention={kind} is a kernel of {needs}.* cpu"):
        attend(x, x, x, implementation=kind)


@pytest.mark.parametrize(
    ("kind", "visibility", "call"),
    [
        pytest.param("triton", packed(2, 129), "__gpu$xla.gpu.triton", marks=pytest.mark.slow),
        ("cudnn", None, "__cudnn$fmhaSoftmax"),
    ],
)
def test_kernels_of_cards_are_lowered_without_one(kind, visibility, call, monkeypatch):
    """Forward and backward, at Phi-3's head width and CLIP's odd length."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    # The one thing that jax asks a card for; the version is one of 2025.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    x = jax.ShapeDtypeStruct((2, 129, 2, 96), jnp.bfloat16)

    def total(q, k, v):
        return attend(q, k, v, visibility, implementation=kind).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(x, x, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f'custom_call @"{call}') + text.count(f"custom_call @{call}") >= 2


def test_memory_of_the_plain_form_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.setattr(exact, "_MOST_LOGITS", 1 << 17)
    monkeypatch.setattr(exact, "_BLOCK_LOGITS", 1 << 15)

    def temporaries(tokens):
        q, k, v = (jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32) for _ in range(3))
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def total(q, k, v, ids):
            return attend(q, k, v, Visibility(ids, ids, True)).sum()

        program = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v, ids).compile()
        return program.memory_analysis().temp_size_in_bytes

    # Logits of all pairs would grow by sixteen; those of the least block of queries by four.
    assert temporaries(4096) < 5 * temporaries(1024)


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ["groups", "patches", "crops"])
@pytest.mark.parametrize("kind", ["cudnn", "triton", "auto"])
def test_a_cards_kernels_are_attention(kind, case, dtype):
    sizes, visibility = CASES[case]
    q, k, v = operands(*sizes, dtype=dtype)
    found = results(q, k, v, visibility, kind)
    check(found, results(q, k, v, visibility, "xla"), 0.03 if dtype == "bfloat16" else 1e-3)


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("kind", ["cudnn", "triton"])
def test_a_cards_kernels_work_at_the_widths_of_our_models(kind, width):
    from vlm2vec_jax.nn import cuda

    assert cuda.works(kind, width, "bfloat16")
