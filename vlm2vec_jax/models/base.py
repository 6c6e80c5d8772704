# SPDX-License-Identifier: Apache-2.0
"""What a backbone is: the parts that everything outside of its folder asks it for."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from vlm2vec_jax.inputs import EncodedInput, MultimodalInput, VisualLayout
from vlm2vec_jax.row_choice import Price
from vlm2vec_jax.weights.rules import Table
from vlm2vec_jax.weights.sentence_transformers import SentenceTransformers


class Processor(Protocol):
    """From what the user wrote to what the model reads (host side, thread-safe, no jax)."""

    @property
    def visual_layout(self) -> VisualLayout:
        """How a row's visual feature table is laid out."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that changes an encoding, JSON-able, for fingerprints."""
        ...

    @property
    def tokenizer_hash(self) -> str:
        """Identity of the tokenizer."""
        ...

    def length(self, item: MultimodalInput) -> tuple[int, int]:
        """Tokens and visual units of an input, without decoding pixels."""
        ...

    def encode(self, item: MultimodalInput) -> EncodedInput:
        """Encode one input."""
        ...


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One vision-language model family; `docs/porting-a-backbone.md` says how to add one.

    Attributes:
      name: HF's `model_type`.
      read_config: HF folder -> configuration (frozen dataclass).
      build: (configuration, rngs) -> nnx module with `model(batch, compute, key=...)`.
      table: configuration -> HF names of all leaves, with the spellings of every generation.
      processor: (folder, configuration, **options) -> Processor; a keyword for each of `options`,
        None for what the folder says.
      options: the processor options (`options.OPTIONS`) that mean something here.
      sharding: (path pattern, PartitionSpec) rules for `parallel.sharding`.
      unused: pattern of leaves that never influence an embedding: never trained.
      targets: the linears that `adapter.targets=auto` adapts, as PEFT's `target_modules`: a list
        of endings of HF names, or one regular expression.
      width: configuration -> D.
      max_tokens: configuration -> longest sequence that the positions allow.
      activation_bytes: (configuration, remat, remat_vision, bytes of an element) -> estimated bytes
        that the backward pass keeps on the device per token and per visual unit.
      flops: (configuration, tokens, visual units) -> FLOPs of one sequence's forward pass that
        its embedding needs; units are a number for one image, or those of each image.
      image_size: (configuration, options by name, width, height) -> tokens and visual units of an
        image; where no processor is read. UserError for an option that it cannot do without.
      visual_layout: configuration -> layout of a row's arrays.
      reference_options: the options that VLM2Vec's own checkpoints of this family are used with,
        by generation (`v1`, `v2`), taken where such a checkpoint is recognised.
      sentence_transformers: how an export for sentence-transformers looks, where that library can
        load this family through transformers; else the reason why it cannot, in words.
    """

    name: str
    read_config: Callable[[Path], Any]
    build: Callable[..., Any]
    table: Callable[[Any], Table]
    processor: Callable[..., Processor]
    options: tuple[str, ...]
    sharding: list[tuple[str, Any]]
    unused: str
    targets: tuple[str, ...] | str
    width: Callable[[Any], int]
    max_tokens: Callable[[Any], int]
    activation_bytes: Callable[[Any, str, str, int], tuple[float, float]]
    flops: Callable[..., float]
    image_size: Callable[[Any, Mapping[str, Any], int, int], tuple[int, int]]
    visual_layout: Callable[[Any], VisualLayout]
    reference_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    sentence_transformers: SentenceTransformers | str = (
        "nobody has tried yet whether sentence-transformers can load this family"
    )

    def price(self, config: Any) -> Price:
        """What rows cost in a model of this configuration."""
        return Price.from_flops(self.width(config), functools.partial(self.flops, config))

    def is_unused(self, path: str) -> bool:
        """Whether a leaf cannot influence an embedding."""
        return re.fullmatch(self.unused, path) is not None
