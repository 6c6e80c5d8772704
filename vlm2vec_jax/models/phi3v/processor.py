# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision's processor: one `MultimodalInput` to the `EncodedInput` that the model reads.

Text is split at the `<|image_k|>` markers, every piece is tokenised on its own with its own
special tokens, and the image tokens go between. Behaviour: `Phi3VProcessor` of
microsoft/Phi-3.5-vision-instruct, and VLM2Vec's use of it. Never imports jax.

Two things to know:

* `max_len` cuts texts without an image. An input with an image is never cut, neither its image
  nor its text, as in the reference, whose numbers depend on it.
* The marker `<|image_k|>` stands for the k-th image wherever it stands. The reference counts
  tokens so, but fills features in by the order of the images, which mixes up reversed markers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.images import (
    EXIF_MODES,
    ExifMode,
    ImageError,
    describe_image,
    image_size,
    load_image,
)
from vlm2vec_jax.inputs import (
    IMAGE_MARKER,
    EncodedInput,
    ImageLike,
    MultimodalInput,
    VisualLayout,
)
from vlm2vec_jax.models.phi3v.hd_transform import (
    HD_ORDERS,
    IMAGE_MEAN,
    IMAGE_STD,
    SHARED_FEATURES,
    HDGeometry,
    crop_info,
    cut_crops,
    hd_geometry,
    image_feature_index,
)
from vlm2vec_jax.models.shared.processor import ImageParts, ImageTextProcessor, marked_images
from vlm2vec_jax.models.tokenizer import TextTokenizer, load_tokenizer, read_json

if TYPE_CHECKING:
    from vlm2vec_jax.models.phi3v.config import Phi3VConfig

DEFAULT_NUM_CROPS = 16
"""The reference's, where no file states another."""

# The reference makes this class of the folder's tokenizer, whatever tokenizer_config.json says.
_TOKENIZER_CLASS = "LlamaTokenizerFast"


class Phi3VProcessor(ImageTextProcessor):
    """Turns texts and images into token ids, 8-bit crops and the feature index (host side).

    Thread-safe; nothing in it changes after construction.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        crop_size: int = 336,
        patch_size: int = 14,
        hd_order: str = "sub_glb",
        num_crops: int = DEFAULT_NUM_CROPS,
        max_len: int | None = None,
        exif: ExifMode = "ignore",
    ):
        """Set up a processor.

        Args:
          tokenizer: from `load_tokenizer`.
          crop_size: side of a crop in pixels.
          patch_size: side of a patch in pixels; two patches must divide a crop.
          hd_order: `sub_glb` (local crops first) or `glb_sub`.
          num_crops: the most local crops an image is cut into.
          max_len: the most tokens of a text without an image, special tokens counted; None means
            the tokenizer's own limit.
          exif: what to do with EXIF orientation, see `load_image`.

        Raises:
          UserError: listing every value that cannot be.
        """
        problems = [
            f"{name} must be an integer of at least 1, not {value!r}"
            for name, value in (
                ("num_crops", num_crops),
                ("max_len", 1 if max_len is None else max_len),
                ("crop_size", crop_size),
                ("patch_size", patch_size),
            )
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1
        ]
        if not problems and crop_size % (2 * patch_size):
            problems.append(f"two patches of {patch_size} do not divide a crop of {crop_size}")
        if not problems and max_len is not None and max_len < tokenizer.special_tokens:
            problems.append(f"max_len={max_len} has no room for the text's special tokens")
        if hd_order not in HD_ORDERS:
            problems.append(f"hd_order must be one of {', '.join(HD_ORDERS)}, not {hd_order!r}")
        if exif not in EXIF_MODES:
            problems.append(f"exif must be one of {', '.join(EXIF_MODES)}, not {exif!r}")
        raise_problems("Unusable settings of the Phi-3.5-Vision processor", problems)
        self._crop = int(crop_size)
        self._patch = int(patch_size)
        self._side = self._crop // self._patch // 2
        self._order = hd_order
        self._num_crops = int(num_crops)
        self._exif: ExifMode = exif
        layout = VisualLayout(
            shared_features=SHARED_FEATURES,
            features_per_unit=self._side**2,
            units={"crops": ((self._crop, self._crop, 3), "uint8"), "crop_info": ((5,), "int32")},
        )
        super().__init__(tokenizer, layout, None if max_len is None else int(max_len))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        config: Phi3VConfig,
        num_crops: int | None = None,
        max_len: int | None = None,
        exif: ExifMode = "ignore",
    ) -> Phi3VProcessor:
        """Read tokenizer and image settings of a model folder.

        Args:
          folder: with `tokenizer.json`, `tokenizer_config.json`, `preprocessor_config.json`.
          config: the model's configuration, for the crop geometry.
          num_crops: overrides the folder's; 16 where neither says anything.
          max_len: as in the constructor.
          exif: as in the constructor.

        Raises:
          UserError: for missing or contradictory files; an image normalisation other than CLIP's
            is refused, because the model has CLIP's built in.
        """
        folder = Path(folder)
        settings = _image_settings(folder)
        stated = settings.get("num_crops")
        default = DEFAULT_NUM_CROPS if stated is None else stated
        return cls(
            load_tokenizer(folder, tokenizer_class=_TOKENIZER_CLASS),
            crop_size=config.crop_size,
            patch_size=config.clip.patch_size,
            hd_order=config.hd_order,
            num_crops=default if num_crops is None else num_crops,
            max_len=max_len,
            exif=exif,
        )

    @property
    def num_crops(self) -> int:
        """The most local crops an image is cut into."""
        return self._num_crops

    @property
    def settings(self) -> dict[str, Any]:
        """Everything here that changes an encoding, for fingerprints and `config.json` files."""
        return {
            "type": "phi3_v",
            "num_crops": self._num_crops,
            "max_len": self._max_len,
            "exif": self._exif,
            "crop_size": self._crop,
            "patch_size": self._patch,
            "hd_order": self._order,
            "special_tokens": self._tokenizer.special_tokens,
            "model_max_length": self._tokenizer.model_max_length,
        }

    def length(self, item: MultimodalInput) -> tuple[int, int]:
        """Tokens and visual units that `encode` would give; of images only headers are read.

        Raises:
          ImageError: if an image's header cannot be read, or it is too narrow to scale.
          UserError: if markers and images do not agree.
        """
        if not item.images:
            return len(self._text_ids(item.text)), 0
        geometries = [self._geometry(i, image_size(i, exif=self._exif)) for i in item.images]
        pieces, numbers = _split(item)
        tokens = sum(len(self._piece_ids(piece)) for piece in pieces)
        tokens += sum(geometries[k].tokens(self._side) for k in numbers)
        return tokens, sum(geometry.units for geometry in geometries)

    def encode(self, item: MultimodalInput) -> EncodedInput:
        """Tokenise, decode and cut.

        A marker without any image in the input is ordinary text, as in the reference.

        Returns:
          An `EncodedInput` with `visual` = {`crops`: u8 [U, crop, crop, 3], `crop_info`:
          i32 [U, 5]}, or {} for a text. A marker that stands twice repeats its image's tokens;
          the crops are there once.

        Raises:
          ImageError: if an image cannot be used.
          UserError: if markers and images do not agree.
        """
        if not item.images:
            tokens = np.asarray(self._text_ids(item.text), np.int32)
            index = np.full(len(tokens), -1, np.int32)
            return EncodedInput(tokens, index, np.arange(len(tokens), dtype=np.int32))
        pieces, numbers = _split(item)
        visual, indices, _, units = self._images(item.images)
        tokens, index = self._interleave(pieces, numbers, indices)
        positions = np.arange(len(tokens), dtype=np.int32)
        return EncodedInput(tokens, index, positions, visual, sum(units), units)

    def _interleave(
        self, pieces: list[str], numbers: list[int], indices: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and feature index of pieces with images between them."""
        tokens: list[np.ndarray] = []
        index: list[np.ndarray] = []
        for place, piece in enumerate(pieces):
            ids = np.asarray(self._piece_ids(piece), np.int32)
            tokens.append(ids)
            index.append(np.full(len(ids), -1, np.int32))
            if place < len(numbers):
                features = indices[numbers[place]]
                tokens.append(np.zeros(len(features), np.int32))
                index.append(features)
        return np.concatenate(tokens), np.concatenate(index)

    def _text_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, self._max_len)

    def _piece_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, truncate=False)

    def _image(self, image: ImageLike) -> ImageParts:
        rgb = load_image(image, exif=self._exif)
        geometry = self._geometry(image, rgb.size)
        visual = {"crops": cut_crops(rgb, geometry), "crop_info": crop_info(geometry)}
        index = image_feature_index(geometry.rows, geometry.columns, self._side, self._order)
        return ImageParts(visual, index)

    def _geometry(self, image: ImageLike, size: tuple[int, int]) -> HDGeometry:
        geometry = hd_geometry(*size, self._num_crops, self._crop)
        if geometry is None:
            raise ImageError(
                f"{describe_image(image)}: {size[0]} x {size[1]} pixels are too narrow: with "
                f"num_crops={self._num_crops} the short side would shrink to nothing; crop or "
                f"pad the image, or raise num_crops"
            )
        return geometry


def _split(item: MultimodalInput) -> tuple[list[str], list[int]]:
    """Pieces of text around the markers, and which image (from 0) follows each but the last."""
    pieces: list[str] = []
    numbers = marked_images(item)
    end = 0
    for marker in IMAGE_MARKER.finditer(item.text):
        pieces.append(item.text[end : marker.start()])
        end = marker.end()
    pieces.append(item.text[end:])
    return pieces, numbers


def _image_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings: `preprocessor_config.json`, else `processor_config.json`."""
    path = folder / "preprocessor_config.json"
    settings = read_json(path)
    if not settings:
        path = folder / "processor_config.json"
        settings = read_json(path)
        # Newer transformers keeps the image processor's part one level down.
        nested = settings.get("image_processor")
        settings = nested if isinstance(nested, dict) else settings
    problems = []
    for name, built_in in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        value = settings.get(name, built_in)
        if not _same_numbers(value, built_in):
            problems.append(f"{name} is {value!r}; the model normalises with {list(built_in)}")
    raise_problems(f"{path} asks for what is not implemented", problems)
    return settings


def _same_numbers(value: Any, expected: tuple[float, ...]) -> bool:
    try:
        return np.shape(value) == (3,) and bool(np.allclose(value, expected, rtol=0, atol=1e-6))
    except (TypeError, ValueError):
        return False
