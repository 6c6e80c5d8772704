# SPDX-License-Identifier: Apache-2.0
"""Sizes of a CLIP vision tower, as HF's CLIPVisionConfig names them, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm2vec_jax.models.shared.decoder_config import stack_values

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""CLIP's mean of each channel, of values in [0, 1]."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's standard deviation of each channel."""


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """HF's CLIPVisionConfig fields that decide the features; the defaults are ViT-L/14-336."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a crop (24 in the real tower)."""
        return self.image_size // self.patch_size

    def layers_used(self, feature_layer: int) -> int:
        """Layers that run to reach `hidden_states[feature_layer]` (23 of 24 for -2)."""
        states = self.num_hidden_layers + 1
        return feature_layer if feature_layer >= 0 else states + feature_layer


def read_clip(problems: list[str], vision: dict[str, Any]) -> ClipConfig:
    """Read CLIPVisionConfig fields; all but `layer_norm_eps` must be there.

    Args:
      problems: what is missing or not implemented is added here.
      vision: the fields.
    """
    for name, allowed in (
        ("hidden_act", ("quick_gelu", None)),
        ("num_channels", (3, None)),
        ("attention_dropout", (0, 0.0, None)),
    ):
        if vision.get(name) not in allowed:
            problems.append(
                f"vision_config.{name} is {vision.get(name)!r}; implemented: {allowed[0]!r}"
            )
    sizes: dict[str, Any] = {}
    for field in dataclasses.fields(ClipConfig):
        value = vision.get(field.name)
        if field.name == "layer_norm_eps" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            problems.append(f"vision_config.{field.name} must be a positive number, not {value!r}")
        else:
            sizes[field.name] = float(value) if field.name == "layer_norm_eps" else int(value)
    return ClipConfig(**sizes)


def clip_values(clip: ClipConfig, layers: int, remat: str) -> float:
    """Values of a crop that so many layers keep, see `decoder_config.stack_values`."""
    c, f = clip.hidden_size, clip.intermediate_size
    # Two norms, the stream between attention and MLP, sigmoid and gelu.
    values = stack_values(
        layers, remat, width=c, attended=c, products=5 * c + f, elementwise=3 * c + 2 * f
    )
    return (clip.patches_per_side**2 + 1) * values


def clip_flops(clip: ClipConfig, layers: int) -> float:
    """FLOPs of one crop through the patch embedding and so many layers."""
    c, f = clip.hidden_size, clip.intermediate_size
    patches = clip.patches_per_side**2
    seen = patches + 1
    layer = seen * (2 * 4 * c * c + 2 * 2 * c * f) + 4 * c * seen * seen
    return patches * 2 * clip.patch_size**2 * 3 * c + layers * layer
