# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets as folders of array_record files, without TensorFlow: made, found, read.

    <folder>/<form>/<Subset>/1.0.0/<form>-<split>.array_record-0000k-of-0000n

Images are the bytes of their files, so nothing is decoded or encoded again. What an example holds
is up to a `Form`: `tfds_train.py`, `tfds_eval.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from vlm2vec_jax.data.arrow import BATCH_ROWS
from vlm2vec_jax.data.embedded import Keep
from vlm2vec_jax.data.folders import OWN_SPLIT, tfds_folders
from vlm2vec_jax.data.manifest import hash_file
from vlm2vec_jax.data.source import Key, Source
from vlm2vec_jax.errors import UserError

VERSION = "1.0.0"
"""Raised whenever the features change."""


def library() -> Any:
    """TFDS, loaded when it is needed, and silent."""
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    return tensorflow_datasets


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of data set.

    Attributes:
      name: of the builder.
      description: in its metadata.
      features: makes the features of an example from `tfds.features`.
      holds: features by which a data set of this form is known.
      with_images: features that have a list `images` of image files.
    """

    name: str
    description: str
    features: Callable[[Any], dict[str, Any]]
    holds: tuple[str, ...]
    with_images: tuple[str, ...]


@functools.cache
def builder_class(form: Form) -> Any:
    """The TFDS builder of a form; its argument `splits` maps a split to its examples."""
    tfds = library()
    base = tfds.core.GeneratorBasedBuilder

    class Builder(base, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues]
        """The data set of one subset."""

        VERSION = tfds.core.Version(VERSION)
        pkg_dir_path = Path(__file__).parent
        name = form.name

        def __init__(
            self,
            *,
            splits: Mapping[str, Callable[[], Iterator[dict[str, Any]]]],
            origin: Mapping[str, Any],
            **more: Any,
        ):
            """Take the examples of these splits; `origin` is kept as metadata."""
            self._splits, self._origin = splits, origin
            super().__init__(**more)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=form.description,
                features=tfds.features.FeaturesDict(form.features(tfds.features)),
                disable_shuffling=True,  # example i of the data set is example i of the splits
                metadata=tfds.core.MetadataDict(self._origin),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: enumerate(make()) for split, make in self._splits.items()}

        def _generate_examples(self, *_: Any) -> Any:
            raise NotImplementedError("the splits bring their own generators")

    return Builder


def origin(sources: Sequence[Source]) -> dict[str, Any]:
    """What the rows were made of: rows and table hashes by split."""
    return {
        "splits": {
            source.split: {
                "rows": len(source),
                "tables": [hash_file(Path(file))[1] for file, _ in source.table.shards],
            }
            for source in sources
        }
    }


def write(
    form: Form,
    subset: str,
    splits: Mapping[str, Callable[[], Iterator[dict[str, Any]]]],
    made_of: Mapping[str, Any],
    folder: str | Path,
) -> Path:
    """Write one subset, unless it is there.

    Args:
      form: of its examples.
      subset: its name.
      splits: split -> a function that gives its examples.
      made_of: `origin` of them.
      folder: the TFDS `data_dir`.

    Returns:
      The folder of the subset.

    Raises:
      UserError: if the folder holds other data under this name.
    """
    config = library().core.BuilderConfig(name=subset, version=VERSION)
    builder = builder_class(form)(
        splits=splits, origin=made_of, data_dir=str(folder), config=config,
        file_format="array_record",
    )  # fmt: skip
    place = Path(builder.data_dir)
    if (place / "dataset_info.json").is_file():
        with contextlib.suppress(OSError, ValueError):
            if json.loads((place / "metadata.json").read_text()) == made_of:
                return place
        raise UserError(f"{place} holds other data of this name; remove it or name a folder")
    # Written to a folder `incomplete.*` beside it, which gets its name when it is whole.
    builder.download_and_prepare()
    return place


def files_of(source: Source, key: Key) -> list[io.BytesIO]:
    """The image files of one side of a row, as they are."""
    paths = source.input(key).images  # refuses what leaves the image root
    return [io.BytesIO(Path(path).read_bytes()) for path in paths]  # pyright: ignore


class Stored(NamedTuple):
    """A split of a subset on disk.

    Attributes:
      folder: where its `features.json` is.
      split: its name.
      shards: its files with the examples in each.
    """

    folder: Path
    split: str
    shards: tuple[tuple[Path, int], ...]


def find(data: Path, subset: str, split: str, form: Form) -> Stored:
    """Find a split, all of its files there.

    Args:
      data: a TFDS `data_dir`, or a folder below it.
      subset: name of the builder's config.
      split: its name; a data set of own pairs has the one split `OWN_SPLIT`, whatever is asked for.
      form: what it must be.

    Raises:
      UserError: if it is not there, not whole, or of another form.
    """
    subsets = tfds_folders(data, form.holds[0])
    if subset not in subsets:
        names = ", ".join(subsets) or f"no data set with the feature {form.holds[0]}"
        raise UserError(f"unknown subset {subset!r}; {data} has: {names}")
    folder = subsets[subset]
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        features = json.loads((folder / "features.json").read_text())
        names = set(features["featuresDict"]["features"])
        splits = {one["name"]: [int(n) for n in one["shardLengths"]] for one in info["splits"]}
        kind, name = info["fileFormat"], info["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a whole TFDS data set ({error!r})") from None
    if kind != "array_record" or not set(form.holds) <= names:
        raise UserError(
            f"{folder}: needs features {', '.join(form.holds)} in array_record files; it has "
            f"{', '.join(sorted(names))} in {kind}"
        )
    if set(splits) == {OWN_SPLIT}:
        split = OWN_SPLIT
    if split not in splits:
        raise UserError(f"{folder}: no split {split!r}; splits there: {', '.join(splits)}")
    counts = splits[split]
    files = [
        folder / f"{name}-{split}.array_record-{k:05d}-of-{len(counts):05d}"
        for k in range(len(counts))
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: files missing: {', '.join(missing[:6])}")
    return Stored(folder, split, tuple(zip(files, counts, strict=True)))


class Records:
    """Random access to the examples of a split, images as bytes; safe in threads."""

    def __init__(self, stored: Stored, form: Form):
        """Open the files at the first access."""
        tfds = library()

        class Bytes(tfds.decode.SkipDecoding):
            """Leaves images as they are; TFDS's own has no form for lists without TensorFlow."""

            def decode_batch_example_np(self, example: Any) -> Any:
                return example

        builder = tfds.builder_from_directory(str(stored.folder))
        decoders = {name: {"images": Bytes()} for name in form.with_images}
        # The reader opens its files at the first access: once, not in several threads.
        self._lock = threading.Lock()
        self._opened = False
        self._where = f"{stored.folder}, split {stored.split}"
        with self._speaking("as a whole"):
            self._source = builder.as_data_source(split=stored.split, decoders=decoders)
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


class Columns:
    """An `arrow.Reader` of a split's texts and image paths."""

    def __init__(
        self,
        stored: Stored,
        form: Form,
        types: Mapping[str, pa.DataType],
        row: Callable[[dict[str, Any]], dict[str, Any]],
    ):
        """Read one split of one subset.

        Args:
          stored: where it is.
          form: of its examples.
          types: of the columns.
          row: makes them from an example.
        """
        self._stored, self._form, self._types, self._row = stored, form, types, row
        self._counts = dict(stored.shards)

    @property
    def key(self) -> str:
        """The split and the version of the rules."""
        return f"{self._stored.split} 1"

    def schema(self, files: Sequence[Path]) -> dict[str, pa.DataType]:
        """The columns."""
        return dict(self._types)

    def count(self, file: Path) -> int:
        """Examples of a shard, as the data set's own record says."""
        return self._counts[file]

    def batches(self, file: Path, schema: pa.Schema, keep: Keep) -> Iterator[pa.RecordBatch]:
        """The examples of a shard without their images."""
        records = Records(self._stored, self._form)
        first = sum(count for _, count in self._stored.shards[: list(self._counts).index(file)])
        last = first + self._counts[file]
        for start in range(first, last, BATCH_ROWS):
            end = min(start + BATCH_ROWS, last)
            rows = [self._row(records[row]) for row in range(start, end)]
            yield pa.RecordBatch.from_pylist(rows, schema=schema)


def as_str(value: bytes | str) -> str:
    """A text as the reader gives it."""
    return value.decode() if isinstance(value, bytes) else value
