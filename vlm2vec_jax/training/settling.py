# SPDX-License-Identifier: Apache-2.0
"""Settling a run's chunks and what its step keeps: on its own devices, alike on all processes.

Devices that report their memory (GPUs, TPUs) have the step compiled, with the shapes that the run
will pack, and its memory analysis decides; the one that is taken comes out of the compilation
cache when the run compiles it. Others (CPUs) go by the estimate, which costs nothing. What was
settled stands in every checkpoint and is taken up again, as another chunk adds up in another order
and draws other dropout.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from vlm2vec_jax.config import Config
from vlm2vec_jax.inputs import VisualLayout
from vlm2vec_jax.models.loading import Model
from vlm2vec_jax.parallel.mesh import row_shards
from vlm2vec_jax.parallel.peers import Peers
from vlm2vec_jax.training import aot, fitting, plan, setup
from vlm2vec_jax.training.batching import Size
from vlm2vec_jax.training.state import Trainer

CPU_CHUNK = 4096
"""Tokens that a device embeds at a time where it does not say how much memory it has."""


class Settled(NamedTuple):
    """What a run settled on.

    Attributes:
      config: with nothing left open, see `fitting.Fit`.
      words: what and why, one line; empty if there was nothing to choose.
      record: for the checkpoint, JSON-able; `before` of a run that goes on.
    """

    config: Config
    words: str
    record: dict[str, Any]


def settle(
    config: Config,
    model: Model,
    trainer: Trainer,
    sizes: Sequence[Size],
    layout: VisualLayout,
    peers: Peers,
    *,
    before: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Settled:
    """Settle what the configuration leaves open for the devices of a run.

    Args:
      config: checked.
      model: loaded.
      trainer: of the run.
      sizes: of a sample of the inputs, the same on all processes.
      layout: of the visual feature table.
      peers: the processes of the run, who settle alike.
      before: `Settled.record` of the checkpoint that the run goes on from. It is taken up if the
        mesh is the same, no device has less memory, and the configuration asks for nothing else.
      say: told of each step that is compiled.
    """
    reported = setup.reported_memory()
    mine = {
        "memory": reported or setup.device_memory() // 2,
        "reported": reported is not None,
        "before": before,
    }
    told = peers.share("start/settling", mine)
    memory = min(one["memory"] for one in told)
    mesh, before = dict(trainer.mesh.shape), told[0]["before"]
    if before is not None and before["mesh"] == mesh and before["memory"] <= memory:
        fitted = fitting.taken_up(config, before["chosen"])
        if fitted is not None:
            return Settled(fitted.config, fitted.words, before)
    number = itertools.count(1)

    def compiled(config: Config) -> int:
        n = next(number)
        if say is not None:
            most = fitting.MOST_TRIALS
            say(f"compiling the step to see what it needs ({n} of at most {most}) ...")
        own = step_bytes(config, model, trainer, sizes, layout, memory)
        return max(peers.share(f"start/settling-{n}", own))

    reporting = all(one["reported"] for one in told)
    if not reporting and not config.packing.chunk_tokens:
        packing = dataclasses.replace(config.packing, chunk_tokens=CPU_CHUNK)
        config = dataclasses.replace(config, packing=packing)
    fitted = fitting.fit(
        config,
        model,
        trainer,
        setup.rows_of(config, model, sizes),
        memory=memory,
        chip=trainer.mesh.devices.flat[0].device_kind,
        compiled=compiled if reporting else None,
    )
    record = {"mesh": mesh, "memory": memory, "chosen": fitted.chosen}
    return Settled(fitted.config, fitted.words, record)


def step_bytes(
    config: Config,
    model: Model,
    trainer: Trainer,
    sizes: Sequence[Size],
    layout: VisualLayout,
    memory: int,
) -> int:
    """Bytes of a device that a run's compiled step needs.

    Args:
      config: with nothing left open.
      model: loaded or abstract.
      trainer: its state may be shapes.
      sizes: of a sample of the inputs.
      layout: of the visual feature table.
      memory: bytes of a device.
    """
    shards = row_shards(trainer.mesh)
    packer = setup.packer(config, setup.rows_of(config, model, sizes), model, layout, shards)
    packer.foresee(sizes, (2 + config.loss.negatives) * config.batch_size)
    spec = setup.step_spec(config, model, cached=packer.cached, shards=shards, memory=memory)
    batch = aot.abstract_batch(packer.shapes, config.batch_size, layout, trainer.mesh, spec.loss)
    try:
        return sum(plan.memory_parts(aot.compile_step(trainer, spec, batch)).values())
    except jax.errors.JaxRuntimeError as error:
        needed = plan.memory_refused(str(error))
        if needed is None:
            raise
        return max(needed, memory)
