# SPDX-License-Identifier: Apache-2.0
"""The subsets of mini-MMEB: one line of `TASKS` each, and the words they are asked in.

Names, meta-tasks, modalities and instructions are MMEB's own. "ood" subsets have no training rows
and differ from training in one thing, their `shift`: combinations of colour and shape ("things")
or tint and texture ("places") that no training row shows or says, another rendering ("style"), or
other fonts ("fonts").
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm2vec_jax.data import mini_builders as b
from vlm2vec_jax.data import scenes
from vlm2vec_jax.data.scenes import COLORS, DIGITS, SHAPES, Place, Thing

MARKER = "<|image_1|>"
PARAPHRASES = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """One subset.

    Attributes:
      name: MMEB's name in the form of MMEB-eval (hyphens).
      meta_task: `classification`, `vqa`, `retrieval` or `grounding`.
      split: `ind` (has training rows) or `ood`.
      query: modality of the query: `I`, `T` or `IT`.
      target: modality of the target: `I`, `T` or `IT`.
      rows: training rows at scale 1; also the share of a training batch, since v1 mixes by size.
      instruction: the fixed words of the `original` split; `{}` takes the query's text.
      wordings: five other ways to say it, for `diverse_instruction`.
      builder: yields the examples.
      target_text: the target's words when it has an image; `{}` takes its text.
      labels: all labels of a classification task; empty if candidates are drawn.
      shift: what an `ood` subset holds out.
      style: how scenes are rendered.
      line: whether a newline instead of a space follows the marker (VQA, image-to-image).
    """

    name: str
    meta_task: str
    split: str
    query: str
    target: str
    rows: int
    instruction: str
    wordings: tuple[str, ...]
    builder: b.Builder
    target_text: str = ""
    labels: tuple[str, ...] = ()
    shift: str = ""
    style: str = "flat"
    line: bool = False

    @property
    def train_name(self) -> str:
        """The name as MMEB-train writes it: its one difference is `ImageNet_1K`."""
        return "ImageNet_1K" if self.name == "ImageNet-1K" else self.name

    @property
    def things(self) -> tuple[Thing, ...]:
        """The things that queries may be about."""
        return scenes.HELD_OUT_THINGS if self.shift == "things" else scenes.SEEN_THINGS

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that pictures may show."""
        return scenes.HELD_OUT_PLACES if self.shift == "places" else scenes.SEEN_PLACES

    def phrase(self, text: str, variant: int | None = None) -> str:
        """Put a query's text under the instruction.

        Args:
          text: the query's own words; may be empty.
          variant: None for the fixed instruction, or 0 to `PARAPHRASES` - 1: one of the five
            wordings, in the first five with the marker (or the instruction) in front as usual,
            in the others with it at the end.
        """
        words = self.instruction if variant is None else self.wordings[variant % 5]
        at_end = variant is not None and variant >= 5
        if "{}" in words:
            words = words.format(text)
        elif text:
            words = f"{text} {words}" if at_end and self.query == "T" else f"{words} {text}"
        if "I" in self.query:
            gap = "\n" if self.line else " "
            words = f"{words} {MARKER}" if at_end else f"{MARKER}{gap}{words}"
        return f"{words}\n"

    def examples(self, world: b.World, count: int, name: str = "") -> list[b.Example]:
        """Build that many examples; `name` sets a second, independent stream apart."""
        stream = self.builder(world, self, world.rng(self.name + name))
        return [example for example, _ in zip(stream, range(count), strict=False)]

    def candidates(
        self, world: b.World, examples: list[b.Example], count: int
    ) -> list[list[b.Candidate]]:
        """Give every example its candidates, the truth first and no second right answer.

        Args:
          world: draws further targets where the examples' own are too few.
          examples: the queries.
          count: candidates per query, unless the label set is smaller.
        """
        rng = world.rng(f"{self.name}/candidates")
        if self.labels:
            pool = [b.Candidate(b.Side(label), label) for label in self.labels]
        elif self.meta_task == "vqa":
            pool = [b.Candidate(b.Side(answer), answer) for answer in b.answer_texts()]
        else:
            pool = self._drawn_pool(world, examples, count)
        lists = []
        for example in examples:
            row = {c.key: c for c in (example.truth, *example.near)}
            for number in rng.permutation(len(pool)):
                other = pool[number]
                if self.meta_task == "vqa" and b.is_rival(other.side.text, example):
                    continue
                row.setdefault(other.key, other)
                if len(row) == count and not self.labels:
                    break
            truth, *others = row.values()
            lists.append([truth, *(others[i] for i in rng.permutation(len(others)))])
        return lists

    def _drawn_pool(
        self, world: b.World, examples: list[b.Example], count: int
    ) -> list[b.Candidate]:
        """Collect targets with different keys: the examples' own first, then further ones."""
        pool: dict = {}
        stream = self.builder(world, self, world.rng(f"{self.name}/pool"))
        for example in examples:
            for candidate in (example.truth, *example.near):
                pool.setdefault(candidate.key, candidate)
        for example, _ in zip(stream, range(20 * count), strict=False):
            if len(pool) >= count + 4:
                break
            for candidate in (example.truth, *example.near):
                pool.setdefault(candidate.key, candidate)
        return list(pool.values())


THING_LABELS = tuple(str(thing) for thing in scenes.THINGS)
PLACE_LABELS = tuple(str(place) for place in scenes.PLACES)
DIGIT_LABELS = tuple(f"{color} {digit}" for color in COLORS for digit in DIGITS)
NEWS_LABELS = tuple(f"{desk} {shape}" for desk in b.DESKS for shape in SHAPES)

IMAGE = f"{MARKER} Represent the given image.\n"
PLAIN_IMAGE = f"{MARKER} Represent the given image."
CROP = f"{MARKER}\nRepresent the given cropped image of the object."
NAMED_CROP = f"{MARKER}\nRepresent the given cropped image of the object: {{}}"
WIKI = f"{MARKER} Represent the given Wikipedia image with related text information: {{}}\n"

CLASSIFY = "Represent the given image for classification."
CLASSIFY_WORDINGS = (
    "Classify the given image.", "Which class does the image belong to?",
    "Give the image a label.", "Represent the image by its class.", "Name the class of the image.",
)  # fmt: skip
NEWS = "Represent the given news image with the following caption for domain classification:"
NEWS_WORDINGS = (
    "Classify the domain of the news image with this caption:",
    "Which domain do the news image and its caption belong to:",
    "Give the domain of this captioned news image:",
    "Represent the domain of the news image and the caption:",
    "Find the news domain of the image with the caption:",
)
OBJECT = "Identify the object shown in the image"
OBJECT_WORDINGS = (
    "Name the object in the image", "Which object does the image show?",
    "Find the object shown in the image", "Represent the object in the given image",
    "Say what object is shown in the image",
)  # fmt: skip
SCENE = "Identify the scene shown in the image."
SCENE_WORDINGS = (
    "Name the scene in the image.", "Which scene does the image show?",
    "Find the scene shown in the image.", "Represent the scene of the given image.",
    "Say what scene is shown in the image.",
)  # fmt: skip
QUESTION = "Represent the given image with the following question:"
QUESTION_WORDINGS = (
    "Answer the question about the given image:", "Represent the image and this question:",
    "Find the answer to the question on the image:", "Given the image, answer this question:",
    "Use the image to answer the following question:",
)  # fmt: skip
TO_IMAGE = "Find me an everyday image that matches the given caption:"
TO_IMAGE_WORDINGS = (
    "Find an image for this caption:", "Which everyday image does the caption describe:",
    "Show me the image that the caption describes:", "Find the picture that matches the caption:",
    "Search for an everyday image with this caption:",
)  # fmt: skip
TO_TEXT = "Find an image caption describing the given everyday image."
TO_TEXT_WORDINGS = (
    "Describe the given image.", "Find the caption of the everyday image.",
    "Which caption describes the image?", "Give the image a caption.",
    "Represent the everyday image for its caption.",
)  # fmt: skip
NEWS_TO_IMAGE = "Retrieve an image of this news caption."
NEWS_TO_IMAGE_WORDINGS = (
    "Find the news image of this caption.", "Which news image has this caption?",
    "Show me the news photo of the caption.", "Retrieve the news picture described here.",
    "Search for an image of the given news caption.",
)  # fmt: skip
NEWS_TO_TEXT = "Find a caption for the news in the given photo."
NEWS_TO_TEXT_WORDINGS = (
    "Describe the news in the photo.", "Which news caption does the photo have?",
    "Retrieve the caption of the news photo.", "Give the news photo a caption.",
    "Find the news caption that describes the photo.",
)  # fmt: skip
CHANGE = "Given an image, find a similar everyday image with the described changes:"
CHANGE_WORDINGS = (
    "Find the image with this change:",
    "Change the given image in this way:",
    "Which everyday image shows the described changes:",
    "Find a similar image that has these changes:",
    "Given the image and the changes, find the other image:",
)
SIMILAR = "Find a day-to-day image that looks similar to the provided image."
SIMILAR_WORDINGS = (
    "Find a similar image.", "Which image looks like the provided image?",
    "Show me a day-to-day image that looks the same.", "Find the image most similar to this one.",
    "Search for an image that looks like the provided one.",
)  # fmt: skip
WIKI_ANSWER = "Find a Wikipedia image that answers this question:"
WIKI_WORDINGS = (
    "Which Wikipedia image answers the question:", "Find the image that answers the question:",
    "Show me a Wikipedia image as the answer:", "Answer this question with a Wikipedia image:",
    "Search for a Wikipedia image that answers:",
)  # fmt: skip
ISOLATE = 'Select the portion of the image that isolates the object labeled as "{}"'
ISOLATE_WORDINGS = (
    'Find the part of the image that shows the "{}"', 'Crop the image to the object "{}"',
    'Which portion of the image is labeled as "{}"?', 'Select the "{}" in the image',
    'Show me only the object labeled as "{}"',
)  # fmt: skip
SIDE_QUESTIONS = b.questions("side")
LABELS = ("{thing}", "{shape}", "{color} object", "{side} object")


def _ood(name: str, meta: str, like: str, instruction: str, builder: b.Builder, **more) -> Task:
    """A held-out subset: modalities as in `like` ("I>T"), never paraphrased, no training rows."""
    query, target = like.split(">")
    return Task(name, meta, "ood", query, target, 0, instruction, (), builder, **more)


# fmt: off
TASKS: tuple[Task, ...] = (
    # classification
    Task("ImageNet-1K", "classification", "ind", "I", "T", 1300, CLASSIFY, CLASSIFY_WORDINGS,
         b.thing_label, labels=THING_LABELS),
    Task("N24News", "classification", "ind", "IT", "T", 600, NEWS, NEWS_WORDINGS,
         b.news_domain, labels=NEWS_LABELS),
    Task("VOC2007", "classification", "ind", "I", "T", 1200, OBJECT, OBJECT_WORDINGS,
         b.digit_label, labels=DIGIT_LABELS),
    Task("SUN397", "classification", "ind", "I", "T", 900, SCENE, SCENE_WORDINGS,
         b.place_label, labels=PLACE_LABELS),
    _ood("Place365", "classification", "I>T", SCENE, b.place_label, labels=PLACE_LABELS,
         shift="places"),
    _ood("ImageNet-R", "classification", "I>T", CLASSIFY, b.thing_label, labels=THING_LABELS,
         shift="style", style="sticker"),
    _ood("ObjectNet", "classification", "I>T", CLASSIFY, b.thing_label, labels=THING_LABELS,
         shift="things"),
    # visual question answering
    Task("OK-VQA", "vqa", "ind", "IT", "T", 1600, QUESTION, QUESTION_WORDINGS,
         b.questions("color of shape", "shape of color"), line=True),
    Task("A-OKVQA", "vqa", "ind", "IT", "T", 1400, QUESTION, QUESTION_WORDINGS,
         SIDE_QUESTIONS, line=True),
    Task("DocVQA", "vqa", "ind", "IT", "T", 1300, QUESTION, QUESTION_WORDINGS,
         b.word_question, line=True),
    Task("ChartQA", "vqa", "ind", "IT", "T", 800, QUESTION, QUESTION_WORDINGS,
         b.chart_question, line=True),
    Task("Visual7W", "vqa", "ind", "IT", "T", 1600, QUESTION, QUESTION_WORDINGS,
         b.questions("color at side", "shape at side", "behind"), line=True),
    _ood("ScienceQA", "vqa", "IT>T", QUESTION, b.questions("color of shape", "shape of color"),
         shift="things", line=True),
    _ood("VizWiz", "vqa", "IT>T", QUESTION, SIDE_QUESTIONS, shift="style", style="blurry",
         line=True),
    _ood("GQA", "vqa", "IT>T", QUESTION, SIDE_QUESTIONS, shift="things", line=True),
    _ood("TextVQA", "vqa", "IT>T", QUESTION, b.word_question, shift="fonts", line=True),
    # retrieval
    Task("CIRR", "retrieval", "ind", "IT", "I", 1600, CHANGE, CHANGE_WORDINGS,
         b.change, PLAIN_IMAGE, line=True),
    Task("VisualNews_t2i", "retrieval", "ind", "T", "I", 700, NEWS_TO_IMAGE,
         NEWS_TO_IMAGE_WORDINGS, b.captions(b.place_caption, 1), IMAGE),
    Task("VisualNews_i2t", "retrieval", "ind", "I", "T", 700, NEWS_TO_TEXT,
         NEWS_TO_TEXT_WORDINGS, b.captions(b.place_caption, 1)),
    Task("MSCOCO_t2i", "retrieval", "ind", "T", "I", 1400, TO_IMAGE, TO_IMAGE_WORDINGS,
         b.captions(b.pair_caption, 2), IMAGE),
    Task("MSCOCO_i2t", "retrieval", "ind", "I", "T", 1400, TO_TEXT, TO_TEXT_WORDINGS,
         b.captions(b.pair_caption, 2)),
    Task("NIGHTS", "retrieval", "ind", "I", "I", 400, SIMILAR, SIMILAR_WORDINGS,
         b.lookalike, PLAIN_IMAGE, line=True),
    Task("WebQA", "retrieval", "ind", "T", "IT", 900, WIKI_ANSWER, WIKI_WORDINGS,
         b.page, WIKI),
    _ood("OVEN", "retrieval", "IT>IT",
         "Given an image, find a Wikipedia image and caption with the described changes:",
         b.change, target_text=WIKI, shift="things", line=True),
    _ood("FashionIQ", "retrieval", "IT>I",
         "Given an image, find a similar fashion image with the described changes:",
         b.change, target_text=PLAIN_IMAGE, shift="things", line=True),
    _ood("EDIS", "retrieval", "T>IT", "Find a news image that answers this question:",
         b.page, target_text=WIKI, shift="things"),
    # grounding
    Task("MSCOCO", "grounding", "ind", "IT", "I", 1800, ISOLATE, ISOLATE_WORDINGS,
         b.point(*LABELS), CROP, line=True),
    _ood("Visual7W-Pointing", "grounding", "IT>I",
         'Select the portion of the image that answers the question "{}"',
         b.point("Which object is {color}?", "Which object is on the {side}?"),
         target_text=CROP, shift="things", line=True),
    _ood("RefCOCO", "grounding", "IT>I",
         'Select the portion of the image that isolates the object described as "{}"',
         b.point("{shape} on the {side}", "{thing} on the {side}"), target_text=CROP,
         shift="things", line=True),
    _ood("RefCOCO-Matching", "grounding", "IT>IT",
         'Select the portion of the image that isolates the object described as "{}"',
         b.point(*LABELS), target_text=NAMED_CROP, shift="things", line=True),
)
# fmt: on


def paraphrase(task: Task, text: str, rng: np.random.Generator) -> str:
    """Put a query's text under one of the task's ten paraphrases, as `diverse_instruction` does."""
    return task.phrase(text, int(rng.integers(PARAPHRASES)))
