# SPDX-License-Identifier: Apache-2.0
"""Pickled checkpoints, which torch writes, become safetensors without running what is in them."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm2vec_jax.flags import call
from vlm2vec_jax.weights import from_bin

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def convert(*argv):
    return call(from_bin.main, from_bin.define, ["from_bin", *map(str, argv)])


@pytest.mark.parametrize("form", ["single", "sharded", "nested", "adapter"])
def test_pickles_become_safetensors(goldens, tmp_path, form):
    import torch

    source = goldens / ("adapters/tiny_mha_dora_r8" if form == "adapter" else "tiny_mha")
    stem = "adapter_model" if form == "adapter" else "model"
    arrays = load_file(source / f"{stem}.safetensors")
    if form == "nested":
        arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}

    def tensor(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    folder = tmp_path / "in"
    shutil.copytree(source, folder, ignore=lambda d, names: [n for n in names if "safetens" in n])
    tensors = {name: tensor(array) for name, array in arrays.items()}
    if form == "sharded":
        names, places = sorted(tensors), {}
        for i in range(3):
            file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
            torch.save({n: tensors[n] for n in names[i::3]}, folder / file)
            places |= dict.fromkeys(names[i::3], file)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        whole = {"state_dict": tensors} if form == "nested" else tensors
        name = "adapter_model.bin" if form == "adapter" else "pytorch_model.bin"
        torch.save(whole, folder / name)
    assert convert(folder, "--output", tmp_path / "out") == 0
    found = load_file(tmp_path / "out" / f"{stem}.safetensors")
    assert set(found) == set(arrays)
    assert all(found[n].tobytes() == a.tobytes() and found[n].dtype == a.dtype
               for n, a in arrays.items())  # fmt: skip
    settings = "adapter_config.json" if form == "adapter" else "config.json"
    assert (tmp_path / "out" / settings).read_bytes() == (folder / settings).read_bytes()
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert convert(folder, "--output", tmp_path / "out") == 2  # it exists
    assert convert(folder, "--output", folder, "--force") == 2


def test_pickles_that_run_code_are_refused(tmp_path, capsys):
    import os

    import torch

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": torch.ones(2), "b": Evil()}, tmp_path / "pytorch_model.bin")
    assert convert(tmp_path, "--output", tmp_path / "out") == 2
    assert "would run code" in capsys.readouterr().err
    torch.save({"a": torch.ones(2), "b": 3}, tmp_path / "pytorch_model.bin")
    assert convert(tmp_path, "--output", tmp_path / "out") == 2
    assert "b is int" in capsys.readouterr().err
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 torn")
    assert convert(tmp_path, "--output", tmp_path / "out") == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
