# SPDX-License-Identifier: Apache-2.0
"""FLOPs counted in compiled programs: what TPUs write, and a program compiled here."""

# ruff: noqa: E501 (programs have long lines)

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.packing import ChunkShape, RowShape
from vlm2vec_jax.parallel import products
from vlm2vec_jax.training import plan

KERNEL = r"""
  %%splash_mha_%s_segmented_no_residuals.7 = (f32[4,896,96]{2,1,0}, %sbf16[4,32,1792,96]{3,2,1,0:T(8,128)(2,1)}) custom-call(%%next, %%q, %%k, %%v, %%s, %%t%s), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 896, \"block_kv\": 896, \"block_q_dkv\": 448, \"block_kv_dkv\": 896}"
}}, metadata={op_name="jit(f)/pallas_call"}
"""
FUSED = "bf16[4,2,32,1792,96]{4,3,2,1,0:T(8,128)(2,1)}, "
"""What a backward kernel results in that has q's gradient, too: parts of it by blocks of keys."""
TEXT = """\
HloModule jit_f

%%batched (a: bf16[4,10,8], b: bf16[4,8,6]) -> bf16[4,10,6] {
  %%a = bf16[4,10,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %%b = bf16[4,8,6]{2,1,0} parameter(1)
  ROOT %%c = bf16[4,10,6]{2,1,0} convolution(%%a, %%b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%%body (p: (s32[], s32[6,2,128])) -> (s32[], s32[6,2,128]) {
  %%x = bf16[4,10,8]{2,1,0} parameter(0)
  %%y = bf16[4,8,6]{2,1,0} parameter(1)
  %%f = bf16[4,10,6]{2,1,0} fusion(%%x, %%y), kind=kOutput, calls=%%batched
}

%%condition (p: (s32[], s32[6,2,128])) -> pred[] {
  ROOT %%less = pred[] compare(%%i, %%n), direction=LT
}

ENTRY %%main (p: s32[]) -> s32[] {
  %%next = s8[1,2,2]{2,1,0} parameter(6)
  %%q = bf16[4,32,1792,96]{3,2,1,0} parameter(0)
  %%k = bf16[4,32,1792,96]{3,2,1,0} parameter(1)
  %%v = bf16[4,32,1792,96]{3,2,1,0} parameter(2)
  %%s = s32[4,1792,128]{2,1,0} parameter(3)
  %%t = s32[4,8,1792]{2,1,0} parameter(7)
  %%order = s32[1792,128]{1,0} parameter(4)
  %%turned = s32[8,1792]{1,0} parameter(5)
  %%w = (s32[], s32[6,2,128]{2,1,0:T(8,128)}) while(%%start), condition=%%condition, body=%%body
%s}
"""


def kernels(*texts):
    return TEXT % "".join(text.lstrip("\n") for text in texts)


def test_what_a_tpu_writes_is_counted():
    """Products of a batch of matrices, a loop whose count is told, kernels by their blocks."""
    text = kernels(KERNEL % ("fwd", "", ", %order"), KERNEL % ("dkv", "", ""))
    found = {p.kind: p for p in products.products(text, lambda line: 5)}
    assert found["convolution"].flops == 2 * 4 * 10 * 8 * 6
    assert found["convolution"].loops == (5,)
    assert found["convolution"].total() == 5 * 2 * 4 * 10 * 8 * 6
    pairs = 4 * 32 * 96 * 2 * 896 * 896
    assert found["splash fwd"].flops == 2 * 3 * pairs  # of four blocks order leaves three
    assert found["splash dkv"].flops == 4 * 4 * pairs and found["splash dkv"].loops == ()
    fused = KERNEL % ("dkv", FUSED, ", %turned")
    whole = products.flops(kernels(fused), lambda line: None)
    assert whole["products"] == found["convolution"].flops  # nobody knows: once
    # Half blocks of queries: 448 x 896 behind the diagonal, one more for the lower half.
    assert whole["attention"] == 5 * (1 + 1 + 2 + 2) * pairs / 2


@pytest.mark.parametrize("part", ["fwd", "dkv"])
@pytest.mark.parametrize("order", ["", ", %order"])
def test_a_single_row_is_counted_as_one_of_several(part, order):
    """Without an axis for rows, segments have the shapes of the places of queries."""
    four = kernels(KERNEL % (part, FUSED if part == "dkv" else "", order))
    one = four.replace("[4,32,1792,", "[32,1792,").replace("{3,2,1,0", "{2,1,0")
    one = one.replace(FUSED, FUSED.replace("[4,", "[").replace("{4,", "{"))
    one = one.replace("s32[4,1792,128]{2,1,0}", "s32[1792,128]{1,0}")
    one = one.replace("s32[4,8,1792]{2,1,0}", "s32[8,1792]{1,0}")
    attention = products.flops(one)["attention"]
    assert attention == products.flops(four)["attention"] / 4 > 0
    # Keys in fewer heads than queries: each query head still has its own products.
    grouped = one.replace("%k = bf16[32,", "%k = bf16[4,").replace("%v = bf16[32,", "%v = bf16[4,")
    assert grouped != one and products.flops(grouped)["attention"] == attention


def test_a_kernel_that_is_not_known_is_not_left_out():
    text = kernels((KERNEL % ("fwd", "", "")).replace("splash_mha", "ring"))
    with pytest.raises(ValueError, match="ring_fwd.*not known"):
        products.products(text)


def test_a_chunk_loop_is_known_by_its_tokens():
    packed = plan.Shapes(
        (ChunkShape(RowShape(128, 0, 32), 16, 6), ChunkShape(RowShape(1664, 10, 16), 8, 3)),
        (5, 2), True, 1, 1.0, 1.0,
    )  # fmt: skip
    assert plan.chunks_run("%w = (s32[], s32[6,2,128]{2,1,0}) while(%t)", packed, 8) == 5
    assert plan.chunks_run("%w = (s32[], s32[3,1,1664]) while(%t)", packed, 8) == 2
    assert plan.chunks_run("%w = (s32[], s32[31]) while(%t)", packed, 8) is None


@given(
    results=st.integers(1, 12), window=st.integers(1, 6), stride=st.integers(1, 4),
    pad=st.integers(0, 5), length=st.integers(1, 8), base=st.integers(1, 4),
    dilate=st.integers(1, 3),
)  # fmt: skip
def test_pairs_that_meet_an_element(results, window, stride, pad, length, base, dilate):
    places = {i * base for i in range(length)}
    expected = sum(
        r * stride + k * dilate - pad in places for r in range(results) for k in range(window)
    )
    found = products._real_pairs(results, window, stride, pad, length, base, dilate)
    assert found == expected


def test_a_compiled_gradient_has_its_products():
    """Six layers in a loop, forward and back: three products of a layer and its input."""

    def loss(layers, x):
        return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0] ** 2).sum()

    layers, x = jnp.ones((6, 32, 32)), jnp.ones((16, 32))
    text = str(jax.jit(jax.grad(loss)).lower(layers, x).compile().as_text())
    found = products.flops(text)
    assert found == {"products": 5 * 2 * 16 * 32 * 32 + 13 * 2 * 16 * 32 * 32, "attention": 0.0}
