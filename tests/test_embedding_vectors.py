# SPDX-License-Identifier: Apache-2.0
"""Prompts, truncation, quantisation, similarities: what needs no model."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from vlm2vec_jax.embedding import vectors
from vlm2vec_jax.embedding.prompts import Prompts, stored_prompts, with_prompt
from vlm2vec_jax.embedding.settings import EncodingSettings
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import MultimodalInput

I1, I2 = "<|image_1|>", "<|image_2|>"


@pytest.mark.parametrize(
    ("text", "images", "prompt", "wanted"),
    [
        ("a cat", 0, "Find: ", "Find: a cat"),
        ("a cat", 0, "", "a cat"),
        ("", 1, "Represent the given image.", f"{I1} Represent the given image."),
        (f"{I1} what is it?", 1, "Answer: ", f"{I1} Answer: what is it?"),
        (f"{I1}\n{I2} differ?", 2, "Compare. ", f"{I1}\n{I2} Compare. differ?"),
        (f"from {I1} to", 1, "Say: ", f"Say: from {I1} to"),
        # MMEB spells its instructions with the marker in front.
        ("", 1, f"{I1} Represent the given image\n", f"{I1} Represent the given image\n"),
        (f"{I1} x", 1, f"{I1}\nLook: ", f"{I1}\nLook: x"),
    ],
)
def test_a_prompt_goes_behind_the_images_that_an_input_opens_with(text, images, prompt, wanted):
    item = MultimodalInput(text, tuple(f"{k}.png" for k in range(images)))
    found = with_prompt(item, prompt)
    assert (found.text, found.images) == (wanted, item.images)
    assert found.problem() is None


def test_a_prompt_that_names_an_image_needs_one():
    with pytest.raises(UserError, match="names an image"):
        with_prompt(MultimodalInput("a text"), f"{I1} Represent")
    with pytest.raises(UserError, match="names an image"):
        with_prompt(MultimodalInput("", ("a.png",)), f"Look at {I1}")


def test_prompts_by_name():
    prompts = Prompts({"query": "Q: ", "passage": "P: ", "corpus": "C: "}, default="query")
    assert prompts.text(None, None) == prompts.text(None, "query") == "Q: "
    assert prompts.text("own", None) == "own" and prompts.text("", None) == ""
    assert prompts.first_of(("target", "document", "passage", "corpus")) == "passage"
    assert Prompts().text(None, None) == ""
    for wrong in (lambda: prompts.text("a", "query"), lambda: prompts.text(None, "gone"),
                  lambda: prompts.text(3, None), lambda: Prompts({"a": 1}), lambda: Prompts([]),
                  lambda: Prompts({}, default="query")):  # fmt: skip
        with pytest.raises(UserError):
            wrong()
    with pytest.raises(UserError, match="'gone'; known: corpus, passage, query"):
        prompts.text(None, "gone")


def test_prompts_that_came_with_a_model(tmp_path):
    (tmp_path / "a").mkdir()
    config = tmp_path / "a" / "config_sentence_transformers.json"
    config.write_text(
        '{"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query"}'
    )
    found = stored_prompts({}, None, tmp_path / "gone", tmp_path / "a")
    assert found == Prompts({"query": "Q: "}, "query")
    assert stored_prompts({"prompts": {"target": "T"}}, tmp_path / "a").named == {"target": "T"}
    assert stored_prompts(None, tmp_path) == Prompts()
    for content in ("{", "[]", '{"prompts": [1]}'):
        config.write_text(content)
        with pytest.raises(UserError, match=str(config)):
            stored_prompts(None, tmp_path / "a")


def random_vectors(n=64, dim=24, seed=0):
    return vectors.normalize(np.random.default_rng(seed).normal(size=(n, dim)))


def test_truncation_takes_the_front_and_unit_length():
    full = random_vectors()
    cut = vectors.truncate(full, 8)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    raw = vectors.truncate(full, 8, renormalize=False)
    np.testing.assert_array_equal(raw, full[:, :8])
    np.testing.assert_allclose(cut, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    assert vectors.truncate(full, None) is full and vectors.truncate(full, 24) is full
    for wrong in (0, 25, -1, 2.5, True, "8"):
        with pytest.raises(UserError, match="from 1 to 24"):
            vectors.check_dimension(wrong, 24)


def test_bits_are_packed_as_sentence_transformers_packs_them():
    rows = np.array([[1, -1, 0, 2, -3, 4, 5, -6, 1], [-1] * 9], np.float32)
    unsigned = vectors.quantize_embeddings(rows, "ubinary")
    assert unsigned.dtype == np.uint8
    assert unsigned.tolist() == [[0b10010110, 0b10000000], [0, 0]]
    signed = vectors.quantize_embeddings(rows, "binary")
    assert signed.dtype == np.int8 and signed.tolist() == [[150 - 128, 0], [-128, -128]]
    for precision, packed in (("binary", signed), ("ubinary", unsigned)):
        back = vectors.dequantize_embeddings(packed, precision, 9)
        np.testing.assert_allclose(back, np.where(rows > 0, 1, -1) / 3, atol=1e-6)


def test_integers_are_those_of_the_formula():
    # levels = (x - min) / ((max - min) / 255), rounded down; int8 is 128 lower.
    rows = random_vectors(300, 16)
    start, end = rows.min(axis=0), rows.max(axis=0)
    levels = (rows - start) / ((end - start) / 255)
    found = vectors.quantize_embeddings(rows, "uint8")
    np.testing.assert_array_equal(found, levels.astype(np.uint8))
    assert found.min() == 0 and found.max() >= 254
    signed = vectors.quantize_embeddings(rows, "int8")
    np.testing.assert_array_equal(signed, (np.floor(levels) - 128).astype(np.int8))
    assert signed.min() == -128 and signed.max() >= 126
    # Beyond the calibration: the ends, where plain conversion would wrap around.
    ranges = np.array([[0.0, 0.0], [1.0, 1.0]])
    beyond = np.array([[-3.0, 7.0]])
    assert vectors.quantize_embeddings(beyond, "uint8", ranges).tolist() == [[0, 255]]
    assert vectors.quantize_embeddings(beyond, "int8", ranges).tolist() == [[-128, 127]]
    found = vectors.quantize_embeddings(beyond, "int8", calibration_embeddings=ranges)
    assert found.tolist() == [[-128, 127]]


@hypothesis.given(
    st.integers(1, 40), st.integers(1, 30), st.sampled_from(["int8", "uint8"]), st.integers(0, 9)
)
def test_a_step_is_the_most_that_integers_lose(n, dim, precision, seed):
    rows = random_vectors(n, dim, seed)
    ranges = vectors.value_ranges(rows)
    packed = vectors.quantize_embeddings(rows, precision, ranges)
    assert packed.shape == rows.shape and packed.dtype == precision
    back = vectors.dequantize_embeddings(packed, precision, dim, ranges)
    assert np.abs(back - rows).max() <= np.max(ranges[1] - ranges[0]) / 255 * 1.01 + 1e-6


def test_wrong_precisions_and_ranges():
    rows = random_vectors()
    for wrong in (
        lambda: vectors.check_precision("int4", None),
        lambda: vectors.check_precision("int8", "binary"),
        lambda: vectors.quantize_embeddings(rows, "int8", np.zeros((2, 5))),
        lambda: vectors.quantize_embeddings(rows, "int8", calibration_embeddings=rows[:0]),
    ):
        with pytest.raises(UserError):
            wrong()
    assert vectors.check_precision("float32", "binary") == "binary"
    assert vectors.check_precision(None, None) == "float32"
    assert vectors.quantize_embeddings(rows[:0], "int8").shape == (0, 24)


def test_similarities():
    a, b = random_vectors(5) * 3, random_vectors(7, seed=1) * 0.1
    matrix = EncodingSettings.similarity(a, b)
    assert matrix.shape == (5, 7) and matrix.dtype == np.float32
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    np.testing.assert_allclose(matrix, cosine, atol=1e-6)
    np.testing.assert_allclose(vectors.similarity(a[0], b), matrix[:1], atol=1e-6)
    pairs = EncodingSettings.similarity_pairwise(a, b[:5])
    np.testing.assert_allclose(pairs, np.diag(matrix), atol=1e-6)
    for wrong in (lambda: vectors.similarity(a, b[:, :3]), lambda: vectors.similarity(a[None], b),
                  lambda: vectors.similarity_pairwise(a, b)):  # fmt: skip
        with pytest.raises(UserError):
            wrong()


def test_settings_can_be_changed():
    settings = EncodingSettings(24)
    assert settings.get_embedding_dimension() == 24 and settings.prompts == {}
    with settings.truncate_embeddings(8):
        assert settings.get_embedding_dimension() == 8
    assert settings.get_embedding_dimension() == 24
    settings.prompts = {"query": "Q"}
    settings.default_prompt_name = "query"
    settings.prompts["target"] = "T"
    assert settings.prompts == {"query": "Q", "target": "T"}
    settings.prompts = {"target": "T"}
    assert settings.default_prompt_name is None
    with pytest.raises(UserError, match="no prompt called 'query'"):
        settings.default_prompt_name = "query"
