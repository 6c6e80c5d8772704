# SPDX-License-Identifier: Apache-2.0
"""Exports for sentence-transformers: what is written, what is refused; the library (torch)."""

import json
import shutil

import numpy as np
import pytest
from backbone_goldens import GOLDENS, VARIANTS, arrays, cases

from vlm2vec_jax import export
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.embedding.vectors import quantize_embeddings
from vlm2vec_jax.flags import call
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.qwen_vl.backbone import SENTENCE_TRANSFORMERS
from vlm2vec_jax.record import make_record

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WIDE = [256, 768]
"""Pixel limits of the goldens."""


def model(tmp_path, backbone, variant=0, **recorded):
    """A golden model with a record of such processor options."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / backbone / VARIANTS[backbone][variant], folder)
    record = make_record(
        backbone=backbone, base=folder, processor=recorded, temperature=None, adapter=None
    )
    record["prompts"] = {"target": "a "}
    (folder / "vlm2vec.json").write_text(json.dumps(record))
    return folder


def run(folder, output):
    argv = ["export", "--checkpoint", folder, "--format", "sentence-transformers"]
    return call(export.main, export.define, [*map(str, argv), "--output", str(output)])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("backbone", QWEN)
def test_what_is_written(backbone, tmp_path, capsys):
    options = {"min_pixels": 300, "max_pixels": 700, "max_len": 9, "image_markers": "wrapped"}
    out = tmp_path / "out"
    assert run(model(tmp_path, backbone, **options), out) == 0
    said = capsys.readouterr().out
    assert "cut at 9 tokens" in said and '{"text": {"max_length": 9}}' in said
    images = read(out / "preprocessor_config.json")
    assert images["size"] == {"shortest_edge": 300, "longest_edge": 700}
    assert (images["min_pixels"], images["max_pixels"]) == (300, 700)
    before = read(GOLDENS / backbone / VARIANTS[backbone][0] / "preprocessor_config.json")
    for name in before.keys() - {"size", "min_pixels", "max_pixels"}:
        assert images[name] == before[name]
    transformer = read(out / "sentence_bert_config.json")
    assert transformer["processor_kwargs"] == {"use_fast": False}
    assert set(transformer["modality_config"]) == {"text", "image", "message"}
    assert read(out / "config_sentence_transformers.json")["prompts"]["document"] == "a "
    template = (out / "chat_template.jinja").read_text()
    assert '"<|vision_start|><|image_pad|><|vision_end|>" * seen.images' in template


def test_bare_markers_and_limits_of_the_folder(tmp_path, capsys):
    folder = model(tmp_path, "qwen2_vl")
    # As newer saves have it: one file, the image processor's part one level down.
    (folder / "preprocessor_config.json").rename(folder / "processor_config.json")
    inner = read(folder / "processor_config.json")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner, "x": 1}))
    out = tmp_path / "out"
    assert run(folder, out) == 0
    assert "cut at" not in capsys.readouterr().out
    assert '"<|image_pad|>" * seen.images' in (out / "chat_template.jinja").read_text()
    held = read(out / "processor_config.json")
    assert held["x"] == 1 and not (out / "preprocessor_config.json").exists()
    assert [*held["image_processor"]["size"].values()] == WIDE
    assert held["image_processor"]["patch_size"] == inner["patch_size"]


def test_a_model_without_the_image_processors_file(tmp_path, capsys):
    folder = model(tmp_path, "qwen2_vl")
    (folder / "preprocessor_config.json").unlink()
    assert run(folder, tmp_path / "out") == 2
    assert "has no preprocessor_config.json" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing half-written


REFUSED = {
    "image_positions": ("sequential", "by_vision_start"),
    "resolution": ("high", "low"),
    "transparency": ("drop",),
}


def test_every_requirement_has_its_refusal():
    assert set(REFUSED) == set(SENTENCE_TRANSFORMERS.requires)


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in REFUSED.items() for v in vs])
def test_what_would_be_read_otherwise_is_refused(name, value, tmp_path, capsys):
    folder = model(tmp_path, "qwen3_vl", **{name: value, "max_pixels": 10**6})
    assert run(folder, tmp_path / "out") == 2
    said = capsys.readouterr().err
    good, there = SENTENCE_TRANSFORMERS.requires[name]
    assert f"{name}={value}: {there} ({name}={good})" in said and "--format hf" in said
    assert "1 problem)" in said and not (tmp_path / "out").exists()


def test_all_refusals_at_once(tmp_path, capsys):
    folder = model(tmp_path, "qwen2_vl", image_positions="sequential", transparency="drop")
    assert run(folder, tmp_path / "out") == 2
    assert "2 problems)" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_fewer_bits_are_those_of_the_library(precision):
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    rows = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ranges = np.stack([rows.min(axis=0), rows.max(axis=0)])
    wanted = quantization.quantize_embeddings(rows[:50], precision, ranges=ranges)
    found = quantize_embeddings(rows[:50], precision, ranges)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)
    if precision.endswith("int8"):  # ranges from the data itself
        wanted = quantization.quantize_embeddings(rows, precision)
        np.testing.assert_array_equal(quantize_embeddings(rows, precision), wanted)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("markers", ["bare", "wrapped"])
@pytest.mark.parametrize("backbone, variant", [(b, v) for b in QWEN for v in (0, 1)])
def test_embeddings_in_the_library(backbone, variant, markers, tmp_path):
    """Texts and images within 1e-5, since the folder asks for Pillow's resize, which is ours."""
    pytest.importorskip("torchvision", reason="that library's processors of videos need it")
    library = pytest.importorskip("sentence_transformers")
    import torch
    from PIL import Image

    out = tmp_path / "out"
    assert run(model(tmp_path, backbone, variant, image_markers=markers), out) == 0
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    loaded = library.SentenceTransformer(str(out), device="cpu", model_kwargs=kwargs)
    golden = arrays(backbone, VARIANTS[backbone][variant])
    shown, largest = [], 0.0
    for case in cases(backbone, VARIANTS[backbone][variant]):
        text = case["text"]
        if case["images"]:
            # Its messages have the image first, and one image each.
            fits = text.startswith("<|image_1|>") and len(case["images"]) == 1
            if not fits or case["wrapped"] != (markers == "wrapped"):
                continue
            image = Image.open(case["images"][0])
            found = loaded.encode({"image": image, "text": text.removeprefix("<|image_1|>")})
            shown.append(case["name"])
        else:
            found = loaded.encode(text)
        wanted = golden[f"{case['name']}/embedding/mrope"]
        largest = max(largest, float(np.abs(found - wanted).max()))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=case["name"])
    print(f"{backbone} {variant} {markers}: {shown} {largest:.1e}")
    assert len(shown) >= 2


def test_the_conversation_of_qwen3_vl_embedding_is_written(tmp_path):
    options = {"template": "embedding", "instruction": 'Say "é" {x}.'}
    folder = model(tmp_path, "qwen3_vl", **options)
    out = tmp_path / "out"
    assert run(folder, out) == 0
    template = (out / "chat_template.jinja").read_text()
    assert (
        '{{- "<|im_start|>system\\nSay \\"\\u00e9\\" {x}.<|im_end|>\\n<|im_start|>user' in template
    )
    # By hand what jinja would make of it: the very text that we tokenise.
    said = [
        json.loads(line[4:-4]) for line in template.splitlines() if line.startswith('{{- "<|im')
    ]
    ours = Embedder.from_pretrained(folder, dtype="float32").processor
    assert f"{said[0]}text{said[1]}" == ours._templated("text")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_conversation_in_the_library(tmp_path):
    pytest.importorskip("torchvision", reason="that library's processors of videos need it")
    library = pytest.importorskip("sentence_transformers")
    import torch
    from PIL import Image

    out = tmp_path / "out"
    options = {"template": "embedding", "instruction": "Find the picture"}
    assert run(model(tmp_path, "qwen3_vl", **options), out) == 0
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    loaded = library.SentenceTransformer(str(out), device="cpu", model_kwargs=kwargs)
    ours = Embedder.from_pretrained(out, dtype="float32")
    assert ours.processor.settings["template"] == "embedding"
    found = loaded.encode(["a", "some text"])
    np.testing.assert_allclose(found, ours.encode(["a", "some text"]), rtol=0, atol=1e-5)
    by_name = {case["name"]: case["images"][0] for case in cases("qwen3_vl", "tied")[2:]}
    pairs = [("What is it?", by_name["small"]), (" A", by_name["bare"])]
    found = loaded.encode([{"image": Image.open(i), "text": t} for t, i in pairs])
    inputs = [MultimodalInput(f"<|image_1|>{t}", (i,)) for t, i in pairs]
    np.testing.assert_allclose(found, ours.encode(inputs), rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_limits_lengths_and_batches_in_the_library(tmp_path):
    """Recorded options have the effect there that they have here; rows of a batch are padded."""
    pytest.importorskip("torchvision", reason="that library's processors of videos need it")
    library = pytest.importorskip("sentence_transformers")
    import torch
    from PIL import Image

    options = {"min_pixels": 320, "max_pixels": 448, "max_len": 9}
    out = tmp_path / "out"
    assert run(model(tmp_path, "qwen2_vl", **options), out) == 0
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    loaded = library.SentenceTransformer(str(out), device="cpu", model_kwargs=kwargs)
    ours = Embedder.from_pretrained(out, dtype="float32")
    texts = ["a", "a text of more tokens than nine, so that it is cut"]
    found = loaded.encode(texts, processing_kwargs={"text": {"max_length": 9}})
    np.testing.assert_allclose(found, ours.encode(texts), rtol=0, atol=1e-5)
    by_name = {case["name"]: case["images"][0] for case in cases("qwen2_vl", "tied")[2:]}
    pairs = [(" What is it?", by_name["small"]), (" A", by_name["bare"])]
    found = loaded.encode([{"image": Image.open(i), "text": t} for t, i in pairs])
    inputs = [MultimodalInput(f"<|image_1|>{t}", (i,)) for t, i in pairs]
    np.testing.assert_allclose(found, ours.encode(inputs), rtol=0, atol=1e-5)
    wide = Embedder.from_pretrained(out, dtype="float32", min_pixels=WIDE[0], max_pixels=WIDE[1])
    assert np.abs(wide.encode(inputs) - found).max() > 1e-3
