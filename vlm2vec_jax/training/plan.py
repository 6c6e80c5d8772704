# SPDX-License-Identifier: Apache-2.0
"""What a compiled train step needs of a chip: memory, collectives, FLOPs, and whether it fits."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vlm2vec_jax.config import Config, processor_options
from vlm2vec_jax.models.loading import Model, abstract_model
from vlm2vec_jax.packing import ChunkShape
from vlm2vec_jax.parallel import hlo, products
from vlm2vec_jax.parallel.mesh import describe, row_shards
from vlm2vec_jax.training import aot, fitting, setup
from vlm2vec_jax.training.assumed import Mix
from vlm2vec_jax.training.batching import BatchPacker, Size
from vlm2vec_jax.training.chunk_search import Trial, largest, search
from vlm2vec_jax.training.step import StepSpec


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The packed shapes of a batch.

    Attributes:
      chunks: per group; the capacity has room for more than this batch uses.
      used: chunks that this batch uses, per group.
      cached: GradCache, or the batch in one piece.
      chunk_tokens: tokens of a chunk over all chips; 0 without GradCache.
      token_share: real tokens among those computed.
      unit_share: real visual units among those computed.
    """

    chunks: tuple[ChunkShape, ...]
    used: tuple[int, ...]
    cached: bool
    chunk_tokens: int
    token_share: float
    unit_share: float


def sample(config: Config, model: Model, mix: Mix) -> list[Size]:
    """Sizes of the inputs of an assumed batch, queries then targets.

    Raises:
      UserError: if the configuration leaves to the model folder what sizes depend on.
    """
    options = processor_options(config, model.backbone.options)

    def image_size(width: int, height: int) -> tuple[int, int]:
        return model.backbone.image_size(model.config, options, width, height)

    sizes = mix.sizes(config.batch_size, image_size, config.data.max_len or 256)
    # Hard negatives are taken to be like the targets that they resemble.
    return sizes + sizes[config.batch_size :] * config.loss.negatives


def shapes(config: Config, model: Model, sizes: list[Size], shards: int) -> Shapes:
    """Pack a batch of these sizes as `train` would."""
    rows = setup.rows_of(config, model, sizes)
    chunk_tokens = shards * (config.packing.chunk_tokens or fitting.MOST_CHUNK)
    fits = sum(tokens for tokens, _ in sizes) <= 0.9 * chunk_tokens
    plain = config.grad_cache == "off" or (config.grad_cache == "auto" and fits)
    packer = BatchPacker(
        rows,
        model.backbone.visual_layout(model.config),
        chunk_tokens=None if plain else chunk_tokens,
        row_multiple=shards,
    )
    planned, chunks = packer.arrange(sizes)
    return Shapes(
        tuple(chunk.shape for chunk in chunks),
        tuple(len(chunk.chunks) for chunk in chunks),
        packer.cached,
        0 if plain else chunk_tokens,
        planned.token_share,
        planned.unit_share,
    )


def useful_flops_per_pair(config: Config, model: Model, sizes: list[Size]) -> float:
    """FLOPs that a pair's gradient needs, on average: nothing computed twice, no padding.

    Twice the forward pass for adapters (the gradients of frozen weights are not needed), three
    times for full fine-tuning.
    """
    forward = sum(model.backbone.flops(model.config, *size) for size in sizes)
    return (3 if config.adapter.type == "none" else 2) * forward / config.batch_size


def check(
    config: Config,
    mesh: Mesh,
    hbm: int,
    folder: str | Path | None = None,
    *,
    search_chunk: bool = False,
) -> dict[str, Any]:
    """Compile the train step of a configuration for a mesh and read the result.

    Args:
      config: checked.
      mesh: of a topology's devices, or of simulated ones.
      hbm: bytes of a chip.
      folder: the model's folder; `model.path` by default.
      search_chunk: compile other chunk sizes as well, to find the largest that fits
        (`chunk_search`); else it is estimated from the one program.

    Returns:
      A JSON-able report, see `words`.

    Raises:
      UserError: if configuration, model and mesh do not fit together.
    """
    model = abstract_model(folder or config.model.path)
    sizes = sample(config, model, Mix())
    layout = model.backbone.visual_layout(model.config)
    trainer = aot.abstract_trainer(config, mesh, model.folder)
    shards = row_shards(mesh)
    known: dict[Any, dict[str, Any]] = {}

    def program(config: Config) -> tuple[Shapes, StepSpec, dict[str, Any]]:
        """The step of a configuration whose choices are made, compiled once."""
        packed = shapes(config, model, sizes, shards)
        spec = setup.step_spec(config, model, cached=packed.cached, shards=shards, memory=hbm)
        batch = aot.abstract_batch(packed.chunks, config.batch_size, layout, mesh, spec.loss)
        # Chunks are made of whole rows, so that two sizes may be one program.
        if (packed.chunks, spec) not in known:
            known[packed.chunks, spec] = _compiled(
                lambda how: aot.compile_step(trainer, spec, batch, how),
                mesh,
                hbm,
                lambda line: chunks_run(line, packed, shards),
            )
        return packed, spec, known[packed.chunks, spec]

    # As a run chooses; there the sizes are of its data, and a group has room for rare ones.
    fitted = fitting.fit(
        config,
        model,
        trainer,
        setup.rows_of(config, model, sizes),
        memory=hbm,
        chip=mesh.devices.flat[0].device_kind,
        compiled=lambda config: program(config)[2]["peak_bytes_per_chip"],
    )
    config = fitted.config
    packed, spec, found = program(config)

    trained, frozen = trainer.sizes()
    report = {
        "mesh": describe(mesh),
        "chips": mesh.size,
        "assumptions": Mix().words(),
        "batch_size": config.batch_size,
        "grad_cache": packed.cached,
        "chunk_tokens": packed.chunk_tokens,
        "chosen": fitted.words,
        "remat": spec.compute.remat,
        "remat_vision": spec.compute.vision.remat,
        "groups": [
            {"chunks": c.chunks, "used": used, "rows": c.rows, **dataclasses.asdict(c.row)}
            for c, used in zip(packed.chunks, packed.used, strict=True)
        ],
        "real_tokens": packed.token_share,
        "real_units": packed.unit_share,
        "parameters_trained": trained,
        "parameters_frozen": frozen,
        "useful_flops_per_pair": useful_flops_per_pair(config, model, sizes),
        "loss_form": spec.loss.form,
        "sharding": trainer.table(),
        "hbm_bytes_per_chip": hbm,
    }
    report |= found
    report |= compared(config, model, sizes, spec, report)
    report["largest_chunk_tokens"] = largest_chunk(report, shards)
    report["searched"] = search_chunk and packed.cached
    if report["searched"]:
        report |= _searched(config, report, shards, lambda config: program(config)[2])
    # The group whose rows are longest needs most; all embed with the same weights.
    longest = max(packed.chunks, key=lambda shape: (shape.row.units > 0, shape.row.tokens))
    group = aot.abstract_group(longest._replace(chunks=1), layout, mesh)
    embedding = _compiled(
        lambda how: aot.compile_embedding(trainer, spec.compute, group, how), mesh, hbm
    )
    report["embedding"] = {"rows": longest.rows, **dataclasses.asdict(longest.row), **embedding}
    report["fits"] = report["fits"] and embedding["fits"]
    return report


def _searched(
    config: Config,
    report: dict[str, Any],
    shards: int,
    program: Callable[[Config], dict[str, Any]],
) -> dict[str, Any]:
    """What `search_chunk` adds to a report: the largest chunk and what was compiled for it."""
    compiled = []

    def measure(chunk_tokens: int) -> int:
        packing = dataclasses.replace(config.packing, chunk_tokens=chunk_tokens)
        # A batch that fits into one chunk is a program of chunks here, too.
        found = program(dataclasses.replace(config, packing=packing, grad_cache="on"))
        compiled.append({"chunk_tokens": chunk_tokens, **found})
        return found["peak_bytes_per_chip"]

    limit = int(fitting.USABLE * report["hbm_bytes_per_chip"])
    first = Trial(report["chunk_tokens"] // shards, report["peak_bytes_per_chip"])
    whole = max(g["chunks"] * g["rows"] * g["tokens"] for g in report["groups"]) // shards
    row = max(g["tokens"] for g in report["groups"])
    trials = search(measure, first, limit=limit, most=max(whole, row), step=row)
    kept = ("chunk_tokens", "fits", "peak_bytes_per_chip", "compile_cpu_s")
    return {
        "largest_chunk_tokens": largest(trials, limit) or 0,
        "search": [{name: one[name] for name in kept} for one in compiled],
    }


def chunks_run(line: str, packed: Shapes, shards: int) -> int | None:
    """How often a loop over the chunks of a group runs: by the group's tokens, which it carries."""
    for shape, used in zip(packed.chunks, packed.used, strict=True):
        if f"s32[{shape.chunks},{shape.rows // shards},{shape.row.tokens}]" in line:
            return used
    return None


def passes(config: Config, cached: bool) -> int:
    """Forward passes' worth of FLOPs that a step makes, the layers' products of a token alone.

    A gradient costs one for what activations need and one for weights, where all are trained; with
    GradCache all is embedded once more, and what is recomputed once more again.
    """
    full = config.adapter.type == "none"
    return 2 + full + cached + (config.remat == "full")


def compared(
    config: Config, model: Model, sizes: list[Size], spec: StepSpec, report: dict[str, Any]
) -> dict[str, Any]:
    """FLOPs of the compiled step against those that the real tokens need, per chip.

    Attention is told apart: kernels compute whole blocks of a row, and so pairs of tokens that do
    not see each other.
    """
    if "flops" not in report:
        return {}
    chips = report["chips"]
    forward = sum(model.backbone.flops(model.config, *size) for size in sizes) / chips
    wanted = forward * passes(config, spec.cached)
    executed = report["flops"]["products"] + report["flops"]["attention"]
    return {
        "flops": report["flops"]
        | {
            "passes": passes(config, spec.cached),
            "useful": wanted,
            "executed_over_useful": executed / wanted,
        }
    }


def _compiled(
    build: Callable[[dict[str, Any]], Any],
    mesh: Mesh,
    hbm: int,
    runs: Callable[[str], int | None] = lambda line: None,
) -> dict[str, Any]:
    """`measure` of what `build` compiles, also where the compiler refuses for lack of memory."""
    started = time.process_time()
    try:
        found = measure(*aot.with_text(build, mesh), hbm, runs)
    except jax.errors.JaxRuntimeError as error:
        needed = memory_refused(str(error))
        if needed is None:
            raise
        found = {"fits": False, "peak_bytes_per_chip": max(needed, hbm), "collectives": {}}
    return found | {"compile_cpu_s": round(time.process_time() - started, 1)}


def largest_chunk(report: dict[str, Any], shards: int) -> int | None:
    """Tokens per chip and chunk (`packing.chunk_tokens`) that should just fit, an estimate.

    The temporaries of a chunk grow with its tokens and have a fixed part; all of them are taken to
    grow, so a larger chunk than this one is estimated safely. None where nothing is known: without
    GradCache, or where the compiler refused.
    """
    memory = report.get("memory")
    if memory is None or not report["grad_cache"]:
        return None
    rows = max(g["rows"] // shards * g["tokens"] for g in report["groups"])
    free = fitting.USABLE * report["hbm_bytes_per_chip"] - memory["arguments"] - memory["results"]
    most = int(rows * free / max(memory["temporaries"], 1))
    return max(most // 128 * 128, 0)


def memory_parts(compiled: Any) -> dict[str, int]:
    """Bytes of a chip that a compiled program needs, by what for."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def measure(
    compiled: Any,
    text: str,
    hbm: int,
    runs: Callable[[str], int | None] = lambda line: None,
) -> dict[str, Any]:
    """Memory, collectives and FLOPs of a compiled program, the last two from its text.

    Args:
      compiled: the program.
      text: of it (`aot.with_text`).
      hbm: bytes of a chip.
      runs: see `products.products`.
    """
    parts = memory_parts(compiled)
    peak = int(sum(parts.values()))
    found = hlo.collectives(text)
    heaviest = sorted(found, key=lambda op: -op.bytes)[:5]
    return {
        "fits": peak <= fitting.USABLE * hbm,
        "peak_bytes_per_chip": peak,
        "memory": parts,
        "collectives": hlo.by_kind(found),
        "largest_collectives": [str(op) for op in heaviest],
        "flops": products.flops(text, runs),
    }


def memory_refused(message: str) -> int | None:
    """Bytes that a program needs, out of the TPU compiler's refusal; None for other errors.

    It may be the temporaries alone that are said.
    """
    for words in (
        r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm",
        r"total memory required for [\w ]+ \(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM",
    ):
        found = re.search(words, message)
        if found is not None:
            return int(float(found.group(1)) * 1024 ** " KMGT".index(found.group(2) or " "))
    return None
