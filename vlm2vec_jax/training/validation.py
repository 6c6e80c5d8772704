# SPDX-License-Identifier: Apache-2.0
"""A small evaluation during training, with the parameters as they are, on the training's mesh.

The rows are MMEB-eval's layout; judged as `evaluate` judges them. The best model so far is kept
(`best.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.config import Config, names
from vlm2vec_jax.data import verify
from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.embedding.batches import Batches, Device
from vlm2vec_jax.embedding.decoding import Decoder
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import judging
from vlm2vec_jax.evaluation.embedding import Source, plan_subset
from vlm2vec_jax.evaluation.rows import Settings
from vlm2vec_jax.evaluation.run import choose_subsets
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.base import Processor
from vlm2vec_jax.models.loading import Model
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.packing import PackedBatch, fill
from vlm2vec_jax.parallel.mesh import ROWS, batch_spec, row_shards
from vlm2vec_jax.parallel.sharding import by_rows
from vlm2vec_jax.training.best import Best
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import embed_rows

_BUDGET = {"cpu": 4096}
"""Tokens of a batch and device, by platform; accelerators take 16384."""


class Validation:
    """Scores the parameters of a trainer; every process of a run takes part and gets the same."""

    def __init__(
        self,
        config: Config,
        model: Model,
        processor: Processor,
        trainer: Trainer,
        compute: Compute,
        best: Best,
    ):
        """Open the rows and look through them.

        Raises:
          UserError: unknown subsets, bad rows or images, all in one message.
        """
        self.every, self._best = config.eval.every, best
        self._trainer, self._processor = trainer, processor
        self._plans = [plan_subset(head, {}, {}) for head in open_heads(config)]
        # Inputs that several subsets have are embedded once.
        inputs: dict[Any, int] = {}
        self._items: list[MultimodalInput] = []
        self._index = []
        for plan in self._plans:
            places = []
            for item, identity in zip(plan.inputs, plan.identities, strict=True):
                if identity not in inputs:
                    inputs[identity] = len(self._items)
                    self._items.append(item)
                places.append(inputs[identity])
            self._index.append(np.array(places))
        mesh = trainer.mesh
        platform = mesh.devices.flat[0].platform
        shards = row_shards(mesh)
        self._embed = embedding_function(trainer.graphdef, compute, mesh)
        self._batches = Batches(
            dimension=model.backbone.width(model.config),
            price=model.backbone.price(model.config),
            max_tokens=model.backbone.max_tokens(model.config),
            device=Device(platform, shards, _BUDGET.get(platform, 16384) * shards),
            fill=lambda rows, encoded, shape, count: fill(
                rows, encoded, shape, processor.visual_layout, num_rows=count
            ),
            compute=self._compute,
        )

    @property
    def queries(self) -> int:
        """How many queries one evaluation has."""
        return sum(len(plan.query_index) for plan in self._plans)

    def words(self) -> str:
        """What will be evaluated, for the start-up page."""
        subsets = ", ".join(plan.subset for plan in self._plans)
        return (
            f"every {self.every} steps, {self.queries} queries and {len(self._items)} distinct "
            f"inputs of {subsets}; the best model is kept in {self._best.folder}"
        )

    def keep_best(
        self, step: int, score: float, state: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> str | None:
        """Keep the parameters if none were better before; says so."""
        if not self._best.offer(step, score, state, meta):
            return None
        return f"step {step}: eval_acc {score:.1%} is the best so far, kept in {self._best.folder}"

    def is_due(self, step: int, last: int) -> bool:
        """Whether to evaluate after this step."""
        return step % self.every == 0 or step == last

    def scores(self) -> dict[str, Any]:
        """Evaluate the trainer's parameters as they are now.

        Returns:
          `eval_acc`, hit@1 as the mean over subsets, and `eval` with hit@1 by subset; fractions.
        """
        (vectors,) = self._batches.run([self._items], Decoder(self._processor, None))
        if isinstance(vectors, Exception):
            raise UserError(f"the evaluation during training: {vectors}")
        found = {}
        for plan, index in zip(self._plans, self._index, strict=True):
            judged = judging.judge(plan, vectors[index], Settings())
            found[plan.subset] = float(np.mean(judged.correct))
        return {"eval_acc": float(np.mean(list(found.values()))), "eval": found}

    def _compute(self, batch: PackedBatch) -> jax.Array:
        mesh = self._trainer.mesh
        placed = NamedSharding(mesh, batch_spec())

        def put(leaf: np.ndarray) -> jax.Array:
            # Every process has the whole batch and gives its own part of it.
            return jax.make_array_from_callback(leaf.shape, placed, lambda index: leaf[index])

        state = self._trainer.state
        with jax.set_mesh(mesh):
            return self._embed(state.params, self._trainer.frozen, jax.tree.map(put, batch))


def embedding_function(
    graphdef: Any, compute: Compute, mesh: Mesh
) -> Callable[[Any, Any, PackedBatch], jax.Array]:
    """Jitted (params, frozen, batch) -> embeddings f32 [R, S, D], whole on every device."""

    def embed(params: Any, frozen: Any, batch: PackedBatch) -> jax.Array:
        spread = by_rows(
            functools.partial(embed_rows, graphdef, compute), (P(), P(), P(ROWS)), P(ROWS)
        )
        return spread(params, frozen, batch)

    return jax.jit(embed, out_shardings=NamedSharding(mesh, P()))


def open_heads(config: Config) -> list[Source]:
    """The first rows of the subsets that `eval` names.

    Raises:
      UserError: unknown subsets, bad rows or images, all in one message.
    """
    wanted = config.eval
    subsets: Sequence[str] | None = names(wanted.subsets) or None
    chosen, _ = choose_subsets(wanted.path, subsets, config.output)
    sources = open_eval(wanted.path, chosen, image_root=wanted.image_root or None)
    verify.report(verify.verify_eval(sources, headers=True))
    for source in sources:
        # As in training, and as `evaluate` does with the trained model.
        source.target_instruction = config.data.target_instruction
    count = wanted.max_queries or None
    return [source.select(source.rows[:count]) for source in sources]
