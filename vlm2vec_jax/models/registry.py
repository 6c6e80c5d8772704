# SPDX-License-Identifier: Apache-2.0
"""Which backbone a model folder holds: HF's `model_type` to the folder of this package."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.base import Backbone

BACKBONES = {
    "phi3_v": "vlm2vec_jax.models.phi3v.backbone",
    "llava_next": "vlm2vec_jax.models.llava_next.backbone",
    "qwen2_vl": "vlm2vec_jax.models.qwen2_vl.backbone",
    "qwen2_5_vl": "vlm2vec_jax.models.qwen2_5_vl.backbone",
    "qwen3_vl": "vlm2vec_jax.models.qwen3_vl.backbone",
}
"""`model_type` -> module with a `BACKBONE`."""


def backbone_of(folder: str | Path) -> Backbone:
    """The backbone of an HF model folder.

    Raises:
      UserError: if there is no readable `config.json`, or its `model_type` is not known here.
    """
    path = Path(folder) / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise UserError(f"{folder} is no model folder: it has no config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if model_type not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise UserError(
            f"{path}: model_type {model_type!r} is not known; known: {known}. How to add one: "
            f"docs/porting-a-backbone.md"
        )
    return backbone(model_type)


def backbone(model_type: str) -> Backbone:
    """The backbone of one of the known model types."""
    return importlib.import_module(BACKBONES[model_type]).BACKBONE
