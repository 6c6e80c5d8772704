# SPDX-License-Identifier: Apache-2.0
"""Zero-shot Flickr30K: recall at 1, 5 and 10, from images to captions and back.

    python -m vlm2vec_jax.evaluation.flickr --model DIR [--adapter DIR] --data DIR --output DIR
        [--dtype float32]

As VLM2Vec's `eval_flickr.py` does it: 1000 images with five captions each; an image is embedded
with `Find an image caption describing the given image.`, a caption alone as it stands; an image's
captions are found by its file name. `--data` is one of
  - the hub folder of `nlphuji/flickr_1k_test_image_text_retrieval`: parquet files with `image`
    (bytes, or a path), `caption` (five strings) and `filename`;
  - a csv of Flickr30K's annotations (`raw` or `caption` as a JSON list, `filename`, `split`) beside
    a folder of the images (`--image_root`, by default searched for next to it).

Recall@k is the share of queries with a right one among the first k. Ties and values that are not
finite count against the model, as everywhere in this package.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from vlm2vec_jax.data.paths import leaves_by_link, unsafe_path
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.evaluation import command, corpus, store
from vlm2vec_jax.evaluation.embedding import tells_roles
from vlm2vec_jax.flags import run
from vlm2vec_jax.inputs import BadInputs, MultimodalInput

PROMPT = "<|image_1|> Find an image caption describing the given image."
"""What an image is embedded with; the published numbers come from this one."""

KS = (1, 5, 10)
BENCHMARK = "Flickr30K-1K-test"


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image and its captions.

    Attributes:
      filename: what both go by.
      path: the image's file.
      captions: verbatim.
    """

    filename: str
    path: Path
    captions: tuple[str, ...]


def read(
    data: str | os.PathLike,
    unpack: str | os.PathLike,
    *,
    split: str = "test",
    image_root: str | os.PathLike | None = None,
) -> list[Picture]:
    """Read the images and captions.

    Args:
      data: see the module.
      unpack: images that lie inside the parquet files are written below this folder.
      split: which rows, where the data says it.
      image_root: where the image files are.

    Raises:
      UserError: no such data, rows without image or captions, file names that leave the folder.
    """
    folder = Path(data)
    tables = sorted(folder.rglob("*.parquet"))
    named = [p for p in tables if p.name.lower().startswith(split)]
    rows: Iterator[dict[str, Any]]
    if tables:
        rows, root = _parquet_rows(named or tables), Path(image_root or folder)
    else:
        files = sorted(folder.glob("*.csv"))
        if len(files) != 1:
            raise UserError(f"{folder} holds no parquet file and {len(files)} csv files, not one")
        rows, root = _csv_rows(files[0]), _image_folder(folder, image_root)
    pictures, problems, seen = [], [], set()
    for n, row in enumerate(rows):
        if row.get("split", split) != split:
            continue
        try:
            picture = _picture(row, root, Path(unpack))
        except UserError as error:
            problems.append(f"row {n}: {error}")
            continue
        if picture.filename in seen:
            problems.append(f"row {n}: a second {picture.filename}")
        seen.add(picture.filename)
        pictures.append(picture)
    raise_problems(f"{folder} cannot be read as Flickr30K", problems)
    if not pictures:
        raise UserError(f"{folder} has no rows of the split {split!r}")
    return pictures


def _picture(row: Mapping[str, Any], root: Path, unpack: Path) -> Picture:
    image = row.get("image")
    inner = image.get("path") if isinstance(image, Mapping) else image
    filename = str(row.get("filename") or (Path(inner).name if isinstance(inner, str) else ""))
    captions = row.get("caption", row.get("raw"))
    if isinstance(captions, str):
        captions = _json_list(captions)
    if not filename or not captions or not all(isinstance(c, str) and c for c in captions):
        raise UserError("needs a file name and captions")
    reason = unsafe_path(filename)
    if reason:
        raise UserError(f"{filename!r}: {reason}")
    content = image.get("bytes") if isinstance(image, Mapping) else None
    if content is not None:
        path = unpack / filename
        if not path.exists() or path.stat().st_size != len(content):
            store.write_bytes(path, content)
    else:
        path = root / (inner if isinstance(inner, str) and not os.path.isabs(inner) else filename)
        path = path if path.is_file() else root / filename
        reason = leaves_by_link(root, os.path.relpath(path, root))
        if reason:
            raise UserError(f"{path}: {reason}")
        if not path.is_file():
            raise UserError(f"no image file {path}")
    return Picture(filename, path, tuple(captions))


def _json_list(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return [text]
    return value if isinstance(value, list) else [text]


def _parquet_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from None


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _image_folder(folder: Path, given: str | os.PathLike | None) -> Path:
    if given is not None:
        return Path(given)
    names = ("flickr30k-images", "images", "Images")
    return next((folder / n for n in names if (folder / n).is_dir()), folder)


def score(
    pictures: Sequence[Picture],
    queries: tuple[np.ndarray, np.ndarray],
    targets: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Recall both ways.

    Args:
      pictures: P of them with C captions in all.
      queries: images float32 [P, D] and captions float32 [C, D], in the order of the pictures.
      targets: the same as targets; mostly the same vectors.

    Returns:
      Fractions `recall@k` under `image_to_text` and `text_to_image`.
    """
    owner = np.repeat(np.arange(len(pictures)), [len(p.captions) for p in pictures])
    own = [np.flatnonzero(owner == n) for n in range(len(pictures))]
    to_text = corpus.rank(queries[0], targets[1], own)
    to_image = corpus.rank(queries[1], targets[0], list(owner[:, None]))
    return {
        name: {f"recall@{k}": found.metrics(KS)[f"hit@{k}"] for k in KS}
        for name, found in (("image_to_text", to_text), ("text_to_image", to_image))
    }


def run_flickr(
    encoder: Any,
    pictures: Sequence[Picture],
    output: str | os.PathLike,
    *,
    prompt: str = PROMPT,
    encode_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Embed, score, and write `flickr30k_score.json`; embeddings are kept and used again.

    Raises:
      UserError: images that cannot be decoded, a folder that cannot be written.
    """
    output, options = Path(output), dict(encode_options or {})
    sides = {
        "image": [MultimodalInput(prompt, (p.path,)) for p in pictures],
        "text": [MultimodalInput(c) for p in pictures for c in p.captions],
    }
    made_with = {
        "format": store.FORMAT,
        "encoder": store.plain(dict(encoder.fingerprint())),
        "benchmark": BENCHMARK,
        "prompt": prompt,
        "captions": store.hash_rows([p.filename, *p.captions] for p in pictures),
        "images": store.hash_images({p.filename: str(p.path) for p in pictures}),
    }
    # Images look for captions and captions for images: whoever tells roles embeds both twice.
    roles = (store.QUERY, store.TARGET) if tells_roles(encoder) else ("",)
    vectors: dict[tuple[str, str], np.ndarray] = {}
    for name, role in itertools.product(sides, roles):
        inputs = sides[name]
        keys = [(f"{n} {item.text}", "") for n, item in enumerate(inputs)]
        path = output / f"flickr30k_{'_'.join(filter(None, (name, role)))}.npz"
        told = {"roles": [role] * len(inputs)} if role else {}
        kept, _ = store.load_embeddings(path, made_with)
        if kept is not None and all(key in kept for key in keys):
            vectors[name, role] = np.stack([kept[key] for key in keys])
            continue
        try:
            found = encoder.encode(inputs, **options, **told)
        except BadInputs as error:
            problems = [f"{pictures[n].filename}: {p}" for n, p in error.problems.items()]
            raise_problems("Flickr30K has bad images", problems, advice=error.advice)
            raise
        vectors[name, role] = np.asarray(found, np.float32)
        store.save_embeddings(path, keys, vectors[name, role], made_with)
    result = {
        "benchmark": BENCHMARK,
        **score(
            pictures,
            *((vectors["image", role], vectors["text", role]) for role in (roles[0], roles[-1])),
        ),
        "num_images": len(pictures),
        "num_captions": len(sides["text"]),
        "fingerprint": made_with,
    }
    store.write_json(output / "flickr30k_score.json", result)
    return result


def define(values: flags.FlagValues) -> None:
    """Add this command's flags: those of `evaluate` that choose an encoder, and its own."""
    command.define_encoder(values)
    flags.DEFINE_string("data", None, "Flickr30K's folder", required=True, flag_values=values)
    flags.DEFINE_string(
        "output", None, "folder for scores and embeddings", required=True, flag_values=values
    )
    flags.DEFINE_string("image_root", None, "where the image files are", flag_values=values)
    flags.DEFINE_string("split", "test", "which rows of the data", flag_values=values)
    flags.DEFINE_string(
        "image_prompt", PROMPT, "what an image is embedded with", flag_values=values
    )


def main(args: Any) -> None:
    """Score and print the table."""
    from rich.console import Console
    from rich.table import Table

    store.check_folder(args.output)
    unpack = Path(args.output) / "flickr30k_images"
    pictures = read(args.data, unpack, split=args.split, image_root=args.image_root)
    encoder, options = command.make_encoder(args, print)
    found = run_flickr(
        encoder, pictures, args.output, prompt=args.image_prompt, encode_options=options
    )
    table = Table(title=f"Flickr30K, {found['num_images']} images, percent")
    for title in ("", *(f"recall@{k}" for k in KS)):
        table.add_column(title, justify="right" if title else "left")
    for name, words in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        table.add_row(words, *(f"{100 * found[name][f'recall@{k}']:.1f}" for k in KS))
    Console().print(table)


if __name__ == "__main__":
    run(main, define)
