# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of mini-MMEB: scenes of coloured shapes, charts, word cards, digits, photos.

Everything is 56 x 56 pixels (4 x 4 CLIP patches of 14 pixels) and speaks one small language: eight
colours, six shapes, and places made of four tints and five textures. A fixed tenth of the
combinations is held out: no training picture or text ever shows them. numpy and Pillow; the
handwritten digits and photographs are read from where scikit-learn and scikit-image ship them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vlm2vec_jax.errors import UserError

SIZE = 56
HALF = SIZE // 2

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 36),
    "green": (36, 150, 56),
    "blue": (36, 76, 214),
    "yellow": (244, 208, 20),
    "purple": (146, 44, 176),
    "orange": (246, 130, 16),
    "cyan": (24, 192, 208),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TINTS: dict[str, tuple[int, int, int]] = {
    "grey": (182, 182, 182),
    "pink": (252, 178, 210),
    "mint": (160, 240, 192),
    "sand": (240, 216, 156),
}
TEXTURES = ("wall", "stripes", "lines", "dots", "checks")
SIDES = ("left", "right")
WORDS = (
    "map sun dog cat key box bus egg fly hat ice jam leg net owl pig sky tea van web "
    "yak zoo cup fox"
).split()
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Thing(NamedTuple):
    """A coloured shape, such as a red circle."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


class Place(NamedTuple):
    """What lies behind the things, such as pink dots."""

    tint: str
    texture: str

    def __str__(self) -> str:
        return f"{self.tint} {self.texture}"


THINGS = tuple(Thing(color, shape) for color in COLORS for shape in SHAPES)
PLACES = tuple(Place(tint, texture) for tint in TINTS for texture in TEXTURES)
# each colour loses one shape and each tint one texture, so that every word stays well trained
HELD_OUT_THINGS = tuple(
    Thing(color, SHAPES[(5 * i + 2) % len(SHAPES)]) for i, color in enumerate(COLORS)
)
HELD_OUT_PLACES = tuple(
    Place(tint, TEXTURES[(2 * i + 1) % len(TEXTURES)]) for i, tint in enumerate(TINTS)
)
SEEN_THINGS = tuple(t for t in THINGS if t not in HELD_OUT_THINGS)
SEEN_PLACES = tuple(p for p in PLACES if p not in HELD_OUT_PLACES)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One thing in the middle, or two side by side (left first), in front of a place.

    Attributes:
      things: one or two; two never share a colour or a shape, so each can be named by either.
      place: the background.
      style: `flat`, `sticker` (white outline) or `blurry` (out of focus and noisy).
    """

    things: tuple[Thing, ...]
    place: Place
    style: str = "flat"


def draw_scene(
    scene: Scene, rng: np.random.Generator
) -> tuple[Image.Image, tuple[tuple[int, int, int, int], ...]]:
    """Draw a scene; sizes, positions, texture phase and colour shades vary with `rng`.

    Args:
      scene: what to show.
      rng: draws everything that the scene leaves open.

    Returns:
      The RGB image of SIZE x SIZE pixels and, for each thing, the square crop (left, top, right,
      bottom) of half the picture's width that holds this thing and no other.
    """
    canvas = _background(scene.place, rng)
    boxes = []
    alone = len(scene.things) == 1
    for k, thing in enumerate(scene.things):
        size = int(rng.integers(17, 21)) * 2 if alone else int(rng.integers(11, 13)) * 2
        if alone:
            x, y = HALF + rng.integers(-2, 3), HALF + rng.integers(-2, 3)
        else:
            x, y = 14 + HALF * k + rng.integers(-1, 2), HALF + rng.integers(-3, 4)
        x, y = int(x), int(y)
        if scene.style == "sticker":
            _paint(canvas, shape_mask(thing.shape, size + 4), (255, 255, 255), x, y)
        _paint(canvas, shape_mask(thing.shape, size), _shade(COLORS[thing.color], rng), x, y)
        top = min(max(y - HALF // 2, 0), SIZE - HALF)
        boxes.append((HALF * k, top, HALF * (k + 1), top + HALF))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if scene.style == "blurry":
        image = image.filter(ImageFilter.GaussianBlur(1.2))
        noisy = np.asarray(image, np.float32) + rng.normal(0, 8, (SIZE, SIZE, 3))
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    return image, tuple(boxes)


def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Cut a box out and enlarge it to SIZE x SIZE pixels."""
    return image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def draw_chart(heights: dict[str, int], rng: np.random.Generator) -> Image.Image:
    """Draw a bar chart: one bar per colour in the given order, heights in pixels (up to 50)."""
    image = Image.new("RGB", (SIZE, SIZE), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    width = SIZE // len(heights)
    for k, (color, height) in enumerate(heights.items()):
        left = k * width + 2
        draw.rectangle(
            (left, SIZE - 3 - height, left + width - 5, SIZE - 4), fill=_shade(COLORS[color], rng)
        )
    draw.line((0, SIZE - 3, SIZE, SIZE - 3), fill=(60, 60, 60), width=1)
    return image


TRAIN_FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
HELD_OUT_FONTS = ("DejaVuSans-BoldOblique.ttf", "DejaVuSansMono-BoldOblique.ttf")


def draw_words(words: tuple[str, str], font: str, rng: np.random.Generator) -> Image.Image:
    """Draw a card with two words of three letters, one above the other.

    Args:
      words: the upper and the lower word.
      font: a file name of `TRAIN_FONTS` or `HELD_OUT_FONTS` (matplotlib ships them).
      rng: draws ink, paper and position.
    """
    tint = tuple(TINTS.values())[rng.integers(len(TINTS))]
    paper = tuple((255 + channel) // 2 for channel in tint)
    image = Image.new("RGB", (SIZE, SIZE), paper)
    draw = ImageDraw.Draw(image)
    inks = ((24, 24, 24), (150, 20, 20), (20, 40, 150), (20, 90, 30))
    ink = inks[rng.integers(len(inks))]
    for k, word in enumerate(words):
        x, y = HALF + int(rng.integers(-2, 3)), 13 + HALF * k + int(rng.integers(-1, 2))
        draw.text((x, y), word, font=_font(font, 24), fill=ink, anchor="mm")
    return image


def draw_digit(pixels: np.ndarray, color: str, tint: str, rng: np.random.Generator) -> Image.Image:
    """Draw a handwritten digit in a colour on tinted paper.

    Args:
      pixels: [8, 8] ink from 0 to 16, as scikit-learn's digits are.
      color: name of the ink's colour.
      tint: name of the paper's tint.
      rng: draws the size and position.
    """
    size = int(rng.integers(40, 49))
    ink = Image.fromarray(np.clip(pixels * 15.9, 0, 255).astype(np.uint8))
    mask = np.asarray(ink.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255.0
    mask = np.clip(mask * 1.4 - 0.2, 0.0, 1.0)
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = TINTS[tint]
    x, y = HALF + int(rng.integers(-2, 3)), HALF + int(rng.integers(-2, 3))
    _paint(canvas, mask, _shade(COLORS[color], rng), x, y)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


@functools.cache
def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's digits: images [1797, 8, 8] from 0 to 16, and labels [1797]."""
    path = _package_folder("sklearn") / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise UserError(f"{path} is missing; mini-MMEB takes its digits from scikit-learn")
    table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


TRAIN_PHOTOS = ("sklearn:flower.jpg", "skimage:chelsea.png", "skimage:ihc.png",
                "skimage:rocket.jpg", "skimage:color.png")  # fmt: skip
EVAL_PHOTOS = ("skimage:astronaut.png", "skimage:coffee.png", "sklearn:china.jpg",
               "skimage:motorcycle_left.png")  # fmt: skip
REGION = 52


@functools.cache
def photo(name: str) -> Image.Image:
    """Open a photograph that a package ships, named `sklearn:FILE` or `skimage:FILE`, as RGB.

    Raises:
      UserError: if the package is not installed or does not hold the file.
    """
    package, file = name.split(":")
    folder = {"sklearn": "datasets/images", "skimage": "data"}[package]
    path = _package_folder(package) / folder / file
    if not path.is_file():
        raise UserError(f"{path} is missing; mini-MMEB reads it from the installed {package}")
    with Image.open(path) as image:
        return image.convert("RGB")


def photo_regions(names: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """List the centres (photo, x, y) of regions that do not overlap and are not almost empty."""
    regions = []
    for name in names:
        image = photo(name)
        grey = np.asarray(image.convert("L"), np.float32)
        for top in range(4, image.height - REGION - 3, REGION):
            for left in range(4, image.width - REGION - 3, REGION):
                if grey[top : top + REGION, left : left + REGION].std() >= 14:
                    regions.append((name, left + REGION // 2, top + REGION // 2))
    return regions


def draw_region(region: tuple[str, int, int], rng: np.random.Generator) -> Image.Image:
    """Draw a region of a photograph with a small shift, zoom and change of brightness."""
    name, x, y = region
    image = photo(name)
    radius = REGION / 2 * rng.uniform(0.9, 1.06)
    x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
    box = (max(x - radius, 0.0), max(y - radius, 0.0),
           min(x + radius, float(image.width)), min(y + radius, float(image.height)))  # fmt: skip
    part = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(part, np.float32) * rng.uniform(0.9, 1.1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@functools.cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Coverage f32 [size, size] from 0 to 1 of a shape that fills a square of that many pixels."""
    fine = 4 * size
    image = Image.new("L", (fine, fine), 0)
    draw = ImageDraw.Draw(image)
    last = fine - 1
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        edge = fine // 14
        draw.rectangle((edge, edge, last - edge, last - edge), fill=255)
    elif shape == "triangle":
        draw.polygon([(last / 2, 0), (last, last), (0, last)], fill=255)
    elif shape == "star":
        draw.polygon(_star(fine), fill=255)
    elif shape == "cross":
        arm = fine * 0.33
        draw.rectangle((arm, 0, last - arm, last), fill=255)
        draw.rectangle((0, arm, last, last - arm), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, last, last), fill=255)
        inner = fine * 0.27
        draw.ellipse((inner, inner, last - inner, last - inner), fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    small = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255.0


def _star(size: int) -> list[tuple[float, float]]:
    """Five long points; the centre sits a little low so that the star fills its square."""
    points = []
    for k in range(10):
        radius = size * (0.54 if k % 2 == 0 else 0.23)
        angle = np.pi * k / 5
        points.append((size / 2 + radius * np.sin(angle), size * 0.54 - radius * np.cos(angle)))
    return points


def _background(place: Place, rng: np.random.Generator) -> np.ndarray:
    """Draw a place as f32 [SIZE, SIZE, 3]: a light tint with a darker pattern of random phase."""
    p, q = (int(phase) for phase in rng.integers(0, 3, 2))
    tint = np.asarray(TINTS[place.tint], np.float32) + rng.uniform(-4, 4, 3)
    return (tint - 46.0 * _pattern(place.texture, p, q)[..., None]).astype(np.float32)


@functools.cache
def _pattern(texture: str, p: int, q: int) -> np.ndarray:
    """Where a texture of phase (p, q) is dark: bool [SIZE, SIZE]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    if texture == "wall":
        return np.zeros((SIZE, SIZE), bool)
    if texture == "stripes":
        return (x + p) % 14 < 6
    if texture == "lines":
        return (y + q) % 14 < 6
    if texture == "dots":
        return ((x + p) % 14 - 6.5) ** 2 + ((y + q) % 14 - 6.5) ** 2 <= 14.0
    if texture == "checks":
        return ((x + p) // 7 + (y + q) // 7) % 2 == 0
    raise ValueError(f"unknown texture {texture!r}")


def _shade(color: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(c + rng.integers(-10, 11), 0, 255)) for c in color)
    return red, green, blue


def _paint(
    canvas: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], x: int, y: int
) -> None:
    """Blend a colour into the canvas where a mask, centred at (x, y), covers it; clips at edges."""
    size = mask.shape[0]
    left, top = x - size // 2, y - size // 2
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + size, SIZE), min(top + size, SIZE)
    alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    canvas[y0:y1, x0:x1] += alpha * (np.asarray(color, np.float32) - canvas[y0:y1, x0:x1])


@functools.cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    path = _package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / file
    if not path.is_file():
        raise UserError(f"{path} is missing; mini-MMEB takes its fonts from matplotlib")
    return ImageFont.truetype(str(path), size)


def _package_folder(package: str) -> Path:
    """Where an installed package lies, without importing it (imports take a second each)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"mini-MMEB needs the package {package}: pip install -r requirements.txt")
    return Path(spec.origin).parent
