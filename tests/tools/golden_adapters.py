# SPDX-License-Identifier: Apache-2.0
"""LoRA and DoRA adapters by peft, and gradients of one contrastive batch."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import golden_checkpoints as checkpoints
import golden_forward as forward
import numpy as np
import peft
import torch
from golden_tokenizers import write_json
from safetensors.torch import load_file, save_file

SEED = 72
RANK, ALPHA = 2, 8
V1_TARGETS = [
    *("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    *("k_proj", "q_proj", "out_proj", "v_proj"),
]
"""VLM2Vec v1's default; V2 adds the two that follow."""
V2_TARGETS = [*V1_TARGETS, "gate_proj", "up_proj"]
# (checkpoint's place, adapter's name, DoRA, targets, names of transformers 4.4x)
ADAPTERS = (
    (0, "lora", False, V2_TARGETS, False),
    (0, "dora", True, V1_TARGETS, False),
    (1, "dora_4", True, V2_TARGETS, True),
)


def write(backbone: str, place: int, checkpoint: Path, cases, out: Path) -> None:
    """Write the adapters of one checkpoint."""
    for where, name, dora, targets, old_names in ADAPTERS:
        if where == place:
            _write(backbone, checkpoint, cases, out / name, dora, targets, old_names)


def _write(backbone, checkpoint, cases, folder: Path, dora, targets, old_names) -> None:
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.1,
        target_modules=targets,
        use_dora=dora,
        base_model_name_or_path=checkpoint.name,
        inference_mode=False,
    )
    model = peft.get_peft_model(checkpoints.load(backbone, checkpoint), config).eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in trained.items():
            rng = np.random.default_rng([SEED, zlib.crc32(key.encode())])
            noise = torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32))
            if "lora_magnitude_vector" in key:
                parameter.mul_(1 + 0.1 * noise)
            elif "lora_A" in key:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
    result = forward.contrastive(model, cases, "mrope")
    result["loss"].backward()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    golden = {key: value.detach() for key, value in result.items()}
    unused = []
    for key, parameter in trained.items():
        saved = _saved_name(key)
        if parameter.grad is None:
            unused.append(saved)
        else:
            golden[f"grad/{saved}"] = parameter.grad
    write_json(
        folder / "golden.json",
        {
            "queries": forward.QUERIES,
            "targets": forward.TARGETS,
            "temperature": forward.TEMPERATURE,
            "positions": "mrope",
            "scaling": ALPHA / RANK,
            "matched_modules": len({key.split(".lora_")[0] for key in trained}),
            "params_without_gradient": sorted(unused),
        },
    )
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = checkpoint.name  # not where it lay on this machine
    settings["target_modules"] = sorted(settings["target_modules"])
    if old_names:
        _rename(backbone, folder)
        settings = {k: v for k, v in settings.items() if k in _KEYS_0_11}
    write_json(path, settings)


def full_gradients(model: torch.nn.Module, cases) -> dict:
    """Gradients of all parameters, each told by its norm and a seeded projection.

    The projection is the sum of gradient times n, n standard normal from (SEED, name in memory).
    """
    model.zero_grad()
    result = forward.contrastive(model, cases, "mrope")
    result["loss"].backward()
    rows: dict[str, list[float]] = {}
    unused = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.any()):
            unused.append(name)
            continue
        gradient = parameter.grad.double().numpy()
        rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
        noise = rng.standard_normal(gradient.shape)
        rows[name] = [float(np.linalg.norm(gradient)), float((gradient * noise).sum())]
    return {
        "queries": forward.QUERIES,
        "targets": forward.TARGETS,
        "temperature": forward.TEMPERATURE,
        "positions": "mrope",
        "loss": float(result["loss"]),
        "projection_seed": SEED,
        "norm_and_projection": rows,
        "without_gradient": sorted(unused),
    }


def _saved_name(key: str) -> str:
    key = key.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return re.sub(r"\.default\.weight$", ".weight", key)


_KEYS_0_11 = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "layer_replication", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_dora", "use_rslora"),
}


def _rename(backbone: str, folder: Path) -> None:
    """Names of adapter and golden as peft wrote them on transformers 4.4x."""
    if backbone == "qwen3_vl":
        return  # never renamed
    wrapped = "base_model.model."

    def old(name: str) -> str:
        grad = "grad/" if name.startswith("grad/") else ""
        name = name.removeprefix("grad/").removeprefix(wrapped)
        if backbone == "llava_next":
            name = name.replace("model.language_model.", "language_model.model.", 1)
            tower = "vision_tower.vision_model."
            name = re.sub(r"^model\.vision_tower\.(vision_model\.)?", tower, name)
        else:
            name = re.sub(r"^model\.(?=visual\.)", "", name)
            name = name.replace("model.language_model.", "model.", 1)
        return grad + wrapped + name

    for file in ("adapter_model.safetensors", "golden.safetensors"):
        tensors = load_file(folder / file)
        save_file(
            {old(k) if wrapped in k else k: v for k, v in tensors.items()},
            folder / file,
            metadata={"format": "pt"},
        )
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    golden["params_without_gradient"] = sorted(map(old, golden["params_without_gradient"]))
    write_json(folder / "golden.json", golden)
