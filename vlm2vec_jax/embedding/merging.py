# SPDX-License-Identifier: Apache-2.0
"""What merging an adapter does to embeddings: measured on sample inputs, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.models.folders import ModelSource, locate
from vlm2vec_jax.models.loading import Model, load_model, open_processor
from vlm2vec_jax.nn.compute import Compute


def embed_samples(model: Model, source: ModelSource) -> np.ndarray:
    """Embeddings float32 [N, D] of the sample inputs, computed in float32; changes the model."""
    processor = open_processor(
        model, source, {"num_crops": 1} if "num_crops" in model.backbone.options else {}
    )
    return Embedder(model, processor, Compute("float32"), None).encode(sample_inputs())


def merge_difference(before: np.ndarray, folder: Path, dtype: str) -> str:
    """Embed the sample inputs with a merged model and say how far they went from `before`.

    Args:
      before: what `embed_samples` gave with the adapter beside the weights.
      folder: the merged model.
      dtype: to hold its weights in: what they were written as, or a wider one.
    """
    source = locate(folder)
    model = load_model(source.base, dtype_of=lambda path: jnp.dtype(dtype))
    after = embed_samples(model, source)
    largest = float(np.abs(after - before).max())
    cosine = float(np.sum(after * before, axis=-1).min())
    return (
        f"merging changed the embeddings of {len(before)} sample inputs by at most {largest:.2e} "
        f"(smallest cosine {cosine:.6f}; computed in float32 with the weights as written)"
    )


def sample_inputs() -> list[Any]:
    """Some texts, an image alone and one with a question: what merging is measured on."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    image = small.resize((320, 240), Image.Resampling.BICUBIC)
    return [
        "A cat and a dog",
        "Find me an everyday image that matches the given caption: a red car in the rain.",
        "1 + 1 = 2; ¿qué hora es? 今何時ですか。",
        {"text": "<|image_1|> Represent the given image.", "images": [image]},
        {
            "text": "<|image_1|> Represent the given image with the following question: "
            "What colour is the sky?",
            "images": [image.rotate(90, expand=True)],
        },
    ]
