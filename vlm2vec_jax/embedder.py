# SPDX-License-Identifier: Apache-2.0
"""`Embedder`: any mixture of texts and images in, one unit vector each out."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import share_images
from vlm2vec_jax.inputs import EncodedInput, MultimodalInput, raise_bad_inputs
from vlm2vec_jax.models.base import Processor
from vlm2vec_jax.models.folders import ModelSource, locate
from vlm2vec_jax.models.loading import (
    Model,
    add_adapter,
    fill,
    flatten,
    load_model,
    open_processor,
    replace_saved,
    split_trainable,
)
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import refresh_dora_norms
from vlm2vec_jax.packing import (
    PackedBatch,
    RowShape,
    row_batches,
    unpack,
)
from vlm2vec_jax.packing import (
    fill as fill_rows,
)
from vlm2vec_jax.parallel.mesh import batch_spec, row_shards
from vlm2vec_jax.record import identity
from vlm2vec_jax.row_choice import Price, batch_rows, plan_rows
from vlm2vec_jax.training.checkpoint import Checkpoints
from vlm2vec_jax.weights.adapter_config import base_difference, config_from_dict, resolve
from vlm2vec_jax.weights.adapters import load_adapter

DTYPES = ("bfloat16", "float32")
BATCH_TOKENS = {"cpu": 4096}
"""Tokens of one call by platform, rows included; accelerators take 16384."""


class Embedder:
    """A model ready to embed.

    An embedding does not depend on what else is embedded with it, in which order, or on how many
    devices (up to float32 rounding).
    """

    def __init__(self, model: Model, processor: Processor, compute: Compute, mesh: Mesh | None):
        """Use `Embedder.from_pretrained`; this takes what it has loaded."""
        self.processor = processor
        self.backbone = model.backbone.name
        self.dimension = model.backbone.width(model.config)
        self._max_tokens = model.backbone.max_tokens(model.config)
        self._mesh = mesh
        self._compute = compute
        # DoRA's norms depend on weights alone, and these stay.
        refresh_dora_norms(model.module)
        graphdef, self._state = nnx.split(model.module)
        self._embed = jax.jit(functools.partial(_embed, graphdef, compute))
        self.remarks = model.remarks
        self._identity: dict[str, Any] = {}
        self._used_rows: set[tuple[bool, int]] = set()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        adapter: str | os.PathLike | None = None,
        dtype: str = "bfloat16",
        mesh: Mesh | None = None,
        *,
        num_crops: int | None = None,
        max_len: int | None = None,
        attention: str = "auto",
        **options: Any,
    ) -> Embedder:
        """Load a model.

        Args:
          path: HF folder, training output folder (its newest good checkpoint is used), PEFT
            adapter folder, or hub id.
          adapter: PEFT folder or training output with an adapter, on top of `path`.
          dtype: `bfloat16`, or `float32` for the reference's numbers.
          mesh: devices to spread rows over (`parallel.mesh.make_mesh`); None: the first one.
          num_crops: most sub-images per image; by default what the model was trained with, or
            its folder says.
          max_len: most tokens of a text; by default as trained, or the tokenizer's limit.
          attention: kernel, see `nn.attention`.
          **options: further processor options that the backbone has, see `options.OPTIONS`.

        Raises:
          UserError: for whatever is wrong with the folders, in words.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
        source = locate(path, adapter)
        model, trained_as = load_source(source, dtype=dtype, mesh=mesh)
        given = {"num_crops": num_crops, "max_len": max_len, **options}
        processor = open_processor(model, source, given)
        embedder = cls(model, processor, Compute(dtype, attention), mesh)  # type: ignore[arg-type]
        embedder._identity = {"base": identity(source.base), **trained_as}
        return embedder

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides an embedding besides its input: stored vectors are kept by it."""
        return {
            "backbone": self.backbone,
            **self._identity,
            "dtype": self._compute.dtype,
            "processor": self.processor.settings,
            "tokenizer": self.processor.tokenizer_hash,
        }

    def encode(
        self,
        inputs: Any,
        batch_tokens: int | None = None,
        progress: bool | Callable[[int], Any] = False,
    ) -> np.ndarray:
        """Embed.

        Args:
          inputs: a list of what `MultimodalInput.of` takes: str, PIL image, pathlib.Path, dict
            with `text` and `images`, MultimodalInput.
          batch_tokens: tokens of one call on all devices together; bounds memory, changes no
            result.
          progress: show a bar, or call this with the number of inputs finished.

        Returns:
          float32 [N, D], unit length, in input order; [0, D] for no inputs.

        Raises:
          BadInputs: listing every input that cannot be read or is too long, by number.
        """
        items = share_images(self._items(inputs))
        out = np.zeros((len(items), self.dimension), np.float32)
        if not items:
            return out
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            sizes = self._sizes(items, pool)
            with _progress(progress, len(items)) as advance:
                for batch, count in self._batches(items, sizes, batch_tokens, pool):
                    unpack(np.asarray(self._embed(self._state, self._put(batch))), batch.slot, out)
                    advance(count)
        return out

    def encode_encoded(self, encoded: Sequence[EncodedInput]) -> np.ndarray:
        """Embed what the processor has already encoded, float32 [N, D]."""
        sizes = [(len(item), item.units) for item in encoded]
        out = np.zeros((len(encoded), self.dimension), np.float32)
        for rows, count, shape in self._rows(sizes, None):
            batch = self._fill(rows, dict(enumerate(encoded)), shape, count)
            unpack(np.asarray(self._embed(self._state, self._put(batch))), batch.slot, out)
        return out

    def _items(self, inputs: Any) -> list[MultimodalInput]:
        if isinstance(inputs, (str, bytes, dict)) or not isinstance(inputs, Iterable):
            raise UserError("encode takes a list of inputs; put a single one into a list")
        items, problems = [], {}
        for number, value in enumerate(inputs):
            try:
                items.append(MultimodalInput.of(value))
            except UserError as error:
                problems[number] = str(error)
                continue
            problem = items[-1].problem()
            if problem:
                problems[number] = problem
        raise_bad_inputs("some inputs cannot be embedded", problems)
        return items

    def _sizes(self, items, pool) -> list[tuple[int, int]]:
        """Tokens and visual units of every input, after checking that each can be embedded."""
        sizes = list(pool.map(_attempt(self.processor.length), items))
        problems = _problems(sizes)
        raise_bad_inputs("some inputs cannot be read", problems)
        problems = {
            number: f"{tokens} tokens are more than the {self._max_tokens} that the model takes"
            for number, (tokens, _) in enumerate(sizes)
            if tokens > self._max_tokens
        }
        raise_bad_inputs(
            "some inputs are too long",
            problems,
            advice=f"max_len (at most {self._max_tokens}) cuts texts. An input with images is "
            f"never cut: shorten its text, give it fewer images, or lower num_crops "
            f"or max_pixels.",
        )
        return sizes

    def _rows(self, sizes, batch_tokens) -> Iterator[tuple[list[list[int]], int, RowShape]]:
        platform = jax.devices()[0].platform
        budget = batch_tokens or BATCH_TOKENS.get(platform, 16384)
        shards = 1 if self._mesh is None else row_shards(self._mesh)
        planned, taken = plan_rows(
            [tokens for tokens, _ in sizes],
            [count for _, count in sizes],
            price=Price(self.dimension, self.processor.visual_layout.features_per_unit),
            # No row need be longer than what one device takes at a time, unless an input is.
            most=max(budget // shards, 128),
            longest=self._max_tokens,
            step=32 if platform == "cpu" else 128,
            used=self._used_rows,
        )
        self._used_rows |= taken
        for group in planned.groups:
            rows = batch_rows(len(group.rows), max(budget // group.shape.tokens, 1), shards)
            # Inputs that show the same image usually follow each other: its pixels go soon.
            group = dataclasses.replace(group, rows=sorted(group.rows, key=min))
            for part in row_batches(group, rows, row_multiple=shards):
                yield part.rows, part.num_rows, group.shape

    def _batches(self, items, sizes, batch_tokens, pool) -> Iterator[tuple[PackedBatch, int]]:
        """Packed batches in turn, the next one's images being decoded while one is computed."""

        def start(rows):
            indices = [i for row in rows for i in row]
            encode = _attempt(self.processor.encode)
            return indices, pool.map(encode, [items[i] for i in indices])

        def finish(indices, results, rows, count, shape):
            encoded = list(results)
            if _problems(encoded):
                self._complain(items, pool)
            return self._fill(rows, dict(zip(indices, encoded, strict=True)), shape, count)

        waiting = None
        for rows, count, shape in self._rows(sizes, batch_tokens):
            started = (*start(rows), rows, count, shape)
            if waiting is not None:
                yield finish(*waiting), len(waiting[0])
            waiting = started
        if waiting is not None:
            yield finish(*waiting), len(waiting[0])

    def _complain(self, items, pool) -> None:
        """Raise for all inputs that cannot be decoded, once it is known that there are some."""

        def without_result(item):
            self.processor.encode(item)

        problems = _problems(pool.map(_attempt(without_result), items))
        raise_bad_inputs("some inputs cannot be read", problems)
        raise UserError("an input could not be read, but now it can: did a file change meanwhile?")

    def _fill(self, rows, encoded, shape: RowShape, count: int) -> PackedBatch:
        return fill_rows(rows, encoded, shape, self.processor.visual_layout, num_rows=count)

    def _put(self, batch: PackedBatch) -> PackedBatch:
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        placed = NamedSharding(self._mesh, batch_spec())
        return jax.tree.map(lambda leaf: jax.device_put(leaf, placed), batch)


def _embed(graphdef, compute: Compute, state, batch: PackedBatch) -> jax.Array:
    return nnx.merge(graphdef, state)(batch, compute)


def load_source(
    source: ModelSource, *, dtype: str, mesh: Mesh | None
) -> tuple[Model, dict[str, Any]]:
    """A model with its adapter or trained leaves in place, and what identifies these."""
    model = load_model(source.base, dtype_of=lambda path: jnp.dtype(dtype), mesh=mesh)
    if source.adapter is not None:
        adapter = load_adapter(source.adapter, model.table, flatten(model.module))
        difference = base_difference(adapter.config, source.base)
        if difference:
            import warnings

            warnings.warn(difference, stacklevel=3)
        replace_saved(model, adapter.saved)
        add_adapter(
            model.module,
            adapter.linears,
            dora=adapter.config.dora,
            dropout=adapter.config.dropout,
            tensors=adapter.tensors,
            mesh=mesh,
        )
        return model, {"adapter": identity(source.adapter)}
    if source.trained is not None:
        return model, _restore(model, source, mesh)
    return model, {}


def _restore(model: Model, source: ModelSource, mesh: Mesh | None) -> dict[str, Any]:
    """Put the newest checkpoint's trained leaves into a model."""
    record = source.record or {}
    spec = record["adapter"]
    if spec is not None:
        config = config_from_dict(spec)
        add_adapter(
            model.module, resolve(config, model.table), dora=config.dora, dropout=0.0, mesh=mesh
        )
    _, params, _ = split_trainable(model, full=spec is None)
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
        for path, leaf in flatten(params).items()
    }
    with Checkpoints(Path(source.trained or "") / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore_latest({"params": abstract}, partial=True)
    if found is None:
        raise UserError(f"{source.trained} holds no checkpoint yet")
    step, state, _ = found
    leaves = flatten(model.module)
    leaves |= {path: new.astype(leaves[path].dtype) for path, new in state["params"].items()}
    model.module = fill(model.module, leaves)
    return {"trained": str(record.get("run", "")), "step": step}


def _attempt(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, with a user's mistake returned instead of raised, to be listed with others."""

    def attempt(item):
        try:
            return function(item)
        except (UserError, OSError) as error:
            return UserError(str(error))

    return attempt


def _problems(results: Iterable[Any]) -> dict[int, str]:
    """The mistakes among results of `_attempt`, by number."""
    return {n: str(r) for n, r in enumerate(results) if isinstance(r, UserError)}


class _progress:  # noqa: N801 (used like a function)
    """`advance(n)` that feeds a rich bar, a callback, or nothing."""

    def __init__(self, wanted: bool | Callable[[int], Any], total: int):
        self._wanted, self._total, self._bar = wanted, total, None

    def __enter__(self) -> Callable[[int], Any]:
        if callable(self._wanted):
            return self._wanted
        if not self._wanted:
            return lambda count: None
        from rich.progress import Progress

        self._bar = Progress(transient=True)
        self._bar.start()
        task = self._bar.add_task("embedding", total=self._total)
        return lambda count: self._bar.advance(task, count) if self._bar else None

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
