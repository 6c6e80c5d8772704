# SPDX-License-Identifier: Apache-2.0
"""Reading `config.json`: every field counts, nothing is assumed, unknown values are named."""

import json
import math

import numpy as np
import pytest

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.phi3v.config import ClipConfig, from_dicts, from_hf
from vlm2vec_jax.models.registry import backbone_of


@pytest.fixture
def raw(goldens):
    return json.loads((goldens / "tiny_gqa/config.json").read_text())


@pytest.fixture
def clip(goldens):
    return json.loads((goldens / "tiny_gqa/clip_config.json").read_text())


def test_the_real_one(goldens):
    config = from_hf(goldens / "phi-3.5-vision")
    assert (config.hidden_size, config.num_layers, config.mlp_size) == (3072, 32, 8192)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (32, 32, 96)
    assert config.clip == ClipConfig() and config.crop_size == 336
    assert (config.merged_side, config.tokens_per_crop, config.clip_layers_used) == (12, 144, 23)
    assert (config.vocab_size, config.pad_token_id) == (32064, 32000)
    assert len(config.rope.short_factor) == len(config.rope.long_factor) == 48
    expected = math.sqrt(1 + math.log(131072 / 4096) / math.log(4096))
    assert config.rope.attention_scale == pytest.approx(expected)


def test_fewer_key_heads_and_a_small_tower(goldens):
    config = from_hf(goldens / "tiny_gqa")
    assert (config.num_heads, config.num_kv_heads) == (4, 2)
    assert (config.clip.hidden_size, config.clip.num_hidden_layers) == (24, 2)
    assert config.clip_layers_used == 1
    assert config.hd_order == "sub_glb"


def test_vision_config_inside_wins_over_the_side_file(goldens, tmp_path, raw, clip):
    (tmp_path / "clip_config.json").write_text(json.dumps(clip))
    small = clip | {"image_size": 56, "num_hidden_layers": 5}
    raw["img_processor"]["num_img_tokens"] = 4
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vision_config": small}))
    config = from_hf(tmp_path)
    assert (config.crop_size, config.tokens_per_crop, config.clip_layers_used) == (56, 4, 4)


@pytest.mark.parametrize("layer_idx, used", [(-2, 1), (-1, 2), (1, 1), (2, 2)])
def test_layer_idx(raw, clip, layer_idx, used):
    raw["img_processor"]["layer_idx"] = layer_idx
    assert from_dicts(raw, clip).clip_layers_used == used


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "phi4"}, "model_type is 'phi4'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"num_attention_heads": 5}, "not divisible by 5"),
        ({"num_key_value_heads": 3}, "not divisible by 3"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn'"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 6}},
         "rope_scaling.short_factor must be 6 positive numbers"),
        ({"pad_token_id": 10**6}, "pad_token_id is 1000000"),
        ({"hidden_size": None}, "hidden_size must be a positive number, not None"),
        ({"embd_layer": {"hd_transform_order": "glb"}}, "hd_transform_order is 'glb'"),
        ({"img_processor": {"name": "clip_vision_model", "layer_idx": -9, "num_img_tokens": 144}},
         "layer_idx is -9"),
        ({"img_processor": {"name": "siglip"}}, "img_processor.name is 'siglip'"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)  # fmt: skip
def test_unknown_values_are_named(raw, clip, change, named):
    for key, value in change.items():
        raw[key] = raw[key] | value if key == "embd_layer" else value
    with pytest.raises(UserError, match="does not describe a model") as error:
        from_dicts(raw, clip)
    assert named in str(error.value)


def test_all_problems_at_once(raw, clip):
    raw |= {"hidden_act": "relu", "model_type": "x", "vocab_size": -1}
    with pytest.raises(UserError) as error:
        from_dicts(raw, clip)
    assert all(word in str(error.value) for word in ("hidden_act", "model_type", "vocab_size"))


def test_an_undescribed_tower_is_refused(raw):
    raw["img_processor"]["model_name"] = "openai/clip-vit-base-patch32"
    with pytest.raises(UserError, match="its sizes are not known"):
        from_dicts(raw)


def test_plain_rope_and_the_default_order(raw, clip):
    del raw["embd_layer"]["hd_transform_order"]
    config = from_dicts(raw | {"rope_scaling": None}, clip)
    assert config.rope.attention_scale == 1.0
    assert set(config.rope.short_factor) == set(config.rope.long_factor) == {1.0}
    assert config.hd_order == "glb_sub"  # HF: Phi3ImageEmbedding's default


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match="it has no config.json"):
        backbone_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        backbone_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama' is not known; known: .*phi3_v"):
        backbone_of(tmp_path)


def test_parameter_shapes_follow_the_configuration(raw, clip):
    from flax import nnx

    from vlm2vec_jax.models.loading import flatten
    from vlm2vec_jax.models.phi3v.model import Phi3V

    for change in ({"num_hidden_layers": 1}, {"num_key_value_heads": 4}, {"vocab_size": 700}):
        config = from_dicts(raw | change, clip)
        flat = flatten(nnx.eval_shape(lambda c=config: Phi3V(c, rngs=nnx.Rngs(0))))
        heads = config.num_heads + 2 * config.num_kv_heads
        assert flat["decoder/last/attn/qkv/kernel"].shape == (1, 48, heads * config.head_size)
        assert ("decoder/layers/attn/qkv/kernel" in flat) == (config.num_layers > 1)
        assert flat["embed/table"].shape == (config.vocab_size, 48)
        assert np.prod(flat["vision/projector/fc1/kernel"].shape) == 4 * 24 * 48
