# SPDX-License-Identifier: Apache-2.0
"""Universal multimodal embeddings from vision-language models, in JAX.

The public face, and lazy: importing the package loads neither jax nor a tokenizer and touches no
device. `Embedder` and `MultimodalInput` are fetched from their modules when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm2vec_jax.embedder import Embedder
    from vlm2vec_jax.inputs import MultimodalInput

__version__ = "0.1.0"
__all__ = ["Embedder", "MultimodalInput", "__version__"]

_HOME = {"Embedder": "vlm2vec_jax.embedder", "MultimodalInput": "vlm2vec_jax.inputs"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
