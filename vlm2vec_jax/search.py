# SPDX-License-Identifier: Apache-2.0
"""Search stored vectors by a text or an image.

    python -m vlm2vec_jax.search --index FILE_OR_DIR --query TEXT|IMAGE [--model DIR] [--top_k 10]

The index is what `python -m vlm2vec_jax.embed` has written. The query is embedded with the model
that made it, which the index names; another one is refused. The search is exact unless `--engine`
says otherwise. Pictures are shown in the terminal where it can, otherwise a page is written.
"""

import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.flags import define_compilation_cache, run, use_compilation_cache

PAGE = "search.html"


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""

    def text(name: str, words: str, required: bool = False) -> None:
        flags.DEFINE_string(name, None, words, required=required, flag_values=values)

    def choice(name: str, default: str, among: list[str], words: str) -> None:
        flags.DEFINE_enum(name, default, among, words, flag_values=values)

    text("index", "stored vectors: .npz, .parquet, .lance, or a folder with one of them", True)
    text("query", "a text, or the path of an image")
    text("image", "the path of an image that goes with the text of --query")
    choice("query_type", "auto", ["auto", "text", "image"], "what --query is; auto: see if it is "
           "the path of an image")  # fmt: skip
    text("model", "where the model is, if not where it was when the index was made")
    text("adapter", "the adapter on top of it; as above")
    flags.DEFINE_integer("top_k", 10, "how many to find", lower_bound=1, flag_values=values)
    text("prompt", "instruction in front of the query")
    text("prompt_name", "or the name of a stored one; `query` by default, if there is one")
    choice("engine", "exact", ["exact", "faiss", "lancedb"], "how to search")
    text("faiss_index", "what FAISS builds, in the words of faiss.index_factory; HNSW32 by default")
    text("html", f"write a page of this name; {PAGE} where the terminal shows no pictures")
    flags.DEFINE_bool("json", False, "print a line of json per hit", flag_values=values)
    define_compilation_cache(values)


def main(args: Any) -> None:
    """Embed the query, search, show."""
    from rich.console import Console

    from vlm2vec_jax.embedding import search, show
    from vlm2vec_jax.embedding.index import open_index

    index = open_index(args.index)
    query = query_of(args)
    if not len(index):
        raise UserError(f"{index.path} holds no vectors")
    vector = embed_query(args, index, query)
    if args.engine == "faiss":
        options = {"factory": args.faiss_index} if args.faiss_index else {}
        hits = search.with_faiss(index, vector, args.top_k, **options)
    elif args.engine == "lancedb":
        hits = search.with_lance(index, vector, args.top_k)
    else:
        hits = search.exact(index, vector, args.top_k)
    hits = search.fill_in(index, hits)

    console = Console()
    if args.json:
        for hit in hits:
            print(json.dumps({"score": hit.score, **hit.row}))
    else:
        what = f"the image {query.images[0]}" if query.images else "the text"
        console.print(f"searching {len(index)} vectors for {what}", markup=False, soft_wrap=True)
        show.print_hits(console, hits)
    page = args.html or (None if args.json or show.can_draw(console) else PAGE)
    if page:
        write_page(Path(page), show.page(query, hits, str(index.path)))
        if not args.json:
            console.print(f"with pictures: {page}", markup=False, soft_wrap=True)


def query_of(args: Any) -> Any:
    """The input that the user means.

    Raises:
      UserError: for none, or an image that cannot be read.
    """
    from vlm2vec_jax.embedding.corpus import IMAGE_SUFFIXES
    from vlm2vec_jax.images import image_size
    from vlm2vec_jax.inputs import MultimodalInput

    text, images = args.query or "", [args.image] if args.image else []
    if not text and not images:
        raise UserError("give --query, a text or the path of an image, or --image")
    looks = Path(text).suffix.lower() in IMAGE_SUFFIXES and "\n" not in text
    kind = args.query_type
    if kind == "auto":
        kind = "image" if looks and not images else "text"
        if kind == "image" and not os.path.isfile(text):
            raise UserError(
                f"--query {text} looks like an image, but there is no such file; --query_type "
                f"text searches for these words"
            )
    if kind == "image":
        if images:
            raise UserError("both --query and --image are images; one of them is enough")
        text, images = "", [text]
    for image in images:
        image_size(image)
    marker = "<|image_1|> " if images and text and "<|image_1|>" not in text else ""
    query = MultimodalInput(marker + text, tuple(Path(image) for image in images))
    problem = query.problem()
    if problem:
        raise UserError(f"--query: {problem}")
    return query


def embed_query(args: Any, index: Any, query: Any) -> Any:
    """The query's vector, float32 [D], by the model that made the index.

    Raises:
      UserError: if that model is not there, or another one is.
    """
    from vlm2vec_jax.evaluation.store import differences, plain
    from vlm2vec_jax.options import OPTIONS

    meta = index.meta
    made = meta["fingerprint"]
    place = meta.get("model") or {}
    path = args.model or place.get("path")
    adapter = args.adapter if args.model or args.adapter else place.get("adapter")
    if not path:
        raise UserError(f"{index.path} does not say where its model is; give --model")
    settings = {k: v for k, v in made["processor"].items() if k in OPTIONS and v is not None}
    settings["quantize"] = made.get("quantize")

    from vlm2vec_jax.embedder import Embedder

    use_compilation_cache(args)
    try:
        embedder = Embedder.from_pretrained(path, adapter, dtype=made["dtype"], **settings)
    except UserError as error:
        if args.model:
            raise
        raise UserError(f"the model of {index.path} is not to be had; --model names another place: "
                        f"{error}") from None  # fmt: skip
    raise_problems(
        f"{index.path} was made by another model than {path}",
        differences(made, plain(embedder.fingerprint())),
        advice="Vectors of different models cannot be compared: search with the model of the "
        "index, or embed the corpus again.",
    )
    given = {"prompt": args.prompt, "prompt_name": args.prompt_name}
    (vector,) = embedder.encode_query([query], truncate_dim=meta["dimension"], **given)
    return vector


def write_page(path: Path, content: str) -> None:
    """Write the page whole or not at all.

    Raises:
      UserError: if it cannot be written.
    """
    from vlm2vec_jax.evaluation.store import write_text

    if not path.parent.is_dir():
        raise UserError(f"--html {path}: there is no folder {path.parent}")
    write_text(path, content)


if __name__ == "__main__":
    run(main, define)
