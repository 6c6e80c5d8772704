# SPDX-License-Identifier: Apache-2.0
"""The name table: rules invert exactly, tables are bijections, old spellings are understood."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.phi3v import config as phi3v_config
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.weights.rules import Alias, Rule, Skip, Table, collapse


@st.composite
def rules_and_arrays(draw):
    rank = draw(st.integers(1, 4))
    permute = draw(st.none() | st.permutations(range(rank)).map(tuple))
    ones = draw(st.integers(0, 3))
    shape = (1,) * ones + tuple(draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank)))
    array = np.arange(np.prod(shape)).reshape(shape)
    return Rule("x.weight", "x", permute, lead_ones=ones), array


@given(rules_and_arrays())
def test_rule_inverts_exactly(case):
    rule, array = case
    ours = rule.to_ours(array)
    assert rule.to_hf(ours).shape == array.shape
    np.testing.assert_array_equal(rule.to_hf(ours), array)
    assert rule.our_shape(array.shape) == ours.shape
    assert rule.hf_shape(ours.shape) == array.shape


@given(rules_and_arrays(), st.data())
def test_slice_of_a_leaf_is_a_slice_of_the_tensor(case, data):
    rule, array = case
    ours = rule.to_ours(array)
    index = []
    for size in ours.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    part = rule.to_ours(array[rule.hf_index(tuple(index))])
    np.testing.assert_array_equal(part, ours[tuple(index)])


def test_the_real_layouts():
    out_in = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(Rule("w.weight", "w", (1, 0)).to_ours(out_in), out_in.T)
    conv = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    ours = Rule("c.weight", "c", (2, 3, 1, 0)).to_ours(conv)
    assert ours.shape == (4, 5, 3, 2)
    assert ours[3, 4, 2, 1] == conv[1, 2, 3, 4]


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa"])
def test_phi3v_table_is_a_bijection_with_the_golden_names(goldens, name):
    table = phi3v_table(phi3v_config.from_hf(goldens / name))
    with safe_open(goldens / name / "model.safetensors", "numpy") as file:
        names = set(file.keys())
    assert {name for name, _ in table.written()} == names
    # Every leaf is filled, and each place on its layer axis once.
    places = [(slot.rule.ours, slot.layer) for slot in table.slots.values()]
    assert len(set(places)) == len(places) == len(names)
    for path, rule in table.by_leaf.items():
        layers = [layer for where, layer in places if where == path]
        assert layers == (list(range(rule.depth)) if rule.stacked else [None])


def test_phi3v_table_of_the_published_sizes():
    rope = phi3v_config.RopeConfig(1e4, (1.0,) * 48, (1.0,) * 48, 131072, 4096)
    config = phi3v_config.Phi3VConfig(
        3072, 8192, 32, 32, 32, 32064, 1e-5, rope, phi3v_config.ClipConfig()
    )
    table = phi3v_table(config)
    # 6 per decoder layer, 16 per CLIP layer, 7 tower, 3 text, 6 projection and separators.
    assert len(table.slots) == 32 * 6 + 24 * 16 + 7 + 3 + 6
    assert table.by_leaf["vision/clip/layers/norm1/scale"].layers == (0, 23)
    assert table.by_leaf["vision/clip/unused_layers/norm1/scale"].layers == (23, 24)
    assert len(table.linears) == 2 * 4 + 2 * 6 + 2 + 1  # the last decoder layer stands apart


def test_no_unused_layers_have_no_leaf(goldens):
    config = dataclasses.replace(phi3v_config.from_hf(goldens / "tiny_gqa"), layer_idx=-1)
    table = phi3v_table(config)
    assert not [path for path in table.by_leaf if "unused" in path]


def test_old_spellings_copies_and_buffers(goldens):
    table = phi3v_table(phi3v_config.from_hf(goldens / "tiny_gqa"))
    assert table.canonical("encoder.model.norm.weight") == "model.norm.weight"
    assert table.canonical("encoder.lm_head.weight") == "lm_head.weight"
    assert table.canonical("encoder.nonsense") == "encoder.nonsense"
    assert table.knows("model.vision_embed_tokens.wte.weight")
    assert "configuration" in (table.skipped("model.layers.3.self_attn.rotary_emb.inv_freq") or "")
    assert not table.knows("model.layers.99.input_layernorm.weight")
    with pytest.raises(UserError, match="twice"):
        table.canonical_names(["model.norm.weight", "encoder.model.norm.weight"])


@pytest.mark.parametrize(
    "build",
    [
        lambda: Table((Rule("a", "x"), Rule("a", "y"))),
        lambda: Table((Rule("a", "x"), Rule("b", "x"))),
        lambda: Table((Rule("a.{l}", "x", layers=(0, 3)), Rule("a.2", "y"))),
        lambda: Table((Rule("a", "x"),), aliases=(Alias("b", of="c"),)),
        lambda: Table((Rule("a", "x"),), skips=(Skip("a", "no reason"),)),
        lambda: Table((Rule("a", "x", tied_to="b"),)),
        lambda: Rule("a.{l}", "x"),
        lambda: Rule("a", "x", layers=(0, 2)),
        lambda: Rule("a", "x", permute=(0, 2)),
    ],
)
def test_broken_tables_are_refused(build):
    with pytest.raises(ValueError):
        build()


def test_collapse_groups_layers():
    names = [f"m.{i}.w" for i in (0, 1, 2, 5)] + ["norm"]
    assert [label for label, _ in collapse(names)] == ["m.{0-2,5}.w", "norm"]
    assert collapse(["m.7.w"]) == [("m.7.w", ["m.7.w"])]
