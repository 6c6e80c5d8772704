# SPDX-License-Identifier: Apache-2.0
"""Reading compiled programs: a text with all that XLA writes, and a program compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm2vec_jax.parallel import hlo
from vlm2vec_jax.parallel.mesh import make_mesh

TEXT = """\
HloModule jit_f, entry_computation_layout={()->f32[2]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(31)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%start (x: bf16[1,4]) -> bf16[4,4] {
  ROOT %g1 = bf16[4,4]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, m={op_name="f/while/body/w"}
}

%overlapped (x: bf16[1,4]) -> bf16[4,4] {
  ROOT %g2 = bf16[4,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=3, dimensions={0}
}

%early (x: bf16[1,4]) -> bf16[1,4] {
  ROOT %g4 = f32[9]{0} all-gather(%x), channel_id=11, dimensions={0}
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g5 = f32[9]{0} all-gather(%x), channel_id=11, dimensions={0}
  %f1 = bf16[4,4] fusion(%x), kind=kCustom, calls=%start
  %f2 = bf16[4,4] fusion(%x), kind=kCustom, calls=%overlapped
  %r = (f32[8]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), channel_id=4, to_apply=%sum
}

%outer_condition (p: (s32[], s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], s32[])) -> (s32[], s32[]) {
  %w = (s32[], /*index=1*/f32[8]) while(%t), condition=%inner_condition, body=%inner
  %c = f32[8] conditional(%k, %t, %u), branch_computations={%branch, %never}
}

%branch (x: bf16[1,4]) -> bf16[4,4] {
  ROOT %g3 = bf16[4,4]{1,0} all-gather(%x), channel_id=8, dimensions={0}
}

%never (x: bf16[1,4]) -> f32[8] {
  %n = f32[8] negate(%x)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %ag = (f32[2]{0}, f32[16]{0}) all-gather-start(%p), channel_id=1, dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ag)
  %f3 = bf16[4,4] fusion(%x), kind=kCustom, calls=%early
  %cp = (u8[4]{0}, u8[4]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=2
  %w1 = (s32[], s32[]) while(%t), condition=%outer_condition, body=%outer, metadata={op_name="x"}
  %w2 = (s32[], f32[8]) while(%t), condition=%c, body=%last, x={"known_trip_count":{"n":"5"}}
}

%last (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %rs = f32[4]{0} reduce-scatter(%x), channel_id=9, to_apply=%sum
}
"""


def test_everything_that_xla_writes():
    everything = hlo.collectives(TEXT)
    # Channel 11 starts outside and is overlapped with a loop.
    early = [op for op in everything if op.arrays[0].shape == (9,)]
    assert [op.loops for op in early] == [()]
    found = {(op.kind, op.loops): op for op in everything if op not in early}
    assert set(found) == {
        ("all-gather", ()),
        ("collective-permute", ()),
        ("all-gather", (None, 31)),
        ("all-reduce", (None, 31)),
        ("all-gather", (None,)),
        ("reduce-scatter", (5,)),
    }
    # The second copy of channel 3 in the same loop is the first one, overlapped.
    assert len(everything) == 6 + 1
    start = found["all-gather", ()]
    assert [str(a) for a in start.arrays] == ["f32[16]"] and start.bytes == 64
    assert found["collective-permute", ()].bytes == 4
    layer = found["all-gather", (None, 31)]
    assert layer.bytes == 32 and layer.total() == 31 * 32 and layer.total(unknown=2) == 62 * 32
    assert layer.source == "f/while/body/w"
    assert str(layer) == "all-gather bf16[4,4] in ? x 31 (f/while/body/w)"
    assert found["all-reduce", (None, 31)].bytes == 4 * (8 + 6)


def test_what_follows_a_kernel_of_several_lines_is_read():
    """As a TPU writes splash attention: its metadata goes on over lines, one of which begins }}."""
    text = """HloModule m

ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  %kernel = f32[2]{0} custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="splash"}
  ROOT %all = f32[8]{0} all-gather(%kernel), channel_id=1, dimensions={0}
}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, str(found.arrays[0])) == ("all-gather", "f32[8]")


def test_sums_by_kind():
    sums = hlo.by_kind(hlo.collectives(TEXT), unknown=2)
    assert sums["outside"]["all-gather"] == {
        "operations": 2,
        "largest_bytes": 64,
        "total_bytes": 64 + 36,
    }
    inside = sums["inside"]["all-gather"]
    assert inside == {"operations": 2, "largest_bytes": 32, "total_bytes": 2 * 32 + 62 * 32}
    assert sums["inside"]["reduce-scatter"]["total_bytes"] == 5 * 16


@pytest.mark.parametrize("steps", [3, None])
def test_a_program_compiled_here(steps):
    mesh = make_mesh(fsdp=8)

    def f(x, n):
        def body(_, x):
            whole = jax.lax.with_sharding_constraint(jnp.sin(x), PartitionSpec())
            mixed = whole @ jnp.cos(whole)
            return jax.lax.with_sharding_constraint(mixed, PartitionSpec("fsdp"))

        return jax.lax.fori_loop(0, n if steps is None else steps, body, x)

    x = jax.ShapeDtypeStruct(
        (16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(x, jnp.int32(2)).compile()
    gathers = [op for op in hlo.collectives(compiled) if op.kind == "all-gather"]
    assert gathers and {op.loops for op in gathers} == {(steps,)}
    assert max(op.bytes for op in gathers) == 16 * 16 * 4
