# SPDX-License-Identifier: Apache-2.0
"""Score a model on MMEB-eval, or on any folder of its layout.

    python -m vlm2vec_jax.evaluate --model DIR [--adapter DIR] --data DIR [--subsets A,B]
        --output DIR [--dtype float32]

The output folder receives, per subset, `<subset>_score.json`, `<subset>_pred.jsonl` and
`<subset>_embeddings.npz`, and over all of them `scores.json` and `scores.md`. Run it again to go on
after an interruption: what is there of the same model and the same data is used, anything else is
computed again. `python -m vlm2vec_jax.evaluation.report` makes a page with pictures of it.

In place of --model, other systems are scored by the same rules:

    --vectors FILE.npz|npy|parquet       vectors made elsewhere (see vlm2vec_jax.evaluation.inputs)
    --encoder module:function            a Python callable encode(inputs)
    --endpoint URL --endpoint_model NAME a server of /v1/embeddings or /v2/embed

Several machines: with --coordinator HOST:PORT --num_processes N --process_id K on each (or
--distributed, where the surroundings say them) they share the work and give the result of one. With
--shard K/N each embeds its part alone, and `python -m vlm2vec_jax.evaluation.merge` joins them.
"""

from typing import Any

from absl import flags

from vlm2vec_jax.flags import run

DTYPES = ("bfloat16", "float32")
SIMILARITIES = ("cosine", "dot")
CANDIDATES = ("own", "corpus")
FORMATS = ("messages", "input", "cohere")
ENCODERS = ("model", "vectors", "encoder", "endpoint")


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""

    def text(name: str, words: str, required: bool = False, default: str | None = None) -> None:
        flags.DEFINE_string(name, default, words, required=required, flag_values=values)

    def number(name: str, words: str, default: int | None = None, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, words, lower_bound=least, flag_values=values)

    def choice(name: str, default: str, names: tuple[str, ...], words: str) -> None:
        flags.DEFINE_enum(name, default, names, words, flag_values=values)

    def names(name: str, words: str) -> None:
        flags.DEFINE_list(name, None, words, flag_values=values)

    text("model", "a model: an HF folder, a training output folder, or a hub id")
    text("adapter", "a PEFT adapter folder on top of it")
    text("data", "folder with one folder per subset", required=True)
    names("subsets", "names of subsets, with commas; all by default")
    text("output", "folder for scores, predictions and embeddings", required=True)
    text("image_root", "what image paths in the data are relative to; --data by default")
    choice("dtype", "bfloat16", DTYPES, "type of the computation")
    number("num_crops", "most sub-images per image; the model's own by default")
    number("max_len", "most tokens of an input, images never cut; the model's own by default")
    number("batch_tokens", "tokens embedded at a time; chosen for the device by default")
    number("devices", "devices of this process to use; all accelerators by default, one CPU")

    choice("similarity", "cosine", SIMILARITIES, "how a target is scored")
    choice("candidates", "own", CANDIDATES, "each row's own list, or all targets of the subset")
    names("truncate_dims", "score the first so many dimensions, too: 64,256")
    names("precisions", "score vectors of these precisions, too: int8,binary")

    text("vectors", "instead of --model: a file of saved vectors")
    text("vector_ids", "whose vectors they are, where the file does not say it")
    text("encoder", "instead of --model: module:function, or an object with encode(inputs)")
    text("endpoint", "instead of --model: the URL of an embedding server")
    text("endpoint_model", "the model's name at the server")
    choice("endpoint_format", "messages", FORMATS, "how inputs are sent")
    text("endpoint_input_type", "of /v2/embed", default="search_document")
    text("api_key_env", "name of the environment variable that holds the server's key")
    number("dimensions", "ask the server for vectors of so many dimensions")
    number("endpoint_batch", "inputs of a request, where the format takes several", 16)
    number("endpoint_workers", "requests at a time", 8)
    number("endpoint_timeout", "seconds to wait for an answer", 120)
    number("endpoint_retries", "how often a request is repeated", 5, least=0)
    text("name", "what to call vectors or a callable in the results")

    text("shard", "K/N, K from 0: embed only this part; join the folders by evaluation.merge")
    text("coordinator", "HOST:PORT of process 0, where several processes share the work")
    number("num_processes", "how many processes share it")
    number("process_id", "number of this one, from 0", least=0)
    flags.DEFINE_bool(
        "distributed", False, "several processes, as the surroundings say (TPU pod, SLURM ...)",
        flag_values=values,
    )  # fmt: skip
    flags.mark_flags_as_mutual_exclusive(ENCODERS, required=True, flag_values=values)


def main(args: Any) -> None:
    """Evaluate, print the table."""
    from rich.console import Console

    from vlm2vec_jax.evaluation import run as evaluation
    from vlm2vec_jax.evaluation import tables

    console = Console()

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    # A wrong name is told before the model is loaded, which may take minutes.
    evaluation.choose_subsets(args.data, args.subsets, args.output)
    settings = scoring_settings(args)
    part = shard(args.shard)
    hosts = join_processes(args)

    encoder, options = make_encoder(args, say)
    scores = evaluation.evaluate(
        encoder,
        args.data,
        args.subsets,
        output=args.output,
        image_root=args.image_root,
        settings=settings,
        encode_options=options,
        say=say,
        hosts=hosts,
        shard=part,
    )
    if part is None and hosts.writes:
        console.print(tables.console_table(scores))
        say(f"written to {args.output}: scores.json, scores.md, and files per subset")


def scoring_settings(args: Any):
    """How rows are scored, from the flags.

    Raises:
      UserError: dimensions that are no numbers, unknown precisions.
    """
    from vlm2vec_jax.errors import UserError
    from vlm2vec_jax.evaluation.rows import Settings

    try:
        dims = tuple(int(d) for d in args.truncate_dims or ())
    except ValueError:
        raise UserError(
            f"--truncate_dims {','.join(args.truncate_dims)}: whole numbers, with commas"
        ) from None
    settings = Settings(args.similarity, args.candidates, dims, tuple(args.precisions or ()))
    assert settings.variants is not None  # raises for what is not known
    return settings


def shard(text: str | None) -> tuple[int, int] | None:
    """The part that `--shard K/N` names.

    Raises:
      UserError: if it names none.
    """
    from vlm2vec_jax.errors import UserError

    if text is None:
        return None
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"--shard {text}: write K/N with K from 0 to N - 1, as 0/4")
    return int(first), int(last)


def join_processes(args: Any):
    """Meet the other processes, where there are some."""
    from vlm2vec_jax.evaluation.hosts import Hosts, Processes

    given = (args.coordinator, args.num_processes, args.process_id)
    if not args.distributed and all(value is None for value in given):
        return Hosts()
    from vlm2vec_jax.parallel.mesh import initialize_distributed

    initialize_distributed(*given)
    return Processes()


def make_encoder(args: Any, say: Any) -> tuple[Any, dict[str, Any]]:
    """What turns inputs into vectors, and the options of its `encode`."""
    if args.vectors:
        from vlm2vec_jax.evaluation.encoders import SavedVectors

        root = args.image_root or args.data
        return SavedVectors(args.vectors, root, ids=args.vector_ids, name=args.name), {}
    if args.encoder:
        from vlm2vec_jax.evaluation.encoders import Callback

        return Callback.load(args.encoder, args.name), {}
    if args.endpoint:
        return make_endpoint(args, say), {}
    return make_embedder(args)


def make_endpoint(args: Any, say: Any):
    """The server behind the flags."""
    import os

    from vlm2vec_jax.errors import UserError
    from vlm2vec_jax.evaluation.endpoint import Endpoint

    if not args.endpoint_model:
        raise UserError("--endpoint needs --endpoint_model, the model's name at the server")
    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env)
        if not key:
            raise UserError(f"--api_key_env: there is no environment variable {args.api_key_env}")
    return Endpoint(
        args.endpoint,
        args.endpoint_model,
        form=args.endpoint_format,
        api_key=key,
        dimensions=args.dimensions,
        batch_size=args.endpoint_batch,
        workers=args.endpoint_workers,
        timeout_s=args.endpoint_timeout,
        retries=args.endpoint_retries,
        input_type=args.endpoint_input_type,
        say=say,
    )


def make_embedder(args: Any) -> tuple[Any, dict[str, Any]]:
    """Our own model on this process's devices."""
    from vlm2vec_jax.embedder import Embedder

    loading: dict[str, Any] = {}
    devices = _devices(args.devices)
    if len(devices) > 1:
        from vlm2vec_jax.parallel.mesh import make_mesh

        loading["mesh"] = make_mesh(devices=devices)
    encoder = Embedder.from_pretrained(
        args.model,
        adapter=args.adapter,
        dtype=args.dtype,
        num_crops=args.num_crops,
        max_len=args.max_len,
        **loading,
    )
    options: dict[str, Any] = {"progress": True}
    if args.batch_tokens:
        options["batch_tokens"] = args.batch_tokens
    return encoder, options


def _devices(count: int | None) -> list[Any]:
    import jax

    from vlm2vec_jax.errors import UserError

    local = jax.local_devices()
    if count is None:
        return local[:1] if local[0].platform == "cpu" else local
    if count > len(local):
        raise UserError(f"--devices {count}: this process has {len(local)}")
    return local[:count]


if __name__ == "__main__":
    run(main, define)
