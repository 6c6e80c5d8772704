# SPDX-License-Identifier: Apache-2.0
"""Exports of every registered backbone with goldens, in transformers 5 and peft (`-m torch`).

Pixels and ids are transformers' own; positions those of the golden's rule `sequential`.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from backbone_goldens import ADAPTERS, GOLDENS, VARIANTS, arrays, cases
from safetensors.numpy import load_file

from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.loading import abstract_model, flatten
from vlm2vec_jax.models.qwen2_vl.mini import write_mini_model
from vlm2vec_jax.models.registry import BACKBONES
from vlm2vec_jax.weights.adapters import load_adapter
from vlm2vec_jax.weights.export import export_hf, export_peft
from vlm2vec_jax.weights.load import load_host
from vlm2vec_jax.weights.safetensors import Checkpoint

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
KNOWN = [b for b in VARIANTS if b in BACKBONES]


def opened(backbone: str, folder):
    """The class of transformers, and what it says about the loading."""
    import torch
    import transformers

    cls = getattr(transformers, CLASSES[backbone])
    model, said = cls.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), {key: value for key, value in said.items() if value}


def embedded(model, backbone: str, case: dict) -> np.ndarray:
    """A text's embedding."""
    import torch

    ids = torch.tensor(case["ids"].astype(np.int64))[None]
    with torch.no_grad():
        state = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(state, dim=0).numpy()


@pytest.mark.parametrize("backbone, place", [(b, p) for b in KNOWN for p in (0, 1)])
def test_full_exports_load_whole(backbone, place, tmp_path):
    variant = VARIANTS[backbone][place]
    folder = GOLDENS / backbone / variant
    table = abstract_model(folder).table
    with Checkpoint(folder) as checkpoint:
        leaves = load_host(checkpoint, table)
    out = export_hf(leaves, table, folder, tmp_path / "out", record={})
    model, said = opened(backbone, out)
    assert not said
    original = opened(backbone, folder)[0].state_dict()
    found = model.state_dict()
    assert set(found) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), name)
    text = cases(backbone, variant)[0]
    wanted = arrays(backbone, variant)["text/embedding/sequential"]
    np.testing.assert_allclose(embedded(model, backbone, text), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", KNOWN)
@pytest.mark.parametrize("name, place", ADAPTERS)
def test_adapters_have_their_effect_in_peft(backbone, name, place, tmp_path):
    """Also those read with names of the 4.4x era, written for transformers 5."""
    import peft

    folder = GOLDENS / backbone / VARIANTS[backbone][place]
    model = abstract_model(folder)
    shapes = flatten(model.module)
    with Checkpoint(folder) as checkpoint:
        base = {**shapes, **load_host(checkpoint, model.table)}
    adapter = load_adapter(GOLDENS / backbone / "adapters" / name, model.table, base)
    config = dataclasses.replace(adapter.config, base=str(folder))
    out = export_peft(adapter.tensors, model.table, config, tmp_path / "out", record={}, layout="5")
    adapted = peft.PeftModel.from_pretrained(opened(backbone, folder)[0], str(out)).eval()
    wanted = load_file(GOLDENS / backbone / "adapters" / name / "golden.safetensors")
    # The batch's second query and first target are texts.
    by_name = {case["name"]: case for case in cases(backbone, folder.name)}
    inner = adapted.get_base_model()
    for case, row in (
        ("text", wanted["query_embedding"][1]),
        ("letter", wanted["target_embedding"][0]),
    ):
        found = embedded(inner, backbone, by_name[case])
        np.testing.assert_allclose(found, row, rtol=0, atol=1e-6)


def small_qwen2_vl(folder: Path) -> tuple[float, int]:
    """The small Qwen2-VL that learns mini-MMEB, written here and read by both.

    Returns:
      The largest difference of an embedding by rules `mrope` and `sequential`, and how many there
      were.
    """
    sys.path.insert(0, str(Path(__file__).parent / "tools"))
    import golden_forward

    data, model = folder / "data", folder / "model"
    write_mini_mmeb(data, 0, 0.03, subsets=["ImageNet-1K", "OK-VQA", "MSCOCO_i2t"])
    write_mini_model(data, model)
    images = GOLDENS / "image_processing" / "images"
    all_cases = golden_forward.prepare("qwen2_vl", model, images)
    theirs = opened("qwen2_vl", model)[0]
    largest = 0.0
    for rule in ("mrope", "sequential"):
        for markers in ("bare", "wrapped"):
            chosen = [case for case in all_cases if case.wrapped == (markers == "wrapped")]
            ours = Embedder.from_pretrained(
                model, dtype="float32", image_positions=rule, image_markers=markers
            ).encode(
                MultimodalInput(case.text, tuple(images / f"{name}.png" for name in case.images))
                for case in chosen
            )
            for case, found in zip(chosen, ours, strict=True):
                wanted = golden_forward.embed(theirs, case, rule).detach().numpy()
                largest = max(largest, float(np.abs(found - wanted).max()))
    return largest, 2 * len(all_cases)


def test_the_small_qwen2_vl_is_one_to_transformers(tmp_path):
    largest, count = small_qwen2_vl(tmp_path)
    assert count == 22 and largest <= 1e-5
