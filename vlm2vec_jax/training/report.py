# SPDX-License-Identifier: Apache-2.0
"""What a run says before its first step: where, what, how much of it, from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from vlm2vec_jax.config import Config
from vlm2vec_jax.models.loading import Model, flatten
from vlm2vec_jax.parallel.mesh import describe, row_shards
from vlm2vec_jax.training import fitting
from vlm2vec_jax.training.batching import BatchPacker
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import StepSpec

_CONSOLE = Console(stderr=True)


def warn(message: str, origin: str = "") -> None:
    """Print a sentence that must not be missed; `origin` is the process that has it to say."""
    _CONSOLE.print(
        f"warning: {origin + ': ' if origin else ''}{message}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def note(message: str) -> None:
    """Print a sentence about what is going on."""
    _CONSOLE.print(message, markup=False, highlight=False, soft_wrap=True)


def start(
    config: Config,
    mesh: Mesh,
    model: Model,
    trainer: Trainer,
    adapter: Any,
    data: Any,
    packer: BatchPacker,
    spec: StepSpec,
    done: int,
    output: Path,
) -> None:
    """Print what will happen."""
    table = Table.grid(padding=(0, 2))
    for name, words in lines(
        config, mesh, model, trainer, adapter, data, packer, spec, done, output
    ):
        table.add_row(name, words)
    _CONSOLE.print(table, markup=False, highlight=False)
    if mesh.size > 1:
        _CONSOLE.print(trainer.table(), markup=False, highlight=False, soft_wrap=True)


def lines(
    config, mesh, model, trainer, adapter, data, packer, spec, done, output
) -> list[tuple[str, str]]:
    """The start-up report as (subject, words)."""
    trained, frozen = trainer.sizes()
    rows = [
        ("mesh", describe(mesh)),
        (
            "model",
            f"{config.model.path} ({model.backbone.name}), computing in {config.model.dtype}",
        ),
        ("parameters", f"{trained:,} trained, {frozen:,} frozen"),
    ]
    if adapter is not None:
        paths = sorted({p.rpartition("/")[0] for p in flatten(trainer.state.params)})
        modules = ", ".join(paths)
        rows.append(
            (
                "adapter",
                f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha:g}, dropout "
                f"{adapter.dropout:g}, on {len(paths)} (stacked) layers: {modules}",
            )
        )
    sizes = {source.subset: len(source) for source in data.mixture.sources}
    listed = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
    epochs = config.steps * config.batch_size / max(len(data.mixture), 1)
    rows += [
        ("data", f"{len(data.mixture):,} pairs, {epochs:.2f} epochs: {listed}"),
        ("batch", _batch(config, mesh, packer)),
        ("memory", _memory(model, trainer, packer, spec, config, mesh)),
        (
            "steps",
            f"{config.steps}, learning rate {config.optim.lr:g} {config.optim.schedule} after "
            f"{config.optim.warmup_steps} of warm-up, temperature {config.temperature:g}",
        ),
        ("output", f"{output}" + (f", going on after step {done}" if done else "")),
    ]
    return rows


def _batch(config: Config, mesh: Mesh, packer: BatchPacker) -> str:
    rows = packer.rows
    shape = (
        f"rows of {rows.text} tokens for texts, of {rows.visual} tokens and {rows.units} "
        f"visual units for images, spread over {row_shards(mesh)} devices"
    )
    how = (
        f"GradCache, chunks of {packer.chunk_tokens:,} tokens"
        if packer.cached
        else "all of it at once"
    )
    pairs = config.batch_size
    return f"{pairs} pairs, each query against all {pairs} targets; {how}; {shape}"


def _memory(
    model: Model, trainer: Trainer, packer: BatchPacker, spec: StepSpec, config: Config, mesh: Mesh
) -> str:
    rows = packer.rows
    tokens = min(packer.chunk_tokens, 1 << 24) / row_shards(mesh)
    if not packer.cached:
        tokens = 2 * config.batch_size * rows.mean_tokens / row_shards(mesh)
    way = fitting.Way(packer.cached, spec.compute.remat, spec.compute.vision.remat)
    acts = fitting.activations(config, model, way, rows, tokens)
    parts = {
        **fitting.held(trainer),
        "activations of a chunk (estimated)": acts,
    }
    told = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return f"about {_bytes(sum(parts.values()))} per device: {told}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"
