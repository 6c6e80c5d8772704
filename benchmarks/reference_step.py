# SPDX-License-Identifier: Apache-2.0
"""The baseline's training step: GradCache in loops of the host, in a form of `reference_shaped`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.reference_shaped import (
    Form,
    embed,
    layout_of,
    right_padded,
    with_most_crops,
    with_pixels,
)
from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.losses.contrastive import contrastive_loss
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.packing import PackedBatch
from vlm2vec_jax.training.batching import BatchPacker, choose_rows
from vlm2vec_jax.training.step import with_dora_norms


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model split for training, as `models.loading.split_trainable` gives it."""

    graphdef: Any
    params: Any
    frozen: Any


class Step:
    """Loss and gradients of a batch of pairs as the reference takes them.

    GradCache in loops of the host: every chunk is embedded, the loss and its gradient with
    respect to the embeddings are taken, and every chunk is embedded once more for its gradient.
    A chunk has inputs of one side.
    """

    def __init__(
        self,
        model: Trained,
        layout: VisualLayout,
        compute: Compute,
        form: Form,
        queries: Sequence[EncodedInput],
        targets: Sequence[EncodedInput],
        *,
        chunk: int | None = 2,
        chunk_tokens: int = 512,
        most_crops: int = 0,
        multiple: int = 1,
        key: jax.Array | None = None,
    ):
        """Make the chunks.

        Args:
          model: split; its linears must be `PeftLinear` if the form says so.
          layout: of the backbone.
          compute: how to compute what the form leaves open.
          form: the habits.
          queries, targets: the batch.
          chunk: inputs of a chunk of right-padded rows; None: each side at once, one pass.
          chunk_tokens: tokens of a chunk of packed rows.
          most_crops: of an image, its global view included, where the form pads crops.
          multiple: of the length of right-padded rows.
          key: dropout key of adapters, or None.
        """
        self._model, self._form, self._key = model, form, key
        self.pairs, self.cached = len(queries), chunk is not None
        items = [*queries, *targets]
        if form.host_pixels:
            items = [with_pixels(item) for item in items]
        if form.padded_crops:
            items = [with_most_crops(item, most_crops) for item in items]
        if form.right_padding:
            found = _padded_chunks(items, self.pairs, chunk or self.pairs, layout, multiple)
        else:
            found = _packed_chunks(items, self.pairs, layout, chunk_tokens if chunk else None)
        self.run_tokens = sum(batch.tokens.size for batch in found)
        self.run_units = sum(
            int(np.prod(next(iter(batch.visual.values())).shape[:2])) if batch.visual else 0
            for batch in found
        )
        self.chunks = [jax.tree.map(jnp.array, batch) for batch in found]
        graphdef = model.graphdef
        self._norms = None
        if not form.peft_dora:
            graphdef = with_dora_norms(graphdef, model.params, model.frozen)[0]
            self._norms = jax.jit(lambda p, f: with_dora_norms(model.graphdef, p, f)[1])

        def run(params, frozen, batch, key):
            return embed(nnx.merge(graphdef, params, frozen), batch, compute, form, key)

        self._forward = jax.jit(run)

        @functools.partial(jax.jit, donate_argnums=4)
        def back(params, frozen, batch, cotangent, grads, key):
            _, pull, waste = jax.vjp(lambda p: run(p, frozen, batch, key), params, has_aux=True)
            return jax.tree.map(jnp.add, grads, pull(cotangent)[0]), waste

        @jax.jit
        def direct(params, frozen, batches, key):
            def whole(params):
                parts, waste = zip(*(run(params, frozen, batch, key) for batch in batches))
                both = self._gathered(parts, batches)
                return _loss(both[: self.pairs], both[self.pairs :]), waste

            return jax.value_and_grad(whole, has_aux=True)(params)

        self._back, self._direct = back, direct
        self._loss = jax.jit(jax.value_and_grad(_loss, argnums=(0, 1)))

    def _gathered(self, parts, batches) -> jax.Array:
        """Embeddings [2 B, D] in order."""
        both = jnp.zeros((2 * self.pairs, parts[0].shape[-1]), jnp.float32)
        for found, batch in zip(parts, batches):
            place = jnp.where(batch.slot >= 0, batch.slot, 2 * self.pairs)
            both = both.at[place].set(found, mode="drop")
        return both

    def __call__(self) -> tuple[jax.Array, Any]:
        """The loss and the gradients of the trained leaves, when they are there."""
        params, frozen = self._model.params, self._model.frozen
        if self._norms is not None:
            frozen = self._norms(params, frozen)
        if not self.cached:
            (value, _), grads = self._direct(params, frozen, self.chunks, self._key)
            return jax.block_until_ready((value, grads))
        parts = [self._forward(params, frozen, batch, self._key)[0] for batch in self.chunks]
        both = self._gathered(parts, self.chunks)
        value, (dq, dt) = self._loss(both[: self.pairs], both[self.pairs :])
        both = jnp.concatenate([dq, dt])
        grads = jax.tree.map(jnp.zeros_like, params)
        for batch in self.chunks:
            own = jnp.where(batch.slot[..., None] >= 0, both[batch.slot], 0)
            grads, _ = self._back(params, frozen, batch, own, grads, self._key)
        return jax.block_until_ready((value, grads))


def _loss(queries: jax.Array, targets: jax.Array) -> jax.Array:
    return contrastive_loss(queries, targets, temperature=0.02)[0]


def _padded_chunks(items, pairs: int, size: int, layout, multiple: int) -> list[PackedBatch]:
    return [
        right_padded(items[start : min(start + size, end)], layout, multiple, first=start)
        for begin, end in ((0, pairs), (pairs, 2 * pairs))
        for start in range(begin, end, size)
    ]


def _packed_chunks(items, pairs: int, layout, chunk_tokens: int | None) -> list[PackedBatch]:
    sizes = [(len(item), item.units) for item in items]
    rows = choose_rows(sizes, longest=1 << 20)
    packer = BatchPacker(rows, layout_of(items, layout), chunk_tokens=chunk_tokens)
    return [
        jax.tree.map(lambda leaf, k=k: leaf[k], group.batch)
        for group in packer(items[:pairs], items[pairs:]).groups
        for k in range(int(group.num_chunks))
    ]
