# SPDX-License-Identifier: Apache-2.0
"""Where tokens stand, on the three axes of M-RoPE (time, row, column). Numpy only.

Three rules by name, because checkpoints were trained under different ones:

* `mrope` (transformers 5): text counts on by one on all axes. An image of h x w units that starts
  at s has time s, row s + its row, column s + its column; what follows starts at s + max(h, w).
* `by_vision_start` (transformers 4.49 to 4.57): the same, but images are counted by
  `<|vision_start|>` with an image token right behind it. If n are counted, the first n images of
  the text are laid out, whether they are the wrapped ones or not; the others are text.
* `sequential`: 0, 1, 2, ... on all axes. What VLM2Vec's Qwen2-VL checkpoints were trained with:
  they write bare image tokens, which the rule of their time did not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm2vec_jax.models.qwen_vl.geometry import Grid

RULES = ("mrope", "by_vision_start", "sequential")


def positions(
    length: int, images: Sequence[tuple[int, Grid]], rule: str, wrapped: Sequence[bool] = ()
) -> np.ndarray:
    """Positions of a sequence, i32 [T, 3].

    Args:
      length: T.
      images: first token and grid of every image in the order of the text; its tokens, one per
        unit, lie row by row.
      rule: one of `RULES`.
      wrapped: for each image whether a vision-start token comes right before it.
    """
    count = len(images)
    if rule == "by_vision_start":
        count = sum(wrapped)
    elif rule == "sequential":
        count = 0
    out = np.empty((length, 3), np.int32)
    done = at = 0
    for start, grid in images[:count]:
        out[done:start] = (at + np.arange(start - done))[:, None]
        at += start - done
        done = start + grid.units
        row, column = np.divmod(np.arange(grid.units), grid.columns)
        out[start:done, 0] = at
        out[start:done, 1] = at + row
        out[start:done, 2] = at + column
        at += max(grid.rows, grid.columns)
    out[done:] = (at + np.arange(length - done))[:, None]
    return out
