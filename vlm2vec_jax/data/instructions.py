# SPDX-License-Identifier: Apache-2.0
"""MMEB-eval with the instruction in columns of its own, brought to the texts of the first layout.

MMEB-V2 keeps `qry_inst` and `tgt_inst` apart from `qry_text` and `tgt_text`. Joined as its own
readers join them the texts are those of MMEB-eval, to the last newline: the vector is read at the
last token, so one newline more or less is another vector. The rules depend on what the
dataset's sides are made of:

    image -> text    `<|image_1|> INST TEXT\\n`; a newline behind the marker in visual question
                     answering; candidates verbatim
    image -> image   `<|image_1|>\\nINST TEXT\\n`; candidates `<|image_1|> INST` (no newline),
                     with a caption `<|image_1|> INST CAPTION\\n`
    text -> image    `INST TEXT\\n` (VisDial: one newline more); candidates `<|image_1|> INST\\n`,
                     with a caption `<|image_1|> INST CAPTION\\n`

A space in front of a newline goes. Source: the image readers of VLM2Vec's V2 code, as measured in
behaviour; where an instruction starts with the marker, the space behind it is not doubled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from vlm2vec_jax.data.arrow import STRING, ParquetColumns
from vlm2vec_jax.data.embedded import Keep
from vlm2vec_jax.data.folders import EVAL_COLUMNS, INSTRUCTION_COLUMNS
from vlm2vec_jax.evaluation import mmeb as benchmark

MARKER = "<|image_1|>"


def join_query(subset: str, instruction: str, text: str, *, image: bool, to_image: bool) -> str:
    """The query's text as MMEB-eval's first layout has it.

    Args:
      subset: name of the dataset; decides between forms for MMEB's own datasets only.
      instruction: `qry_inst`.
      text: `qry_text`.
      image: whether the query has an image.
      to_image: whether the candidates have images.
    """
    if not image:
        words = _words(instruction.replace(MARKER, ""), text)
        return f"{words}\n\n" if subset == "VisDial" else f"{words}\n"
    bare = instruction.replace(MARKER, "")
    task, _ = benchmark.group_of(subset)
    question = task == "vqa" or task == benchmark.OTHER and text.strip() != ""
    if to_image or question:
        return _tidy(f"{MARKER}\n{_words(bare.strip(), text)}") + "\n"
    return _tidy(f"{MARKER} {_words(bare.lstrip(' '), text)}") + "\n"


def join_targets(
    instruction: str, texts: Sequence[str], paths: Sequence[str], *, query_image: bool
) -> list[str]:
    """The candidates' texts as MMEB-eval's first layout has them.

    Args:
      instruction: `tgt_inst`.
      texts: `tgt_text`.
      paths: `tgt_img_path`; empty strings for candidates without an image.
      query_image: whether the query has an image.
    """
    if not any(paths):
        return list(texts)
    bare = instruction.replace(MARKER, "").lstrip(" ")
    if texts and texts[0].strip():  # as the reference does: the first decides for all
        return [_tidy(f"{MARKER} {_words(bare, text)}") + "\n" for text in texts]
    end = "" if query_image else "\n"
    return [_tidy(f"{MARKER} {bare}") + end] * len(texts)


def _words(instruction: str, text: str) -> str:
    return f"{instruction} {text}" if instruction and text else instruction or text


def _tidy(text: str) -> str:
    return text.replace(" \n", "\n")


class InstructionColumns(ParquetColumns):
    """Reads MMEB-eval with instruction columns as the columns of the first layout."""

    def __init__(self, subset: str):
        """Read one dataset; its name decides between the forms."""
        super().__init__((*EVAL_COLUMNS, *INSTRUCTION_COLUMNS))
        self.subset = subset

    @property
    def key(self) -> str:
        """The columns, the dataset, and the version of the rules."""
        return f"{super().key} joined 1 {self.subset}"

    def schema(self, files: Sequence[Path]) -> dict[str, pa.DataType]:
        """The four columns of the first layout."""
        stored = super().schema(files)
        return {name: kind for name, kind in stored.items() if name in EVAL_COLUMNS}

    def batches(self, file: Path, schema: pa.Schema, keep: Keep) -> Iterator[pa.RecordBatch]:
        """The rows, joined."""
        raw = pa.schema([*schema, *(pa.field(name, STRING) for name in INSTRUCTION_COLUMNS)])
        for batch in super().batches(file, raw, keep):
            rows = [self._join(row) for row in batch.to_pylist()]
            yield pa.RecordBatch.from_pylist(rows, schema=schema)

    def _join(self, row: dict) -> dict:
        texts, paths = row["tgt_text"] or [], row["tgt_img_path"] or []
        if not isinstance(texts, list) or not isinstance(paths, list):
            return {name: row[name] for name in EVAL_COLUMNS}  # told by the reader's type check
        texts, paths = [t or "" for t in texts], [p or "" for p in paths]
        image, to_image = bool(row["qry_img_path"]), any(paths)
        return {
            "qry_text": join_query(
                self.subset, row["qry_inst"] or "", row["qry_text"] or "", image=image,
                to_image=to_image,
            ),
            "qry_img_path": row["qry_img_path"],
            "tgt_text": join_targets(row["tgt_inst"] or "", texts, paths, query_image=image),
            "tgt_img_path": paths,
        }  # fmt: skip
