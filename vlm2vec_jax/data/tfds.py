# SPDX-License-Identifier: Apache-2.0
"""Training pairs as a TFDS data set: array_record files, written and read without TensorFlow.

    <folder>/vlm2vec_pairs/<Subset>/1.0.0/vlm2vec_pairs-<split>.array_record-0000k-of-0000n

An example holds query, positive and negatives; images are the bytes of their files, so nothing is
decoded or encoded again, and a row read from here is the row that was written. Training takes such
a folder as `--config.data.path`; texts are copied once more into a memory-mapped Arrow file, so
that the check before a run reads no image. `prepare --tfds` writes it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from vlm2vec_jax.data import verify
from vlm2vec_jax.data.arrow import BATCH_ROWS, STRING, STRINGS
from vlm2vec_jax.data.folders import NEGATIVE_COLUMNS, OWN_SPLIT, TRAIN_COLUMNS, tfds_folders
from vlm2vec_jax.data.manifest import hash_file
from vlm2vec_jax.data.mmeb import EvalSource, TrainRow, TrainSource
from vlm2vec_jax.data.paths import SEPARATOR
from vlm2vec_jax.data.source import Key
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import MultimodalInput

NAME = "vlm2vec_pairs"
VERSION = "1.0.0"
"""Raised whenever the features change."""

_DESCRIPTION = "Pairs for training multimodal embeddings: query, positive, negatives."
_SIDES = ("query", "positive")


def _library() -> Any:
    """TFDS, loaded when it is needed, and silent."""
    import tensorflow_datasets as library

    library.disable_progress_bar()
    return library


@functools.cache
def _builder_class() -> Any:
    library = _library()
    features = library.features

    def side() -> dict[str, Any]:
        return {"text": features.Text(), "paths": features.Text(),
                "images": features.Sequence(features.Image())}  # fmt: skip

    base = library.core.GeneratorBasedBuilder

    class Vlm2vecPairs(base, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues]
        """The data set; `sources` are the splits of one subset."""

        VERSION = library.core.Version(VERSION)
        pkg_dir_path = Path(__file__).parent
        name = NAME

        def __init__(self, *, sources: Sequence[TrainSource], **more: Any):
            """Take the rows of these sources."""
            self._sources = {source.split: source for source in sources}
            super().__init__(**more)

        def _info(self) -> Any:
            return library.core.DatasetInfo(
                builder=self,
                description=_DESCRIPTION,
                features=features.FeaturesDict(
                    {
                        "query": side(),
                        "positive": side(),
                        # Images of all negatives end to end; the paths say whose they are.
                        "negatives": {
                            "texts": features.Sequence(features.Text()),
                            "paths": features.Sequence(features.Text()),
                            "images": features.Sequence(features.Image()),
                        },
                    }
                ),
                disable_shuffling=True,  # row i of the data set is row i of the source
                metadata=library.core.MetadataDict(origin(list(self._sources.values()))),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: _examples(source) for split, source in self._sources.items()}

        def _generate_examples(self, *_: Any) -> Any:
            raise NotImplementedError("the splits bring their own generators")

    return Vlm2vecPairs


def origin(sources: Sequence[TrainSource]) -> dict[str, Any]:
    """What the rows were made of: rows and table hashes by split."""
    return {
        "splits": {
            source.split: {
                "rows": len(source),
                "tables": [hash_file(file)[1] for file, _ in source.table.shards],
            }
            for source in sources
        }
    }


def _examples(source: TrainSource) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in range(len(source)):
        row = int(source.rows[i])
        query, positive, negatives = source.keys(row, source.table.row(row))
        example: dict[str, Any] = {
            side: {"text": key[0], "paths": key[1], "images": _files(source, key)}
            for side, key in zip(_SIDES, (query, positive), strict=True)
        }
        example["negatives"] = {
            "texts": [text for text, _ in negatives],
            "paths": [paths for _, paths in negatives],
            "images": [file for key in negatives for file in _files(source, key)],
        }
        yield i, example


def _files(source: TrainSource, key: Key) -> list[io.BytesIO]:
    """The image files of one side, as they are."""
    paths = source.input(key).images  # refuses what leaves the image root
    return [io.BytesIO(Path(path).read_bytes()) for path in paths]  # pyright: ignore


def write(
    sources: Sequence[TrainSource | EvalSource], folder: str | Path
) -> Iterator[tuple[str, int]]:
    """Write training subsets as a TFDS data set, a subset at a time; done ones are left alone.

    Args:
      sources: opened subsets; splits of one subset go together. Every row and image is checked
        before the first is written.
      folder: the TFDS `data_dir`.

    Yields:
      The folder of each subset, and the examples in it.

    Raises:
      UserError: bad rows, evaluation data (whose candidate lists share their images: read it from
        its own layout), or a folder that holds other data under this name.
    """
    training = [source for source in sources if isinstance(source, TrainSource)]
    if len(training) < len(sources) or not training:
        raise UserError("only training data is written as TFDS; evaluation reads its own layout")
    verify.report(verify.verify_train(training, headers=True))
    library = _library()
    subsets = {source.subset: [] for source in training}
    for source in training:
        subsets[source.subset].append(source)
    for subset, splits in subsets.items():
        config = library.core.BuilderConfig(name=subset, version=VERSION)
        builder = _builder_class()(
            sources=splits, data_dir=str(folder), config=config, file_format="array_record"
        )
        place = Path(builder.data_dir)
        if (place / "dataset_info.json").is_file():
            with contextlib.suppress(OSError, ValueError):
                if json.loads((place / "metadata.json").read_text()) == origin(splits):
                    yield str(place), sum(len(source) for source in splits)
                    continue
            raise UserError(f"{place} holds other data of this name; remove it or name a folder")
        # Written to a folder `incomplete.*` beside it, which gets its name when it is whole.
        builder.download_and_prepare()
        yield str(place), sum(len(source) for source in splits)


class _Records:
    """Random access to the examples of a split, images as bytes; safe in threads."""

    def __init__(self, folder: Path, split: str):
        library = _library()

        class Bytes(library.decode.SkipDecoding):
            """Leaves images as they are; TFDS's own has no form for lists without TensorFlow."""

            def decode_batch_example_np(self, example: Any) -> Any:
                return example

        builder = library.builder_from_directory(str(folder))
        decoders = {name: {"images": Bytes()} for name in (*_SIDES, "negatives")}
        # The reader opens its files at the first access: once, not in several threads.
        self._lock = threading.Lock()
        self._opened = False
        self._where = f"{folder}, split {split}"
        with self._speaking("as a whole"):
            self._source = builder.as_data_source(split=split, decoders=decoders)
            self._count = len(self._source)

    @contextlib.contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        # The record reader raises RuntimeError, ValueError, IndexError and protobuf's own.
        try:
            yield
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self._where}, {what}: damaged records ({reason[:120]}); write the set again"
            ) from None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not self._opened:
            with self._lock:
                for place in (0, self._count - 1):
                    with self._speaking(f"example {place}"):
                        self._source[place]
                self._opened = True
        with self._speaking(f"example {row}"):
            return self._source[int(row)]


class TfdsColumns:
    """An `arrow.Reader` of a split's texts and image paths."""

    def __init__(self, folder: Path, split: str, shards: Sequence[tuple[Path, int]]):
        """Read one split of one subset.

        Args:
          folder: where its `features.json` is.
          split: which one.
          shards: its files with the examples in each.
        """
        self.folder, self.split = folder, split
        self._counts = dict(shards)
        starts, start = {}, 0
        for file, count in shards:
            starts[file], start = start, start + count
        self._starts = starts

    @property
    def key(self) -> str:
        """The split and the version of the rules."""
        return f"{self.split} 1"

    def schema(self, files: Sequence[Path]) -> dict[str, pa.DataType]:
        """MMEB-train's columns."""
        kinds = (STRING, STRING, STRING, STRING, STRINGS, STRINGS)
        return dict(zip((*TRAIN_COLUMNS, *NEGATIVE_COLUMNS), kinds, strict=True))

    def count(self, file: Path) -> int:
        """Examples of a shard, as the data set's own record says."""
        return self._counts[file]

    def batches(self, file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The examples of a shard without their images."""
        records = _Records(self.folder, self.split)
        first, count = self._starts[file], self._counts[file]
        for start in range(first, first + count, BATCH_ROWS):
            rows = [
                _columns(records[row])
                for row in range(start, min(start + BATCH_ROWS, first + count))
            ]
            yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _columns(record: dict[str, Any]) -> dict[str, Any]:
    query, positive, negatives = (record[name] for name in (*_SIDES, "negatives"))
    values = (
        *(_str(side[name]) for side in (query, positive) for name in ("text", "paths")),
        [_str(text) for text in negatives["texts"]],
        [_str(path) for path in negatives["paths"]],
    )
    return dict(zip((*TRAIN_COLUMNS, *NEGATIVE_COLUMNS), values, strict=True))


def _str(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


class TfdsSource(TrainSource):
    """One subset of a TFDS data set, as `TrainSource`; images are in the examples."""

    def _files(self) -> list[Path]:
        subsets = tfds_folders(self.data)
        if self.subset not in subsets:
            raise UserError(
                f"unknown subset {self.subset!r}; {self.data} has: {', '.join(subsets)}"
            )
        self.folder = subsets[self.subset]
        try:
            info = json.loads((self.folder / "dataset_info.json").read_text())
            features = json.loads((self.folder / "features.json").read_text())
            names = set(features["featuresDict"]["features"])
            splits = {
                split["name"]: [int(n) for n in split["shardLengths"]] for split in info["splits"]
            }
            kind, name = info["fileFormat"], info["name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder}: not a whole TFDS data set ({error!r})") from None
        if kind != "array_record" or not {*_SIDES, "negatives"} <= names:
            raise UserError(
                f"{self.folder}: needs features query, positive, negatives in array_record files; "
                f"it has {', '.join(sorted(names))} in {kind}"
            )
        if set(splits) == {OWN_SPLIT}:  # own pairs have no splits, here as in their files
            self.split = OWN_SPLIT
        if self.split not in splits:
            raise UserError(
                f"{self.folder}: no split {self.split!r}; splits there: {', '.join(splits)}"
            )
        counts = splits[self.split]
        files = [
            self.folder / f"{name}-{self.split}.array_record-{k:05d}-of-{len(counts):05d}"
            for k in range(len(counts))
        ]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{self.folder}: files missing: {', '.join(missing[:6])}")
        self._shards = list(zip(files, counts, strict=True))
        return files

    def _reader(self, files: Sequence[Path]) -> TfdsColumns:
        return TfdsColumns(self.folder, self.split, self._shards)

    def _find_root(self, folder: Path) -> Path:
        self._records = _Records(self.folder, self.split)
        return folder

    def image_folder(self) -> verify.ImageFolder:
        """Images lie in the examples, where they were checked before they were written."""
        return _Stored(self.folder)

    def _build(self, row: int, values: dict) -> TrainRow:
        query, positive, negatives = self.keys(row, values)
        record = self._records[row]
        try:
            sides = [_input(key, list(record[side]["images"]))
                     for side, key in zip(_SIDES, (query, positive), strict=True)]  # fmt: skip
            images = list(record["negatives"]["images"])
            inputs = tuple(_input(key, images) for key in negatives)
        except UserError as error:
            raise UserError(f"{self.at(row)}: {error}") from None
        return TrainRow(
            sides[0], sides[1], inputs, self.subset, row, positive, tuple(negatives)
        )  # fmt: skip


class _Stored(verify.ImageFolder):
    def fault(self, path: str) -> tuple[str, str] | None:
        return None

    def check_headers(self, paths: Sequence[str], workers: int) -> None:
        return None


def _input(key: Key, images: list[bytes]) -> MultimodalInput:
    """The input of a key; takes its images off the front of `images`."""
    text, path = key
    opened = []
    for name in path.split(SEPARATOR) if path else ():
        if not images:
            raise UserError(f"{name}: the example lacks this image")
        try:
            image = Image.open(io.BytesIO(images.pop(0)))
        except Exception as error:  # Pillow raises almost anything for damaged bytes
            raise UserError(f"{name}: not a readable image ({error})") from None
        image.filename = name  # messages name it
        opened.append(image)
    return MultimodalInput(text=text, images=tuple(opened))


def open_tfds(
    data: str | os.PathLike,
    subsets: Sequence[str] = (),
    split: str = "original",
    *,
    limit: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[TrainSource]:
    """Open several subsets of a TFDS data set (all that have the split if none are named).

    Raises:
      UserError: one message with everything wrong with any of them.
    """
    opened: list[TrainSource] = []
    problems = [f"subset {n!r} is listed twice" for n in sorted(set(subsets))
                if list(subsets).count(n) > 1]  # fmt: skip
    for name in subsets or tfds_folders(data):
        try:
            opened.append(TfdsSource(data, name, split, limit=limit, cache_dir=cache_dir))
        except UserError as error:
            problems.append(str(error))
    raise_problems(f"Cannot read split {split!r} of {data}", problems)
    return opened
