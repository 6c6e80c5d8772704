# SPDX-License-Identifier: Apache-2.0
"""The train step as shapes: what a run would compile, without weights, data or its devices.

Everything comes from the configuration and the model folder's `config.json`; the mesh may be made
of devices that are not there (a TPU topology, see `compile.py`) or of simulated ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm2vec_jax.config import Config
from vlm2vec_jax.inputs import VisualLayout
from vlm2vec_jax.losses import LossOptions
from vlm2vec_jax.models.base import Backbone
from vlm2vec_jax.models.loading import (
    Model,
    abstract_model,
    add_adapter,
    fill,
    flatten,
    split_trainable,
)
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.packing import ChunkedGroup, ChunkShape, PackedBatch
from vlm2vec_jax.parallel import sharding
from vlm2vec_jax.parallel.mesh import ROWS, batch_spec
from vlm2vec_jax.parallel.sharding import constrain
from vlm2vec_jax.training import setup
from vlm2vec_jax.training.optimizer import AdamW
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import StepSpec, TrainBatch, TrainState
from vlm2vec_jax.training.temperature import Temperature
from vlm2vec_jax.weights.adapter_config import resolve


def abstract_trainer(config: Config, mesh: Mesh, folder: str | Path | None = None) -> Trainer:
    """The trainer of a configuration whose leaves are shapes, dtypes and shardings.

    Args:
      config: checked; a new adapter is put on even where `model.adapter` names a trained one.
      mesh: where it shall live.
      folder: the model's folder (only config.json is read); `model.path` by default.

    Raises:
      UserError: if the folder describes no known model, or it cannot be spread over the mesh.
    """
    model = abstract_model(folder or config.model.path)
    full = config.adapter.type == "none"
    model.module = adapted(config, model.backbone, model) if not full else model.module
    dtype = jnp.dtype("float32" if full else config.model.dtype)
    model.module = fill(model.module, placed(flatten(model.module), model.backbone, mesh, dtype))
    graphdef, params, frozen = split_trainable(model, full=full)
    optimizer: AdamW = setup.optimizer(config)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = optimizer.state_shardings(jax.tree.map(lambda p: p.sharding, params), whole)
    opt = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(optimizer.init, params),
        shardings,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    learned = None
    if config.loss.learn_temperature:
        learned = Temperature(*(jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),) * 3)
    return Trainer(graphdef, TrainState(step, params, opt, learned), frozen, optimizer, mesh)


def adapted(config: Config, backbone: Backbone, model: Model) -> Any:
    """The model's module with the configuration's fresh adapter on it, as shapes."""
    adapter = setup.new_adapter(config, backbone)

    def build():
        module = backbone.build(model.config, rngs=nnx.Rngs(0))
        linears = resolve(adapter, model.table)
        fused = config.adapter.dora_dropout == "fused"
        add_adapter(
            module, linears, dora=adapter.dora, dropout=adapter.dropout, fused_dropout=fused
        )
        return module

    return nnx.eval_shape(build)


def placed(
    leaves: dict[str, Any], backbone: Backbone, mesh: Mesh, dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves by path with dtype (adapters float32) and the backbone's place for them."""
    where = sharding.shardings(leaves, mesh, backbone.sharding)
    adapters = ("lora_a", "lora_b", "magnitude")
    return {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.dtype("float32") if path.rpartition("/")[2] in adapters else dtype,
            sharding=where[path],
        )
        for path, leaf in leaves.items()
    }


def abstract_group(shape: ChunkShape, layout: VisualLayout, mesh: Mesh) -> ChunkedGroup:
    """A group of chunks, rows spread as `Trainer.put` spreads them."""
    lead = (shape.chunks, shape.rows)
    rows = NamedSharding(mesh, batch_spec(1))

    def leaf(dims: Sequence[int], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *dims), dtype, sharding=rows)

    tokens, sequences = (shape.row.tokens,), (shape.row.sequences,)
    visual = {}
    if shape.row.units:
        visual = {
            name: leaf((shape.row.units, *unit), dtype)
            for name, (unit, dtype) in layout.units.items()
        }
    batch = PackedBatch(
        tokens=leaf(tokens),
        feature_index=leaf(tokens),
        positions=leaf((*tokens, *layout.position_shape)),
        segment_ids=leaf(tokens),
        pool_index=leaf(sequences),
        slot=leaf(sequences),
        visual=visual,
    )
    whole = NamedSharding(mesh, PartitionSpec())
    return ChunkedGroup(batch, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))


def abstract_batch(
    shapes: Sequence[ChunkShape],
    pairs: int,
    layout: VisualLayout,
    mesh: Mesh,
    loss: LossOptions = LossOptions(),  # noqa: B008 (frozen)
) -> TrainBatch:
    """A global batch of `pairs` pairs in groups of these shapes, for a loss of these options."""
    whole = NamedSharding(mesh, PartitionSpec())
    columns = pairs * (1 + loss.negatives)

    def ids(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    return TrainBatch(
        tuple(abstract_group(shape, layout, mesh) for shape in shapes),
        ids(columns),
        known=ids(pairs, 1) if loss.same_query != "negative" else None,
        source=ids(pairs) if loss.same_source else None,
        valid=ids(columns, dtype=jnp.bool_) if loss.negatives else None,
    )


def compile_step(
    trainer: Trainer,
    spec: StepSpec,
    batch: TrainBatch,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compile the train step for these shapes on the trainer's mesh; `options` are XLA's own."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = NamedSharding(trainer.mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    with jax.set_mesh(trainer.mesh):
        lowered = trainer.compile_step(spec).lower(trainer.state, trainer.frozen, batch, key)
        return lowered.compile(compiler_options=options)


def compile_embedding(
    trainer: Trainer,
    compute: Compute,
    group: ChunkedGroup,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compile the forward pass alone, for a chunk of these shapes (a group of one chunk)."""

    def embed(params, frozen, batch: PackedBatch) -> jax.Array:
        chunk = jax.tree.map(lambda leaf: constrain(leaf[0], ROWS), batch)
        return nnx.merge(trainer.graphdef, params, frozen)(chunk, compute)

    with jax.set_mesh(trainer.mesh):
        step = jax.jit(embed, out_shardings=NamedSharding(trainer.mesh, PartitionSpec(ROWS)))
        lowered = step.lower(trainer.state.params, trainer.frozen, group.batch)
        return lowered.compile(compiler_options=options)


def with_text(build: Callable[[dict[str, Any]], Any], mesh: Mesh) -> tuple[Any, str]:
    """Compile for a mesh, and get the program's text even where jaxlib cannot read it.

    The TPU's compiler may be of another version than jaxlib's: libtpu 0.0.52 writes asynchronous
    operations of several operands, which jaxlib 0.10.2 refuses to read back ("async-update
    instruction should have 1 operands"). The compiler itself can be told to write its text.

    Args:
      build: XLA's options -> the compiled program.
      mesh: that it is compiled for.

    Returns:
      The compiled program and its text.
    """
    if mesh.devices.flat[0].platform != "tpu":
        compiled = build({})
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = build({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        try:
            return compiled, compiled.as_text()
        except jax.errors.JaxRuntimeError:
            # The program of the step comes last; small ones may be compiled on the way.
            written = Path(folder).glob("*.after_optimizations.txt")
            texts = sorted(written, key=lambda path: path.stat().st_size)
            if not texts:
                raise
            return compiled, texts[-1].read_text(encoding="utf-8")
