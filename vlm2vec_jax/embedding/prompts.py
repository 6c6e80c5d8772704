# SPDX-License-Identifier: Apache-2.0
"""Prompts: instructions that a model was trained to see in front of queries and targets.

A prompt is a prefix of the text, not a turn of a conversation. Where an input opens with its
images, the prompt follows their markers, as in VLM2Vec's data:
`<|image_1|> Represent the given image with the following question: What is this?`
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import IMAGE_MARKER, MultimodalInput

QUERY_NAMES = ("query",)
TARGET_NAMES = ("target", "document", "passage", "corpus")
"""What the prompt of what is searched may be called, in order of preference."""

SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
_LEADING_MARKERS = re.compile(rf"(?:\s*{IMAGE_MARKER.pattern})*")


@dataclasses.dataclass
class Prompts:
    """Named prompts and the one used when none is asked for.

    Attributes:
      named: name -> text.
      default: name of the prompt that `encode` uses by itself, or None.
    """

    named: dict[str, str] = dataclasses.field(default_factory=dict)
    default: str | None = None

    def __post_init__(self):
        self.named = checked(self.named, "prompts")
        if self.default is not None:
            self.text(None, self.default)

    def text(self, prompt: str | None, name: str | None) -> str:
        """The prompt to use: `prompt` itself, else the one called `name`, else the default.

        Raises:
          UserError: if both are given, or there is no prompt of the name.
        """
        if prompt is not None and name is not None:
            raise UserError(f"both prompt and prompt_name={name!r} are given; give one of them")
        if prompt is not None:
            if not isinstance(prompt, str):
                raise UserError(f"prompt must be a string, not {type(prompt).__name__}")
            return prompt
        name = self.default if name is None else name
        if name is None:
            return ""
        if name not in self.named:
            known = ", ".join(sorted(self.named)) or "none; set some: embedder.prompts = {...}"
            raise UserError(f"there is no prompt called {name!r}; known: {known}")
        return self.named[name]

    def first_of(self, names: tuple[str, ...]) -> str | None:
        """The first of these names that has a prompt, or None."""
        return next((name for name in names if name in self.named), None)


def checked(value: Any, where: str) -> dict[str, str]:
    """A mapping of names to texts.

    Raises:
      UserError: if it is something else.
    """
    if not isinstance(value, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    ):
        raise UserError(f'{where} must map names to texts, like {{"query": "Find ..."}}')
    return dict(value)


def stored_prompts(record: Mapping[str, Any] | None, *folders: Path | None) -> Prompts:
    """The prompts that came with a model.

    Args:
      record: its `vlm2vec.json`, whose field `prompts` comes first.
      folders: where a `config_sentence_transformers.json` may lie, for its `prompts` and
        `default_prompt_name`.

    Raises:
      UserError: if one of them is not readable.
    """
    if record and record.get("prompts"):
        return Prompts(checked(record["prompts"], "prompts in vlm2vec.json"))
    import json

    for folder in folders:
        path = None if folder is None else folder / SENTENCE_TRANSFORMERS
        if path is None or not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            named = config.get("prompts") or {}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        # The library writes empty prompts for names that have none; they are no prompts.
        named = {k: v for k, v in checked(named, f"prompts in {path}").items() if v}
        default = config.get("default_prompt_name")
        return Prompts(named, default if default in named else None)
    return Prompts()


def with_prompt(item: MultimodalInput, prompt: str) -> MultimodalInput:
    """The input with a prompt in front of its own words, behind the images that it opens with.

    Image markers that a prompt itself opens with (as MMEB spells its instructions) are the
    input's own where it has images.

    Raises:
      UserError: if the prompt names images that the input cannot have.
    """
    if not prompt:
        return item
    lead = _LEADING_MARKERS.match(item.text)
    assert lead is not None  # it matches the empty text
    markers, rest = item.text[: lead.end()], item.text[lead.end() :]
    if item.images:
        own = _LEADING_MARKERS.match(prompt)
        prompt = prompt[own.end() if own else 0 :]
    if IMAGE_MARKER.search(prompt):
        raise UserError(f"the prompt {prompt!r:.60} names an image, but the input's are elsewhere")
    if not markers:
        return dataclasses.replace(item, text=prompt + rest)
    gap = "" if prompt[:1].isspace() else " "
    return dataclasses.replace(item, text=f"{markers}{gap}{prompt}{rest.lstrip(' ')}")
