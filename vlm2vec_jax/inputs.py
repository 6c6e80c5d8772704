# SPDX-License-Identifier: Apache-2.0
"""What a piece of data is before packing: as the user wrote it, and as a backbone reads it.

Numpy only; the road from here on is `packing.py` and then the model (design, section 1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm2vec_jax.errors import UserError, raise_problems

ImageLike = Image.Image | str | os.PathLike
"""An image in memory, or the path of one."""

IMAGE_MARKER = re.compile(r"<\|image_(\d+)\|>")
"""Where the k-th image stands in a text, as VLM2Vec's data writes it: `<|image_k|>`."""


@dataclasses.dataclass(frozen=True)
class MultimodalInput:
    """One thing to embed: a text with `<|image_1|>` ... `<|image_n|>` markers, and n images.

    An input without text gets one marker per image, so that an image alone can be embedded.
    """

    text: str = ""
    images: tuple[ImageLike, ...] = ()

    def __post_init__(self):
        if not self.text and self.images:
            markers = "".join(f"<|image_{k}|>" for k in range(1, len(self.images) + 1))
            object.__setattr__(self, "text", markers)

    @classmethod
    def of(cls, value: Any) -> MultimodalInput:
        """Read what a user hands over.

        Args:
          value: a `MultimodalInput`; a `str` (always text, never sniffed for a path); a
            `pathlib.Path` or a PIL image (an image alone); or a mapping with `text` and/or
            `images` (or `image`), one image or a sequence of them.

        Raises:
          UserError: for any other type, an unknown key, or a field of the wrong type.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(text=value)
        if isinstance(value, (Image.Image, os.PathLike)):
            return cls(images=(value,))
        if isinstance(value, Mapping):
            return cls._of_mapping(value)
        raise UserError(
            f"an input must be a str, an image, a pathlib.Path, a dict with 'text' and/or "
            f"'images', or a MultimodalInput, not {type(value).__name__}"
        )

    @classmethod
    def _of_mapping(cls, value: Mapping[str, Any]) -> MultimodalInput:
        unknown = sorted(set(value) - {"text", "images", "image"})
        if unknown:
            raise UserError(f"unknown key(s) {unknown} in an input; known are 'text' and 'images'")
        if "image" in value and "images" in value:
            raise UserError("an input has both 'image' and 'images'; give one of them")
        text = value.get("text")
        text = "" if text is None else text
        if not isinstance(text, str):
            raise UserError(f"'text' must be a string, not {type(text).__name__}")
        images = value.get("images", value.get("image"))
        if images is None:
            images = ()
        elif isinstance(images, (str, os.PathLike, Image.Image)):
            images = (images,)
        elif not isinstance(images, Sequence):
            raise UserError(f"'images' must be a list of images, not {type(images).__name__}")
        for image in images:
            if not isinstance(image, (str, os.PathLike, Image.Image)) or image == "":
                raise UserError(f"an image must be a path or a PIL image, not {image!r:.60}")
        return cls(text=text, images=tuple(images))

    def relative_to(self, root: str | os.PathLike) -> MultimodalInput:
        """The same input with relative image paths joined to `root`."""
        images = tuple(i if isinstance(i, Image.Image) else Path(root) / i for i in self.images)
        return dataclasses.replace(self, images=images)

    def problem(self) -> str | None:
        """Say in words why this input cannot be embedded as it stands; None if it can.

        An input with neither text nor image, and markers that do not name the images 1..n.
        A marker may stand more than once only if the counts still agree: they must not.
        """
        if not self.text and not self.images:
            return "neither text nor image"
        numbers = [int(k) for k in IMAGE_MARKER.findall(self.text)]
        n = len(self.images)
        if sorted(numbers) != list(range(1, n + 1)):
            found = ", ".join(f"<|image_{k}|>" for k in numbers) or "none"
            if not n:
                return f"the text has the marker {found} but there are 0 images"
            return (
                f"{n} image(s) but markers {found}; the text needs each of "
                f"<|image_1|> ... <|image_n|> exactly once"
            )
        return None


@dataclasses.dataclass
class EncodedInput:
    """One sequence as a backbone reads it (host side).

    Attributes:
      tokens: i32 [T]; 0 where a visual feature stands.
      feature_index: i32 [T]; -1 for a text token, otherwise the row of the visual feature
        table that stands there, units counted from 0 within this sequence (`VisualLayout`).
      positions: i32 [T], or [T, A] where the layout has A position axes.
      visual: arrays with a leading axis of visual units; empty for a text. A unit is the piece of
        image that the backbone counts in: a crop (Phi-3.5-V), a merged patch (Qwen), a tile.
      units: how many visual units.
      images: units of each image, where there are several; () for one or none.
    """

    tokens: np.ndarray
    feature_index: np.ndarray
    positions: np.ndarray
    visual: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    units: int = 0
    images: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def image_units(self) -> tuple[int, ...]:
        """Units of each image."""
        return self.images or ((self.units,) if self.units else ())


def content_hash(item: EncodedInput) -> int:
    """A number for what a model is shown, the same on every machine (63 bits).

    Of the tokens and the pixels, so it does not matter under which path an image lies; two inputs
    that differ only behind `max_len` are the same, as they are to the model.
    """
    # Most processors have instructions for this one: on megabytes of pixels it takes half as long
    # as others do. Nobody gains by making two images collide.
    digest = hashlib.sha1(usedforsecurity=False)
    arrays = {"tokens": item.tokens, "feature_index": item.feature_index, **item.visual}
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


@dataclasses.dataclass(frozen=True)
class VisualLayout:
    """How the arrays of a row are laid out, so that the packer can shift, fill and announce them.

    The visual feature table of a row is `shared_features` rows that every sequence shares
    (Phi-3.5-V: newline, separator), then `features_per_unit` rows for each visual unit in order.
    Units of a row lie end to end; whatever a unit must know of its image (which grid, which
    place) it carries itself, relative to its own place, so that packing never rewrites it.

    Attributes:
      shared_features: rows before the first unit.
      features_per_unit: rows per unit (Phi-3.5-V: 144 per crop of 336 pixels; Qwen: 1 per merged
        patch).
      units: for each visual array its shape behind the unit axis and its numpy dtype name.
      position_axes: 0 for one position per token, else the axes of each (3 with M-RoPE).
    """

    shared_features: int
    features_per_unit: int
    units: dict[str, tuple[tuple[int, ...], str]]
    position_axes: int = 0

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Shape of `positions` behind the token axis: () or (A,)."""
        return (self.position_axes,) if self.position_axes else ()


class BadInputs(UserError):
    """Some of a list of inputs cannot be used.

    Attributes:
      problems: what is wrong with each, by its number in the list, for callers that know where
        an input came from (a line of a file, a row of a table).
      advice: what to do.
    """

    def __init__(self, message: str, problems: Mapping[int, str], advice: str = ""):
        super().__init__(message)
        self.problems, self.advice = dict(problems), advice


def raise_bad_inputs(title: str, problems: Mapping[int, str], *, advice: str = "") -> None:
    """Raise one `BadInputs` that lists inputs by number; nothing happens if there is none."""
    ordered = dict(sorted(problems.items()))
    try:
        raise_problems(title, [f"input {n}: {p}" for n, p in ordered.items()], advice=advice)
    except UserError as error:
        raise BadInputs(str(error), ordered, advice) from None
