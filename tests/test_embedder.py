# SPDX-License-Identifier: Apache-2.0
"""The Embedder: what it takes and refuses; an embedding depends on its own input alone."""

import functools
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from small_models import PROMPT, label, picture, write_model, write_train

from vlm2vec_jax import MultimodalInput, embedder
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import BadInputs
from vlm2vec_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("embedder")
    write_train(root / "data", count=12)
    write_model(root / "data", root / "base")
    picture(3, (150, 70)).save(root / "wide.png")
    picture(4, (50, 190)).save(root / "tall.png")
    return root


@pytest.fixture(scope="module")
def model(folder) -> Embedder:
    return Embedder.from_pretrained(folder / "base", dtype="float32")


def pool(folder: Path) -> list:
    """Inputs of every kind and of many lengths."""
    wide, tall = folder / "wide.png", folder / "tall.png"
    return [
        label(1),
        "a text that goes on for some time, " * 12,
        {"text": label(3)},
        MultimodalInput("x"),
        picture(1),
        wide,
        {"images": [tall]},
        {"text": PROMPT, "images": [picture(2, (120, 110))]},
        MultimodalInput(PROMPT, (str(wide),)),
        {"text": "from <|image_1|> to <|image_2|> it is", "images": [str(wide), picture(7)]},
        {"text": "<|image_2|> after <|image_1|>", "images": [picture(8), wide]},
    ]


@pytest.fixture(scope="module")
def alone(folder, model) -> np.ndarray:
    """Every input of the pool embedded by itself: what all else is compared with."""
    return np.concatenate([model.encode([item]) for item in pool(folder)])


def test_embeddings_are_unit_vectors_and_all_different(alone):
    assert alone.dtype == np.float32 and alone.shape == (11, 32)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    similar = alone @ alone.T - np.eye(len(alone))
    assert similar.max() < 0.9999


def check_selection(folder, model, alone, order, batch_tokens):
    items = pool(folder)
    found = model.encode([items[k] for k in order], batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, alone[list(order)], **TOLERANCE)


ORDERS = st.lists(st.integers(0, 10), min_size=1, max_size=30)
"""Any selection in any order, duplicates included."""


@hypothesis.settings(max_examples=5)
@hypothesis.given(order=ORDERS, batch_tokens=st.sampled_from([None, 256, 1024]))
def test_an_embedding_depends_on_its_input_alone(folder, model, alone, order, batch_tokens):
    check_selection(folder, model, alone, order, batch_tokens)


@pytest.mark.slow
@hypothesis.settings(max_examples=25)
@hypothesis.given(order=ORDERS, batch_tokens=st.sampled_from([None, 1, 128, 300, 700, 1500]))
def test_an_embedding_depends_on_its_input_alone_at_length(
    folder, model, alone, order, batch_tokens
):
    check_selection(folder, model, alone, order, batch_tokens)


@functools.cache
def spread(base: Path, shape: tuple[int, int, int]) -> Embedder:
    return Embedder.from_pretrained(base, dtype="float32", mesh=make_mesh(*shape))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((2, 4, 1), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_any_mesh_gives_the_same(folder, alone, shape):
    assert len(jax.devices()) == 8
    found = spread(folder / "base", shape).encode(pool(folder))
    np.testing.assert_allclose(found, alone, **TOLERANCE)
    if shape == (2, 4, 1):  # fewer inputs than devices, in chunks of less than a row
        few = spread(folder / "base", shape).encode(pool(folder)[:3], batch_tokens=64)
        np.testing.assert_allclose(few, alone[:3], **TOLERANCE)


def test_the_order_is_restored_with_duplicates(folder, model, alone):
    order = [3, 0, 0, 10, 3, 7, 7, 1, 10]
    check_selection(folder, model, alone, order, None)


def test_one_picture_handed_over_in_every_way(folder, model):
    from PIL import Image

    path = folder / "wide.png"
    marker = "<|image_1|>"
    with Image.open(path) as image:
        ways = [path, image, {"images": [path]}, {"image": str(path)}, {"images": str(path)},
                {"text": marker, "images": [path]}, MultimodalInput(images=(path,)),
                {"text": None, "images": (image,)}]  # fmt: skip
        found = model.encode(ways)
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), **TOLERANCE)


def test_images_of_one_input_are_told_apart(folder, model):
    first, second = picture(1), picture(2)
    text = "<|image_1|> then <|image_2|>"
    found = model.encode(
        [
            {"text": text, "images": [first, second]},
            {"text": text, "images": [second, first]},
            {"text": "<|image_2|> then <|image_1|>", "images": [second, first]},
        ]
    )
    assert np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_allclose(found[0], found[2], **TOLERANCE)


def test_no_inputs(model):
    for nothing in ([], (), iter([])):
        found = model.encode(nothing)
        assert found.shape == (0, 32) and found.dtype == np.float32


@pytest.mark.parametrize("value", ["a text", {"text": "x"}, b"bytes", 3, None])
def test_a_single_input_must_stand_in_a_list(model, value):
    with pytest.raises(UserError, match="list"):
        model.encode(value)


def test_progress_counts_every_input_once(model):
    counts = []
    model.encode([label(k) for k in range(40)], batch_tokens=128, progress=counts.append)
    assert sum(counts) == 40 and len(counts) > 1 and min(counts) > 0


def test_bad_inputs_are_all_listed_by_number(folder, model):
    torn = folder / "torn.png"
    torn.write_bytes((folder / "wide.png").read_bytes()[:-200])
    with pytest.raises(BadInputs) as found:
        model.encode(["fine", 3, {"txt": "a"}, {}, "", {"text": "<|image_1|>"}])
    assert list(found.value.problems) == [1, 2, 3, 4, 5]
    assert "(5 problems)" in str(found.value)
    with pytest.raises(BadInputs) as found:
        model.encode(["fine", folder / "gone.png", "fine", folder])
    assert list(found.value.problems) == [1, 3] and "gone.png" in str(found.value)
    # Damage behind the header shows in decoding only; still all of it is told at once.
    with pytest.raises(BadInputs) as found:
        model.encode([torn, *pool(folder), torn, "fine", torn], batch_tokens=128)
    assert list(found.value.problems) == [0, 12, 14]
    assert str(found.value).count("torn.png: truncated or damaged") == 3


def test_an_input_that_is_too_long_is_told_with_the_way_out(folder, model):
    long = {"text": PROMPT + "word " * 5000, "images": [folder / "wide.png"]}
    with pytest.raises(BadInputs) as found:
        model.encode(["short", long])
    assert list(found.value.problems) == [1]
    for words in ("input 1: ", "tokens are more than the 4096", "max_len", "num_crops"):
        assert words in str(found.value)
    tokens = int(str(found.value).split("input 1: ")[1].split()[0])
    assert tokens == model.processor.length(MultimodalInput.of(long))[0] > 4096


@pytest.mark.slow
def test_an_input_longer_than_a_row_and_than_a_batch(folder, model):
    long = ["word " * 700, {"text": PROMPT + "other " * 500, "images": [folder / "wide.png"]}]
    found = model.encode([*long, "short"])
    small = model.encode(["short", *long], batch_tokens=128)
    np.testing.assert_allclose(small, found[[2, 0, 1]], **TOLERANCE)


def test_max_len_cuts_texts_and_num_crops_counts(folder, model):
    short = Embedder.from_pretrained(folder / "base", dtype="float32", max_len=4, num_crops=1)
    texts = ["a red circle", "a red circle and a blue square and a ring"]
    cut, whole = short.encode(texts), model.encode(texts)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    np.testing.assert_allclose(cut[0], cut[1], **TOLERANCE)
    image = {"text": PROMPT + texts[1], "images": [folder / "wide.png"]}
    assert np.abs(short.encode([image]) - model.encode([image])).max() > 1e-3
    assert short.processor.length(MultimodalInput.of(image))[1] == 1  # never cut, one crop


@pytest.mark.slow
def test_bfloat16_stays_close(folder, alone):
    found = Embedder.from_pretrained(folder / "base").encode(pool(folder))
    assert found.dtype == np.float32
    assert np.sum(found * alone, axis=1).min() > 0.999


def test_the_fingerprint_names_what_decides(folder, model):
    made = Embedder.from_pretrained
    base = folder / "base"
    same = made(base, dtype="float32").fingerprint()
    assert same == model.fingerprint() == json.loads(json.dumps(same))
    write_model(folder / "data", folder / "other", seed=1)
    others = [
        made(base).fingerprint(),
        made(base, dtype="float32", num_crops=1, max_len=50).fingerprint(),
        made(base, dtype="float32", num_crops=1).fingerprint(),
        made(folder / "other", dtype="float32").fingerprint(),
    ]
    texts = {json.dumps(f, sort_keys=True) for f in [same, *others]}
    assert len(texts) == len(others) + 1, sorted(texts)


@pytest.mark.slow
def test_the_fingerprint_names_the_adapter(goldens, tmp_path):
    tiny = shutil.copytree(goldens / "tiny_mha", tmp_path / "a_copy_is_the_same")
    found = [Embedder.from_pretrained(tiny).fingerprint()]
    for name in ("tiny_mha_lora_r8", "tiny_mha_dora_r8", "tiny_mha_dora_r16"):
        adapter = goldens / "adapters" / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the copy has another name than the adapter's base
            found.append(Embedder.from_pretrained(tiny, adapter=adapter).fingerprint())
    assert len({json.dumps(f, sort_keys=True) for f in found}) == 4
    assert found[0] == Embedder.from_pretrained(goldens / "tiny_mha").fingerprint()


@pytest.mark.slow
def test_an_adapter_folder_alone_names_its_base(folder, goldens, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(goldens / "adapters" / "tiny_mha_lora_r8", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(goldens / "tiny_mha")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = Embedder.from_pretrained(adapter, dtype="float32").encode(["a text"])
    same = Embedder.from_pretrained(goldens / "tiny_mha", adapter, dtype="float32")
    np.testing.assert_allclose(found, same.encode(["a text"]), **TOLERANCE)
    with pytest.raises(UserError, match="is an adapter itself"):
        Embedder.from_pretrained(adapter, adapter)
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="there is no model folder .*gone"):
        Embedder.from_pretrained(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError):  # of another size
            Embedder.from_pretrained(folder / "base", adapter)


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as found:
        Embedder.from_pretrained(path, **options)
    return str(found.value)


def test_wrong_things_are_refused_in_words(folder, tmp_path):
    base = folder / "base"
    assert "is a file; a model is a folder" in refusal(base / "config.json")
    assert "there is no model folder" in refusal(tmp_path / "gone")
    assert "as a hub id it cannot be fetched" in refusal("nobody/nothing")
    assert "no config.json" in refusal(tmp_path)
    assert "float16" in refusal(base, dtype="float16")
    assert "num_crops" in refusal(base, num_crops=-1)
    assert "max_len" in refusal(base, max_len=-1)

    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(pickled) and "safetensors" in refusal(pickled)

    torn = tmp_path / "torn"
    shutil.copytree(base, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(weights) in refusal(torn)

    for name, content in (("config.json", "{"), ("config.json", '{"model_type": "bert"}'),
                          ("tokenizer.json", "{}"), ("preprocessor_config.json", "[")):  # fmt: skip
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(base, broken)
        (broken / name).write_text(content)
        assert name in refusal(broken)
    (broken / "preprocessor_config.json").write_text("{}")
    (broken / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(broken)
    with pytest.raises(UserError, match="adapter_config.json"):
        Embedder.from_pretrained(base, adapter=base)


def training_output(folder: Path, output: Path, adapter=None) -> Path:
    """What a run leaves before its first checkpoint."""
    from vlm2vec_jax.record import NAME, make_record, write_json

    (output / "checkpoints").mkdir(parents=True)
    record = make_record(
        backbone="phi3_v", base=folder, processor={"num_crops": 1, "max_len": 9},
        temperature=0.02, adapter=adapter,
    )  # fmt: skip
    write_json(output / NAME, record)
    return output


def test_training_outputs_that_cannot_be_used(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    output = training_output(base, tmp_path / "run")
    assert "holds no checkpoint yet" in refusal(output)
    assert "without an adapter" in refusal(base, adapter=output)
    assert "another adapter cannot go on top" in refusal(output, adapter=output)
    shutil.copy(write_model(folder / "data", tmp_path / "b", 7) / "model.safetensors", base)
    assert "holds other weights now" in refusal(output)
    shutil.rmtree(base)
    assert "is not there any more" in refusal(output)
    (output / "vlm2vec.json").write_text("{}")
    assert "vlm2vec.json cannot be read" in refusal(output)
    (output / "vlm2vec.json").unlink()
    assert "no vlm2vec.json" in refusal(output)


def test_importing_the_package_stays_light():
    code = (
        "import sys, vlm2vec_jax; "
        "heavy = {'jax', 'flax', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; vlm2vec_jax.Embedder; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_row_s_budget_is_a_share_of_the_batch(folder, model, monkeypatch):
    """Chunks of every size put the inputs into different rows, not only into different calls."""
    seen = set()
    original = embedder.Embedder._fill

    def fill(self, rows, encoded, shape, count):
        seen.add((shape.tokens, count))
        return original(self, rows, encoded, shape, count)

    monkeypatch.setattr(embedder.Embedder, "_fill", fill)
    items = [label(k) for k in range(60)]
    reference = model.encode(items)
    for budget in (128, 512, 2048):
        # A new one, which has no programs yet that it might take instead.
        fresh = Embedder.from_pretrained(folder / "base", dtype="float32")
        np.testing.assert_allclose(fresh.encode(items, batch_tokens=budget), reference, **TOLERANCE)
    assert len(seen) > 2
