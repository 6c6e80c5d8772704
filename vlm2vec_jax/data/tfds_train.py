# SPDX-License-Identifier: Apache-2.0
"""Training pairs as a TFDS data set: an example holds query, positive and negatives with images.

A row read from here is the row that was written. Training takes such a folder as
`--config.data.path`; texts are copied once more into a memory-mapped Arrow file, so that the check
before a run reads no image.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from vlm2vec_jax.data.arrow import STRING, STRINGS
from vlm2vec_jax.data.checks import ImageFolder
from vlm2vec_jax.data.folders import NEGATIVE_COLUMNS, TRAIN_COLUMNS
from vlm2vec_jax.data.manifest import ImageFacts
from vlm2vec_jax.data.mmeb import TrainRow, TrainSource
from vlm2vec_jax.data.paths import SEPARATOR
from vlm2vec_jax.data.source import Key
from vlm2vec_jax.data.tfds_records import Columns, Form, Records, as_str, files_of, find
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import image_size, load_image
from vlm2vec_jax.inputs import MultimodalInput

NAME = "vlm2vec_pairs"
SIDES = ("query", "positive")

_TYPES: dict[str, pa.DataType] = dict(
    zip(
        (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS),
        (STRING, STRING, STRING, STRING, STRINGS, STRINGS),
        strict=True,
    )
)


def _features(features: Any) -> dict[str, Any]:
    def side() -> dict[str, Any]:
        return {"text": features.Text(), "paths": features.Text(),
                "images": features.Sequence(features.Image())}  # fmt: skip

    return {
        "query": side(),
        "positive": side(),
        # Images of all negatives end to end; the paths say whose they are.
        "negatives": {
            "texts": features.Sequence(features.Text()),
            "paths": features.Sequence(features.Text()),
            "images": features.Sequence(features.Image()),
        },
    }


FORM = Form(
    NAME,
    "Pairs for training multimodal embeddings: query, positive, negatives.",
    _features,
    ("positive", "query", "negatives"),
    (*SIDES, "negatives"),
)


def examples(source: TrainSource) -> Iterator[dict[str, Any]]:
    """The rows in use as examples."""
    for row in source.rows.tolist():
        query, positive, negatives = source.keys(row, source.table.row(row))
        example: dict[str, Any] = {
            side: {"text": key[0], "paths": key[1], "images": files_of(source, key)}
            for side, key in zip(SIDES, (query, positive), strict=True)
        }
        example["negatives"] = {
            "texts": [text for text, _ in negatives],
            "paths": [paths for _, paths in negatives],
            "images": [file for key in negatives for file in files_of(source, key)],
        }
        yield example


def _columns(record: dict[str, Any]) -> dict[str, Any]:
    query, positive, negatives = (record[name] for name in (*SIDES, "negatives"))
    values = (
        *(as_str(side[name]) for side in (query, positive) for name in ("text", "paths")),
        [as_str(text) for text in negatives["texts"]],
        [as_str(path) for path in negatives["paths"]],
    )
    return dict(zip(_TYPES, values, strict=True))


class TfdsSource(TrainSource):
    """One subset of a TFDS data set, as `TrainSource`; images are in the examples."""

    in_files = False

    @property
    def own(self) -> bool:
        """Its splits are those of the set."""
        return False

    def _files(self) -> list[Path]:
        self._stored = find(self.data, self.subset, self.split, FORM)
        self.split = self._stored.split
        return [file for file, _ in self._stored.shards]

    def _reader(self, files: Sequence[Path]) -> Columns:
        self._records = Records(self._stored, FORM)
        return Columns(self._stored, FORM, _TYPES, _columns)

    def _find_root(self, folder: Path) -> Path:
        return folder

    def image_folder(self) -> ImageFolder:
        """Images lie in the examples, where they were checked before they were written."""
        return _InExamples(self)

    def _build(self, row: int, values: dict) -> TrainRow:
        query, positive, negatives = self.keys(row, values)
        images = self.images(row)
        try:
            first, second, *rest = (_input(key, images) for key in (query, positive, *negatives))
        except UserError as error:
            raise UserError(f"{self.at(row)}: {error}") from None
        inputs = (first, self._instructed(second, positive), *(
            self._instructed(item, key) for item, key in zip(rest, negatives, strict=True)
        ))  # fmt: skip
        return TrainRow(
            inputs[0], inputs[1], inputs[2:], self.subset, row, positive, tuple(negatives)
        )

    def _instructed(self, item: MultimodalInput, key: Key) -> MultimodalInput:
        return item if item.images else MultimodalInput(self.as_target(key)[0])

    def images(self, row: int) -> list[bytes]:
        """All image files of a row, in the order of its sides."""
        record = self._records[row]
        return [file for side in FORM.with_images for file in record[side]["images"]]


class _InExamples(ImageFolder):
    """Stands for the folder of images that are in the examples of one subset."""

    def __init__(self, source: TfdsSource):
        super().__init__(source.image_root)
        self._source = source

    def fault(self, path: str) -> tuple[str, str] | None:
        return self._known.get(path)

    def words(self, path: str) -> str:
        return f"{self._source.image_root}: {path}"

    def check_headers(self, paths: Sequence[str], workers: int) -> None:
        return None

    def examine(self, paths: Sequence[str], *, decode: bool, workers: int) -> Iterator[ImageFacts]:
        """Open every image where it comes first; here, as examples are read one by one."""
        left, source = set(paths), self._source
        for row in source.rows.tolist():
            query, positive, negatives = source.keys(row, source.table.row(row))
            names = [
                name
                for _, path in (query, positive, *negatives)
                for name in (path.split(SEPARATOR) if path else ())
            ]
            if not left & set(names):
                continue
            for name, content in zip(names, source.images(row), strict=False):
                if name not in left:
                    continue
                left.remove(name)
                size, problem = (0, 0), ""
                try:
                    image = _opened(name, content)
                    size = load_image(image).size if decode else image_size(image)
                except UserError as error:
                    problem = f"{source.at(row)}: {error}"
                digest = hashlib.sha256(content).hexdigest()
                yield ImageFacts(name, len(content), digest, *size, problem)
        for name in sorted(left):
            yield ImageFacts(name, -1, "", 0, 0, f"{self.words(name)}: no example holds it")


def _opened(name: str, content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
    except Exception as error:  # Pillow raises almost anything for damaged bytes
        raise UserError(f"{name}: not a readable image ({error})") from None
    image.filename = name  # messages name it
    return image


def _input(key: Key, images: list[bytes]) -> MultimodalInput:
    """The input of a key; takes its images off the front of `images`."""
    text, path = key
    opened = []
    for name in path.split(SEPARATOR) if path else ():
        if not images:
            raise UserError(f"{name}: the example lacks this image")
        opened.append(_opened(name, images.pop(0)))
    return MultimodalInput(text=text, images=tuple(opened))
