# SPDX-License-Identifier: Apache-2.0
"""Embeds a corpus on a Ray cluster (extra `ray`): Ray Data streams windows through Embedders.

A row of the dataset is a window. Tasks read it, actors that hold the model embed it, and this
process keeps each result as it comes. A worker or a node that dies is replaced by Ray and what it
had in hand is done again; a window that is done twice has one part, so nothing is lost or doubled.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm2vec_jax.embedding.corpus import Corpus, Window
from vlm2vec_jax.embedding.run import Result, embed, packed, unpacked
from vlm2vec_jax.errors import UserError

MOST_BLOCKS = 4096


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How much of a cluster to use.

    Attributes:
      address: of the cluster; None: the one that the surroundings name, else this machine.
      actors: how many hold the model.
      cpus: processors of each.
      gpus: cards of each.
    """

    address: str | None = None
    actors: int = 1
    cpus: float = 1
    gpus: float = 0


def library(cluster: Cluster) -> Any:
    """The module `ray`, connected.

    Raises:
      UserError: if it is not installed or there is no such cluster.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise UserError(
            f"--engine ray needs the package ray: pip install 'vlm2vec_jax[ray]' ({error})"
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster answers at {cluster.address}: {error}") from None
    return ray


def about(cluster: Cluster, model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What a model on the cluster is; loads it there once, so that mistakes show early.

    Args:
      cluster: where.
      model: arguments of `Embedder.from_pretrained`.
      options: of `Embedder.encode_windows`.

    Raises:
      UserError: if it cannot be loaded.
    """
    ray = library(cluster)
    task = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus)(_about)
    try:
        return ray.get(task.remote(model, options))
    except ray.exceptions.RayError as error:
        raise _in_words(error) from error


def _about(model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    from vlm2vec_jax.embedder import Embedder

    return Embedder.from_pretrained(**model).about(**_of_vectors(options))


def results(
    cluster: Cluster,
    corpus: Corpus,
    windows: list[Window],
    model: dict[str, Any],
    options: dict[str, Any],
    expected: dict[str, Any],
    *,
    skip: bool,
) -> Iterator[tuple[Window, Result]]:
    """Results of windows, in the order in which they are ready.

    Args:
      cluster: where to embed.
      corpus: must be readable at the same path on every node, like its images and the model.
      windows: what to embed.
      model: arguments of `Embedder.from_pretrained`.
      options: of `Embedder.encode_windows`.
      expected: from `about`: every actor's model must be that one.
      skip: leave bad entries out.

    Raises:
      UserError: for a user's mistake on any node.
    """
    ray = library(cluster)
    if not windows:
        return
    by_number = {window.number: window for window in windows}
    items = [{"window": json.dumps(dataclasses.asdict(window))} for window in windows]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
    dataset = dataset.map_batches(_load, batch_size=1, fn_kwargs={"corpus": corpus})
    dataset = dataset.map_batches(
        _Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=cluster.actors),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus or None,
        fn_constructor_args=(corpus, model, options, expected, skip),
    )
    try:
        for row in dataset.iter_rows():
            number, result = unpacked(row["result"])
            yield by_number[number], result
    except ray.exceptions.RayError as error:
        raise _in_words(error) from error


def _load(batch: dict[str, np.ndarray], corpus: Corpus) -> dict[str, np.ndarray]:
    windows = [Window(**json.loads(text)) for text in batch["window"]]
    data = [corpus.load(window) for window in windows]
    return {"window": batch["window"], "data": _objects(data)}


def _of_vectors(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "batch_tokens"}


class _Actor:
    """Holds an Embedder on a node."""

    def __init__(self, corpus: Corpus, model, options, expected, skip: bool):
        from vlm2vec_jax.embedder import Embedder

        self._corpus, self._options, self._skip = corpus, options, skip
        self._embedder = Embedder.from_pretrained(**model)
        if self._embedder.about(**_of_vectors(options)) != expected:
            raise UserError("a node of the cluster has another model under the same path")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        windows = [Window(**json.loads(text)) for text in batch["window"]]
        pairs = zip(windows, batch["data"], strict=True)
        items = ((window, self._corpus.parse(window, data)) for window, data in pairs)
        made = embed(self._embedder, items, skip=self._skip, **self._options)
        return {"result": _objects([packed(window, result) for window, result in made])}


def _objects(values: list[bytes]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _in_words(error: BaseException) -> UserError:
    """The user's mistake behind an error of Ray's, or what Ray says."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None) or seen.__cause__
        if isinstance(seen, UserError) and type(seen).__module__ == UserError.__module__:
            return seen
        seen = cause if isinstance(cause, BaseException) else None
    lines = str(error).strip().splitlines()
    return UserError(f"the Ray cluster could not do it: {lines[-1] if lines else error!r}")
