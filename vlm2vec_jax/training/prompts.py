# SPDX-License-Identifier: Apache-2.0
"""The instructions that training data carries, read off its texts: for `vlm2vec.json`.

MMEB's rows have their instruction inside the text ("<|image_1|> Represent the given image for
classification"). What all rows of a subset open with is that instruction, and a user of the
trained model needs it to write queries like those it has seen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from vlm2vec_jax.data.mmeb import TrainSource
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import IMAGE_MARKER

ROWS = 256
"""Rows of a subset that are looked at, evenly spaced."""
_LEAST_WORDS = 3
_LEAST_TEXTS = 4


def prompts_of(sources: Sequence[TrainSource]) -> dict[str, str]:
    """What the texts of each subset open with.

    Returns:
      `<Subset>/query` and `<Subset>/target` -> prompt, where there is one; and `query`, `target`
      where all subsets have the same. Image markers in front are left out.
    """
    found: dict[str, dict[str, str]] = {"query": {}, "target": {}}
    for source in sources:
        texts: dict[str, list[str]] = {"query": [], "target": []}
        for row in range(0, len(source), max(len(source) // ROWS, 1)):
            try:
                example = source[row]
            except (UserError, OSError):  # a bad row is told where it is used
                continue
            texts["query"].append(example.query.text)
            texts["target"].append(example.positive.text)
        for side, said in texts.items():
            found[side][source.subset] = common_prompt(said)
    out = {}
    for side, prompts in found.items():
        if len(set(prompts.values())) == 1 and (shared := next(iter(prompts.values()))):
            out[side] = shared
        out |= {f"{subset}/{side}": text for subset, text in prompts.items() if text}
    return out


def common_prompt(texts: Iterable[str]) -> str:
    """The instruction that all texts open with, "" if there is none.

    It ends at the end of a word and has at least three words; fewer than four texts tell nothing.
    """
    bare = [re.sub(rf"^(\s*{IMAGE_MARKER.pattern})*\s*", "", text) for text in texts]
    if len(bare) < _LEAST_TEXTS:
        return ""
    prefix = os.path.commonprefix(bare)
    if any(text != prefix for text in bare):
        # Texts go on behind it: what is left of a word that only some share is no part of it.
        end = max(prefix.rfind(mark) for mark in (" ", "\n", "\t"))
        prefix = prefix[: end + 1]
    return prefix if len(prefix.split()) >= _LEAST_WORDS else ""
