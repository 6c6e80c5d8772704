# SPDX-License-Identifier: Apache-2.0
"""Train steps as shapes: compiled, never run. For plans of memory, collectives and programs."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.beds import Bed


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step.

    Attributes:
      program: what jax compiled.
      trained: numbers in the trained leaves.
      width: of an embedding.
    """

    program: Any
    trained: int
    width: int

    @property
    def temporary_bytes(self) -> int:
        """What the program needs besides its arguments and results, on one device."""
        return self.program.memory_analysis().temp_size_in_bytes

    @property
    def flops(self) -> float:
        """As the compiler counts them; a loop's body counts once."""
        return float(self.program.cost_analysis().get("flops", 0.0))


def train_step(
    bed: Bed,
    *,
    pairs: int,
    rows: int,
    row: Any,
    chunks: int = 2,
    devices: int = 1,
    adapter: str = "lora",
    cached: bool = True,
    **config: Any,
) -> Compiled:
    """Compile the step of `vlm2vec_jax.train` for one group of rows, on simulated devices.

    Args:
      bed: the model's sizes.
      pairs: of the global batch.
      rows: of a chunk, over all devices.
      row: `packing.RowShape`.
      chunks: capacity of the group.
      devices: data-parallel ones.
      adapter: `adapter.type`.
      cached: GradCache.
      **config: further fields of `Config` by name, such as remat="full".
    """
    import jax

    from vlm2vec_jax.config import AdapterConfig, Config, ModelConfig
    from vlm2vec_jax.models.loading import abstract_model, flatten
    from vlm2vec_jax.packing import ChunkShape
    from vlm2vec_jax.parallel.mesh import make_mesh
    from vlm2vec_jax.training import aot, setup

    with tempfile.TemporaryDirectory() as name:
        Path(name, "config.json").write_text(json.dumps(bed.fields))
        wanted = Config(
            model=ModelConfig(path=name, dtype="float32"),
            adapter=AdapterConfig(type=adapter, rank=8, dropout=0.0),
            batch_size=pairs,
            **config,
        )
        mesh = make_mesh(devices, devices=jax.devices("cpu")[:devices])
        trainer = aot.abstract_trainer(wanted, mesh, name)
        spec = setup.step_spec(
            wanted, abstract_model(name), cached=cached, shards=devices, memory=1 << 34
        )
    shape = ChunkShape(row, rows, chunks if cached else 1)
    batch = aot.abstract_batch([shape], pairs, bed.layout, mesh, spec.loss)
    trained = sum(leaf.size for leaf in flatten(trainer.state.params).values())
    return Compiled(aot.compile_step(trainer, spec, batch), trained, bed.config.hidden_size)
