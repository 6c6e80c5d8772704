# SPDX-License-Identifier: Apache-2.0
"""What a user may mean by `--model`: an HF folder, a training output, an adapter, a hub id."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.record import identity, read_record
from vlm2vec_jax.weights.adapter_config import CONFIG as ADAPTER_CONFIG
from vlm2vec_jax.weights.adapter_config import read_config

_CARD = 1 << 16
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model lie.

    Attributes:
      named: what the user gave, for messages.
      base: local HF folder with configuration, tokenizer and base weights.
      adapter: PEFT folder on top of it, or None.
      trained: training output folder whose newest checkpoint holds the trained leaves, or None.
      record: its `vlm2vec.json`, if there is one.
    """

    named: str
    base: Path
    adapter: Path | None = None
    trained: Path | None = None
    record: dict[str, Any] | None = None


def locate(named: str | os.PathLike, adapter: str | os.PathLike | None = None) -> ModelSource:
    """Find the parts of a model.

    Args:
      named: an HF folder, a training output folder, an adapter folder (its base is the one it
        names), or a hub id.
      adapter: a PEFT folder, hub id, or training output with an adapter, to put on top.

    Raises:
      UserError: if something is not there or does not fit together.
    """
    folder = local_folder(named)
    record = read_record(folder)
    if (folder / ADAPTER_CONFIG).exists():
        if adapter is not None:
            raise UserError(f"{named} is an adapter itself; another one cannot go on top of it")
        base = read_config(folder).base
        if not base:
            raise UserError(f"{folder / ADAPTER_CONFIG} names no base model; give it by --model")
        return ModelSource(str(named), local_folder(base, near=folder), folder, record=record)
    if (folder / "checkpoints").is_dir():
        if adapter is not None:
            raise UserError(f"{named} is a training output; another adapter cannot go on top")
        return _trained(named, folder, record)
    if adapter is None:
        return ModelSource(str(named), folder, record=record)
    top = local_folder(adapter)
    if (top / "checkpoints").is_dir():
        trained = read_record(top)
        if trained is None or trained["adapter"] is None:
            raise UserError(f"{adapter} is a training output without an adapter; use it as --model")
        return ModelSource(str(named), folder, trained=top, record=trained)
    return ModelSource(str(named), folder, top, record=read_record(top) or record)


def _trained(named: str | os.PathLike, folder: Path, record: dict[str, Any] | None) -> ModelSource:
    if record is None:
        raise UserError(f"{folder} has checkpoints but no vlm2vec.json: is it whole?")
    base = record["base"]
    there = [Path(p) for p in (base["path"], base["absolute"]) if p and Path(p).is_dir()]
    for place in there:
        if base["identity"] in (None, identity(place)):
            return ModelSource(str(named), place, trained=folder, record=record)
    if base["absolute"] is None:
        return ModelSource(str(named), local_folder(base["path"]), trained=folder, record=record)
    trouble = "holds other weights now" if there else "is not there any more"
    advice = (
        "put it back"
        if record["adapter"] is None
        else (f"put it back, or name where it is now: --model BASE --adapter {folder}")
    )
    raise UserError(
        f"{folder} was trained from the model in {base['path']}, which {trouble}; {advice}"
    )


def of_the_reference(source: ModelSource) -> str | None:
    """Whether a model was published by the authors of VLM2Vec, as far as its folder tells.

    Such a folder has no record of ours. It goes by the name in its path or hub id, the hub cache's
    folder, or its model card.

    Returns:
      Its generation, `v1` or `v2`; None for a model that is not theirs.
    """
    if source.record is not None:
        return None
    folder = source.adapter or source.base
    # Of the path only what names the model: people work in folders called vlm2vec.
    names = [*Path(source.named).parts[-2:]] if source.adapter is None else []
    names += [folder.name, *(p for p in folder.resolve().parts if p.startswith("models--"))]
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:_CARD]
    except OSError:
        card = ""
    if "vlm2vec" not in card.lower() + " ".join(names).lower():
        return None
    # Cards of v1 mention V2, so only the title of a card counts.
    title = next((line for line in card.splitlines() if line.startswith("# ")), "")
    return "v2" if any("vlm2vec-v2" in text.lower() for text in (*names, title)) else "v1"


def local_folder(named: str | os.PathLike, near: Path | None = None) -> Path:
    """The local folder of a path or hub id; a hub id is looked up in the cache or fetched.

    Args:
      named: path or id.
      near: where a relative path may also start from.

    Raises:
      UserError: if it is neither.
    """
    places = [Path(named)] if near is None else [Path(named), near / named, near.parent / named]
    for place in places:
        if place.is_dir():
            return place
    if places[0].exists():
        raise UserError(f"{named} is a file; a model is a folder")
    parts = str(named).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(f"there is no model folder {named}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(named), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the client raises a dozen kinds, from offline to forbidden
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"there is no folder {named}, and as a hub id it cannot be fetched: {reason}"
        ) from None
