# SPDX-License-Identifier: Apache-2.0
"""Our exports in old libraries: adapters in the oldest PEFT that they are written for, and one
between; full models in the transformers of that time.

`make test-old-peft` sets up an environment for each (tests/tools/peft-*.txt) and names their
pythons in OLD_PEFT, with colons between. transformers 4.4x goes with them, so adapters have the
names of that generation, which are the default of an export.
"""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from backbone_goldens import GOLDENS, VARIANTS, arrays, cases
from golden_batches import load_npz
from safetensors.numpy import load_file
from test_torch import MODEL, NAMES, largest, our_states, said
from test_weights_forms import uneven, write_adapter

from vlm2vec_jax.models.loading import abstract_model, add_adapter, load_model, replace_saved
from vlm2vec_jax.models.phi3v import config as phi3v_config
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.weights.adapters import load_adapter, merge
from vlm2vec_jax.weights.export import export_hf, export_peft
from vlm2vec_jax.weights.load import load_host
from vlm2vec_jax.weights.safetensors import Checkpoint

TOOL = Path(__file__).parent / "tools" / "old_peft.py"
FULL = TOOL.with_name("old_transformers.py")
PYTHONS = [name for name in os.environ.get("OLD_PEFT", "").split(":") if name]
UNEVEN = ["uneven_lora", "uneven_dora"]
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not PYTHONS, reason="OLD_PEFT names no python (make test-old-peft)"),
]


@pytest.fixture(scope="module")
def exports(goldens, tmp_path_factory):
    """(folder of the model, table, leaves, full export, input file, name -> (adapter, export))"""
    folder, room = goldens / MODEL, tmp_path_factory.mktemp("old")
    table = phi3v_table(phi3v_config.from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        leaves = load_host(checkpoint, table)
    full = export_hf(leaves, table, folder, room / "full", record={})
    golden = load_npz(goldens / "forward" / MODEL / "text_single.npz")
    pixels = np.random.default_rng(0).normal(size=(1, 336, 336, 3)).astype(np.float32)
    np.savez(room / "inputs.npz", ids=golden["input_ids"], pixels=pixels)
    sources = {name: goldens / "adapters" / name for name in NAMES}
    tensors = load_file(full / "model.safetensors")
    for name in UNEVEN:
        settings, adapted, _ = uneven(table, tensors, dora=name.endswith("dora"))
        # Small, or the states become so large that they say nothing about the arithmetic.
        adapted = {n: a / 20 if "lora_B" in n else a for n, a in adapted.items()}
        sources[name] = write_adapter(room / f"made_{name}", adapted, **settings)
    out = {}
    for name, source in sources.items():
        adapter = load_adapter(source, table, leaves)
        out[name] = adapter, export_peft(
            adapter.tensors, table, adapter.config, room / name, record={}, base="b",
            saved=adapter.saved,
        )  # fmt: skip
    return folder, table, leaves, full, room / "inputs.npz", out


@pytest.fixture(scope="module", params=PYTHONS)
def theirs(request, exports, tmp_path_factory):
    """What that python's peft makes of all exports: array by name."""
    folder, _, _, full, inputs, adapters = exports
    file = tmp_path_factory.mktemp("theirs") / "out.npz"
    run_by(request.param, TOOL, folder, full, inputs, file, *(e for _, e in adapters.values()))
    found = load_npz(file)
    versions = json.loads(str(found.pop("versions")))
    print(f"\nMEASURED with {versions}")
    return versions, found


def run_by(python, *arguments):
    # Without this process's PYTHONPATH, which may name packages of another environment.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = list(map(str, (python, *arguments)))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def under(found, prefix):
    return {k.removeprefix(prefix): v for k, v in sorted(found.items()) if k.startswith(prefix)}


@pytest.mark.parametrize("name", [*NAMES, *UNEVEN])
def test_old_peft_loads_our_adapters(exports, theirs, goldens, name):
    folder, table, leaves, _, inputs, adapters = exports
    versions, found = theirs
    adapter, export = adapters[name]
    label = f"{name} in peft {versions['peft']}"
    stored, written = (
        under(found, f"{name}/stored/"),
        load_file(export / "adapter_model.safetensors"),
    )
    assert set(stored) == set(written)
    assert all(np.array_equal(stored[key], array) for key, array in written.items())

    model = load_model(folder, dtype_of=lambda path: jnp.float32)
    replace_saved(model, adapter.saved)
    add_adapter(
        model.module, adapter.linears, dora=adapter.config.dora, dropout=0.0,
        tensors=adapter.tensors,
    )  # fmt: skip
    given = np.load(inputs)
    ours = our_states(model, goldens, given["ids"], given["pixels"])
    for what, part, states in zip(("decoder", "tower"), ("text", "seen"), ours):
        seen = list(under(found, f"{name}/{part}/").values())
        plain = list(under(found, f"plain/{part}/").values())
        said(f"{what}, hidden states, {label}", largest(states, seen))
        assert largest(states, seen) < 5e-5
        assert largest(plain[: len(states)], seen) > 1e-2  # the adapter does something there

    scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
    merged = merge(leaves, adapter.tensors, scaling)
    gaps = []
    for key, value in under(found, f"{name}/merged/").items():
        slot = table.slots[table.canonical(key)]
        leaf = merged[slot.rule.ours]
        own = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
        gaps.append(float(np.abs(own - value).max()))
    said(f"merged weights, {label}", max(gaps))
    assert max(gaps) < 2e-6


@pytest.mark.parametrize("python", PYTHONS)
def test_old_transformers_loads_full_exports_whole(python, tmp_path):
    """Qwen2-VL and LLaVA-NeXT, which that generation has; in both forms of every tiny one."""
    classes = {
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
    }
    models, ids, wanted, tensors = [], {}, {}, {}
    for backbone, cls in classes.items():
        for variant in VARIANTS[backbone]:
            folder, name = GOLDENS / backbone / variant, f"{backbone}_{variant}"
            table = abstract_model(folder).table
            with Checkpoint(folder) as checkpoint:
                leaves = load_host(checkpoint, table)
            out = export_hf(leaves, table, folder, tmp_path / name, record={})
            models.append(f"{cls}={out}")
            text = cases(backbone, variant)[0]
            ids[name] = np.asarray(text["ids"], np.int64)
            wanted[name] = arrays(backbone, variant)["text/embedding/sequential"]
            tensors[name] = load_file(out / "model.safetensors")
    np.savez(tmp_path / "inputs.npz", **ids)
    run_by(python, FULL, tmp_path / "out.npz", tmp_path / "inputs.npz", *models)
    found = load_npz(tmp_path / "out.npz")
    versions = json.loads(str(found["versions"]))
    loaded = [name for name in ids if f"{name}/states" in found]
    assert [name for name in ids if name.startswith("llava_next")] == [
        name for name in loaded if name.startswith("llava_next")
    ]
    for name in loaded:
        problems = json.loads(str(found[f"{name}/said"]))
        assert not any(problems.values()), (name, problems)
        for key, tensor in tensors[name].items():
            np.testing.assert_array_equal(found[f"{name}/tensors/{key}"], tensor, key)
        last = found[f"{name}/states"][-1]
        gap = largest([last / np.linalg.norm(last)], [wanted[name]])
        said(f"embedding of a text, {name} in transformers {versions['transformers']}", gap)
        assert gap < 1e-5
