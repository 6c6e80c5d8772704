# SPDX-License-Identifier: Apache-2.0
"""The train step: one compiled program, GradCache as two loops over chunks inside it.

Embed every chunk, take the loss over the global batch and its gradient with respect to all
embeddings, then pull that gradient back through one chunk at a time and add up (Gao et al.,
arXiv 2101.06983). How many chunks are real is known only at run time, so a program serves every
batch of its shapes. Where a batch is a single chunk, the plain step does without the first pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.losses.contrastive import contrastive_loss
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import refresh_dora_norms
from vlm2vec_jax.packing import ChunkedGroup, PackedBatch
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import by_rows, constrain, row_shard, sum_over_rows
from vlm2vec_jax.training.optimizer import AdamW


class TrainState(NamedTuple):
    """What a step changes, and a checkpoint holds.

    Attributes:
      step: i32 [], updates made so far.
      params: the trained leaves, float32.
      opt: the optimizer's state.
    """

    step: Any
    params: Any
    opt: Any


_GROUP = ChunkedGroup(batch=P(None, ROWS), num_chunks=P())  # type: ignore[arg-type]
"""How a group of chunks is spread."""


class TrainBatch(NamedTuple):
    """A global batch of B pairs, packed.

    Attributes:
      groups: rows of one shape each, dealt into chunks; slots 0..B-1 are the queries and
        B..2B-1 the targets.
      target_id: i32 [B], equal for targets that are the same thing.
    """

    groups: tuple[ChunkedGroup, ...]
    target_id: Any


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Static choices of a train step (hashable).

    Attributes:
      compute: how the model computes.
      temperature: of the contrastive loss.
      mask_duplicates: leave targets equal to a query's own out of its negatives.
      cached: GradCache; False asks for batches whose groups are one chunk each.
      dropout: whether adapters drop inputs, so that a key must be drawn.
    """

    compute: Compute
    temperature: float = 0.02
    mask_duplicates: bool = False
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
      The state after the update and f32 scalars: loss, grad_norm (before clipping), lr (used
      here), and the loss's metrics.
    """
    loss, metrics, grads = loss_and_grads(
        graphdef, spec, state.params, frozen, batch, jax.random.fold_in(key, state.step)
    )
    params, opt, info = optimizer.update(grads, state.opt, state.params)
    return TrainState(state.step + 1, params, opt), {"loss": loss, **info, **metrics}


def loss_and_grads(
    graphdef: Any, spec: StepSpec, params: Any, frozen: Any, batch: TrainBatch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Loss of the global batch, its metrics, and its gradient for `params` in float32."""
    graphdef, frozen = with_dora_norms(graphdef, params, frozen)
    pairs = batch.target_id.shape[0]

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

    def objective(embeddings: jax.Array):
        return contrastive_loss(
            embeddings[:pairs],
            embeddings[pairs:],
            temperature=spec.temperature,
            target_id=batch.target_id,
            mask_duplicates=spec.mask_duplicates,
        )

    if not spec.cached:
        return _plain(embed, objective, params, fixed, batch.groups, 2 * pairs)

    embedded = [
        _embed_chunks(embed, params, fixed, g, group) for g, group in enumerate(batch.groups)
    ]
    embeddings = in_slots([g.batch.slot for g in batch.groups], embedded, 2 * pairs)
    (loss, metrics), cotangent = jax.value_and_grad(objective, has_aux=True)(embeddings)
    return loss, metrics, _pull_back(embed, params, fixed, batch.groups, cotangent)


def with_dora_norms(graphdef: Any, params: Any, frozen: Any) -> tuple[Any, Any]:
    """Compute DoRA's norms once: (graphdef, frozen) with them among the frozen leaves."""
    model = nnx.merge(graphdef, params, frozen)
    refresh_dora_norms(model)
    trained = {path for path, _ in nnx.to_flat_state(params)}
    graphdef, _, frozen = nnx.split(model, lambda path, variable: path in trained, ...)
    return graphdef, frozen


def in_slots(slots: list[jax.Array], embedded: list[jax.Array], count: int) -> jax.Array:
    """Put embeddings [..., S, D] of slots [..., S] in order: f32 [count, D], whole everywhere."""
    out = jnp.zeros((count, embedded[0].shape[-1]), jnp.float32)
    for slot, values in zip(slots, embedded, strict=True):
        # One gather of the embeddings, nothing else of the batch leaves its chip.
        values = constrain(values.reshape(-1, values.shape[-1]))
        # Out of range is dropped; -1 would be the last.
        index = jnp.where(slot < 0, count, slot).reshape(-1)
        out = out.at[index].set(values, mode="drop")
    return constrain(out)


def _plain(embed, objective, params, fixed, groups: tuple[ChunkedGroup, ...], count: int):
    if any(group.batch.slot.shape[0] != 1 for group in groups):
        raise ValueError("the plain step needs groups of one chunk")
    chunks = [jax.tree.map(lambda leaf: leaf[0], group.batch) for group in groups]

    def run(params, fixed, chunks: list[PackedBatch]) -> list[jax.Array]:
        return [embed(params, fixed, chunk, (g, 0)) for g, chunk in enumerate(chunks)]

    spread = by_rows(run, (P(), P(), P(ROWS)), P(ROWS))
    embedded, back = jax.vjp(lambda p: spread(p, fixed, chunks), params)
    embeddings = in_slots([chunk.slot for chunk in chunks], embedded, count)
    (loss, metrics), cotangent = jax.value_and_grad(objective, has_aux=True)(embeddings)
    (grads,) = back([_own(cotangent, chunk.slot) for chunk in chunks])
    return loss, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _own(cotangent: jax.Array, slot: jax.Array) -> jax.Array:
    """The rows of a cotangent [N, D] for slots [R, S]: [R, S, D], zero where none is."""
    own = jnp.where((slot >= 0)[..., None], cotangent[jnp.maximum(slot, 0)], 0.0)
    return constrain(own, ROWS)


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


def _pull_back(embed, params, fixed, groups: tuple[ChunkedGroup, ...], cotangent: jax.Array) -> Any:
    """Gradient of the groups, chunk by chunk; summed over chips once, behind the loops."""

    def run(params, fixed, groups: tuple[ChunkedGroup, ...], cotangent: jax.Array) -> Any:
        grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        for g, group in enumerate(groups):

            def body(k, grads):
                chunk = _chunk(group.batch, k)
                back = jax.vjp(lambda p: embed(p, fixed, chunk, (g, k)), params)[1]
                (more,) = back(_own(cotangent, chunk.slot))
                return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, more)

            grads = jax.lax.fori_loop(0, group.num_chunks, body, grads)
        return sum_over_rows(grads)

    return by_rows(run, (P(), P(), tuple(_GROUP for _ in groups), P()), P())(
        params, fixed, groups, cotangent
    )
