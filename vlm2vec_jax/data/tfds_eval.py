# SPDX-License-Identifier: Apache-2.0
"""Evaluation rows as a TFDS data set: queries with their candidates, and each image once.

A thousand candidates of a row share their images with those of the other rows, so these are no
part of it: beside the split of rows (`test`) stands one of images (`test_images`), an example for
each. The evaluator names images by their files (it hashes them, and decodes one that several
inputs show once), so opening a set brings them out into a folder beside the converted table, once
for all processes; `--image_root` names one where they are already.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlm2vec_jax.data.arrow import STRING, STRINGS
from vlm2vec_jax.data.embedded import PREFIX
from vlm2vec_jax.data.folders import EVAL_COLUMNS
from vlm2vec_jax.data.mmeb import EvalSource
from vlm2vec_jax.data.paths import SEPARATOR, unsafe_path
from vlm2vec_jax.data.source import as_text, as_texts
from vlm2vec_jax.data.tfds_records import Columns, Form, Records, as_str, files_of, find
from vlm2vec_jax.errors import UserError

NAME = "vlm2vec_eval"
IMAGES = "_images"
"""What the name of the split of images has behind that of the rows."""

_TYPES: dict[str, pa.DataType] = dict(
    zip(EVAL_COLUMNS, (STRING, STRING, STRINGS, STRINGS), strict=True)
)


def _features(features: Any) -> dict[str, Any]:
    return {
        "query": {"text": features.Text(), "paths": features.Text()},
        "targets": {
            "texts": features.Sequence(features.Text()),
            "paths": features.Sequence(features.Text()),
        },
        # Of rows empty; an example of images has nothing else.
        "image": {"path": features.Text(), "images": features.Sequence(features.Image())},
    }


FORM = Form(
    NAME,
    "Queries with their candidates, the truth first, and the images of both.",
    _features,
    ("targets", "query", "image"),
    ("image",),
)


def rows(source: EvalSource) -> Iterator[dict[str, Any]]:
    """The rows in use as examples."""
    for row in source.rows.tolist():
        text, path, texts, paths = (source.table.row(row)[name] for name in EVAL_COLUMNS)
        yield {
            "query": {"text": as_text(text), "paths": as_text(path)},
            "targets": {"texts": as_texts(texts), "paths": as_texts(paths)},
            "image": {"path": "", "images": []},
        }


def images(source: EvalSource) -> Iterator[dict[str, Any]]:
    """The images of these rows as examples, each once, in order of first mention."""
    for path in dict.fromkeys(_paths(source)):
        yield {
            "query": {"text": "", "paths": ""},
            "targets": {"texts": [], "paths": []},
            "image": {"path": path, "images": files_of(source, ("", path))},
        }


def _paths(source: EvalSource) -> Iterator[str]:
    for row in source.rows.tolist():
        values = source.table.row(row)
        for path in (as_text(values["qry_img_path"]), *as_texts(values["tgt_img_path"])):
            yield from path.split(SEPARATOR) if path else ()


def _columns(record: dict[str, Any]) -> dict[str, Any]:
    query, targets = record["query"], record["targets"]
    values = (
        as_str(query["text"]),
        as_str(query["paths"]),
        [as_str(text) for text in targets["texts"]],
        [as_str(path) for path in targets["paths"]],
    )
    return dict(zip(_TYPES, values, strict=True))


class TfdsEvalSource(EvalSource):
    """One evaluation subset of a TFDS data set, as `EvalSource`."""

    @property
    def own(self) -> bool:
        """Its splits are those of the set."""
        return False

    @property
    def kept(self) -> Path:
        """Images that lay in a table before: with the others, under the names that rows have."""
        return self.image_root / PREFIX

    def _files(self) -> list[Path]:
        self._stored = find(self.data, self.subset, self.split, FORM)
        self._pictures = find(self.data, self.subset, self.split + IMAGES, FORM)
        return [file for file, _ in self._stored.shards]

    def _reader(self, files: Sequence[Path]) -> Columns:
        return Columns(self._stored, FORM, _TYPES, _columns)

    def _find_root(self, folder: Path) -> Path:
        """The folder of the images, which appears under its name when all of them are in it."""
        target = self.table.path.with_suffix(".images")
        if target.is_dir():
            return target
        part = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=target.parent))
        try:
            self._unpack(part)
            os.chmod(part, 0o755)  # mkdtemp's 0700 would hide it from other users
            try:
                os.rename(part, target)
            except OSError:
                if not target.is_dir():  # another process was there first
                    raise
        except OSError as error:
            raise UserError(
                f"{target}: the images cannot be written ({error.strerror}); make room or give "
                f"another cache folder"
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for other in target.parent.glob(f"{self.split}-*.images"):
            if other != target:  # of a set that was here before
                shutil.rmtree(other, ignore_errors=True)
        return target

    def _unpack(self, folder: Path) -> None:
        records = Records(self._pictures, FORM)
        for n in range(len(records)):
            image = records[n]["image"]
            path = as_str(image["path"])
            reason = unsafe_path(path) or ("" if len(image["images"]) == 1 else "not one image")
            if reason or not path:
                raise UserError(f"{self._pictures.folder}, image {n}: {path!r}: {reason}")
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image["images"][0])
