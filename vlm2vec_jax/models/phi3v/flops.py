# SPDX-License-Identifier: Apache-2.0
"""What an input costs a Phi-3-Vision model: its size in tokens and crops, and useful FLOPs.

Useful is the least that gives the embedding: causal attention within the sequence, CLIP up to the
layer that is used, the last decoder layer for the pooled token only, no LM head, no padding. A
multiply and an add are two FLOPs. Norms, rotary positions and softmax are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm2vec_jax.inputs import VisualLayout
from vlm2vec_jax.models.phi3v.config import Phi3VConfig
from vlm2vec_jax.models.phi3v.hd_transform import SHARED_FEATURES, hd_geometry
from vlm2vec_jax.models.shared.clip_config import clip_flops
from vlm2vec_jax.models.shared.decoder_config import decoder_flops


def forward_flops(config: Phi3VConfig, tokens: int, crops: int | Sequence[int] = 0) -> float:
    """FLOPs of one sequence's forward pass.

    Args:
      config: sizes.
      tokens: all tokens of the sequence, image tokens included.
      crops: visual units, global views included; of each image, or of all together.
    """
    count = crops if isinstance(crops, int) else sum(crops)
    return decoder_flops(config.decoder, tokens) + count * crop_flops(config)


def crop_flops(config: Phi3VConfig) -> float:
    """FLOPs of one crop: patches, CLIP's used layers, projection of its tokens."""
    c, d = config.clip.hidden_size, config.hidden_size
    project = config.tokens_per_crop * 2 * (4 * c * d + d * d)
    return clip_flops(config.clip, config.clip_layers_used) + project


def image_size(config: Phi3VConfig, num_crops: int, width: int, height: int) -> tuple[int, int]:
    """Tokens and crops of an image of this size in pixels."""
    geometry = hd_geometry(width, height, num_crops, config.crop_size)
    if geometry is None:
        raise ValueError(f"an image of {width} x {height} pixels is too narrow")
    return geometry.tokens(config.merged_side), geometry.units


def visual_layout(config: Phi3VConfig) -> VisualLayout:
    """How a row's visual feature table is laid out: newline, separator, then the crops."""
    crop = ((config.crop_size, config.crop_size, 3), "uint8")
    return VisualLayout(
        shared_features=SHARED_FEATURES,
        features_per_unit=config.tokens_per_crop,
        units={"crops": crop, "crop_info": ((5,), "int32")},
    )
