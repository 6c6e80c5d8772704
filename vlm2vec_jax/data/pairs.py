# SPDX-License-Identifier: Apache-2.0
"""Own pairs from jsonl, csv or parquet files, brought to MMEB's columns.

A row has a `query`, a `positive`, and any number of `negatives`; each is a text, images, or both.
`docs/your-own-data.md` is the user's page; in short

    {"query": {"text": "...", "images": ["a.png"]}, "positive": "...", "negatives": ["...", ...]}

or flat columns (the only way in csv): `query`, `query_image` (one path) or `query_images` (a list;
in csv a JSON list), the same for `positive`, and `negatives` (a list of texts or objects; JSON in
csv) or `negative`, `negative_image`, `negative_1`, `negative_1_image`, ... For evaluation
`candidates` may list the targets to choose from; without it they are positive and negatives. In
parquet files an image may also lie in the table itself (`embedded.py`).

A text with images but without markers gets `<|image_1|> ... <|image_n|>` in front.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec_jax.data.arrow import BATCH_ROWS, STRING, STRINGS, read_schema
from vlm2vec_jax.data.embedded import ROWS, Keep, holds_bytes, path_of, unkept
from vlm2vec_jax.data.folders import EVAL_COLUMNS, NEGATIVE_COLUMNS, TRAIN_COLUMNS
from vlm2vec_jax.data.paths import SEPARATOR
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import IMAGE_MARKER, MultimodalInput

Side = tuple[str, str]
"""Text, and image paths joined by `paths.SEPARATOR`."""

_KNOWN = re.compile(
    r"(query|positive|negative(_\d+)?)(_images?)?|negatives|candidates"
)  # fmt: skip
_NEGATIVE = re.compile(r"negative(?:_(\d+))?")
_NAMES = ("query", "positive", "negative", "negatives", "candidates", "query_image",
          "query_images", "positive_image", "positive_images", "negative_image")  # fmt: skip
_TYPOS = 0.8
"""How similar an unknown column's name must be to a known one to be taken for a slip."""


def read_side(value: Any, images: Any = None, keep: Keep = unkept) -> Side:
    """One side of a pair.

    Args:
      value: a text, None, an object with `text` and/or `images` (or `image`), or an image alone as
        it lies in a table (`embedded.path_of`).
      images: further images beside it: one, a list, or None.
      keep: puts the bytes of an image away.

    Raises:
      UserError: for anything else, in words.
    """
    if isinstance(value, Mapping):
        # A struct of a parquet file has all its fields in every row, absent ones as None.
        value = {k: v for k, v in value.items() if v is not None}
        if value and value.keys() <= {"bytes", "path"}:
            value = {"images": value}
        value = {k: _paths(v, keep) if k in ("image", "images") else v for k, v in value.items()}
    elif isinstance(value, bytes):
        value = {"images": _paths(value, keep)}
    images = _paths(images, keep)
    item = MultimodalInput.of("" if value is None else value)
    # `MultimodalInput` puts markers into an empty text; what was written counts here.
    written = value.get("text", "") if isinstance(value, Mapping) else value or ""
    paths = [str(path) for path in item.images]
    if isinstance(images, str):
        images = [images] if images else []
    elif images is None:
        images = []
    elif isinstance(images, Mapping) or not isinstance(images, Sequence):
        raise UserError(f"an image must be the path of a file, not {type(images).__name__}")
    for path in images:
        if not isinstance(path, str) or not path:
            raise UserError(f"an image must be the path of a file, not {path!r:.60}")
    paths += images
    for path in paths:
        if SEPARATOR in path:
            raise UserError(f"image path with a control character: {path!r:.80}")
    if paths and written and not IMAGE_MARKER.search(written):
        markers = " ".join(f"<|image_{k}|>" for k in range(1, len(paths) + 1))
        written = f"{markers} {written}"
    return written, SEPARATOR.join(paths)


def _paths(images: Any, keep: Keep) -> Any:
    """Paths in place of images that lie in a table; anything else as it is."""
    if isinstance(images, (bytes, Mapping)):
        images = [images]
    if not isinstance(images, Sequence) or isinstance(images, str):
        return images
    found = [path_of(i, keep) if isinstance(i, (bytes, Mapping)) else i for i in images]
    return [one for one, i in zip(found, images, strict=True) if one or not isinstance(i, Mapping)]


def read_row(
    row: Mapping[str, Any], keep: Keep = unkept
) -> tuple[Side, Side, list[Side], list[Side] | None]:
    """Query, positive, negatives, and candidates (None if not given) of a row.

    Args:
      row: its columns.
      keep: puts the bytes of an image away and gives its path.

    Raises:
      UserError: for what is missing or of a wrong type; the message names the field.
    """
    query, positive = _field(row, "query", keep), _field(row, "positive", keep)
    for name, side in (("query", query), ("positive", positive)):
        if not any(side):
            raise UserError(f"{name}: neither text nor image")
    negatives = _list(row, "negatives", keep) or []
    numbered = sorted(
        {m.group() for name in row if (m := _NEGATIVE.match(name)) and _KNOWN.fullmatch(name)}
        - {"negatives"},
        key=lambda name: int(name.partition("_")[2] or 0),
    )
    negatives += [side for name in numbered if any(side := _field(row, name, keep))]
    candidates = _list(row, "candidates", keep)
    return query, positive, negatives, candidates


def _field(row: Mapping[str, Any], name: str, keep: Keep) -> Side:
    try:
        images = row.get(f"{name}_images")
        one = row.get(f"{name}_image")
        if images and one:
            raise UserError(f"both {name}_image and {name}_images; give one of them")
        return read_side(row.get(name), images or one, keep)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _list(row: Mapping[str, Any], name: str, keep: Keep) -> list[Side] | None:
    values = row.get(name)
    if values is None or values == "":
        return None
    if isinstance(values, (str, bytes, Mapping)):  # one alone
        values = [values]
    if not isinstance(values, Sequence):
        raise UserError(f"{name}: must be a list, not {type(values).__name__}")
    sides = []
    for k, value in enumerate(values):
        try:
            sides.append(read_side(value, keep=keep))
            if not any(sides[-1]):
                raise UserError("neither text nor image")
        except UserError as error:
            raise UserError(f"{name}[{k}]: {error}") from None
    return sides


def train_columns(row: Mapping[str, Any], keep: Keep = unkept) -> dict[str, Any]:
    """A row as MMEB-train's columns."""
    query, positive, negatives, _ = read_row(row, keep)
    values = (*query, *positive, [text for text, _ in negatives], [path for _, path in negatives])
    return dict(zip((*TRAIN_COLUMNS, *NEGATIVE_COLUMNS), values, strict=True))


def eval_columns(row: Mapping[str, Any], keep: Keep = unkept) -> dict[str, Any]:
    """A row as MMEB-eval's columns: the positive first, then the other candidates.

    Raises:
      UserError: if there are `candidates` and the positive is not among them.
    """
    query, positive, negatives, candidates = read_row(row, keep)
    others = negatives
    if candidates is not None:
        if positive not in candidates:
            raise UserError("the candidates do not hold the positive, so no answer can be right")
        place = candidates.index(positive)
        others = candidates[:place] + candidates[place + 1 :]
    targets = [positive, *others]
    values = (*query, [text for text, _ in targets], [path for _, path in targets])
    return dict(zip(EVAL_COLUMNS, values, strict=True))


class Pairs:
    """An `arrow.Reader` of files of pairs."""

    def __init__(self, purpose: Literal["train", "eval"]):
        """Read for training or for evaluation."""
        self.purpose = purpose
        self._columns: Callable[..., dict[str, Any]]
        self._columns = train_columns if purpose == "train" else eval_columns
        self._counts: dict[Path, int] = {}

    @property
    def key(self) -> str:
        """Purpose and version of the rules."""
        return f"{self.purpose} 1"

    def schema(self, files: Sequence[Path]) -> dict[str, pa.DataType]:
        """MMEB's columns; every row is looked at here, before anything is written.

        Raises:
          UserError: listing every row that cannot be read.
        """
        problems: list[str] = []
        for file in files:
            rows = 0
            for number, row in _read(file):
                rows += 1
                if isinstance(row, UserError):
                    problems.append(f"{file} {number}: {row}")
                    continue
                try:
                    self._columns(row)
                except UserError as error:
                    problems.append(f"{file} {number}: {error}")
            if not rows:
                problems.append(f"{file}: no row in it")
            self._counts[file] = rows
        raise_problems("Pairs that cannot be read", problems)
        if self.purpose == "eval":
            return dict(zip(EVAL_COLUMNS, (STRING, STRING, STRINGS, STRINGS), strict=True))
        kinds = (STRING, STRING, STRING, STRING, STRINGS, STRINGS)
        return dict(zip((*TRAIN_COLUMNS, *NEGATIVE_COLUMNS), kinds, strict=True))

    def count(self, file: Path) -> int:
        """Rows as `schema` counted them."""
        return self._counts[file]

    def batches(self, file: Path, schema: pa.Schema, keep: Keep) -> Iterator[pa.RecordBatch]:
        """The rows as MMEB's columns, images that lie in the file put away."""
        rows: list[dict[str, Any]] = []
        for _, row in _read(file):
            if isinstance(row, UserError):
                raise UserError(f"{file} changed while it was read")
            rows.append(self._columns(row, keep))
            if len(rows) == BATCH_ROWS:
                yield pa.RecordBatch.from_pylist(rows, schema=schema)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _read(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | UserError]]:
    """The rows of a file, each with its place in words; an error stands for an unreadable row."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _read_parquet(file)
        return
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            yield from _read_lines(file, text) if kind == ".jsonl" else _read_table(file, text)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise UserError(f"{file}: not a readable table ({error})") from None


def _read_lines(file: Path, text: Any) -> Iterator[tuple[str, Mapping[str, Any] | UserError]]:
    checked: set[str] = set()
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, UserError(f"not JSON ({str(error)[:80]})")
            continue
        if not isinstance(row, dict):
            yield where, UserError(f"a line is a JSON object, not {type(row).__name__}")
            continue
        new = [name for name in row if name not in checked]
        if new:
            problem = _unknown(new)
            if problem:
                yield where, UserError(problem)
                continue
            checked.update(new)
        yield where, row


def _read_table(file: Path, text: Any) -> Iterator[tuple[str, Mapping[str, Any] | UserError]]:
    csv.field_size_limit(1 << 27)  # the module's own limit is 128 KiB a cell
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    names = list(reader.fieldnames or ())
    problem = _unknown(names) or _missing(names)
    if problem:
        raise UserError(f"{file}: {problem}")
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row or None in row.values():
            yield where, UserError(f"the row has not {len(names)} cells as the head has")
            continue
        try:
            yield where, {name: _cell(name, value) for name, value in row.items()}
        except UserError as error:
            yield where, error


def _cell(name: str, value: str) -> Any:
    """A cell of a csv file: lists are written as JSON."""
    if not value or not (name.endswith("_images") or name in ("negatives", "candidates")):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise UserError(f'{name}: must be a JSON list such as ["a", "b"], not {value!r:.60}')
    return found


def _read_parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | UserError]]:
    schema = read_schema(file)
    names = schema.names
    problem = _unknown(names) or _missing(names)
    if problem:
        raise UserError(f"{file}: {problem}")
    used = [name for name in names if _KNOWN.fullmatch(name)]
    size = ROWS if any(holds_bytes(schema.field(name).type) for name in used) else BATCH_ROWS
    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=size, columns=used):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: damaged parquet file ({str(error)[:120]})") from None


def _unknown(names: Sequence[str]) -> str | None:
    """A column that looks like a slip of the pen; others are the user's own and are left alone."""
    for name in names:
        if not name or _KNOWN.fullmatch(name):
            continue
        near = difflib.get_close_matches(name.lower(), _NAMES, 1, _TYPOS)
        if near:
            return f"unknown column {name!r}; did you mean {near[0]}?"
    return None


def _missing(names: Sequence[str]) -> str | None:
    for side in ("query", "positive"):
        if not {side, f"{side}_image", f"{side}_images"} & set(names):
            return f"no column {side} (or {side}_image); it has {', '.join(names) or 'none'}"
    return None
