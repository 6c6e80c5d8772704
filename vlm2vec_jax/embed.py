# SPDX-License-Identifier: Apache-2.0
"""Embed a file of texts and images, a parquet file, or a folder of images.

    python -m vlm2vec_jax.embed --model DIR [--adapter DIR] --input FILE.jsonl --output FILE.npz

A line of the input is `{"text": "...", "images": ["path", ...]}`; either may be missing, and a
relative path is relative to the file. The output holds `embeddings`, float32 [N, D], in the order
of the lines. `--input` may also be a parquet file, a folder of them, or a folder of images;
`--output` may end in .npz, .parquet or .lance (a LanceDB table).

Give the same command again to go on after an interruption. Memory does not grow with the corpus.
Several machines: `--engine ray`, or one process on each with `--distributed`.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import (
    define_compilation_cache,
    define_processes,
    define_processor_options,
    define_quantize,
    join_processes,
    processor_options,
    run,
    use_compilation_cache,
)

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
SUFFIXES = (".npz", ".parquet", ".lance")


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""

    def text(name: str, words: str, required: bool = False) -> None:
        flags.DEFINE_string(name, None, words, required=required, flag_values=values)

    def number(name: str, words: str, default: int | None = None, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, words, lower_bound=least, flag_values=values)

    def choice(name: str, default: str, among: Any, words: str) -> None:
        flags.DEFINE_enum(name, default, among, words, flag_values=values)

    def switch(name: str, words: str) -> None:
        flags.DEFINE_bool(name, False, words, flag_values=values)

    text("model", "an HF folder, a training output folder, an adapter, or a hub id", True)
    text("adapter", "a PEFT adapter folder on top of it")
    text("input", "a jsonl file, a parquet file or folder of them, or a folder of images", True)
    text("output", "the file to write: .npz, .parquet or .lance", True)
    choice("dtype", "bfloat16", ["bfloat16", "float32"], "of the computation")
    define_quantize(values)
    define_processor_options(values)
    define_compilation_cache(values)
    number("batch_tokens", "tokens embedded at a time; chosen for the device by default")
    text("text_column", "of parquet files; `text` by default")
    text("image_column", "of parquet files; `images` or `image` by default")
    text("id_column", "of parquet files; `id` by default")
    text("prompt", "instruction in front of every input")
    text("prompt_name", "or the name of one that is stored with the model, such as target")
    number("truncate_dim", "how many leading numbers of a vector to keep")
    choice("precision", "float32", PRECISIONS, "of the stored numbers")
    choice("on_bad_input", "fail", ["fail", "skip"], "tell all bad inputs, or leave them out")
    switch("restart", "drop what an interrupted run of the same output has left")
    number("devices", "devices of this machine to use; one by default")
    number("workers", "processes that decode images; 0: threads", 0, 0)
    choice("engine", "local", ["local", "ray"], "who embeds")
    text("ray_address", "of the Ray cluster; the one that surrounds this process by default")
    number("ray_actors", "Embedders on the Ray cluster", 1)
    flags.DEFINE_float("ray_cpus", 1, "processors of each", 0, flag_values=values)
    flags.DEFINE_float("ray_gpus", 0, "cards of each", 0, flag_values=values)
    define_processes(values)


def main(args: Any) -> None:
    """Read, embed, write."""
    output = Path(args.output)
    check_output(output)
    team = join(args)

    from vlm2vec_jax.embedding.corpus_parquet import Columns, open_corpus
    from vlm2vec_jax.embedding.parts import Parts
    from vlm2vec_jax.embedding.run import Task, embed_corpus, scan

    parts = Parts(output)
    columns = Columns(args.text_column, args.image_column, args.id_column)
    with tempfile.TemporaryDirectory() as own:
        # The nodes of a cluster read the list of a folder's images where the output is written.
        shared = args.engine == "ray" and os.path.isdir(args.input)
        if shared:
            parts.make()
        listing = parts.listing if shared else Path(own) / "listing.jsonl"
        skip = args.on_bad_input == "skip"
        corpus = open_corpus(args.input, listing, columns)
        task = Task(corpus, args.input, output, skip, args.precision)
        windows, embedder, error = [], None, None
        try:
            windows = scan(task)
            kind = RayEmbedder if args.engine == "ray" else LocalEmbedder
            embedder = kind(args, task)
        except UserError as problem:
            parts.tidy()
            error = problem
        team.settle(error)  # the others would otherwise wait for a process that has given up
        assert embedder is not None
        with embedder:
            count = embed_corpus(
                task,
                windows,
                parts,
                embedder.results,
                embedder.made_with(),
                team,
                restart=args.restart,
            )
    if team.leads:
        width = embedder.made_with()["dimension"]
        print(f"{count} embeddings of {width} numbers written to {output}")


class LocalEmbedder:
    """Embeds on the devices of this process."""

    def __init__(self, args: Any, task: Any):
        """Load the model.

        Raises:
          UserError: if that cannot be done.
        """
        from vlm2vec_jax.embedder import Embedder

        use_compilation_cache(args)
        self._args, self._task = args, task
        self._options = encode_options(args)
        chosen = {k: getattr(args, k) for k in ("devices", "workers") if getattr(args, k)}
        self._embedder = Embedder.from_pretrained(**model_arguments(args), **chosen)
        for remark in self._embedder.remarks:
            print(remark)
        self._about = self._embedder.about(**self._options)

    def __enter__(self) -> "LocalEmbedder":
        return self

    def __exit__(self, *exc: object) -> None:
        self._embedder.close()

    def made_with(self) -> dict[str, Any]:
        """What decides the vectors, and where the model is."""
        return {**self._about, **where_the_model_is(self._args)}

    def results(self, windows: Any) -> Any:
        """Embed windows, with a bar."""
        from vlm2vec_jax.embedding.corpus import read
        from vlm2vec_jax.embedding.decoding import progress_bar
        from vlm2vec_jax.embedding.run import embed

        items = ((window, read(self._task.corpus, window)) for window in windows)
        with progress_bar(True, sum(window.count for window in windows)) as advance:
            yield from embed(
                self._embedder,
                items,
                skip=self._task.skip,
                batch_tokens=self._args.batch_tokens,
                advance=advance,
                **self._options,
            )


class RayEmbedder:
    """Embeds on a Ray cluster."""

    def __init__(self, args: Any, task: Any):
        """Connect, and ask a node what the model is.

        Raises:
          UserError: if there is no cluster, or no such model on it.
        """
        from vlm2vec_jax.embedding import ray_engine

        if args.distributed or args.coordinator:
            raise UserError("--engine ray brings its own processes; give it without --distributed")
        self._engine, self._args, self._task = ray_engine, args, task
        self._cluster = ray_engine.Cluster(
            args.ray_address, args.ray_actors, args.ray_cpus, args.ray_gpus
        )
        self._model = model_arguments(args, absolute=True)
        self._options = encode_options(args)
        self._about = ray_engine.about(self._cluster, self._model, self._options)

    def __enter__(self) -> "RayEmbedder":
        return self

    def __exit__(self, *exc: object) -> None:
        pass  # the cluster stays with whoever started it

    def made_with(self) -> dict[str, Any]:
        """See `LocalEmbedder`."""
        return {**self._about, **where_the_model_is(self._args)}

    def results(self, windows: Any) -> Any:
        """Embed windows, in the order in which they are ready."""
        from vlm2vec_jax.embedding.decoding import progress_bar

        with progress_bar(True, sum(window.count for window in windows)) as advance:
            for window, result in self._engine.results(
                self._cluster,
                self._task.corpus,
                windows,
                self._model,
                {**self._options, "batch_tokens": self._args.batch_tokens},
                self._about,
                skip=self._task.skip,
            ):
                yield window, result
                advance(window.count)


def model_arguments(args: Any, *, absolute: bool = False) -> dict[str, Any]:
    """Arguments of `Embedder.from_pretrained`; local paths by their full names if `absolute`."""

    def place(name: str | None) -> str | None:
        return os.path.abspath(name) if absolute and name and os.path.exists(name) else name

    return {
        "path": place(args.model),
        "adapter": place(args.adapter),
        "dtype": args.dtype,
        **({"quantize": args.quantize} if args.quantize else {}),
        **processor_options(args),
    }


def encode_options(args: Any) -> dict[str, Any]:
    """What is done to each input and vector."""
    return {
        "prompt": args.prompt,
        "prompt_name": args.prompt_name,
        "truncate_dim": args.truncate_dim,
    }


def where_the_model_is(args: Any) -> dict[str, Any]:
    """What a search needs to load the same model."""
    model = model_arguments(args, absolute=True)
    return {"model": {"path": model["path"], "adapter": model["adapter"]}}


def join(args: Any) -> Any:
    """Meet the other processes, where there are some."""
    from vlm2vec_jax.embedding.team import DistributedTeam, Team

    return DistributedTeam() if join_processes(args).processes > 1 else Team()


def check_output(output: Path) -> None:
    """Find out before anything is computed that the output cannot be written.

    Raises:
      UserError: saying why.
    """
    if output.suffix not in SUFFIXES:
        raise UserError(
            f"--output must be the name of a file that ends in .npz, .parquet or .lance, "
            f"not {output}"
        )
    if output.is_dir() and output.suffix != ".lance":
        raise UserError(f"--output {output} is a folder; give the name of a file in it")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: the folder {output.parent} cannot be written")
    if output.suffix == ".lance":
        from vlm2vec_jax.embedding.lance import library

        library()


if __name__ == "__main__":
    run(main, define)
