# SPDX-License-Identifier: Apache-2.0
"""The model card (`README.md`) of an exported folder: front matter for the hub, facts, usage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT = ("license", "license_name", "license_link", "language")
"""Front matter of the base model's card that holds for what is made from it."""

_LIBRARY = {
    "hf": "transformers",
    "merged": "transformers",
    "peft": "peft",
    "sentence-transformers": "sentence-transformers",
}
_WHAT = {
    "hf": "a full model",
    "merged": "a full model with its adapter merged into the weights",
    "peft": "a PEFT adapter",
    "sentence-transformers": "a full model in the form of sentence-transformers",
}


def model_card(record: Mapping[str, Any], *, base: str | None, source: Path) -> str:
    """Write the card.

    Args:
      record: contents of `vlm2vec.json`, with `exported`.
      base: hub id or path of the base model; only an id goes into the front matter.
      source: folder of the base model, whose card may name a licence.
    """
    exported = record["exported"]
    form = exported["format"]
    adapter = record.get("adapter") or exported.get("adapter")
    named = base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
    front = [
        *([f"base_model: {named}"] if named else []),
        *_kept(source),
        f"library_name: {_LIBRARY[form]}",
        "pipeline_tag: feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("multimodal", "embedding", "vlm2vec", "mmeb")),
        *(["- lora", *([f"- base_model:adapter:{named}"] if named else [])] * (form == "peft")),
    ]
    rows = {
        "architecture": f"`{record['backbone']}`",
        "base model": named or (Path(base).name if base else None),
        "pooling": f"{record['pooling']} token, "
        + ("L2-normalised" if record["normalize"] else "not normalised"),
        "temperature of the loss": record.get("temperature"),
        "training step": exported.get("step"),
        "configuration": record.get("run"),
        "adapter": None if adapter is None else _adapter(adapter),
        "element type": exported.get("dtype"),
        "module names of transformers": exported.get("hf_layout"),
        **{name: value for name, value in record["processor"].items() if value is not None},
    }
    lines = ["---", *front, "---", "", f"# {_WHAT[form][0].upper()}{_WHAT[form][1:]}", ""]
    lines += [
        "Embeds texts, images, and both together under an instruction. Written by vlm2vec_jax; "
        "`vlm2vec.json` says the same for programs.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
        "",
    ]
    prompts = record.get("prompts") or {}
    if prompts:
        lines += ["Prompts of the training data:", ""]
        lines += [f"* `{name}`: {text!r}" for name, text in prompts.items()]
        lines.append("")
    lines += [
        "```python",
        "from vlm2vec_jax import Embedder",
        "",
        'embedder = Embedder.from_pretrained("this folder")',
        'embedder.encode(["A cat and a dog"])  # float32 [1, D], length 1',
        "```",
        "",
    ]
    return "\n".join(lines)


def _adapter(spec: Mapping[str, Any]) -> str:
    kind = "DoRA" if spec.get("use_dora") else "LoRA"
    targets = spec["target_modules"]
    shown = (
        f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{t}`" for t in targets[:12])
    )
    more = (
        "" if isinstance(targets, str) or len(targets) <= 12 else f" and {len(targets) - 12} more"
    )
    return f"{kind}, rank {spec['r']}, alpha {spec['lora_alpha']}, on {shown}{more}"


def _kept(source: Path) -> list[str]:
    """Lines of the base model's front matter that are kept; simple `key: value` lines only."""
    try:
        text = (source / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    lines = match[1].splitlines() if match else []
    return [line for line in lines if re.fullmatch(rf"({'|'.join(KEPT)}): \S.*", line)]
