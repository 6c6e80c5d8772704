# SPDX-License-Identifier: Apache-2.0
"""The exact strings that reach the tokenizer, for every kind of dataset, from both layouts.

The pooled token is the last one, so a newline more or less is another embedding. A text with an
image is tokenised in pieces, in front of the marker and behind it; a text alone as a whole.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_data import write_image

from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.evaluation import mmeb, run
from vlm2vec_jax.models.loading import abstract_model

IMAGE = "img/q.png"
OTHERS = ("img/a.png", "img/b.png")
ANY = "Represent the given image."
QUESTION = "Represent the given image with the following question:"
PAIR = "Represent the given Wikipedia image with related text information:"
EXPRESSION = "Select the portion of the image that follows the language expressions:"

# Dataset; instruction, text and image of the query; of the candidates; then, as the first layout
# spells them and the tokenizer must get them, query and candidates.
KINDS = [
    ("ImageNet-1K", "Represent the given image for classification", "", IMAGE,
     "", ("goldfish", "shark"), ("", ""),
     "<|image_1|> Represent the given image for classification\n", ("goldfish", "shark")),
    ("N24News", "Represent the given news image with the following caption for domain "
     "classification:", "A dog, running.", IMAGE,
     "", ("Sports", "Music"), ("", ""),
     "<|image_1|> Represent the given news image with the following caption for domain "
     "classification: A dog, running.\n", ("Sports", "Music")),
    ("OK-VQA", QUESTION, "What is it?", IMAGE,
     "", ("a dog", "two  dogs "), ("", ""),
     f"<|image_1|>\n{QUESTION} What is it?\n", ("a dog", "two  dogs ")),
    ("MSCOCO_t2i", "Find me an everyday image that matches the given caption:", "A dog.", "",
     ANY, ("", ""), OTHERS,
     "Find me an everyday image that matches the given caption: A dog.\n",
     (f"<|image_1|> {ANY}\n", f"<|image_1|> {ANY}\n")),
    ("VisDial", "Represent the given dialogue about an image, which is used for image retrieval:",
     "Q:is it\nA:yes", "",
     ANY, ("", ""), OTHERS,
     "Represent the given dialogue about an image, which is used for image retrieval: "
     "Q:is it\nA:yes\n\n", (f"<|image_1|> {ANY}\n", f"<|image_1|> {ANY}\n")),
    ("MSCOCO_i2t", "Find an image caption describing the given everyday image.", "", IMAGE,
     "", ("A dog.", "A cat.\n"), ("", ""),
     "<|image_1|> Find an image caption describing the given everyday image.\n",
     ("A dog.", "A cat.\n")),
    ("NIGHTS", "Find a day-to-day image that looks similar to the provided image.", "", IMAGE,
     ANY, ("", ""), OTHERS,
     "<|image_1|>\nFind a day-to-day image that looks similar to the provided image.\n",
     (f"<|image_1|> {ANY}", f"<|image_1|> {ANY}")),
    ("CIRR", "Given an image, find a similar everyday image with the described changes:",
     "more dogs", IMAGE,
     ANY, ("", ""), OTHERS,
     "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: "
     "more dogs\n", (f"<|image_1|> {ANY}", f"<|image_1|> {ANY}")),
    ("WebQA", "Find a Wikipedia image that answers this question:", "Who?", "",
     PAIR, ("A man", "A hat"), OTHERS,
     "Find a Wikipedia image that answers this question: Who?\n",
     (f"<|image_1|> {PAIR} A man\n", f"<|image_1|> {PAIR} A hat\n")),
    ("OVEN", "Retrieve a Wikipedia image-description pair that provides evidence for the "
     "question of this image:", "What model?", IMAGE,
     PAIR, ("A car", "A bus"), OTHERS,
     "<|image_1|>\nRetrieve a Wikipedia image-description pair that provides evidence for the "
     "question of this image: What model?\n",
     (f"<|image_1|> {PAIR} A car\n", f"<|image_1|> {PAIR} A bus\n")),
    ("MSCOCO", "Select the portion of the image that isolates the object labeled as", '"dog"',
     IMAGE,
     "Represent the given cropped image of the object.", ("", ""), OTHERS,
     '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "dog"\n',
     ("<|image_1|> Represent the given cropped image of the object.",) * 2),
    ("RefCOCO-Matching", EXPRESSION, '"left dog"', IMAGE,
     EXPRESSION, ('"left dog"', '"cat"'), OTHERS,
     f'<|image_1|>\n{EXPRESSION} "left dog"\n',
     (f'<|image_1|> {EXPRESSION} "left dog"\n', f'<|image_1|> {EXPRESSION} "cat"\n')),
]  # fmt: skip


def first_layout(kind) -> dict:
    return {
        "qry_text": kind[7], "qry_img_path": kind[3],
        "tgt_text": list(kind[8]), "tgt_img_path": list(kind[6]),
    }  # fmt: skip


def instruction_columns(kind) -> dict:
    mark = "<|image_1|> "
    return {
        "qry_inst": (mark if kind[3] else "") + kind[1], "qry_text": kind[2],
        "qry_img_path": kind[3],
        "tgt_inst": (mark if any(kind[6]) else "") + kind[4], "tgt_text": list(kind[5]),
        "tgt_img_path": list(kind[6]),
    }  # fmt: skip


class Listening:
    """Encodes with the real processor of a tiny model and listens to what its tokenizer is given.

    Attributes:
      heard: for each input, in order, its text as the evaluator has it and the strings.
    """

    def __init__(self, folder):
        model = abstract_model(folder)
        self.processor = model.backbone.processor(folder, model.config, num_crops=1)
        self.heard: list[tuple[str, list[str]]] = []
        self.strings: list[str] = []
        tokenizer = self.processor._tokenizer
        encode = tokenizer.encode

        def listen(text, *args, **kwargs):
            self.strings.append(text)
            return encode(text, *args, **kwargs)

        tokenizer.encode = listen

    def fingerprint(self):
        return {"model": "listening"}

    def encode(self, inputs):
        out = np.zeros((len(inputs), 3), np.float32)
        for n, item in enumerate(inputs):
            self.strings = []
            out[n] = len(self.processor.encode(item)), n, 1
            self.heard.append((item.text, self.strings))
        return out


def pieces(text: str) -> list[str]:
    front, marker, behind = text.partition("<|image_1|>")
    return [front, behind] if marker else [text]


@pytest.mark.parametrize("layout", [first_layout, instruction_columns])
def test_the_strings_that_reach_the_tokenizer(goldens, tmp_path, layout):
    for path in (IMAGE, *OTHERS):
        write_image(tmp_path / path)
    for kind in KINDS:
        (tmp_path / kind[0]).mkdir()
        table = pa.Table.from_pylist([layout(kind)])
        pq.write_table(table, tmp_path / kind[0] / "test-00000-of-00001.parquet")
    encoder = Listening(goldens / "tiny_gqa")
    run.evaluate_sources(encoder, open_eval(tmp_path, []), output=tmp_path / "out")
    heard = dict(encoder.heard)
    wanted = {text for kind in KINDS for text in (kind[7], *kind[8])}
    assert set(heard) == wanted
    for text, strings in heard.items():
        assert strings == pieces(text), text
    # Every kind of dataset that the benchmark has is among them.
    kinds = {(d.meta_task, d.query, d.target) for d in mmeb.DATASETS}
    assert kinds == {(d.meta_task, d.query, d.target) for k in KINDS if (d := mmeb.find(k[0]))}
