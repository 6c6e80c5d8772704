# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL's processor: the family's, and Qwen3-VL-Embedding's way of asking.

Qwen3-VL-Embedding reads every input as a conversation: a system turn with the instruction, a user
turn with images (between vision start and end) and text, and the beginning of the assistant's
answer, whose last token is pooled. Behaviour: the example code of its model card.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

from vlm2vec_jax.models.qwen_vl import processor as family
from vlm2vec_jax.models.qwen_vl.config import QwenVLConfig
from vlm2vec_jax.models.tokenizer import TextTokenizer

OPTIONS = (*family.OPTIONS, "template", "instruction")
INSTRUCTION = "Represent the user's input."
EMBEDDING_UNITS = (4, 1800)
"""Fewest and most units of an image in the model card's code."""
TEMPLATES = {
    "embedding": (
        "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
}
"""`template` -> what stands before and behind images and text."""
_CARD = 1 << 16


class Qwen3VLProcessor(family.QwenVLProcessor):
    """Tokens, patches and positions; thread-safe."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        config: QwenVLConfig,
        *,
        template: str = "none",
        instruction: str = INSTRUCTION,
        **chosen: Any,
    ):
        """Set up.

        Args:
          tokenizer: of the model.
          config: of the model.
          template: `none` reads inputs as they are; `embedding` puts them in Qwen3-VL-Embedding's
            conversation, which also wraps markers and has pixel limits of its own.
          instruction: of the system turn; gets a full stop if it ends without punctuation.
          **chosen: as in the family's processor.

        Raises:
          UserError: listing every setting that cannot be used.
        """
        self._template = template
        instruction = instruction.strip() or INSTRUCTION
        if not unicodedata.category(instruction[-1]).startswith("P"):
            instruction += "."
        self._instruction = instruction
        if template == "embedding":
            area = config.vision.unit_pixels**2
            chosen.setdefault("image_markers", "wrapped")
            if "pixel_limits" not in chosen:
                chosen.setdefault("min_pixels", EMBEDDING_UNITS[0] * area)
                chosen.setdefault("max_pixels", EMBEDDING_UNITS[1] * area)
        super().__init__(tokenizer, config, **chosen)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, config: QwenVLConfig, **chosen: Any
    ) -> Qwen3VLProcessor:
        """Read a model folder's tokenizer; options that are None are the folder's or the default.

        A folder that is Qwen3-VL-Embedding, by its name or its model card, gets its template.

        Raises:
          UserError: for missing or contradictory files, and unusable options.
        """
        given = {name: value for name, value in chosen.items() if value is not None}
        if "template" not in given and is_embedding_model(folder):
            given["template"] = "embedding"
        return cls(family.load_tokenizer(folder), config, **given)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything here that changes an encoding."""
        asked = {"template": self._template, "instruction": self._instruction}
        return {**super().settings, **asked}

    def _templated(self, text: str) -> str:
        before, behind = TEMPLATES.get(self._template, ("", ""))
        return before.replace("{instruction}", self._instruction) + text + behind


def is_embedding_model(folder: str | os.PathLike) -> bool:
    """Whether a folder is a published Qwen3-VL-Embedding, by its name or its model card."""
    path = Path(folder)
    names = [path.name, *(p for p in path.resolve().parts if p.startswith("models--"))]
    try:
        names.append((path / "README.md").read_text(encoding="utf-8", errors="replace")[:_CARD])
    except OSError:
        pass
    return any("qwen3-vl-embedding" in name.lower() for name in names)
