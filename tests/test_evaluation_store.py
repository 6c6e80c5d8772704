# SPDX-License-Identifier: Apache-2.0
"""Files of an evaluation: fingerprints, atomic writing, embeddings on disk."""

import json
import os

import numpy as np
import pytest

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import store

KEYS = [("a text\n", ""), ("", "img/ü.png"), ("both", "img/b.png")]
VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_embeddings_come_back_for_the_same_fingerprint(tmp_path):
    path = tmp_path / "s_embeddings.npz"
    store.save_embeddings(path, KEYS, VECTORS, {"model": "a", "size": (1, 2)})
    found, why_not = store.load_embeddings(path, {"model": "a", "size": (1, 2)})
    assert why_not == "" and found is not None and list(found) == KEYS
    for key, vector in zip(KEYS, VECTORS):
        np.testing.assert_array_equal(found[key], vector)
    assert os.listdir(tmp_path) == [path.name]


def test_another_fingerprint_is_told_and_not_used(tmp_path):
    path = tmp_path / "s_embeddings.npz"
    store.save_embeddings(path, KEYS, VECTORS, {"encoder": {"model": "a", "crops": 4}})
    found, why_not = store.load_embeddings(path, {"encoder": {"model": "a", "crops": 16}})
    assert found is None and "encoder.crops: 4 -> 16" in why_not


def test_no_file_needs_no_words(tmp_path):
    assert store.load_embeddings(tmp_path / "none.npz", {}) == (None, "")


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_half_a_file_is_not_used(tmp_path, keep):
    path = tmp_path / "s_embeddings.npz"
    store.save_embeddings(path, KEYS, VECTORS, {})
    path.write_bytes(path.read_bytes()[:keep])
    found, why_not = store.load_embeddings(path, {})
    assert found is None and "cannot be read" in why_not


def test_a_pickle_is_never_loaded(tmp_path):
    path = tmp_path / "s_embeddings.npz"
    arrays = {"embeddings": VECTORS, "keys": np.array([{"a": 1}], object)}
    np.savez(path, fingerprint=np.array([object()], object), **arrays)
    found, why_not = store.load_embeddings(path, {})
    assert found is None and "cannot be read" in why_not


def test_keys_and_vectors_must_agree(tmp_path):
    with pytest.raises(ValueError, match="3 keys for 2"):
        store.save_embeddings(tmp_path / "x.npz", KEYS, VECTORS[:2], {})


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "scores.json"
    store.write_json(path, {"acc": 0.5})

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="scores.json: No space left on device"):
        store.write_atomically(path, full)
    assert json.loads(path.read_text()) == {"acc": 0.5}
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        store.write_text(tmp_path / "file" / "scores.md", "x")


def test_json_that_no_reader_could_read_is_refused(tmp_path):
    with pytest.raises(ValueError):
        store.write_json(tmp_path / "x.json", {"acc": float("nan")})
    assert os.listdir(tmp_path) == []


def test_any_text_survives_jsonl(tmp_path):
    rows = [{"text": 'line\nbreak \u2028 quote " <b> \ud800 ü'}, {"text": ""}]
    path = tmp_path / "x.jsonl"
    store.write_jsonl(path, rows)
    lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
    assert [json.loads(line) for line in lines if line] == rows


def test_differences_name_the_place():
    assert store.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 2}) == []
    found = store.differences({"a": {"b": 1, "gone": 3}}, {"a": {"b": 2}, "new": "x"})
    assert found == ["a.b: 1 -> 2", "a.gone: 3 -> null", 'new: null -> "x"']
    assert store.differences(None, {"a": 1}) != []


def test_image_hash_follows_content_and_name_not_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"pixels")
    one, two = ({"a.png": tmp_path / f / "a.png"} for f in ("one", "two"))
    assert store.hash_images(one) == store.hash_images(two)
    assert store.hash_images(one) != store.hash_images({"b.png": one["a.png"]})
    (tmp_path / "two" / "a.png").write_bytes(b"pixelS")
    assert store.hash_images(one) != store.hash_images(two)
    with pytest.raises(UserError, match="nowhere.png"):
        store.hash_images({"x": tmp_path / "nowhere.png"})
