# SPDX-License-Identifier: Apache-2.0
"""Setting up what is trained: model, adapters, optimizer state, the compiled step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm2vec_jax.models.loading import Model, fill, flatten, split_trainable
from vlm2vec_jax.parallel.mesh import batch_spec, row_part
from vlm2vec_jax.parallel.sharding import table
from vlm2vec_jax.training.guard import guarded
from vlm2vec_jax.training.optimizer import AdamW
from vlm2vec_jax.training.step import StepSpec, TrainBatch, TrainState, train_step
from vlm2vec_jax.training.temperature import Temperature


@dataclasses.dataclass
class Trainer:
    """A model split for training, on a mesh.

    Attributes:
      graphdef: structure of the model.
      state: the newest state.
      frozen: leaves that are not trained.
      optimizer: AdamW with its schedule.
      mesh: where all of it lives.
    """

    graphdef: Any
    state: TrainState
    frozen: Any
    optimizer: AdamW
    mesh: Mesh

    @classmethod
    def create(
        cls,
        model: Model,
        optimizer: AdamW,
        mesh: Mesh,
        *,
        full: bool,
        temperature: float | None = None,
    ) -> Trainer:
        """Split a loaded (and adapted) model; the optimizer's moments lie as their parameters.

        Args:
          model: loaded.
          optimizer: AdamW with its schedule.
          mesh: where it lives.
          full: train every parameter, not adapters alone.
          temperature: where a learned one starts; None if it is not learned.
        """
        graphdef, params, frozen = split_trainable(model, full=full)
        whole = NamedSharding(mesh, PartitionSpec())
        placed = optimizer.state_shardings(jax.tree.map(lambda p: p.sharding, params), whole)
        opt = jax.jit(optimizer.init, out_shardings=placed)(params)
        learned = None if temperature is None else Temperature.start(temperature)
        state = TrainState(
            jax.device_put(jnp.int32(0), whole), params, opt, jax.device_put(learned, whole)
        )
        return cls(graphdef, state, frozen, optimizer, mesh)

    def compile_step(self, spec: StepSpec) -> Callable[[TrainState, Any, TrainBatch, Any], Any]:
        """The jitted step (state, frozen, batch, key) -> (state, metrics); donates the state."""
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(
            functools.partial(guarded(train_step), self.graphdef, self.optimizer, spec),
            donate_argnums=0,
            out_shardings=(placed, NamedSharding(self.mesh, PartitionSpec())),
        )

    def key(self, seed: int) -> jax.Array:
        """The base key of a run, whole on every device."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(jax.random.key, out_shardings=whole)(seed)

    def put(self, batch: TrainBatch) -> TrainBatch:
        """Send a host batch to the mesh: rows over `data` and `fsdp`, the rest whole.

        Where several processes take part each gives its own rows of every chunk
        (`packing.fill_chunks` with `part`), and all give the same ids.
        """
        rows = NamedSharding(self.mesh, batch_spec(1))
        whole = NamedSharding(self.mesh, PartitionSpec())

        parts = row_part(self.mesh)[1]

        def spread(leaf):
            shape = (leaf.shape[0], leaf.shape[1] * parts, *leaf.shape[2:])
            return jax.make_array_from_process_local_data(rows, leaf, shape)

        groups = tuple(
            type(group)(
                jax.tree.map(spread, group.batch),
                jax.device_put(group.num_chunks, whole),
            )
            for group in batch.groups
        )
        known, source, valid = jax.device_put((batch.known, batch.source, batch.valid), whole)
        return TrainBatch(groups, jax.device_put(batch.target_id, whole), known, source, valid)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds, leaves by path, so that parts can be read without the rest."""
        opt = self.state.opt
        learned = self.state.temperature
        return {
            **({} if learned is None else {"temperature": learned._asdict()}),
            "step": {"step": self.state.step},
            "params": flatten(self.state.params),
            "opt": {"count": opt.count, "mu": flatten(opt.mu), "nu": flatten(opt.nu)},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take the state out of a checkpoint that `saved` made."""
        params, opt = self.state.params, self.state.opt
        self.state = TrainState(
            saved["step"]["step"],
            fill(params, saved["params"]),
            opt._replace(
                count=saved["opt"]["count"],
                mu=fill(opt.mu, saved["opt"]["mu"]),
                nu=fill(opt.nu, saved["opt"]["nu"]),
            ),
            None if self.state.temperature is None else Temperature(**saved["temperature"]),
        )

    @property
    def temperature(self) -> float | None:
        """The learned temperature as it is now; None where it is not learned."""
        learned = self.state.temperature
        return None if learned is None else float(learned.value)

    def table(self) -> str:
        """Where everything lives, as a text table: parameters and the optimizer's moments."""
        opt = self.state.opt
        leaves = {**flatten(self.frozen), **flatten(self.state.params)}
        for name, moment in (("mu", opt.mu), ("nu", opt.nu)):
            leaves |= {f"optimizer/{name}/{path}": v for path, v in flatten(moment).items()}
        return table(leaves, {path: leaf.sharding for path, leaf in leaves.items()})

    def sizes(self) -> tuple[int, int]:
        """Numbers trained and frozen."""
        trained, frozen = (
            sum(leaf.size for leaf in flatten(tree).values())
            for tree in (self.state.params, self.frozen)
        )
        return trained, frozen
