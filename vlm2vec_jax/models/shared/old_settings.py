# SPDX-License-Identifier: Apache-2.0
"""`config.json` as transformers 4.x has it, from what transformers 5 saves; both read the result.

transformers 4.46 knows no `rope_parameters`, `dtype` or, for Qwen-VL, `text_config`: it would take
its defaults instead, in silence. transformers 5 reads the older form (and so do we).
"""

from __future__ import annotations

from typing import Any


def with_old_rope(text: dict[str, Any]) -> dict[str, Any]:
    """A text model's settings with `rope_theta` and `rope_scaling` for `rope_parameters`."""
    found = dict(text)
    rope = found.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
    kind = "mrope" if "mrope_section" in scaling else rope.get("rope_type", "default")
    if kind != "default":
        found["rope_scaling"] = {**scaling, "type": kind}
    return _with_old_dtype(found)


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """The form of models whose text model has a `text_config` in both generations."""
    found = _with_old_dtype(config)
    if "text_config" in found:
        found["text_config"] = with_old_rope(found["text_config"])
    return found


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The form of models whose text model's settings stood beside the whole's (Qwen-VL)."""
    found = with_old_rope(config)
    text = with_old_rope(found.pop("text_config", {}))
    text.pop("model_type", None)
    return {**found, **{name: v for name, v in text.items() if found.get(name) is None}}


def _with_old_dtype(config: dict[str, Any]) -> dict[str, Any]:
    found = dict(config)
    if "dtype" in found:
        found.setdefault("torch_dtype", found.pop("dtype"))
        found.pop("dtype", None)
    return found
