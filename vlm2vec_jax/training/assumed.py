# SPDX-License-Identifier: Apache-2.0
"""An assumed mixture of MMEB-like inputs, for planning where no data is at hand.

The numbers are assumptions, not measurements of MMEB: lengths of texts are lognormal, and images
have the shapes of photographs, pages and screens. They are drawn from a fixed seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from vlm2vec_jax.training.batching import Size

IMAGES = (
    (640, 480, 0.40),
    (600, 400, 0.18),
    (480, 640, 0.14),
    (512, 512, 0.08),
    (827, 1169, 0.08),
    (1280, 720, 0.05),
    (850, 1100, 0.04),
    (800, 350, 0.03),
)
"""Width, height and share of the images."""

_SPREAD = 0.6


@dataclasses.dataclass(frozen=True)
class Mix:
    """What is assumed about pairs.

    Attributes:
      query_images: share of queries with an image.
      target_images: share of targets with an image.
      query_text: median tokens of a query's text, 8 to `max_len`.
      target_text: median tokens of a target without an image, 2 to `max_len`.
      caption: median tokens of the text beside a target's image.
    """

    query_images: float = 16 / 20
    target_images: float = 7 / 20
    query_text: int = 32
    target_text: int = 12
    caption: int = 10

    def words(self) -> str:
        """The assumptions in a sentence."""
        return (
            f"assumed: {self.query_images:.0%} of queries and {self.target_images:.0%} of targets "
            f"with one image (sizes {', '.join(f'{w}x{h} {s:.0%}' for w, h, s in IMAGES)}); texts "
            f"lognormal with medians of {self.query_text} (queries), {self.target_text} (targets) "
            f"and {self.caption} (beside a target's image) tokens"
        )

    def sizes(
        self, pairs: int, image_size: Callable[[int, int], tuple[int, int]], max_len: int = 256
    ) -> list[Size]:
        """Tokens and visual units of all queries, then all targets.

        Args:
          pairs: how many.
          image_size: (width, height) -> tokens and visual units.
          max_len: texts are cut here.
        """
        rng = np.random.default_rng(0)
        known = [image_size(width, height) for width, height, _ in IMAGES]
        shares = [share for *_, share in IMAGES]

        def side(with_image: float, alone: int, beside: int, least: int) -> list[Size]:
            pictured = rng.random(pairs) < with_image
            which = rng.choice(len(IMAGES), pairs, p=shares)
            drawn = np.exp(rng.normal(0.0, _SPREAD, pairs)) * np.where(pictured, beside, alone)
            texts = np.clip(drawn.round().astype(int), least, max_len)
            found = []
            for text, has, image in zip(texts.tolist(), pictured, which, strict=True):
                tokens, units = known[image] if has else (0, 0)
                found.append((text + tokens, units))
            return found

        queries = side(self.query_images, self.query_text, self.query_text, 8)
        return queries + side(self.target_images, self.target_text, self.caption, 2)
