# SPDX-License-Identifier: Apache-2.0
"""List the distinct inputs of an evaluation, for another system to embed.

    python -m vlm2vec_jax.evaluation.inputs --data DIR --output FILE.jsonl [--subsets A,B]
        [--target_instruction RULE]

A line is `{"id": ..., "text": ..., "images": [path]}`, the text verbatim (its end decides an
embedding) and the path relative to the image root. `evaluate --vectors` takes the vectors back by
these ids, with the same `--target_instruction` if there is one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.evaluation import command, store
from vlm2vec_jax.evaluation.encoders import input_id
from vlm2vec_jax.evaluation.run import choose_subsets
from vlm2vec_jax.flags import run


def list_inputs(
    data: str | os.PathLike,
    subsets: Sequence[str] | None = None,
    *,
    image_root: str | os.PathLike | None = None,
    target_instruction: str = "",
) -> list[dict[str, Any]]:
    """Every distinct input of the subsets, those of one image next to each other.

    Args:
      data: folder with one folder per subset.
      subsets: names; all that are there by default.
      image_root: what image paths are relative to; found in or below `data` by default.
      target_instruction: what stands in front of targets that are text alone
        (`data.target_instruction`).

    Raises:
      UserError: unknown subsets or unreadable data.
    """
    chosen, _ = choose_subsets(data, subsets, ".")
    found: dict[str, dict[str, Any]] = {}
    for source in open_eval(data, chosen, image_root=image_root):
        source.target_instruction = target_instruction
        for n in range(len(source)):
            row = source[n]
            for key in (row.query_key, *row.target_keys):
                item = source.input(key)
                images = [
                    os.path.relpath(
                        os.path.abspath(os.fspath(i)), os.path.abspath(source.image_root)
                    )
                    for i in item.images
                    if isinstance(i, (str, os.PathLike))
                ]
                name = input_id(item.text, images)
                found.setdefault(name, {"id": name, "text": item.text, "images": images})
    return sorted(found.values(), key=lambda v: (not v["images"], v["images"]))


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    flags.DEFINE_string(
        "data", None, "folder with one folder per subset", required=True, flag_values=values
    )
    flags.DEFINE_string(
        "output", None, "the jsonl file to write", required=True, flag_values=values
    )
    flags.DEFINE_list(
        "subsets", None, "names of subsets, with commas; all by default", flag_values=values
    )
    flags.DEFINE_string(
        "image_root", None, "what image paths are relative to; --data by default",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("target_instruction", "", command.TARGET_INSTRUCTION, flag_values=values)


def main(args: Any) -> None:
    """List and write."""
    found = list_inputs(
        args.data,
        args.subsets,
        image_root=args.image_root,
        target_instruction=args.target_instruction,
    )
    store.write_jsonl(Path(args.output), found)
    print(f"{len(found)} inputs written to {args.output}")


if __name__ == "__main__":
    run(main, define)
