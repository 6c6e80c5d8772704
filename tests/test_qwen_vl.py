# SPDX-License-Identifier: Apache-2.0
"""The Qwen-VL family against transformers: sizes, pixels, positions, layers, adapters."""

import functools
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_goldens import (
    GOLDENS,
    IMAGES,
    VARIANTS,
    arrays,
    cases,
    kept_rows,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from vlm2vec_jax.embedder import Embedder, load_source
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import ImageError
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.folders import locate
from vlm2vec_jax.models.loading import load_model
from vlm2vec_jax.models.qwen_vl import geometry
from vlm2vec_jax.models.qwen_vl.positions import RULES, positions
from vlm2vec_jax.models.qwen_vl.processor import pixel_values
from vlm2vec_jax.models.registry import BACKBONES, backbone
from vlm2vec_jax.nn.attention import Visibility, attend, attend_near
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.packing import RowShape, fill

QWEN = [name for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") if name in BACKBONES]
CHECKPOINTS = [(name, variant) for name in QWEN for variant in VARIANTS[name]]
COMPUTE = Compute()


@functools.cache
def model_of(name: str, variant: str):
    return load_model(GOLDENS / name / variant, dtype_of=lambda path: jnp.float32)


@functools.cache
def processor(name: str, variant: str, **options):
    model = model_of(name, variant)
    return model.backbone.processor(model.folder, model.config, **options)


def encode(name, variant, case, rule="mrope"):
    markers = "wrapped" if case["wrapped"] else "bare"
    made = processor(name, variant, image_positions=rule, image_markers=markers)
    return made.encode(MultimodalInput(case["text"], tuple(case["images"])))


def packed(name, variant, encoded):
    """Each in a row of its own."""
    model = model_of(name, variant)
    layout = model.backbone.visual_layout(model.config)
    shape = RowShape(max(map(len, encoded)), max(item.units for item in encoded), 1)
    batch = fill([[i] for i in range(len(encoded))], encoded, shape, layout)
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(("name", "variant"), CHECKPOINTS)
def test_the_vision_tower_layer_by_layer(name, variant):
    found, module = arrays(name, variant), model_of(name, variant).module
    for case in cases(name, variant):
        if case["name"] not in ("wide", "two"):
            continue
        encoded = encode(name, variant, case)
        batch = packed(name, variant, [encoded])
        start = f"{case['name']}/"
        golden = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        for layer, state in enumerate(module.vision.hidden_states(batch.visual, COMPUTE)):
            rows = np.asarray(state[0])[kept_rows(state.shape[1])]
            np.testing.assert_allclose(rows, golden[f"vision_layer_{layer}"], atol=1e-4, rtol=0)
        merged, deep = module.vision(batch.visual, COMPUTE)
        np.testing.assert_allclose(merged[0], golden["vision_merged"], atol=1e-4, rtol=0)
        for n, features in enumerate(deep):
            golden_features = golden[f"deepstack_{n}"]
            table = np.asarray(features[0])[encoded.feature_index[encoded.feature_index >= 0]]
            np.testing.assert_allclose(table, golden_features, atol=1e-4, rtol=0)


def test_resized_sizes():
    rules = json.loads((GOLDENS / "qwen2_vl" / "sizes.json").read_text())
    limits = {"stock": (28, 3136, 1003520)}
    tried = 0
    for key, rows in rules.items():
        unit, least, most = limits.get(key) or _limits_of(key)
        for height, width, new_height, new_width in rows:
            found = geometry.smart_resize(width, height, unit, least, most)
            if new_height is None:
                assert isinstance(found, str) and "200" in found
            elif isinstance(found, str):
                # transformers goes over its own limit here, since a side is one unit already
                assert "max_pixels" in found and new_height * new_width > most
                assert unit in (new_height, new_width)
            else:
                assert found == (new_width, new_height), (height, width)
            tried += 1
    assert tried > 100


def _limits_of(key: str) -> tuple[int, int, int]:
    said = json.loads((GOLDENS / "qwen2_vl" / "images.json").read_text())[key]
    return 2 * said["patch_size"], said["min_pixels"], said["max_pixels"]


def test_pixels_are_bit_equal(tmp_path):
    """Against `Qwen2VLImageProcessorPil`: every kind of picture, every stated setting."""
    said = json.loads((GOLDENS / "qwen2_vl" / "images.json").read_text())
    source = GOLDENS / "qwen2_vl" / VARIANTS["qwen2_vl"][1]
    for key, setting in said.items():
        folder = tmp_path / key
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["patch_size"] = setting["patch_size"]
        config["vision_config"].pop("spatial_patch_size", None)
        (folder / "config.json").write_text(json.dumps(config))
        stated = {k: v for k, v in setting.items() if k != "images"}
        (folder / "preprocessor_config.json").write_text(json.dumps(stated))
        family = backbone("qwen2_vl")
        read = family.read_config(folder)
        made = family.processor(folder, read)
        dropped = family.processor(folder, read, transparency="drop")
        for image, golden in setting["images"].items():
            item = MultimodalInput(images=(IMAGES / f"{image}.png",))
            visual = made.encode(item).visual
            values = pixel_values(visual, read)
            assert visual["grid"][0, 3:].tolist() == [n // 2 for n in golden["grid"][1:]], image
            assert hashlib.sha256(values.tobytes()).hexdigest() == golden["f32"], image
            if "alpha_dropped" in golden:
                values = pixel_values(dropped.encode(item).visual, read)
                assert hashlib.sha256(values.tobytes()).hexdigest() == (
                    golden["alpha_dropped"]["f32"]
                    if isinstance(golden["alpha_dropped"], dict)
                    else golden["alpha_dropped"]
                )


def test_the_device_normalises_as_the_host():
    from vlm2vec_jax.models.qwen_vl.config import ImageConfig
    from vlm2vec_jax.models.qwen_vl.vision import normalise

    images = ImageConfig()
    every = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    scaled = (every.astype(np.float64) * (1 / 255)).astype(np.float32)
    expected = (scaled - np.float32(images.mean)) / np.float32(images.std)
    found = jax.jit(lambda x: normalise(x, images))(every)
    np.testing.assert_array_equal(found, expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_windows_hold_every_unit_once(rows, columns, side):
    grid = geometry.Grid(rows, columns)
    order, place = geometry.window_order(grid, side)
    assert sorted(order.tolist()) == list(range(grid.units))
    row, column = np.divmod(order, columns)
    window = np.arange(grid.units) - place
    # Units of one window are neighbours, and windows are runs.
    for start in np.unique(window):
        inside = window == start
        assert len(np.unique(row[inside] // side)) == len(np.unique(column[inside] // side)) == 1
    assert len(np.unique(window)) == -(-rows // side) * -(-columns // side)
    assert place.max() < side * side


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)), max_size=3),
    st.integers(0, 3),
    st.sampled_from(RULES),
)
def test_positions_never_run_ahead(images, tail, rule):
    at, placed = 0, []
    for gap, rows, columns in images:
        at += gap
        placed.append((at, geometry.Grid(rows, columns)))
        at += rows * columns
    length = at + tail
    found = positions(length, placed, rule, [False] * len(placed))
    assert found.shape == (length, 3) and (found <= np.arange(length)[:, None]).all()
    if rule != "mrope":
        np.testing.assert_array_equal(found, np.arange(length)[:, None].repeat(3, 1))
    elif length:
        steps = sum(max(g.rows, g.columns) - g.units for _, g in placed)
        if tail:
            assert (found[-1] == length - 1 + steps).all()


@pytest.mark.parametrize("runs", [[5], [20, 1, 20, 3] * 9, [7] * 60])
def test_attention_near_and_in_blocks_is_attention(runs):
    from vlm2vec_jax.nn import exact

    segments = np.repeat(np.arange(len(runs)), runs)[None].astype(np.int32)
    rng = np.random.default_rng(len(runs))
    q, k, v = rng.standard_normal((3, 1, segments.size, 2, 4)).astype(np.float32)
    seen = Visibility(jnp.asarray(segments), jnp.asarray(segments))
    expected = attend(q, k, v, seen)
    near = attend_near(q, k, v, jnp.asarray(segments), 19)
    np.testing.assert_allclose(near, expected, atol=1e-6)
    causal = Visibility(seen.query_segments, seen.key_segments, True)
    for visibility in (seen, causal):
        blocks = exact._attend_in_blocks(q, k, v, visibility, 128)
        np.testing.assert_allclose(blocks, attend(q, k, v, visibility), atol=1e-6)


def small(name="qwen2_vl", variant=None, **options):
    return processor(name, variant or VARIANTS[name][1], **options)


def test_resolutions_markers_and_limits():
    picture = Image.new("RGB", (300, 40), "red")
    item = MultimodalInput("<|image_1|> x", (picture,))
    low = small(resolution="low")
    rows, columns = low.encode(item).visual["grid"][0, 3:].tolist()
    assert rows == columns and low.length(item)[1] == rows * columns
    assert small(resolution="high").length(item)[1] == low.length(item)[1]  # the folder's maximum
    roomy = small(resolution="high", max_pixels=10**7)
    assert roomy.encode(item).visual["grid"][0, 3:].tolist() == [48, 48]
    bare, wrapped = small(), small(image_markers="wrapped")
    assert wrapped.length(item)[0] == bare.length(item)[0] + 2
    # Limits asked for go before the folder's, and both are recorded.
    few = small(min_pixels=784, max_pixels=6 * 784)
    assert few.length(item)[1] <= 6 < bare.length(item)[1]
    assert few.settings["max_pixels"] == 4704
    named = small(pixel_limits="vlm2vec_train")
    assert (named.settings["min_pixels"], named.settings["max_pixels"]) == (200704, 1003520)
    assert small(pixel_limits="vlm2vec_v2").settings["min_pixels"] == 3136
    both = small(pixel_limits="vlm2vec_train", max_pixels=300000).settings
    assert (both["pixel_limits"], both["max_pixels"]) == ("vlm2vec_train", 300000)
    assert few.settings["folder_pixels"] == bare.settings["folder_pixels"]
    assert bare.settings["max_pixels"] == bare.settings["folder_pixels"][1]


def test_texts_are_cut_and_images_never():
    short = small(max_len=3)
    assert short.length(MultimodalInput("one two three four five six seven"))[0] == 3
    item = MultimodalInput("<|image_1|> one two three", (Image.new("RGB", (60, 60)),))
    assert short.length(item) == small().length(item)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels (5000) is more than max_pixels"),
        ({"min_pixels": 10, "max_pixels": 100}, "less than one unit of 28 x 28"),
        ({"image_positions": "diagonal"}, "image_positions must be one of mrope"),
        ({"max_len": 0}, "max_len must be a whole number"),
    ],
)
def test_unusable_settings_speak(options, said):
    with pytest.raises(UserError) as error:
        small(**options)
    assert said in str(error.value)


def test_unusable_images_and_texts_speak():
    with pytest.raises(ImageError, match="201 x 1 pixels: the longer side is more than 200 times"):
        small().length(MultimodalInput(images=(Image.new("RGB", (201, 1)),)))
    limits = {"min_pixels": 784, "max_pixels": 2 * 784}
    with pytest.raises(ImageError, match="max_pixels=1568 allows fewer"):
        small(**limits).length(MultimodalInput(images=(Image.new("RGB", (2800, 28)),)))
    with pytest.raises(UserError, match=r"images are named by <\|image_1\|>"):
        small().length(MultimodalInput("see <|image_pad|>"))
    with pytest.raises(UserError, match="2 image"):
        picture = Image.new("RGB", (30, 30))
        small().encode(MultimodalInput("<|image_1|>", (picture, picture)))


def test_bad_configurations_list_everything(tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(GOLDENS / "qwen2_vl" / "untied", folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"hidden_act": "relu", "num_hidden_layers": 0, "use_sliding_window": True}
    raw |= {"max_window_layers": 0, "rope_scaling": {"type": "yarn", "mrope_section": [1, 1, 1]}}
    raw["vision_config"]["hidden_act"] = "selu"
    (folder / "config.json").write_text(json.dumps(raw))
    shown = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**shown, "do_resize": False}))
    with pytest.raises(UserError) as error:
        backbone("qwen2_vl").read_config(folder)
    for word in (
        *("hidden_act", "num_hidden_layers", "yarn", "mrope_section", "'selu'"),
        *("preprocessor_config.json.do_resize",),
    ):
        assert word in str(error.value), word


def test_vlm2vecs_own_adapter_is_recognised(tmp_path, capsys):
    """Sequential positions then, said at start-up; another rule can be asked for."""
    source = GOLDENS / "qwen2_vl" / "adapters" / "dora_4"
    adapter = tmp_path / "VLM2Vec-Qwen2VL-2B"
    shutil.copytree(source, adapter)
    base = GOLDENS / "qwen2_vl" / "untied"
    found = Embedder.from_pretrained(base, adapter, dtype="float32")
    settings = found.processor.settings
    assert settings["image_positions"] == "sequential" and settings["transparency"] == "drop"
    assert "image_positions=sequential" in found.remarks[0]
    asked = Embedder.from_pretrained(base, adapter, dtype="float32", image_positions="mrope")
    assert asked.processor.settings["image_positions"] == "mrope"
    plain = Embedder.from_pretrained(base, source, dtype="float32")
    assert plain.processor.settings["image_positions"] == "mrope" and not plain.remarks


def test_adapters_are_strict(tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(GOLDENS / "qwen2_vl" / "adapters" / "dora_4", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 missing, 1 unexpected"):
        load_source(locate(GOLDENS / "qwen2_vl" / "untied", adapter), dtype="float32", mesh=None)


def test_qwen3_vl_embeddings_prompt(tmp_path):
    """The conversation of the model card, unasked for where the folder is that model."""
    folder = tmp_path / "Qwen3-VL-Embedding-2B"
    shutil.copytree(GOLDENS / "qwen3_vl" / "untied", folder)
    family = backbone("qwen3_vl")
    config = family.read_config(folder)
    made = family.processor(folder, config)
    item = MultimodalInput("<|image_1|>a dog", (Image.new("RGB", (64, 64)),))
    written = (
        "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_1|>"
        "<|vision_end|>a dog<|im_end|>\n<|im_start|>assistant\n"
    )
    asked = family.processor(folder, config, instruction=" Find it ")
    plain = family.processor(
        folder, config, template="none", min_pixels=4 * 1024, max_pixels=1800 * 1024
    )
    by_hand = plain.encode(MultimodalInput(written, item.images))
    found = asked.encode(item)
    np.testing.assert_array_equal(found.tokens, by_hand.tokens)
    np.testing.assert_array_equal(found.positions, by_hand.positions)
    assert found.units == 4 and asked.length(item) == (len(found), 4)
    assert made.settings["template"] == "embedding"
    assert made.settings["instruction"] == "Represent the user's input."
    assert made.settings["max_pixels"] == 1800 * 1024
    other = family.processor(GOLDENS / "qwen3_vl" / "untied", config)
    assert other.settings["template"] == "none"
    assert other.settings["max_pixels"] == config.images.max_pixels
