# SPDX-License-Identifier: Apache-2.0
"""The small untrained model: complete as an HF folder, named and shaped as the real one."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.folders import locate
from vlm2vec_jax.models.loading import load_model, open_processor
from vlm2vec_jax.models.phi3v import mini
from vlm2vec_jax.models.qwen2_vl import mini as mini_qwen
from vlm2vec_jax.models.shared.mini import training_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini_model") / "data"
    names = ["ImageNet-1K", "OK-VQA", "MSCOCO_i2t", "MSCOCO_t2i", "WebQA", "MSCOCO"]
    write_mini_mmeb(root, 0, 0.03, subsets=names)
    return root


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("mini_model") / "model"
    mini.write_mini_model(data, output, seed=0)
    return output


def _tensors(path):
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _scheme(names):
    """Names with the layer numbers taken out."""
    return {re.sub(r"layers\.\d+", "layers.N", name) for name in names}


def test_names_are_those_of_the_reference(folder, goldens):
    ours, metadata = _tensors(folder / "model.safetensors")
    golden, _ = _tensors(goldens / "tiny_mha" / "model.safetensors")
    assert _scheme(ours) == _scheme(golden)
    assert metadata == {"format": "pt"}
    assert all(t.dtype == np.float32 and np.isfinite(t).all() for t in ours.values())
    numbers = {int(k) for n in ours for k in re.findall(r"^model\.layers\.(\d+)", n)}
    assert numbers == set(range(mini.MiniSizes().layers))


def test_shapes_follow_the_golden_when_sizes_do(data, goldens):
    """With the sizes of tiny_gqa (fewer key/value heads, 336 px) every shape is that golden's."""
    config = json.loads((goldens / "tiny_gqa" / "config.json").read_text())
    clip = json.loads((goldens / "tiny_gqa" / "clip_config.json").read_text())
    sizes = mini.MiniSizes(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        vision_size=clip["hidden_size"],
        vision_intermediate=clip["intermediate_size"],
        vision_layers=clip["num_hidden_layers"],
        vision_heads=clip["num_attention_heads"],
        image_size=336,
    )
    sizes.check()
    golden, _ = _tensors(goldens / "tiny_gqa" / "model.safetensors")
    ours = mini.random_weights(sizes, config["vocab_size"], 0)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in golden.items()}
    assert sizes.image_tokens == config["img_processor"]["num_img_tokens"]


def test_config_has_every_field_of_the_reference(folder, goldens):
    config = json.loads((folder / "config.json").read_text())
    golden = json.loads((goldens / "tiny_mha" / "config.json").read_text())
    assert set(golden) - {"transformers_version"} <= set(config)
    assert config["embd_layer"] == golden["embd_layer"]
    sizes, vision = mini.MiniSizes(), config["vision_config"]
    half = sizes.hidden_size // sizes.heads // 2
    assert len(config["rope_scaling"]["short_factor"]) == half
    assert len(config["rope_scaling"]["long_factor"]) == half
    assert vision["hidden_size"] == config["img_processor"]["image_dim_out"]
    assert config["img_processor"]["num_img_tokens"] == 4
    clip = json.loads((goldens / "tiny_mha" / "clip_config.json").read_text())
    needed = set(clip) - {"dropout", "initializer_factor", "initializer_range", "projection_dim"}
    assert needed <= set(vision)
    for name in ("preprocessor_config.json", "generation_config.json", "special_tokens_map.json"):
        ours = json.loads((folder / name).read_text())
        theirs = json.loads((goldens / "tiny_mha" / name).read_text())
        assert set(ours) == set(theirs) - {"transformers_version"}, name


def test_start_is_sensible(folder):
    ours, _ = _tensors(folder / "model.safetensors")
    for name, tensor in ours.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            assert 0.005 < tensor.std() < 0.5 and abs(tensor.mean()) < 0.1, name


def test_tokenizer_is_built_as_the_reference_s(folder, goldens):
    ours = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    golden = json.loads((goldens / "tiny_mha" / "tokenizer.json").read_text(encoding="utf-8"))
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "version"):
        assert ours[key] == golden[key], key
    model = {k: v for k, v in ours["model"].items() if k not in ("vocab", "merges")}
    assert model == {k: v for k, v in golden["model"].items() if k not in ("vocab", "merges")}
    vocab, old = ours["model"]["vocab"], golden["model"]["vocab"]
    assert [k for k, v in vocab.items() if v < 259] == [k for k, v in old.items() if v < 259]
    assert sorted(vocab.values()) == list(range(len(vocab)))
    shift = len(vocab) - len(old)
    for token, other in zip(ours["added_tokens"], golden["added_tokens"], strict=True):
        moved = other["id"] + (shift if other["id"] > 2 else 0)
        assert token == {**other, "id": moved}
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == len(vocab)
    assert config["vocab_size"] > max(token["id"] for token in ours["added_tokens"])


def test_texts_survive_tokenization_without_unknowns(folder, data):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = training_texts(data)
    assert len(texts) > 100
    texts += ["naïve 図 \t text never seen: zebra!", "  two  spaces", "x"]
    for text in set(texts):
        encoded = tokenizer.encode(text)
        assert encoded.ids[0] == 1 and 0 not in encoded.ids, text
        assert tokenizer.decode(encoded.ids[1:]) == text
    assert tokenizer.encode("red circle").tokens == ["<s>", "\u2581red", "\u2581circle"]


def test_no_piece_reaches_over_a_space(folder):
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    for piece in list(vocab)[259:]:
        assert "\u2581" not in piece[1:] and (piece == "\n" or "\n" not in piece), piece


def test_same_settings_same_bytes(data, folder, tmp_path):
    mini.write_mini_model(data, tmp_path / "again", seed=0)
    mini.write_mini_model(data, tmp_path / "other", seed=1)
    names = sorted(p.name for p in folder.iterdir())
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()


def test_other_models_are_not_overwritten(data, folder, tmp_path, capsys):
    flags = ["--data", str(data), "--output", str(tmp_path / "m"), "--layers", "2"]
    assert mini.main(flags) == 0
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 2
    assert mini.main(flags) == 0
    assert mini.main([*flags[:-1], "3"]) == 2
    assert "--force" in capsys.readouterr().err
    assert mini.main([*flags[:-1], "3", "--force"]) == 0


def test_sizes_that_do_not_fit_are_listed_together(data, tmp_path):
    sizes = dataclasses.replace(mini.MiniSizes(), heads=5, vision_heads=3, image_size=60)
    with pytest.raises(UserError, match="4 problems"):
        mini.write_mini_model(data, tmp_path / "m", sizes=sizes)
    assert not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="no <Subset>"):
        mini.write_mini_model(tmp_path, tmp_path / "m")


def test_a_small_qwen2_vl_is_whole_and_no_phi3_v(data, folder, goldens, tmp_path, capsys):
    output = tmp_path / "qwen"
    flags = ["--data", str(data), "--output", str(output)]
    assert mini_qwen.main(flags) == 0
    ours, _ = _tensors(output / "model.safetensors")
    manifest = json.loads((output / "mini_model.json").read_text())
    assert manifest["parameters"] == sum(tensor.size for tensor in ours.values())
    words = f"untrained qwen2_vl with {manifest['parameters']:,} parameters"
    assert words in capsys.readouterr().out
    golden, _ = _tensors(goldens / "qwen2_vl" / "tied" / "model.safetensors")
    blocks = {re.sub(r"\.\d+\.", ".N.", name) for name in golden}
    assert {re.sub(r"\.\d+\.", ".N.", name) for name in ours} == blocks
    for name, tensor in ours.items():
        kind = (tensor == 1 if name.endswith("weight") else tensor == 0).all()
        assert kind if tensor.ndim == 1 else 0.005 < tensor.std() < 0.5, name
    # Strict: every name and shape that the configuration asks for.
    model = load_model(output, dtype_of=lambda path: np.float32)
    processor = open_processor(model, locate(output), {})
    picture = Image.new("RGB", (56, 56), "red")
    encoded = processor.encode(MultimodalInput("<|image_1|> What is it?", (picture,)))
    assert encoded.units == 16 == np.count_nonzero(encoded.feature_index >= 0)
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    for text in {*training_texts(data), "naïve 図 \t never seen: zebra!", "  two  spaces"}:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    before = (output / "model.safetensors").read_bytes()
    assert mini_qwen.main(flags) == 0 and (output / "model.safetensors").read_bytes() == before
    for other in ([*flags, "--seed", "1"], [*flags[:-1], str(folder)]):
        assert mini_qwen.main(other) == 2
        assert "--force" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["model_type"] == "phi3_v"
