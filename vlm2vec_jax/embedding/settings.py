# SPDX-License-Identifier: Apache-2.0
"""What an `Embedder` remembers about how to embed: its prompts and how long its vectors are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vlm2vec_jax.embedding import prompts as prompting
from vlm2vec_jax.embedding import vectors as vector
from vlm2vec_jax.inputs import MultimodalInput


class EncodingSettings:
    """Prompts, length of vectors, similarities: the parts of an `Embedder` that need no model.

    Attributes:
      dimension: D of the model.
      truncate_dim: how many leading coordinates `encode` keeps unless told otherwise; None: all.
    """

    def __init__(self, dimension: int):
        self.dimension = dimension
        self.truncate_dim: int | None = None
        self._prompts = prompting.Prompts()

    @property
    def prompts(self) -> dict[str, str]:
        """Instructions by name, such as `query` and `target`; assign a dict to change them."""
        return self._prompts.named

    @prompts.setter
    def prompts(self, named: Mapping[str, str]) -> None:
        default = self._prompts.default
        self._prompts = prompting.Prompts(dict(named), default if default in named else None)

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt that `encode` uses when it is told none."""
        return self._prompts.default

    @default_prompt_name.setter
    def default_prompt_name(self, name: str | None) -> None:
        self._prompts = prompting.Prompts(self._prompts.named, name)

    def get_embedding_dimension(self) -> int:
        """Numbers of a vector as `encode` returns it: `truncate_dim`, or all."""
        return self.truncate_dim or self.dimension

    @contextlib.contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Inside of the `with` block `encode` keeps so many coordinates."""
        before = self.truncate_dim
        self.truncate_dim = vector.check_dimension(truncate_dim, self.dimension)
        try:
            yield
        finally:
            self.truncate_dim = before

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarity of each of `a` [N, D] with each of `b` [M, D]: float32 [N, M]."""
        return vector.similarity(a, b)

    @staticmethod
    def similarity_pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarity of `a[i]` with `b[i]`: float32 [N]."""
        return vector.similarity_pairwise(a, b)

    def _how(
        self,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
    ) -> tuple[Callable[[Any], MultimodalInput], Callable[[np.ndarray], np.ndarray]]:
        """What is done to each input before the model, and to the vectors behind it."""
        words = self._prompts.text(prompt, prompt_name)
        dim = vector.check_dimension(truncate_dim, self.dimension) or self.truncate_dim
        return (
            lambda value: prompting.with_prompt(MultimodalInput.of(value), words),
            lambda found: vector.truncate(found, dim, renormalize=normalize_embeddings),
        )

    def _named(self, names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
        if options.get("prompt") is None and options.get("prompt_name") is None:
            return {**options, "prompt_name": self._prompts.first_of(names)}
        return options
