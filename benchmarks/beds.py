# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks run on: Phi-3.5-Vision tiny, scaled down or real, and made-up inputs for it.

`scaled` keeps crops of 336 pixels and the shares of decoder and CLIP per image (2.8 to 1) about as
in the real model (3 to 1), at a size that a CPU computes in seconds. `real` has the published
sizes and random weights. `tiny` is for tests.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.inputs import EncodedInput, VisualLayout

_PHI = {
    "model_type": "phi3_v",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
}


def _sizes(decoder: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json; `vision` has the sizes of the CLIP tower."""
    half = decoder["hidden_size"] // decoder["num_attention_heads"] // 2
    rope = {"type": "su", "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    merged = (vision["image_size"] // vision["patch_size"] // 2) ** 2
    image = {
        "name": "clip_vision_model",
        "image_dim_out": vision["hidden_size"],
        "num_img_tokens": merged,
    }
    return {
        **_PHI,
        **decoder,
        "num_key_value_heads": decoder["num_attention_heads"],
        "rope_scaling": rope,
        "img_processor": image,
        "vision_config": {"patch_size": 14, "layer_norm_eps": 1e-5, **vision},
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _sizes(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "vocab_size": 64,
        },
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
    ),
    "scaled": _sizes(
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "vocab_size": 1024,
        },
        {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 336,
            "patch_size": 14,
        },
    ),
    "real": _sizes(
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32064,
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    ),
}

TARGETS = (
    "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj"
)  # fmt: skip
"""What the reference's recipe adapts, as endings of HF names."""


@dataclasses.dataclass(frozen=True)
class Bed:
    """A size of the model, and inputs for it.

    Attributes:
      size: a name in `SIZES`.
      layers: of the decoder, where not as the size says.
    """

    size: str = "scaled"
    layers: int | None = None

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """What a config.json would say."""
        fields = SIZES[self.size]
        return fields if self.layers is None else {**fields, "num_hidden_layers": self.layers}

    @functools.cached_property
    def config(self):
        """Phi3VConfig."""
        from vlm2vec_jax.models.phi3v.config import from_dicts

        return from_dicts(self.fields, self.fields["vision_config"])

    @functools.cached_property
    def layout(self) -> VisualLayout:
        """Of a row's visual feature table."""
        from vlm2vec_jax.models.phi3v.flops import visual_layout

        return visual_layout(self.config)

    def model(self, dtype: str = "float32"):
        """The model with random weights, as `models.loading.Model`."""
        import jax
        from flax import nnx

        from vlm2vec_jax.models.loading import Model
        from vlm2vec_jax.models.phi3v.backbone import BACKBONE

        def build():
            module = BACKBONE.build(self.config, rngs=nnx.Rngs(0))
            graphdef, state = nnx.split(module)
            return graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), state)

        if dtype == "float32":
            module = BACKBONE.build(self.config, rngs=nnx.Rngs(0))
        else:
            # Under jit, so that the whole model never stands there in float32.
            graphdef, _ = nnx.eval_shape(build)
            module = nnx.merge(graphdef, jax.jit(lambda: build()[1])())
        return Model(BACKBONE, self.config, Path("."), module)

    def adapted(self, kind: str, *, dtype: str = "float32", dropout: float = 0.0, rank: int = 8):
        """The model with a fresh adapter of `kind` on the reference's targets.

        PEFT starts from B = 0; here B is random, so that gradients flow and norms differ from
        the magnitudes as they do in the middle of a run.
        """
        import jax

        from vlm2vec_jax.models.loading import add_adapter, fill, flatten
        from vlm2vec_jax.weights.adapter_config import AdapterConfig, resolve

        model = self.model(dtype)
        adapter = AdapterConfig(rank, 8 * rank, targets=TARGETS, dora=kind == "dora")
        linears = resolve(adapter, model.table)
        dora = adapter.dora
        add_adapter(model.module, linears, dora=dora, dropout=dropout, fused_dropout=True)
        drawn = {
            path: 0.02 / rank * jax.random.normal(jax.random.key(n), leaf.shape, leaf.dtype)
            for n, (path, leaf) in enumerate(flatten(model.module).items())
            if path.endswith("lora_b")
        }
        model.module = fill(model.module, {**flatten(model.module), **drawn})
        return model

    def text(self, rng: np.random.Generator, length: int) -> EncodedInput:
        """A text of random tokens."""
        tokens = rng.integers(3, self.fields["vocab_size"], length).astype(np.int32)
        place = np.arange(length, dtype=np.int32)
        return EncodedInput(tokens, np.full(length, -1, np.int32), place)

    def texts(self, rng: np.random.Generator, count: int, multiple: int = 1, **how: Any):
        """Texts of lognormal lengths, rounded up to a multiple."""
        lengths = text_lengths(rng, count, **how)
        return [self.text(rng, n) for n in -(-lengths // multiple) * multiple]

    def photo(
        self, rng: np.random.Generator, rows: int, columns: int, question: int
    ) -> EncodedInput:
        """A photograph of rows x columns crops and a question of some tokens."""
        from vlm2vec_jax.models.phi3v.hd_transform import (
            crop_info,
            hd_geometry,
            image_feature_index,
        )

        side = self.config.crop_size
        geometry = hd_geometry(side * columns, side * rows, rows * columns, side)
        assert geometry is not None and (geometry.rows, geometry.columns) == (rows, columns)
        info = crop_info(geometry)
        crops = rng.integers(0, 256, (len(info), side, side, 3), np.uint8)
        crops[: geometry.views] = 0
        index = image_feature_index(rows, columns, self.config.merged_side, "sub_glb")
        words = self.text(rng, question)
        tokens = np.concatenate([np.ones(1), np.zeros(len(index)), words.tokens]).astype(np.int32)
        features = np.concatenate([[-1], index, words.feature_index]).astype(np.int32)
        place = np.arange(len(tokens), dtype=np.int32)
        visual = {"crops": crops, "crop_info": np.asarray(info, np.int32)}
        return EncodedInput(tokens, features, place, visual, len(info))

    def flops(self, items) -> float:
        """Useful FLOPs of the forward passes of some inputs."""
        from vlm2vec_jax.models.phi3v.flops import forward_flops

        return sum(forward_flops(self.config, len(item), item.units) for item in items)


class NoProcessor:
    """What the Embedder asks of a processor when its inputs are encoded already."""

    def __init__(self, layout: VisualLayout):
        self.visual_layout = layout


def text_lengths(rng: np.random.Generator, count: int, *, median=24, sigma=0.7, most=250):
    """Lognormal token counts, clipped to [2, most]."""
    drawn = rng.lognormal(np.log(median), sigma, count)
    return np.clip(np.round(drawn), 2, most).astype(int)
