# SPDX-License-Identifier: Apache-2.0
"""The parts of a run, made from its configuration: what `train.py` puts together in order."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm2vec_jax import config as config_lib
from vlm2vec_jax.config import Config
from vlm2vec_jax.data.pipeline import BatchStats
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.inputs import VisualLayout
from vlm2vec_jax.losses import LossOptions, choose_form
from vlm2vec_jax.models.base import Backbone, Processor
from vlm2vec_jax.models.folders import ModelSource, local_folder
from vlm2vec_jax.models.loading import Model, add_adapter, flatten, load_model, open_processor
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.exact import platform
from vlm2vec_jax.record import make_record, read_record
from vlm2vec_jax.training.batching import BatchPacker, PackedStep, RowSizes, Size, choose_rows
from vlm2vec_jax.training.identities import identities
from vlm2vec_jax.training.optimizer import AdamW, make_schedule
from vlm2vec_jax.training.prompts import prompts_of
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import StepSpec, TrainBatch
from vlm2vec_jax.training.temperature import TemperatureRule
from vlm2vec_jax.training.trackers import Tracker, open_trackers
from vlm2vec_jax.weights.adapter_config import AdapterConfig, peft_config, resolve
from vlm2vec_jax.weights.adapters import Adapter, load_adapter

if TYPE_CHECKING:
    from vlm2vec_jax.training.data import Data


def load(config: Config, mesh: Mesh) -> tuple[Model, Processor, AdapterConfig | None]:
    """Load the model, put the adapter on, set up the processor."""
    folder = local_folder(config.model.path)
    full = config.adapter.type == "none"
    dtype = jnp.dtype(config.model.dtype)
    model = load_model(
        folder,
        # What full fine-tuning trains has float32 masters.
        dtype_of=lambda path: jnp.dtype("float32") if full else dtype,
        mesh=mesh,
    )
    adapter = None if full else _adapt(config, model, mesh)
    # What the configuration leaves open is as the adapter to start from, or the model, has it.
    top = local_folder(config.model.adapter) if config.model.adapter else None
    source = ModelSource(
        config.model.adapter or config.model.path,
        folder,
        top,
        record=read_record(top or folder),
    )
    given = config_lib.processor_options(config, model.backbone.options)
    return model, open_processor(model, source, given), adapter


def _adapt(config: Config, model: Model, mesh: Mesh) -> AdapterConfig:
    wanted = config.adapter
    if config.model.adapter:
        trained = load_adapter(
            local_folder(config.model.adapter), model.table, flatten(model.module)
        )
        if trained.config.kind != wanted.type:
            raise UserError(
                f"{config.model.adapter} is a {trained.config.kind} adapter, but adapter.type is "
                f"{wanted.type}"
            )
        _check_trainable(config.model.adapter, trained)
        add_adapter(
            model.module,
            trained.linears,
            dora=trained.config.dora,
            dropout=wanted.dropout,
            fused_dropout=wanted.dora_dropout == "fused",
            tensors=trained.tensors,
            mesh=mesh,
        )
        return dataclasses.replace(trained.config, dropout=wanted.dropout)
    adapter = new_adapter(config, model.backbone)
    add_adapter(
        model.module,
        resolve(adapter, model.table),
        dora=adapter.dora,
        dropout=adapter.dropout,
        fused_dropout=config.adapter.dora_dropout == "fused",
        seed=config.seed,
        mesh=mesh,
    )
    return adapter


def _check_trainable(folder: str, adapter: Adapter) -> None:
    """Refuse to go on training what a run would not keep.

    Raises:
      UserError: if the adapter stores whole modules, or is a DoRA that leaves out some layers of
        a stack (whose magnitudes would be trained, too).
    """
    problems = []
    if adapter.saved:
        problems.append(f"it stores whole modules (modules_to_save {list(adapter.config.saved)})")
    uneven = [p for p, linear in adapter.linears.items() if not all(linear.ranks)]
    if uneven and adapter.config.dora:
        problems.append(f"it is a DoRA that leaves out some layers of {', '.join(uneven[:5])}")
    raise_problems(
        f"{folder} can be used and exported, but training cannot go on from it",
        problems,
        advice="Merge it first (python -m vlm2vec_jax.export --format merged) and train a new "
        "adapter on the result.",
    )


def new_adapter(config: Config, backbone: Backbone) -> AdapterConfig:
    """The fresh adapter that a configuration asks for."""
    wanted = config.adapter
    targets = config_lib.target_names(config)
    return AdapterConfig(
        rank=wanted.rank,
        alpha=wanted.alpha,
        dropout=wanted.dropout,
        targets=backbone.targets if targets == ("auto",) else targets,
        dora=wanted.type == "dora",
        base=config.model.path,
    )


def record_of(
    config: Config,
    model: Model,
    processor: Processor,
    adapter: AdapterConfig | None,
    data: Data | None = None,
) -> dict[str, Any]:
    """`vlm2vec.json` of this run; `data` for the prompts in it."""
    return {
        **make_record(
            backbone=model.backbone.name,
            base=config.model.path,
            processor=processor.settings,
            temperature=config.temperature,
            adapter=None if adapter is None else peft_config(adapter, table=model.table),
        ),
        "prompts": {} if data is None else prompts_of(data.mixture.sources),
        "target_instruction": config.data.target_instruction,
        "run": config_lib.fingerprint(config)[:16],
    }


def rows_of(config: Config, model: Model, sizes: Sequence[Size]) -> RowSizes:
    """Row lengths for inputs of these sizes."""
    return choose_rows(
        sizes,
        longest=model.backbone.max_tokens(model.config),
        row_tokens=config.packing.row_tokens,
        crowding=model.backbone.price(model.config).crowding,
    )


def packer(
    config: Config,
    rows: RowSizes,
    model: Model,
    layout: VisualLayout,
    shards: int,
    part: tuple[int, int] = (0, 1),
) -> BatchPacker:
    """What packs every batch of the run.

    Args:
      config: settled (`fitting`).
      rows: row lengths.
      model: loaded or abstract.
      layout: of the visual feature table.
      shards: devices that share the rows of a batch.
      part: the block of rows that this process holds.
    """
    return BatchPacker(
        rows,
        layout,
        chunk_tokens=None if config.grad_cache == "off" else config.packing.chunk_tokens * shards,
        row_multiple=shards,
        negatives=config.loss.negatives,
        part=part,
        flops=functools.partial(model.backbone.flops, model.config),
        finely=platform() == "cpu",
    )


def step_spec(
    config: Config, model: Model, *, cached: bool, shards: int, memory: int | None = None
) -> StepSpec:
    """The static choices of the train step.

    Args:
      config: checked.
      model: loaded or abstract.
      cached: GradCache.
      shards: devices that share the rows of a batch.
      memory: bytes of a device; by default what the first device says.

    Raises:
      UserError: if `loss.matryoshka` asks for more than an embedding has.
    """
    wanted = config.loss
    width = model.backbone.width(model.config)
    widths = config_lib.prefix_widths(config)
    if widths and widths[-1] > width:
        raise UserError(f"loss.matryoshka: {widths[-1]} is wider than an embedding ({width})")
    form = wanted.form
    if form == "auto":
        columns = config.batch_size * (1 + wanted.negatives)
        memory = memory or device_memory()
        form = choose_form(config.batch_size, columns, width, shards, memory)
    rule = None
    if wanted.learn_temperature:
        rule = TemperatureRule(
            # A multiple of the model's rate, so that it has the shape of the run's schedule.
            wanted.temperature_lr / config.optim.lr,
            wanted.temperature_min,
            wanted.temperature_max,
        )
    options = LossOptions(
        form=form,  # type: ignore[arg-type]
        tile=wanted.tile,
        symmetric=wanted.symmetric,
        mask_duplicates=wanted.mask_duplicate_targets,
        same_query=wanted.same_query,  # type: ignore[arg-type]
        margin=wanted.margin if wanted.margin >= 0 else None,
        same_source=wanted.same_source,
        private_negatives=wanted.private_negatives,
        hardness=wanted.hardness,
        widths=widths,
        negatives=wanted.negatives,
    )
    return StepSpec(
        compute=compute(config),
        temperature=config.temperature,
        loss=options,
        warmth=rule,
        cached=cached,
        dropout=config.adapter.type != "none" and config.adapter.dropout > 0,
    )


def reported_memory() -> int | None:
    """Bytes of the first device as it says itself; None where it does not (CPUs)."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(limit) if limit else None


def device_memory() -> int:
    """Bytes of the first device; where it does not say, this machine's memory shared out."""
    devices = jax.local_devices()
    limit = reported_memory()
    if limit:
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def compute(config: Config) -> Compute:
    """How the model computes."""
    vision = None if config.remat_vision == "same" else config.remat_vision
    # The most frugal where nobody has settled it (`fitting`).
    remat = "full" if config.remat == "auto" else config.remat
    return Compute(config.model.dtype, config.attention, remat, vision)  # type: ignore[arg-type]


def optimizer(config: Config) -> AdamW:
    """AdamW with its schedule."""
    optim = config.optim
    schedule = make_schedule(optim.schedule, optim.lr, optim.warmup_steps, config.steps)
    return AdamW(
        schedule,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )


def trainer(config: Config, model: Model, mesh: Mesh) -> Trainer:
    """State and optimizer, before the first step."""
    return Trainer.create(
        model,
        optimizer(config),
        mesh,
        full=config.adapter.type == "none",
        temperature=config.temperature if config.loss.learn_temperature else None,
    )


def trackers(config: Config, output: Path, done: int) -> list[Tracker]:
    """TensorBoard and Weights & Biases, as far as wanted; for the first process only."""
    wanted = config.tracking
    return open_trackers(
        output,
        done,
        tensorboard=wanted.tensorboard,
        wandb=wanted.wandb,
        project=wanted.project,
        config=config_lib.to_dict(config),
    )


def train_batch(packed: PackedStep, stats: BatchStats, options: LossOptions) -> TrainBatch:
    """What the step takes."""
    same_query = options.same_query != "negative"
    ids = identities(
        stats.target_id,
        stats.query_id,
        stats.negative_ids,
        negatives=options.negatives,
        same_query=same_query,
    )
    return TrainBatch(
        packed.groups,
        ids.target_id,
        known=ids.known if same_query else None,
        source=stats.rows[:, 0].astype(np.int32) if options.same_source else None,
        valid=ids.valid if options.negatives else None,
    )
