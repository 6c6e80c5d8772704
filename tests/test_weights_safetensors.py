# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: lazy reads, shards, everything that can be wrong with a folder."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.weights.files import INDEX, SINGLE
from vlm2vec_jax.weights.safetensors import Checkpoint, write


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    out = {f"layer.{i}.weight": rng.normal(size=(8, 6)).astype(np.float32) for i in range(5)}
    out["half"] = rng.normal(size=(3, 4, 5)).astype(np.float16)
    out["brain"] = rng.normal(size=(7, 2)).astype(ml_dtypes.bfloat16)
    out["scalar"] = np.float32(3.5).reshape(())
    out["empty"] = np.zeros((0, 4), np.float32)
    out["odd"] = np.arange(3, dtype=np.int8)
    return out


def bits(array):
    return array.dtype, array.shape, array.tobytes()


@pytest.mark.parametrize("shard_bytes", [1e9, 300, 1])
def test_write_and_read_back(tmp_path, tensors, shard_bytes):
    files = write(tmp_path / "new", tensors.items(), shard_bytes=shard_bytes)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in files)
    assert (files[-1].name == INDEX) == (shard_bytes < 1e9)
    with Checkpoint(tmp_path / "new") as checkpoint:
        assert checkpoint.names == sorted(tensors)
        assert checkpoint.nbytes() == sum(array.nbytes for array in tensors.values())
        for name, array in tensors.items():
            assert checkpoint.shape(name) == array.shape
            assert checkpoint.dtype(name) == array.dtype
            assert bits(checkpoint.read(name)) == bits(array)
        part = checkpoint.read("half", (slice(1, 3), slice(0, 4), slice(2, 3)))
        np.testing.assert_array_equal(part, tensors["half"][1:3, :, 2:3])
        part = checkpoint.read("brain", (slice(None), slice(1, 2)))
        assert bits(part) == bits(np.ascontiguousarray(tensors["brain"][:, 1:2]))


def test_files_are_what_the_format_says(tmp_path, tensors):
    (file,) = write(tmp_path, tensors.items())
    with safe_open(file, "numpy") as handle:
        assert handle.metadata() == {"format": "pt"}
    loaded = load_file(file)
    assert {name: bits(array) for name, array in loaded.items()} == {
        name: bits(array) for name, array in tensors.items()
    }


def test_index_is_the_usual_one(tmp_path, tensors):
    files = write(tmp_path, tensors.items(), shard_bytes=300)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    count = len(files) - 1
    assert set(index["weight_map"].values()) == {
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    }
    for file in files[:-1]:
        held = sum(array.nbytes for array in load_file(file).values())
        assert held <= 300 or len(load_file(file)) == 1


def test_transposed_arrays_are_written_in_their_own_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    (file,) = write(tmp_path, [("x", array)])
    np.testing.assert_array_equal(load_file(file)["x"], array)


def test_a_failing_write_leaves_nothing(tmp_path, tensors):
    def stream():
        yield from tensors.items()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write(tmp_path, stream(), shard_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_old_weights_are_not_mixed_with_new_ones(tmp_path, tensors):
    (old,) = write(tmp_path, [("x", np.ones(3, np.float32))])
    before = old.read_bytes()
    with pytest.raises(UserError, match="already"):
        write(tmp_path, tensors.items())
    assert old.read_bytes() == before and list(tmp_path.iterdir()) == [old]


def test_names_come_once_and_types_are_known(tmp_path):
    x = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="twice"):
        write(tmp_path, [("x", x), ("x", x)])
    with pytest.raises(ValueError, match="complex"):
        write(tmp_path, [("x", x.astype(np.complex64))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError) as error:
            Checkpoint(path)
        assert name in str(error.value)
        assert f"vlm2vec_jax.weights.from_bin {tmp_path} --output" in str(error.value)


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_truncated_files_are_named(tmp_path, goldens, cut):
    data = (goldens / "tiny_gqa" / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:cut])
    with pytest.raises(UserError, match=f"{SINGLE}.*truncated"):
        Checkpoint(tmp_path)


def test_missing_things(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no weights"):
        Checkpoint(tmp_path)


def damage_absent(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def damage_json(folder):
    (folder / INDEX).write_text('{"weight_map": {')


def damage_no_map(folder):
    (folder / INDEX).write_text('{"metadata": {}}')


def damage_outside(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": "../other/model.safetensors"}}')


def damage_twice(folder):
    first = folder / "model-00001-of-00003.safetensors"
    shutil.copyfile(first, folder / "model-00002-of-00003.safetensors")


def damage_unnamed(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["b"]
    (folder / INDEX).write_text(json.dumps(index))


def damage_both(folder):
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / SINGLE)


def damage_no_index(folder):
    (folder / INDEX).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_absent, "model-00002-of-00003.safetensors is absent.*such as c"),
        (damage_json, "cannot be read as an index"),
        (damage_no_map, "cannot be read as an index"),
        (damage_outside, "outside of its folder"),
        (damage_twice, "a is in model-00001.* and in model-00002"),
        (damage_unnamed, "b: model-00001.* holds it, the index does not"),
        (damage_both, "holds both"),
        (damage_no_index, f"{INDEX} is missing"),
    ],
)
def test_broken_shards_are_named(tmp_path, damage, message):
    arrays = [(name, np.ones(4, np.float32)) for name in "abcdef"]
    write(tmp_path, arrays, shard_bytes=32)
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 3
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        Checkpoint(tmp_path)


def test_types_that_numpy_does_not_hold_are_refused_when_read(tmp_path):
    header = b'{"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.shape("x") == (4,)
        with pytest.raises(UserError, match="x has the unreadable type F8_E4M3"):
            checkpoint.read("x")
