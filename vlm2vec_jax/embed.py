# SPDX-License-Identifier: Apache-2.0
"""Embed a file of texts and images.

    python -m vlm2vec_jax.embed --model DIR [--adapter DIR] --input FILE.jsonl --output FILE.npz

A line of the input is `{"text": "...", "images": ["path", ...]}`; either may be missing, and a
relative path is relative to the file. The output holds `embeddings`, float32 [N, D], in the order
of the lines.
"""

import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.flags import define_processor_options, processor_options, run
from vlm2vec_jax.images import image_size
from vlm2vec_jax.inputs import BadInputs, MultimodalInput


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    for name, words, required in (
        ("model", "an HF folder, a training output folder, an adapter, or a hub id", True),
        ("adapter", "a PEFT adapter folder on top of it", False),
        ("input", "a jsonl file with text and images", True),
        ("output", "the npz file to write", True),
    ):
        flags.DEFINE_string(name, None, words, required=required, flag_values=values)
    flags.DEFINE_enum(
        "dtype", "bfloat16", ["bfloat16", "float32"], "of the computation", flag_values=values
    )
    define_processor_options(values)
    words = "tokens embedded at a time; chosen for the device by default"
    flags.DEFINE_integer("batch_tokens", None, words, lower_bound=1, flag_values=values)


def main(args: Any) -> None:
    """Read, embed, write."""
    output = Path(args.output)
    check_output(output)
    inputs, lines = read_inputs(args.input)

    from vlm2vec_jax.embedder import Embedder

    embedder = Embedder.from_pretrained(
        args.model,
        adapter=args.adapter,
        dtype=args.dtype,
        **processor_options(args),
    )
    for remark in embedder.remarks:
        print(remark)
    try:
        embeddings = embedder.encode(inputs, batch_tokens=args.batch_tokens, progress=True)
    except BadInputs as error:  # what only decoding shows: truncated images, too long inputs
        problems = [f"line {lines[n]}: {reason}" for n, reason in error.problems.items()]
        raise_problems(f"{args.input} has bad lines", problems, advice=error.advice)
        raise
    write_npz(output, embeddings)
    print(f"{len(inputs)} embeddings of {embedder.dimension} numbers written to {output}")


def check_output(output: Path) -> None:
    """Find out before anything is computed that the output cannot be written.

    Raises:
      UserError: saying why.
    """
    if output.suffix != ".npz":
        raise UserError(f"--output must be the name of a file that ends in .npz, not {output}")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give the name of a file in it")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: the folder {output.parent} cannot be written")


def read_inputs(path: str | os.PathLike) -> tuple[list[MultimodalInput], list[int]]:
    """Read a jsonl file of inputs; empty lines do not count.

    Returns:
      The inputs, and the line of each, counted from 1.

    Raises:
      UserError: if the file cannot be read, or listing every line that is no input, or whose
        images are missing or not readable, by line number.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None
    inputs, numbers, problems = [], [], []
    for number, encoded in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"line {number}: not UTF-8 ({error.reason} at byte {error.start})")
            continue
        if not line.strip():
            continue
        try:
            item = read_line(line).relative_to(path.parent)
            trouble = item.problem()
            if trouble is not None:
                raise UserError(trouble)
            for image in item.images:
                image_size(image)
            inputs.append(item)
            numbers.append(number)
        except UserError as error:
            problems.append(f"line {number}: {error}")
    raise_problems(f"{path} has bad lines", problems)
    return inputs, numbers


def read_line(line: str) -> MultimodalInput:
    """One line of the input file.

    Raises:
      UserError: if it is no JSON object with `text` and/or `images`.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(
            f'must be a JSON object such as {{"text": "...", "images": ["..."]}}, '
            f"not {type(value).__name__}"
        )
    return MultimodalInput.of(value)


def write_npz(path: Path, embeddings: Any) -> None:
    """Write under a temporary name and rename: whole or not at all.

    Raises:
      UserError: if the disk does not take it; an earlier file of the name stays as it was.
    """
    import numpy as np

    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, embeddings=embeddings)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main, define)
