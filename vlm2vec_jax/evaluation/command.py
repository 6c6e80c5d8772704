# SPDX-License-Identifier: Apache-2.0
"""Flags that the evaluation's commands share: which system embeds, which processes take part."""

from __future__ import annotations

import os
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import (
    define_compilation_cache,
    define_processor_options,
    define_quantize,
    join_processes,
    processor_options,
    use_compilation_cache,
)

DTYPES = ("bfloat16", "float32")
FORMATS = ("messages", "input", "cohere")
TARGET_INSTRUCTION = (
    "words in front of targets that are text alone: `task` for words by meta-task, any others as "
    "they are, empty for none"
)
ENCODERS = ("model", "vectors", "encoder", "endpoint")


def define_encoder(values: flags.FlagValues) -> None:
    """Add the flags that choose an encoder; exactly one of `ENCODERS` must be given."""

    def text(name: str, words: str, default: str | None = None) -> None:
        flags.DEFINE_string(name, default, words, flag_values=values)

    def number(name: str, words: str, default: int | None = None, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, words, lower_bound=least, flag_values=values)

    text("model", "a model: an HF folder, a training output folder, or a hub id")
    text("adapter", "a PEFT adapter folder on top of it")
    flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "type of the computation", flag_values=values)
    define_quantize(values)
    define_processor_options(values)
    define_compilation_cache(values)
    number("batch_tokens", "tokens embedded at a time; chosen for the device by default")
    number("devices", "devices of this process to use; all accelerators by default, one CPU")

    text("vectors", "instead of --model: a file of saved vectors")
    text("vector_ids", "whose vectors they are, where the file does not say it")
    text("encoder", "instead of --model: module:function, or an object with encode(inputs)")
    text("name", "what to call vectors or a callable in the results")
    text("endpoint", "instead of --model: the URL of an embedding server")
    text("endpoint_model", "the model's name at the server")
    flags.DEFINE_enum(
        "endpoint_format", "messages", FORMATS, "how inputs are sent", flag_values=values
    )
    flags.DEFINE_list(
        "endpoint_input_type", [], "what the server calls a query and a target, or one word for "
        "both; search_query,search_document in the cohere format", flag_values=values,
    )  # fmt: skip
    text("api_key_env", "name of the environment variable that holds the server's key")
    number("dimensions", "ask the server for vectors of so many dimensions")
    number("endpoint_batch", "inputs of a request, where the format takes several", 16)
    number("endpoint_workers", "requests at a time", 8)
    number("endpoint_timeout", "seconds to wait for an answer", 120)
    number("endpoint_retries", "how often a request is repeated", 5, least=0)
    flags.mark_flags_as_mutual_exclusive(ENCODERS, required=True, flag_values=values)


def join(args: Any):
    """Meet the other processes, where there are some."""
    from vlm2vec_jax.evaluation.hosts import Hosts, Processes

    return Processes() if join_processes(args).processes > 1 else Hosts()


def make_encoder(args: Any, say: Any) -> tuple[Any, dict[str, Any]]:
    """What turns inputs into vectors, and the options of its `encode`."""
    if args.vectors:
        from vlm2vec_jax.evaluation.encoders import SavedVectors

        roots = [args.image_root] if args.image_root else image_roots(args.data)
        return SavedVectors(args.vectors, roots, ids=args.vector_ids, name=args.name), {}
    if args.encoder:
        from vlm2vec_jax.evaluation.encoders import Callback

        return Callback.load(args.encoder, args.name), {}
    if args.endpoint:
        return make_endpoint(args, say), {}
    return make_embedder(args, say)


def image_roots(data: str) -> list[str]:
    """What image paths of a data folder may be relative to."""
    from vlm2vec_jax.data.paths import IMAGE_FOLDERS

    return [str(data), *(os.path.join(data, name) for name in IMAGE_FOLDERS)]


def make_endpoint(args: Any, say: Any):
    """The server behind the flags."""
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


def make_embedder(args: Any, say: Any) -> tuple[Any, dict[str, Any]]:
    """Our own model on this process's devices."""
    from vlm2vec_jax.embedder import Embedder

    use_compilation_cache(args)
    loading: dict[str, Any] = {"quantize": args.quantize} if args.quantize else {}
    devices = _devices(args.devices)
    if len(devices) > 1:
        loading["devices"] = devices
    encoder = Embedder.from_pretrained(
        args.model,
        adapter=args.adapter,
        dtype=args.dtype,
        **processor_options(args),
        **loading,
    )
    for remark in getattr(encoder, "remarks", ()):
        say(remark)
    options: dict[str, Any] = {"progress": True}
    if args.batch_tokens:
        options["batch_tokens"] = args.batch_tokens
    return encoder, options


def _devices(count: int | None) -> list[Any]:
    import jax

    local = jax.local_devices()
    if count is None:
        return local[:1] if local[0].platform == "cpu" else local
    if count > len(local):
        raise UserError(f"--devices {count}: this process has {len(local)}")
    return local[:count]
