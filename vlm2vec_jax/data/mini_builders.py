# SPDX-License-Identifier: Apache-2.0
"""How the examples of each mini-MMEB subset come about: what is drawn, asked and expected.

A builder yields examples without the instruction; `mini_tasks` says which subset uses which
builder under which words. Every target carries a key, the attributes that it shows or says, so
that nobody's candidate list holds a second right answer.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlm2vec_jax.data import scenes
from vlm2vec_jax.data.scenes import COLORS, SHAPES, SIDES, TINTS, WORDS, Scene, Thing

if TYPE_CHECKING:
    from vlm2vec_jax.data.mini_tasks import Task

DESKS = ("sports", "arts", "science", "travel")


@dataclasses.dataclass(frozen=True)
class Side:
    """A text with its image marker, and the path of the image; empty where absent."""

    text: str
    image: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A target and what it shows or says; two candidates with one key answer the same queries."""

    side: Side
    key: Hashable


@dataclasses.dataclass(frozen=True)
class Example:
    """One query with its truth.

    Attributes:
      text: the query's own words, without instruction; may be empty.
      image: path of the query's image; empty for a text query.
      truth: the right target.
      asked: every word that is true of what is asked; an answer made of these alone is no wrong
        answer, so it never stands among the candidates.
      near: wrong candidates that a model would choose if it ignored a part of the query.
      things: the things that the query or truth is about (tests read it).
    """

    text: str
    image: str
    truth: Candidate
    asked: frozenset[str] = frozenset()
    near: tuple[Candidate, ...] = ()
    things: tuple[Thing, ...] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn scene: its path below the data folder, its pixels and each thing's own box."""

    path: str
    scene: Scene
    image: Image.Image
    boxes: tuple[tuple[int, int, int, int], ...]


Builder = Callable[["World", "Task", np.random.Generator], Iterator[Example]]


class World:
    """The pictures of one phase (`train` or `eval`): draws them, names them, keeps them.

    Training subsets share a pool of scenes, so that one picture stands under many instructions.

    Attributes:
      pictures: path below `DIR/train` or `DIR/eval` -> image, in the order of drawing.
    """

    def __init__(self, seed: int, phase: str, pool: tuple[int, int] = (0, 0)):
        self.seed = seed
        self.train = phase == "train"
        self.phase = phase
        self.pictures: dict[str, Image.Image] = {}
        self._counts: dict[str, int] = {}
        rng = self.rng("scenes")
        self._pool = {
            1: [self._random_scene("scenes", None, rng, 1)[0] for _ in range(pool[0])],
            2: [self._random_scene("scenes", None, rng, 2)[0] for _ in range(pool[1])],
        }

    def rng(self, name: str) -> np.random.Generator:
        """Return a generator that depends on seed, phase and name only."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.phase}/{name}".encode())])

    def keep(self, folder: str, image: Image.Image) -> str:
        """Take an image in and return the path that it will have."""
        number = self._counts[folder] = self._counts.get(folder, -1) + 1
        path = f"{'images' if self.train else 'eval_images'}/{folder}/{number:06d}.png"
        self.pictures[path] = image
        return path

    def draw(self, folder: str, scene: Scene, rng: np.random.Generator) -> Picture:
        """Draw a scene and keep it."""
        image, boxes = scenes.draw_scene(scene, rng)
        return Picture(self.keep(folder, image), scene, image, boxes)

    def pick(self, task: Task, rng: np.random.Generator, count: int) -> tuple[Picture, int]:
        """Return a picture of one or two things and which of them to ask about.

        From the shared pool in training; freshly drawn, as the task's shift wants it, otherwise.
        """
        if self.train:
            pool = self._pool[count]
            return pool[rng.integers(len(pool))], int(rng.integers(count))
        return self._random_scene(task.name, task, rng, count)

    def _random_scene(
        self, folder: str, task: Task | None, rng: np.random.Generator, count: int
    ) -> tuple[Picture, int]:
        thing = choose(task.things if task else scenes.SEEN_THINGS, rng)
        place = choose(task.places if task else scenes.SEEN_PLACES, rng)
        things, asked = [thing], int(rng.integers(count))
        if count == 2:
            others = [
                t for t in scenes.SEEN_THINGS if t.color != thing.color and t.shape != thing.shape
            ]
            things.insert(1 - asked, choose(others, rng))
        scene = Scene(tuple(things), place, task.style if task else "flat")
        return self.draw(folder, scene, rng), asked


def choose(values, rng: np.random.Generator):
    """Draw one of a sequence."""
    return values[int(rng.integers(len(values)))]


def thing_label(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A picture of one thing -> its name."""
    while True:
        picture, _ = world.pick(task, rng, 1)
        label = str(picture.scene.things[0])
        truth = Candidate(Side(label), label)
        yield Example("", picture.path, truth, things=picture.scene.things)


def place_label(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A picture of one or two things -> the place behind them."""
    while True:
        picture, _ = world.pick(task, rng, int(rng.integers(1, 3)))
        label = str(picture.scene.place)
        yield Example("", picture.path, Candidate(Side(label), label))


def digit_label(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A coloured handwritten digit -> `red seven`; the last 400 digits are for evaluation only."""
    pixels, labels = scenes.handwritten_digits()
    split = len(pixels) - 400
    numbers = np.arange(split) if world.train else np.arange(split, len(pixels))
    while True:
        for number in rng.permutation(numbers):
            color, tint = choose(tuple(COLORS), rng), choose(tuple(TINTS), rng)
            image = scenes.draw_digit(pixels[number], color, tint, rng)
            label = f"{color} {scenes.DIGITS[labels[number]]}"
            yield Example("", world.keep(task.name, image), Candidate(Side(label), label))


def news_domain(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A picture and a caption -> a domain that takes one word from each."""
    while True:
        picture, _ = world.pick(task, rng, 1)
        desk = choose(DESKS, rng)
        label = f"{desk} {picture.scene.things[0].shape}"
        text = f"A story from the {desk} desk."
        yield Example(text, picture.path, Candidate(Side(label), label))


def _questions(picture: Picture, k: int) -> dict[str, tuple[str, str]]:
    thing, side = picture.scene.things[k], SIDES[k]
    return {
        "side": (f"What is on the {side}?", str(thing)),
        "color of shape": (f"What color is the {thing.shape}?", thing.color),
        "shape of color": (f"What shape is the {thing.color} object?", thing.shape),
        "color at side": (f"What color is on the {side}?", thing.color),
        "shape at side": (f"What shape is on the {side}?", thing.shape),
        "behind": ("What is behind the objects?", str(picture.scene.place)),
    }


def questions(*kinds: str) -> Builder:
    """A picture of two things and a question -> the answer; questions come in `kinds`.

    At evaluation each picture is asked about twice, so that one embedding cannot serve both.
    """

    def build(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
        while True:
            picture, k = world.pick(task, rng, 2)
            asked_things = [k] if world.train or task.shift == "things" else [k, 1 - k]
            for k in asked_things:
                kind = choose(kinds, rng)
                question, answer = _questions(picture, k)[kind]
                thing, place = picture.scene.things[k], picture.scene.place
                true = place if kind == "behind" else (*thing, SIDES[k])
                truth = Candidate(Side(answer), answer)
                yield Example(question, picture.path, truth, frozenset(true), things=(thing,))

    return build


def chart_question(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A bar chart and a question -> the colour of the tallest or the shortest bar."""
    while True:
        colors = [str(c) for c in rng.permutation(list(COLORS))[:4]]
        heights = [int(rng.integers(44, 51)), int(rng.integers(20, 33)),
                   int(rng.integers(20, 33)), int(rng.integers(6, 13))]  # fmt: skip
        bars = dict(zip(colors, heights, strict=True))
        order = {str(c): bars[str(c)] for c in rng.permutation(colors)}
        path = world.keep(task.name, scenes.draw_chart(order, rng))
        for which, color in (("tallest", colors[0]), ("shortest", colors[3])):
            text = f"What color is the {which} bar?"
            yield Example(text, path, Candidate(Side(color), color), frozenset({color, "bar"}))


def word_question(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A card with two rendered words and a question -> the upper or the lower word."""
    fonts = scenes.HELD_OUT_FONTS if task.shift == "fonts" else scenes.TRAIN_FONTS
    while True:
        upper, lower = (WORDS[int(i)] for i in rng.permutation(len(WORDS))[:2])
        card = scenes.draw_words((upper, lower), choose(fonts, rng), rng)
        path = world.keep(task.name, card)
        for which, word in (("top", upper), ("bottom", lower)):
            truth = Candidate(Side(word), word)
            yield Example(f"What is the {which} word?", path, truth, frozenset({word}))


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def pair_caption(picture: Picture) -> tuple[str, Hashable]:
    """Describe two things side by side; the key is the two things in order."""
    left, right = picture.scene.things
    text = f"{_article(str(left))} to the left of {_article(str(right))}."
    return text[0].upper() + text[1:], (left, right)


def place_caption(picture: Picture) -> tuple[str, Hashable]:
    """Describe one thing and its place; the key is both."""
    thing, place = picture.scene.things[0], picture.scene.place
    text = f"{_article(str(thing))} on {place}."
    return text[0].upper() + text[1:], (thing, place)


def captions(describe: Callable[[Picture], tuple[str, Hashable]], count: int) -> Builder:
    """A picture -> its caption, or the other way round if the task's query is a text."""

    def build(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
        while True:
            picture, _ = world.pick(task, rng, count)
            text, key = describe(picture)
            things = picture.scene.things
            if task.query == "T":
                side = Side(task.target_text, picture.path)
                yield Example(text, "", Candidate(side, key), things=things)
            else:
                yield Example("", picture.path, Candidate(Side(text), key), things=things)

    return build


def change(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A picture and `the same but red` -> another picture; the first one is a near miss."""

    def target(picture: Picture) -> Candidate:
        text, key = place_caption(picture)
        return Candidate(Side(task.target_text.format(text), picture.path), key)

    while True:
        thing, place = choose(task.things, rng), choose(task.places, rng)
        kind = choose(("color", "shape", "place"), rng)
        before, behind = thing, place
        if kind == "place":
            behind = choose([p for p in scenes.SEEN_PLACES if p != place], rng)
            text = f"the same but on {place}"
        else:
            fixed = "shape" if kind == "color" else "color"
            before = choose(
                [
                    t
                    for t in scenes.SEEN_THINGS
                    if getattr(t, fixed) == getattr(thing, fixed) and t != thing
                ],
                rng,
            )
            text = f"the same but {thing.color if kind == 'color' else _article(thing.shape)}"
        source = world.draw(task.name, Scene((before,), behind, task.style), rng)
        result = world.draw(task.name, Scene((thing,), place, task.style), rng)
        yield Example(text, source.path, target(result), near=(target(source),), things=(thing,))


def lookalike(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A piece of a photograph -> almost the same piece; the photos of evaluation are others."""
    regions = scenes.photo_regions(scenes.TRAIN_PHOTOS if world.train else scenes.EVAL_PHOTOS)
    while True:
        for number in rng.permutation(len(regions)):
            name, x, y = regions[number]
            if world.train:  # anywhere in the photo: the grid would give too few
                x, y = x + int(rng.integers(-26, 27)), y + int(rng.integers(-26, 27))
            first, second = (
                world.keep(task.name, scenes.draw_region((name, x, y), rng)) for _ in range(2)
            )
            yield Example("", first, Candidate(Side(task.target_text, second), regions[number]))


def page(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
    """A question with a page's name and a thing -> a picture of the thing with that name."""

    def target(picture: Picture, name: str) -> Candidate:
        side = Side(task.target_text.format(name), picture.path)
        return Candidate(side, (name, picture.scene.things[0]))

    while True:
        picture, _ = world.pick(task, rng, 1)
        thing, name = picture.scene.things[0], choose(WORDS, rng)
        near = ()
        if not world.train:
            other = choose([t for t in scenes.SEEN_THINGS if t != thing], rng)
            scene = dataclasses.replace(picture.scene, things=(other,))
            another_name = choose([w for w in WORDS if w != name], rng)
            near = (
                target(world.draw(task.name, scene, rng), name),
                target(picture, another_name),
            )
        text = f"Which page of {name} shows {_article(str(thing))}?"
        yield Example(text, "", target(picture, name), near=near, things=(thing,))


def point(*expressions: str) -> Builder:
    """A picture of two things and an expression -> the crop of one; the other is a near miss.

    Args:
      *expressions: texts with `{thing}`, `{color}`, `{shape}` and `{side}`.
    """

    def build(world: World, task: Task, rng: np.random.Generator) -> Iterator[Example]:
        crop = functools.partial(_crop, world, task)
        while True:
            picture, k = world.pick(task, rng, 2)
            asked_things = [k] if world.train or task.shift == "things" else [k, 1 - k]
            crops = (crop(picture, 0), crop(picture, 1))
            for k in asked_things:
                thing = picture.scene.things[k]
                text = choose(expressions, rng).format(
                    thing=thing, color=thing.color, shape=thing.shape, side=SIDES[k]
                )
                yield Example(text, picture.path, crops[k], near=(crops[1 - k],), things=(thing,))

    return build


def _crop(world: World, task: Task, picture: Picture, k: int) -> Candidate:
    thing = picture.scene.things[k]
    path = world.keep(task.name, scenes.crop(picture.image, picture.boxes[k]))
    return Candidate(Side(task.target_text.format(thing), path), (thing, picture.scene.place))


def answer_texts() -> tuple[str, ...]:
    """Everything that may stand among the candidate answers of a question, without repeats."""
    colors, shapes = tuple(COLORS), SHAPES
    texts: list[str] = [*colors, *shapes, *SIDES, *TINTS, *scenes.TEXTURES, *WORDS, *scenes.DIGITS]
    texts += [str(t) for t in scenes.THINGS] + [str(p) for p in scenes.PLACES]
    texts += [f"{a} and {b}" for a in colors for b in colors if a != b]
    texts += [f"{a} and {b}" for a in shapes for b in shapes if a != b]
    texts += [f"{color} {digit}" for color in colors for digit in scenes.DIGITS]
    texts += [f"{thing} on the {side}" for thing in scenes.THINGS for side in SIDES]
    return tuple(dict.fromkeys(texts))


def is_rival(answer: str, example: Example) -> bool:
    """Whether a candidate answer is as true as the truth: it only says what is so of the asked."""
    return set(answer.split()) - {"on", "the"} <= example.asked
