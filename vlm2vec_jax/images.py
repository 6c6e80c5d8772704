# SPDX-License-Identifier: Apache-2.0
"""Images as users hand them over, made RGB: one door for every mode, every defect has a name.

`load_image` decodes, `image_size` reads only the header. Which modes become what, and why, is in
`docs/images.md`. Both may be called from many threads and leave no file open.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import ImageLike, MultimodalInput

ExifMode = Literal["ignore", "apply"]
EXIF_MODES = ("ignore", "apply")
Transparency = Literal["drop", "white"]

RESOLUTIONS = {"high": 1344, "mid": 672, "low": 128}
"""VLM2Vec's words for the square that it makes of every image, whatever its shape, and its side."""

MAX_PIXELS = 178_956_970
"""Images of more pixels are refused (twice Pillow's warning threshold, where it raises, too).

Our own number, so that a program which lifted `PIL.Image.MAX_IMAGE_PIXELS` is still protected.
"""

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DECODING = tuple(threading.Lock() for _ in range(64))
"""Shared out among images in memory by their id, so that different ones hardly ever wait."""

# Pillow draws these by running another program; loading a picture must not run code.
_VECTOR_FORMATS = frozenset({"EPS", "WMF"})


class ImageError(UserError):
    """An image that cannot be used; the message names the file and says what is wrong with it."""


def describe_image(source: ImageLike) -> str:
    """Name an image in a message: its path, or its mode and size if it is only in memory."""
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        if filename:
            return str(filename)
        return f"<{source.mode} image of {source.width} x {source.height} in memory>"
    return os.fsdecode(source)


def load_image(
    source: ImageLike,
    *,
    exif: ExifMode = "ignore",
    transparency: Transparency = "drop",
    square: int | None = None,
) -> Image.Image:
    """Decode an image to 8-bit RGB.

    The conversion is Pillow's `convert("RGB")`, as the reference does it (alpha is dropped, not
    composited), except for the modes whose values do not fit 8 bits: see `docs/images.md`.

    Args:
      source: a path, or an image in memory (which is never changed).
      exif: `ignore` keeps the pixels as stored, which is what the reference does; `apply` turns
        them upright by the EXIF orientation.
      transparency: `drop` ignores alpha; `white` composites the image on white, as transformers 5
        does.
      square: resize to this many pixels a side before anything else, in the image's own mode and
        with Pillow's default filter for it, as VLM2Vec does.

    Returns:
      An image of mode RGB, fully decoded. It may be `source` itself: treat it as read-only.

    Raises:
      ImageError: missing, unreadable, truncated or too large files, and values that have no
        8-bit meaning.
      UserError: for an unknown `exif`.
    """
    _check_exif(exif)
    if isinstance(source, SharedImage):
        return source.load(exif, transparency, square)
    name = describe_image(source)
    if isinstance(source, Image.Image):
        # Pillow decodes an opened file when it is first used, and two threads must not both do it.
        with _DECODING[id(source) // 16 % len(_DECODING)]:
            return _decode(source, name, exif, transparency, square)
    with _open(source, name) as image:
        return _decode(image, name, exif, transparency, square)


SHARED_BYTES = 1 << 30
"""Decoded pixels that images in use by several inputs may hold; beyond it they decode again."""


class SharedImage(os.PathLike):
    """The file of an image that several inputs show: decoded for the first, kept for the last."""

    _held = 0
    _counting = threading.Lock()

    def __init__(self, path: str | os.PathLike, uses: int):
        """Nothing is read yet.

        Args:
          path: the file.
          uses: how many times it will be loaded.
        """
        self.path, self.uses = os.fspath(path), uses
        self._lock = threading.Lock()
        self._image: Image.Image | None = None

    def __fspath__(self) -> str:
        return os.fsdecode(self.path)

    def load(
        self, exif: ExifMode, transparency: Transparency = "drop", square: int | None = None
    ) -> Image.Image:
        """`load_image` of the file, see there; the same arguments each time."""
        with self._lock:
            self.uses -= 1
            image = self._image
            if image is None:
                image = load_image(self.path, exif=exif, transparency=transparency, square=square)
            keep = self.uses > 0
            if keep and self._image is None:
                keep = self._count(3 * image.width * image.height)
            elif not keep and self._image is not None:
                self._count(-3 * image.width * image.height)
            self._image = image if keep else None
            return image

    @classmethod
    def _count(cls, size: int) -> bool:
        """Take note of pixels that are kept or dropped; False where there is no room."""
        with cls._counting:
            if size > 0 and cls._held + size > SHARED_BYTES:
                return False
            cls._held += size
            return True

    def __del__(self) -> None:
        image = getattr(self, "_image", None)
        if image is not None:
            self._count(-3 * image.width * image.height)


def share_images(inputs: Sequence[MultimodalInput]) -> list[MultimodalInput]:
    """The same inputs, with files that several of them show decoded only once.

    Args:
      inputs: to be encoded once each, in any order and by any thread.
    """
    uses = Counter(
        os.fspath(image)
        for item in inputs
        for image in item.images
        if not isinstance(image, Image.Image)
    )
    shared = {path: SharedImage(path, count) for path, count in uses.items() if count > 1}
    if not shared:
        return list(inputs)

    def one(image: ImageLike) -> ImageLike:
        return image if isinstance(image, Image.Image) else shared.get(os.fspath(image), image)

    return [
        MultimodalInput(item.text, tuple(one(image) for image in item.images)) for item in inputs
    ]


def image_size(source: ImageLike, *, exif: ExifMode = "ignore") -> tuple[int, int]:
    """Width and height that `load_image` would give, without decoding the pixels.

    Only the header is read. (One exception: with `exif="apply"` a PNG without EXIF data in front
    of its pixels is decoded, because PNG allows the EXIF data to follow them.)

    Raises:
      ImageError: if the file is missing, no image, or too large. Damage behind the header shows
        up in `load_image` only.
    """
    _check_exif(exif)
    if isinstance(source, Image.Image):
        return _upright_size(source, describe_image(source), exif)
    path = os.fspath(source)
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return _size_of_file(path, exif)  # says what is wrong
    return _known_size(path, exif, found.st_size, found.st_mtime_ns, found.st_ino)


def _size_of_file(path: str | os.PathLike, exif: ExifMode) -> tuple[int, int]:
    name = describe_image(path)
    with _open(path, name) as image:
        return _upright_size(image, name, exif)


@functools.lru_cache(maxsize=1 << 15)
def _known_size(path: str, exif: ExifMode, *signature: int) -> tuple[int, int]:
    """The size of a file as it was found; a look at the data and planning rows both ask for it."""
    return _size_of_file(path, exif)


def _check_exif(exif: str) -> None:
    if exif not in EXIF_MODES:
        raise UserError(f"exif must be one of {', '.join(EXIF_MODES)}, not {exif!r}")


@contextlib.contextmanager
def _open(path: str | os.PathLike, name: str) -> Iterator[Image.Image]:
    """Open a regular file as an image, header only; closed on the way out."""
    with contextlib.ExitStack() as stack:
        try:
            status = os.stat(path)
            # A pipe would block for ever, and a device never ends.
            if stat.S_ISDIR(status.st_mode):
                raise ImageError(f"{name}: is a directory, not an image")
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{name}: is not a regular file")
            if status.st_size == 0:
                raise ImageError(f"{name}: the file is empty (0 bytes)")
            file = stack.enter_context(open(path, "rb"))
        except FileNotFoundError as error:
            raise ImageError(f"{name}: no such image file") from error
        except (OSError, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"{name!r}: cannot be opened: {reason}") from error
        with _speaking(name):
            image = stack.enter_context(Image.open(file))
        yield image


@contextlib.contextmanager
def _speaking(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises while it reads a file into an `ImageError` in words.

    Pillow's plugins raise almost anything for a damaged file (OSError, SyntaxError, ValueError,
    struct.error, IndexError, ...), so the net is wide and held only over calls into Pillow.
    """
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image, or of a format Pillow does not read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: refused, too many pixels: {error}") from error
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode it") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name}: truncated or damaged image file ({reason})") from error


def _check_header(image: Image.Image, name: str) -> None:
    width, height = image.size
    if image.format in _VECTOR_FORMATS:
        raise ImageError(f"{name}: {image.format} is a vector format; convert it to PNG or JPEG")
    if width < 1 or height < 1:
        raise ImageError(f"{name}: an image of {width} x {height} pixels is empty")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: refused, {width} x {height} pixels are more than the limit of "
            f"{MAX_PIXELS:,}; scale the image down first"
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 (upright) if there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except OSError:
        raise  # a PNG whose pixels had to be read for it is damaged
    except Exception:
        return 1  # a picture is not refused for broken metadata
    return value if value in _ORIENTATIONS else 1


def _upright_size(image: Image.Image, name: str, exif: ExifMode) -> tuple[int, int]:
    _check_header(image, name)
    # Pillow itself always applies the orientation of a TIFF, and its size says so already; the
    # tag only disappears once the pixels are loaded.
    if exif == "apply" and image.format != "TIFF":
        with _speaking(name):
            if _orientation(image) >= 5:
                return image.height, image.width
    return image.size


def _decode(
    image: Image.Image, name: str, exif: ExifMode, transparency: Transparency, square: int | None
) -> Image.Image:
    _check_header(image, name)
    size = image.size
    with _speaking(name):
        image.load()
        if image.size != size:
            # ICO can do this. Token counts come from the header, so it cannot be let through.
            raise ImageError(f"{name}: the header says {size} pixels, the data {image.size}")
        orientation = _orientation(image) if exif == "apply" else 1
        if square is not None:
            info = image.info  # a resize keeps the palette and forgets what is transparent in it
            image = image.resize((square, square))
            image.info = dict(info)
        rgb = _to_rgb(image, name, transparency)
        if orientation != 1:
            rgb = rgb.transpose(_ORIENTATIONS[orientation])
    return rgb


def _to_rgb(image: Image.Image, name: str, transparency: Transparency) -> Image.Image:
    mode = image.mode
    clear = "a" in mode.lower()[1:] or image.info.get("transparency") is not None
    clear = clear and transparency == "white" and mode not in ("LAB", "I", "F", "I;16")
    if mode == "RGB" and not clear:
        return image
    if mode.startswith("I;16"):
        # Pillow clips 16-bit values at 255, which leaves white: take the high byte instead.
        return _grey(np.asarray(image) >> 8)
    if mode == "I":
        return _grey(_eight_bits_of_int(np.asarray(image), name))
    if mode == "F":
        _check_float(np.asarray(image), name)
    if mode == "La":
        image = image.convert("LA")
    if clear:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if isinstance(image.info.get("transparency"), bytes) and mode == "P":
        # Pillow would warn that the palette's alpha is lost, which is what is meant to happen.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _eight_bits_of_int(values: np.ndarray, name: str) -> np.ndarray:
    """Mode I does not say how many bits it means: 8 if all values fit, otherwise 16."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name}: 32-bit integer pixels from {low} to {high} have no 8-bit meaning; "
            f"convert the image to 8 bits per channel"
        )
    return values if high <= 255 else values >> 8


def _check_float(values: np.ndarray, name: str) -> None:
    low, high = float(values.min()), float(values.max())
    # A NaN makes every comparison false, so it is refused, too.
    if not (low >= 0.0 and high <= 255.0) or 0.0 < high <= 1.0:
        raise ImageError(
            f"{name}: floating-point pixels from {low:g} to {high:g}; only the range 0 to 255 has "
            f"an 8-bit meaning, so convert the image to 8 bits per channel"
        )
