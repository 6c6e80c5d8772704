# SPDX-License-Identifier: Apache-2.0
"""Our encoders as models of the `mteb` package: `mteb.evaluate(MtebEncoder(embedder, ...), tasks)`.

mteb is asked for nothing before a method of it needs it; it brings torch, so it is no requirement
of this package. No benchmark of mteb is MMEB: MIEB has other tasks and other candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import IMAGE_MARKER, MultimodalInput

IMAGE_PROMPT = "Represent the given image."
"""What VLM2Vec's data says to an image that comes without words."""


class MtebEncoder:
    """mteb's `EncoderProtocol` around `vlm2vec_jax.Embedder`, or anything with its `encode`."""

    def __init__(
        self,
        encoder: Any,
        name: str,
        revision: str | None = None,
        *,
        prompts: Mapping[str, str] | None = None,
        image_prompt: str = IMAGE_PROMPT,
        encode_options: Mapping[str, Any] | None = None,
    ):
        """Wrap an encoder.

        Args:
          encoder: `encode(inputs)` takes a list of `MultimodalInput`, gives float32 [N, D].
          name: `organisation/model`, under which mteb keeps results.
          revision: of the model.
          prompts: instruction by task name, task type, or `query` and `document`, the first of them
            that is there; otherwise what the task itself says for queries, which "" switches off.
          image_prompt: for an image without text and without an instruction.
          encode_options: passed to `encoder.encode`.

        Raises:
          UserError: a name without an organisation, which mteb does not take.
        """
        if name.count("/") != 1:
            raise UserError(f"mteb needs a model name of the form organisation/model, not {name!r}")
        self.encoder, self.name, self.revision = encoder, name, revision or "none"
        self.prompts, self.image_prompt = dict(prompts or {}), image_prompt
        self.options = dict(encode_options or {})

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb wants to know of a model (`mteb.models.ModelMeta`)."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        return ModelMeta.create_empty(
            overwrites={
                "name": self.name,
                "revision": self.revision,
                "framework": ["JAX"],
                "modalities": ["text", "image"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": getattr(self.encoder, "dimension", None),
                "use_instructions": True,
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed what mteb hands over in batches, float32 [N, D].

        Raises:
          UserError: for audio, video, or items without text and image.
        """
        del hf_split, hf_subset, kwargs
        instruction = self.instruction(task_metadata, prompt_type)
        items = [item for batch in inputs for item in self.inputs(batch, instruction)]
        return np.asarray(self.encoder.encode(items, **self.options), np.float32)

    def instruction(self, task_metadata: Any, prompt_type: Any) -> str:
        """The words in front of an item of a task."""
        side = getattr(prompt_type, "value", prompt_type)
        for key in (task_metadata.name, task_metadata.type, side):
            if key in self.prompts:
                return self.prompts[key]
        said = task_metadata.prompt
        if isinstance(said, Mapping):
            return str(said.get(side) or "")
        return str(said or "") if side == "query" else ""

    def inputs(self, batch: Mapping[str, Any], instruction: str) -> list[MultimodalInput]:
        """A batch's items as ours: the marker, the instruction, the text, one space between them.

        A text that has image markers of its own is taken verbatim.
        """
        for name in ("audio", "video"):
            if any(value is not None for value in batch.get(name, ())):
                raise UserError(f"{name} cannot be embedded")
        count = max((len(batch[n]) for n in ("text", "image") if n in batch), default=0)
        empty = [None] * count
        columns = (batch.get(name, empty) for name in ("text", "image", "title"))
        items = []
        for text, image, title in zip(*columns, strict=True):
            words = " ".join(part for part in (title, text) if part)
            if image is None and not words:
                raise UserError("an item of the task has neither text nor image")
            if image is None:
                items.append(MultimodalInput(" ".join(p for p in (instruction, words) if p)))
                continue
            if not IMAGE_MARKER.search(words):
                said = instruction or ("" if words else self.image_prompt)
                words = " ".join(p for p in ("<|image_1|>", said, words) if p)
            items.append(MultimodalInput(words, (image,)))
        return items

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [N, M], as mteb's own models give them."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [N] of pairs."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)
