# SPDX-License-Identifier: Apache-2.0
"""Processor options: who has a use for which, what is recorded, what is recognised."""

import dataclasses
import json

import numpy as np
import pytest

from vlm2vec_jax import options
from vlm2vec_jax.config import Config, check, processor_options
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.models.folders import ModelSource, of_the_reference
from vlm2vec_jax.models.registry import BACKBONES, backbone, backbone_of
from vlm2vec_jax.packing import RowShape, fill
from vlm2vec_jax.training.aot import abstract_group
from vlm2vec_jax.training.setup import new_adapter


def test_what_is_given_goes_before_what_is_recorded():
    known = ("max_len", "image_positions", "resolution")
    given = {"max_len": 7, "image_positions": None, "num_crops": None}
    recorded = {"max_len": 9, "image_positions": "sequential", "type": "x"}
    assert options.choose("qwen", known, given, recorded) == {
        "max_len": 7,
        "image_positions": "sequential",
        "resolution": None,
    }


def test_named_limits_replace_recorded_numbers_and_not_given_ones():
    known = ("pixel_limits", "min_pixels", "max_pixels")
    recorded = {"pixel_limits": "vlm2vec_train", "min_pixels": 1, "max_pixels": 2}
    assert options.choose("qwen", known, {}, recorded) == recorded
    assert options.choose("qwen", known, {"pixel_limits": "folder", "max_pixels": 9}, recorded) == {
        "pixel_limits": "folder",
        "min_pixels": None,
        "max_pixels": 9,
    }


def test_options_without_use_and_unknown_words_are_refused_together():
    with pytest.raises(UserError) as error:
        options.choose(
            "phi3_v", ("num_crops", "resolution"), {"max_pixels": 5, "resolution": "huge"}
        )
    said = str(error.value)
    assert "max_pixels=5: phi3_v has no such option; it has num_crops" in said
    assert "resolution must be one of native, high, mid, low, not 'huge'" in said


def test_configuration_fields_become_options():
    config = Config()
    # The default number of crops is no choice where nothing is cut, but what was set is one.
    assert processor_options(config, ("max_len", "min_pixels")) == {
        "max_len": 256,
        "min_pixels": None,
    }
    config.data.num_crops, config.data.max_len = 3, 0
    assert processor_options(config, ("max_len",)) == {"num_crops": 3, "max_len": None}
    config.model.image_positions = "sideways"
    config.data.min_pixels, config.data.max_pixels = 9, 4
    with pytest.raises(UserError) as error:
        check(config)
    said = str(error.value)
    assert "image_positions must be one of mrope, by_vision_start, sequential" in said
    assert "data.min_pixels (9) is more than data.max_pixels (4)" in said


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_backbone_says_what_it_must(name):
    found = backbone(name)
    assert found.name == name
    assert set(found.options) <= set(options.OPTIONS) and "max_len" in found.options
    assert set(found.reference_options) <= {"v1", "v2"}
    for chosen in found.reference_options.values():
        assert set(chosen) <= set(found.options)
        assert options.choose(name, found.options, chosen).items() >= chosen.items()
    config = Config()
    config.adapter.targets = "auto"
    assert new_adapter(config, found).targets == found.targets


def test_an_unknown_model_type_lists_those_there_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama"}))
    with pytest.raises(UserError) as error:
        backbone_of(tmp_path)
    assert all(name in str(error.value) for name in BACKBONES)
    assert "'mllama'" in str(error.value) and "docs/porting-a-backbone.md" in str(error.value)


def test_the_authors_own_checkpoints_are_recognised(tmp_path):
    def source(folder, named="some/path", record=None):
        folder.mkdir(parents=True, exist_ok=True)
        return ModelSource(str(named), tmp_path, adapter=folder, record=record)

    plain = source(tmp_path / "vlm2vec_jax" / "runs" / "adapter")
    assert not of_the_reference(plain)
    for name, generation in (
        ("VLM2Vec-Qwen2VL-2B", "v1"),
        ("models--VLM2Vec--VLM2Vec-V2.0/snapshots/abc", "v2"),
    ):
        found = source(tmp_path / name)
        assert of_the_reference(found) == generation
        assert not of_the_reference(dataclasses.replace(found, record={"processor": {}}))
    (tmp_path / "vlm2vec_jax/runs/adapter/README.md").write_text("# VLM2Vec\nfine-tuned ...")
    assert of_the_reference(plain) == "v1"
    (tmp_path / "vlm2vec_jax/runs/adapter/README.md").write_text("text\n# VLM2Vec-V2 here\n")
    assert of_the_reference(plain) == "v2"
    (tmp_path / "vlm2vec_jax/runs/adapter/README.md").write_text("# VLM2Vec\nNews: VLM2Vec-V2")
    assert of_the_reference(plain) == "v1"


def test_positions_of_several_axes_are_packed_and_announced():
    layout = VisualLayout(0, 1, {"patches": ((4, 3), "uint8")}, position_axes=3)

    def item(count, units):
        index = np.full(count, -1, np.int32)
        index[1 : 1 + units] = range(units)
        positions = np.arange(3 * count, dtype=np.int32).reshape(count, 3)
        patches = {"patches": np.full((units, 4, 3), count, np.uint8)}
        return EncodedInput(np.ones(count, np.int32), index, positions, patches, units)

    items = [item(5, 2), item(6, 3)]
    shape = RowShape(12, 6, 2)
    batch = fill([[0, 1]], items, shape, layout, num_rows=2)
    assert batch.positions.shape == (2, 12, 3)
    np.testing.assert_array_equal(batch.positions[0, 5:11], items[1].positions)
    assert not batch.positions[0, 11:].any() and not batch.positions[1].any()
    # Features of the second sequence come behind those of the first.
    np.testing.assert_array_equal(batch.feature_index[0, 6:9], [2, 3, 4])
    with pytest.raises(ValueError, match="3 position axes"):
        items[0].positions = items[0].positions[:, 0]
        fill([[0]], items, shape, layout)


def test_the_abstract_batch_is_the_packed_batch():
    import jax

    from vlm2vec_jax.packing import ChunkShape
    from vlm2vec_jax.parallel.mesh import make_mesh

    layout = VisualLayout(0, 1, {"patches": ((4, 3), "uint8")}, position_axes=3)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    group = abstract_group(ChunkShape(RowShape(12, 6, 2), 2, 1), layout, mesh)
    made = fill([], [], RowShape(12, 6, 2), layout, num_rows=2)
    for abstract, leaf in zip(jax.tree.leaves(group.batch), jax.tree.leaves(made), strict=True):
        assert abstract.shape == (1, *leaf.shape) and abstract.dtype == leaf.dtype
