# SPDX-License-Identifier: Apache-2.0
"""The train step: one compiled program, GradCache as two loops over chunks inside it.

Embed every chunk, take the loss over the global batch and its gradient with respect to all
embeddings, then pull that gradient back through one chunk at a time and add up (Gao et al.,
arXiv 2101.06983). How many chunks are real is known only at run time, so a program serves every
batch of its shapes. Where a batch is a single chunk, the plain step does without the first pass.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.losses import LossOptions, contrastive_loss
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import refresh_dora_norms
from vlm2vec_jax.packing import ChunkedGroup, PackedBatch
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import by_rows, constrain, row_shard, sum_over_rows
from vlm2vec_jax.training.exchange import Sides, collect, deliver
from vlm2vec_jax.training.optimizer import AdamW
from vlm2vec_jax.training.temperature import TemperatureRule


class TrainState(NamedTuple):
    """What a step changes, and a checkpoint holds.

    Attributes:
      step: i32 [], updates made so far.
      params: the trained leaves, float32.
      opt: the optimizer's state.
      temperature: `Temperature` where it is learned, else None.
    """

    step: Any
    params: Any
    opt: Any
    temperature: Any = None


_GROUP = ChunkedGroup(batch=P(None, ROWS), num_chunks=P())  # type: ignore[arg-type]
"""How a group of chunks is spread."""


class TrainBatch(NamedTuple):
    """A global batch of B pairs with k places for hard negatives each, packed.

    Attributes:
      groups: rows of one shape each, dealt into chunks; slots 0..B-1 are the queries,
        B + i (1 + k) is the target of query i and the k slots behind it its hard negatives.
      target_id: i32 [M], M = B (1 + k); equal for columns that are the same thing.
      known: i32 [B, P], ids of all targets known to be right for a query, its own first, -1
        behind the last; None for its own alone.
      source: i32 [B], the subset of each pair; None where nobody asks.
      valid: bool [M], False where a hard negative is missing; None if all are there.
    """

    groups: tuple[ChunkedGroup, ...]
    target_id: Any
    known: Any = None
    source: Any = None
    valid: Any = None


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Static choices of a train step (hashable).

    Attributes:
      compute: how the model computes.
      temperature: of the contrastive loss, where it is not learned.
      loss: variations of the loss, and its form.
      warmth: how the temperature is learned; None if it is not.
      cached: GradCache; False asks for batches whose groups are one chunk each.
      dropout: whether adapters drop inputs, so that a key must be drawn.
    """

    compute: Compute
    temperature: float = 0.02
    loss: LossOptions = LossOptions()
    warmth: TemperatureRule | None = None
    cached: bool = True
    dropout: bool = False


def train_step(
    graphdef: Any,
    optimizer: AdamW,
    spec: StepSpec,
    state: TrainState,
    frozen: Any,
    batch: TrainBatch,
    key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; pure, to be jitted with the first three arguments static.

    Args:
      graphdef: structure of the model (`models.loading.split_trainable`).
      optimizer: AdamW with its schedule.
      spec: static choices.
      state: before the update.
      frozen: leaves that are not trained.
      batch: the global batch.
      key: base key of the run; the step number is folded in here.

    Returns:
      The state after the update and f32 scalars: loss, grad_norm (before clipping), lr and
      temperature (used here), and the loss's metrics.
    """
    warmth = None if spec.warmth is None else state.temperature.log
    loss, metrics, grads, dwarmth = _loss_and_all_grads(
        graphdef, spec, state.params, frozen, batch, jax.random.fold_in(key, state.step), warmth
    )
    params, opt, info = optimizer.update(grads, state.opt, state.params)
    temperature = state.temperature
    if spec.warmth is not None:
        info["temperature"] = temperature.value
        temperature = spec.warmth.update(dwarmth, temperature, info["lr"], state.step)
    state = TrainState(state.step + 1, params, opt, temperature)
    return state, {"loss": loss, **info, **metrics}


def loss_and_grads(
    graphdef: Any, spec: StepSpec, params: Any, frozen: Any, batch: TrainBatch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Loss of the global batch, its metrics, and its gradient for `params` in float32.

    At the temperature of `spec`; see `train_step` for one that is learned.
    """
    spec = dataclasses.replace(spec, warmth=None)
    return _loss_and_all_grads(graphdef, spec, params, frozen, batch, key, None)[:3]


def _loss_and_all_grads(
    graphdef: Any, spec: StepSpec, params: Any, frozen: Any, batch: TrainBatch, key, warmth: Any
) -> tuple[jax.Array, dict[str, jax.Array], Any, jax.Array]:
    """Loss of the global batch, its metrics, and its gradients.

    Args:
      graphdef: structure of the model.
      spec: static choices.
      params: trained leaves.
      frozen: the others.
      batch: the global batch.
      key: of this step.
      warmth: the logarithm of the temperature where `spec.warmth` says that it is learned.

    Returns:
      The loss, its metrics, the gradient for `params` in float32, and that for `warmth`, zero
      where it is not learned.
    """
    graphdef, frozen = with_dora_norms(graphdef, params, frozen)

    # All arrays come as arguments: `by_rows` allows nothing else.
    fixed = (frozen, key)

    def embed(params, fixed, chunk: PackedBatch, place: tuple[int, Any]) -> jax.Array:
        frozen, key = fixed
        model = nnx.merge(graphdef, params, frozen)
        chunk_key = None
        if spec.dropout:
            chunk_key = jax.random.fold_in(jax.random.fold_in(key, place[0]), place[1])
            shard = row_shard()
            chunk_key = chunk_key if shard is None else jax.random.fold_in(chunk_key, shard)
        return model(chunk, spec.compute, key=chunk_key)

    if spec.cached:
        embedded = [
            _embed_chunks(embed, params, fixed, g, group) for g, group in enumerate(batch.groups)
        ]
        back = functools.partial(_pull_back, embed, params, fixed, batch.groups)
    else:
        embedded, back = _plain(embed, params, fixed, batch.groups)

    ring = spec.loss.form == "ring"
    slots = [group.batch.slot for group in batch.groups]
    columns = batch.target_id.shape[0]
    pairs = columns // (1 + spec.loss.negatives)
    sides = collect(slots, embedded, pairs, columns, ring)
    objective = functools.partial(_objective, spec, batch)
    warmth = jnp.float32(0.0 if spec.warmth is None else warmth)
    (loss, metrics), (cotangent, dwarmth) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        sides, warmth
    )
    return loss, metrics, back(deliver(cotangent, slots, ring)), dwarmth


def _objective(spec: StepSpec, batch: TrainBatch, sides: Sides, warmth: jax.Array):
    """The loss and its metrics of embeddings in order."""
    each = 1 + spec.loss.negatives
    number = jnp.arange(batch.target_id.shape[0], dtype=jnp.int32)
    return contrastive_loss(
        sides.queries,
        sides.columns,
        temperature=spec.temperature if spec.warmth is None else jnp.exp(warmth),
        target_id=batch.target_id,
        known=batch.known,
        source=batch.source,
        owner=jnp.where(number % each == 0, -1, number // each),
        valid=batch.valid,
        options=spec.loss,
    )


def embed_rows(
    graphdef: Any, compute: Compute, params: Any, frozen: Any, batch: PackedBatch
) -> jax.Array:
    """Embeddings f32 [R, S, D] of packed rows with the parameters as they are, nothing dropped."""
    graphdef, frozen = with_dora_norms(graphdef, params, frozen)
    return nnx.merge(graphdef, params, frozen)(batch, compute)


def with_dora_norms(graphdef: Any, params: Any, frozen: Any) -> tuple[Any, Any]:
    """Compute DoRA's norms once: (graphdef, frozen) with them among the frozen leaves."""
    model = nnx.merge(graphdef, params, frozen)
    refresh_dora_norms(model)
    trained = {path for path, _ in nnx.to_flat_state(params)}
    graphdef, _, frozen = nnx.split(model, lambda path, variable: path in trained, ...)
    return graphdef, frozen


def _plain(embed, params, fixed, groups: tuple[ChunkedGroup, ...]):
    """Embeddings [1, R, S, D] of groups of one chunk, and what pulls their gradient back."""
    if any(group.batch.slot.shape[0] != 1 for group in groups):
        raise ValueError("the plain step needs groups of one chunk")
    chunks = [jax.tree.map(lambda leaf: leaf[0], group.batch) for group in groups]

    def run(params, fixed, chunks: list[PackedBatch]) -> list[jax.Array]:
        return [embed(params, fixed, chunk, (g, 0)) for g, chunk in enumerate(chunks)]

    spread = by_rows(run, (P(), P(), P(ROWS)), P(ROWS))
    embedded, back = jax.vjp(lambda p: spread(p, fixed, chunks), params)

    def pull(cotangents: list[jax.Array]) -> Any:
        (grads,) = back([cotangent[0] for cotangent in cotangents])
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    return [values[None] for values in embedded], pull


def _chunk(batch: PackedBatch, k: jax.Array) -> PackedBatch:
    def take(leaf):
        return constrain(jax.lax.dynamic_index_in_dim(leaf, k, keepdims=False), ROWS)

    return jax.tree.map(take, batch)


def _embed_chunks(embed, params, fixed, g: int, group: ChunkedGroup) -> jax.Array:
    """Embeddings [K, R, S, D] of a group; zeros for chunks that are not real."""

    def run(params, fixed, group: ChunkedGroup) -> jax.Array:
        def one(k):
            return embed(params, fixed, _chunk(group.batch, k), (g, k))

        def body(k, out):
            return jax.lax.dynamic_update_index_in_dim(out, one(k), k, 0)

        shape = (group.batch.slot.shape[0], *jax.eval_shape(one, jnp.int32(0)).shape)
        out = constrain(jnp.zeros(shape, jnp.float32), None, ROWS)
        return jax.lax.fori_loop(0, group.num_chunks, body, out)

    return by_rows(run, (P(), P(), _GROUP), P(None, ROWS))(params, fixed, group)


def _pull_back(
    embed, params, fixed, groups: tuple[ChunkedGroup, ...], cotangents: list[jax.Array]
) -> Any:
    """Gradient of the groups, chunk by chunk; summed over chips once, behind the loops."""

    def run(params, fixed, groups: tuple[ChunkedGroup, ...], cotangents: list[jax.Array]) -> Any:
        grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        for g, (group, cotangent) in enumerate(zip(groups, cotangents, strict=True)):

            def body(k, grads):
                chunk = _chunk(group.batch, k)
                back = jax.vjp(lambda p: embed(p, fixed, chunk, (g, k)), params)[1]
                own = jax.lax.dynamic_index_in_dim(cotangent, k, keepdims=False)
                (more,) = back(constrain(own, ROWS))
                return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, more)

            grads = jax.lax.fori_loop(0, group.num_chunks, body, grads)
        return sum_over_rows(grads)

    spread = (P(), P(), tuple(_GROUP for _ in groups), [P(None, ROWS)] * len(groups))
    return by_rows(run, spread, P())(params, fixed, groups, cotangents)
