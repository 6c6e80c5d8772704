# SPDX-License-Identifier: Apache-2.0
"""`Embedder`: any mixture of texts and images in, one unit vector each out.

Names follow sentence-transformers where the meaning is the same (docs/embedding.md has the table).
The parts are in `embedding/`: prompts, batches, decoding, what is done to vectors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from vlm2vec_jax.embedding import prompts as prompting
from vlm2vec_jax.embedding import vectors as vector
from vlm2vec_jax.embedding.batches import Batches, Device, windows_of
from vlm2vec_jax.embedding.decoding import Decoder, Workers, progress_bar
from vlm2vec_jax.embedding.loading import load_source, mesh_of
from vlm2vec_jax.embedding.settings import EncodingSettings
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import BadInputs, EncodedInput, raise_bad_inputs
from vlm2vec_jax.models.base import Processor
from vlm2vec_jax.models.folders import locate
from vlm2vec_jax.models.loading import Model, open_processor
from vlm2vec_jax.nn import quantization
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.linear import refresh_dora_norms
from vlm2vec_jax.packing import PackedBatch, RowShape
from vlm2vec_jax.packing import fill as fill_rows
from vlm2vec_jax.parallel.mesh import batch_spec, row_shards
from vlm2vec_jax.record import identity

__all__ = ["BATCH_TOKENS", "DTYPES", "WINDOW", "Embedder", "load_source"]

DTYPES = ("bfloat16", "float32")
BATCH_TOKENS = {"cpu": 4096}
"""Tokens of one call by platform, rows included; accelerators take 16384."""
WINDOW = 2048
"""Inputs of a stream that are planned together: enough to fill rows well."""


class Embedder(EncodingSettings):
    """A model ready to embed.

    An embedding does not depend on what else is embedded with it, in which order, or on how many
    devices (up to float32 rounding). With `workers`, use it in a `with` statement or call
    `close`, so that their processes end when they are no longer needed.

    Attributes:
      target_instruction: what stood in front of targets that are text in training, a rule of
        `data/target_instruction.py`; the evaluator does the same.
    """

    target_instruction: str = ""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        compute: Compute,
        mesh: Mesh | None,
        *,
        quantize: quantization.Quantization | None = None,
    ):
        """Use `Embedder.from_pretrained`; this takes what it has loaded."""
        self.processor = processor
        self.backbone = model.backbone.name
        super().__init__(model.backbone.width(model.config))
        self._max_tokens = model.backbone.max_tokens(model.config)
        self._mesh = mesh
        self._compute = compute
        # DoRA's norms depend on weights alone, and these stay.
        refresh_dora_norms(model.module)
        self.remarks = list(model.remarks)
        self._quantize = quantize
        if quantize is not None:
            self.remarks.append(quantization.quantize(model.module, quantize).words(quantize))
        graphdef, self._state = nnx.split(model.module)
        self._embed = _program(graphdef, compute)
        self._identity: dict[str, Any] = {}
        self._workers: Workers | None = None
        platform = jax.devices()[0].platform
        self._batches = Batches(
            dimension=self.dimension,
            price=model.backbone.price(model.config),
            max_tokens=self._max_tokens,
            device=Device(
                platform,
                shards=1 if mesh is None else row_shards(mesh),
                budget=BATCH_TOKENS.get(platform, 16384),
            ),
            # Looked up when called: what a subclass fills rows with is its own affair.
            fill=lambda *args: self._fill(*args),
            compute=lambda batch: self._embed(self._state, self._put(batch)),
        )

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
        devices: int | str | Sequence[jax.Device] | None = None,
        workers: int = 0,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
        quantize: str | None = None,
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
          devices: instead of `mesh`: how many of this process's devices, a list of them, or
            "all"; each holds the whole model and takes a share of the rows.
          workers: processes that decode images; 0: threads of this one.
          prompts: name -> instruction; by default those stored with the model.
          default_prompt_name: the prompt that `encode` uses by itself.
          truncate_dim: see the attribute.
          quantize: keep the weights of linear layers in 8 bits, `int8` or `fp8`, see
            `nn.quantization`: half the memory, and slightly other embeddings. (The `quantize` of
            `encode` is about the vectors.)
          **options: further processor options that the backbone has, see `options.OPTIONS`.

        Raises:
          UserError: for whatever is wrong with the folders, in words.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
        quantization.check(quantize)
        mesh = mesh_of(devices, mesh)
        source = locate(path, adapter)
        model, trained_as = load_source(source, dtype=dtype, mesh=mesh)
        given = {"num_crops": num_crops, "max_len": max_len, **options}
        processor = open_processor(model, source, given)
        compute = Compute(dtype, attention)  # type: ignore[arg-type]
        embedder = cls(model, processor, compute, mesh, quantize=quantize)  # type: ignore[arg-type]
        embedder._identity = {"base": identity(source.base), **trained_as}
        embedder.target_instruction = (source.record or {}).get("target_instruction", "")
        stored = prompting.stored_prompts(source.record, source.adapter, source.base)
        embedder._prompts = prompting.Prompts(
            stored.named if prompts is None else dict(prompts),
            default_prompt_name or (stored.default if prompts is None else None),
        )
        embedder.truncate_dim = vector.check_dimension(truncate_dim, embedder.dimension)
        embedder._workers = Workers(processor, workers) if workers else None
        return embedder

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that decode images; the next call that needs them starts new ones."""
        if self._workers is not None:
            self._workers.close()

    # ----------------------------------------------------------------------- what it is

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides an embedding besides its input: stored vectors are kept by it."""
        return {
            "backbone": self.backbone,
            **self._identity,
            "dtype": self._compute.dtype,
            **({"quantize": self._quantize} if self._quantize else {}),
            "processor": self.processor.settings,
            "tokenizer": self.processor.tokenizer_hash,
        }

    def about(self, **options: Any) -> dict[str, Any]:
        """What stored vectors must carry to be searched later (JSON-able).

        Args:
          **options: `prompt`, `prompt_name` and `truncate_dim` with which they are made.
        """
        dim = vector.check_dimension(options.get("truncate_dim"), self.dimension)
        return {
            "fingerprint": self.fingerprint(),
            "dimension": dim or self.get_embedding_dimension(),
            "prompt": self._prompts.text(options.get("prompt"), options.get("prompt_name")),
        }

    @property
    def max_seq_length(self) -> int:
        """Most tokens of an input, visual ones included."""
        return self._max_tokens

    # ------------------------------------------------------------------------ embedding

    def encode(
        self,
        inputs: Any,
        batch_tokens: int | None = None,
        progress: bool | Callable[[int], Any] = False,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        precision: str | None = None,
        quantize: str | None = None,
        calibration_embeddings: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embed.

        Args:
          inputs: a list of what `MultimodalInput.of` takes: str (always text), PIL image,
            pathlib.Path, dict with `text` and `images`, MultimodalInput.
          batch_tokens: tokens of one call on all devices together; bounds memory, changes no
            result.
          progress: show a bar, or call this with the number of inputs finished.
          prompt_name: which of `prompts` to put in front of every input.
          prompt: or the words themselves.
          batch_size: for those who think in inputs: as many tokens as so many inputs of the
            longest kind among them have.
          show_progress_bar: another name of `progress`.
          normalize_embeddings: whether truncated vectors are brought to unit length again; whole
            ones have it anyway.
          truncate_dim: how many leading coordinates to keep; by default `self.truncate_dim`.
          precision: `float32`, `int8`, `uint8`, `binary` or `ubinary`, see
            `embedding.vectors.quantize_embeddings`.
          quantize: another name of `precision`.
          calibration_embeddings: float32 [M, D], for int8 and uint8: where their ranges are
            taken from; by default the result itself, so pass the corpus when you embed queries.

        Returns:
          [N, D] in input order, float32 of unit length unless asked otherwise; [0, D] for no
          inputs.

        Raises:
          BadInputs: listing every input that cannot be read or is too long, by number.
          UserError: for options that cannot be.
        """
        if isinstance(inputs, (str, bytes, dict)) or not isinstance(inputs, Iterable):
            raise UserError("encode takes a list of inputs; put a single one into a list")
        items = list(inputs)
        precision = vector.check_precision(precision, quantize)
        prepare, finish = self._how(prompt, prompt_name, truncate_dim, normalize_embeddings)
        wanted = progress or bool(show_progress_bar)
        with self._decoder() as decoder, progress_bar(wanted, len(items)) as advance:
            if batch_size is not None:
                batch_tokens = self._tokens_of(batch_size, items, prepare, decoder)
            (found,) = self._batches.run(
                [items],
                decoder,
                prepare=prepare,
                batch_tokens=batch_tokens,
                advance=advance,
            )
        if isinstance(found, BadInputs):
            raise found
        return vector.quantize_embeddings(
            finish(found), precision, calibration_embeddings=calibration_embeddings
        )

    def encode_query(self, inputs: Any, *args: Any, **options: Any) -> np.ndarray:
        """`encode` with the prompt called `query`, if there is one and no other is asked for."""
        return self.encode(inputs, *args, **self._named(prompting.QUERY_NAMES, options))

    def encode_target(self, inputs: Any, *args: Any, **options: Any) -> np.ndarray:
        """`encode` with the prompt of what is searched: `target`, `document`, `passage`, ..."""
        return self.encode(inputs, *args, **self._named(prompting.TARGET_NAMES, options))

    encode_document = encode_target

    def encode_stream(
        self,
        inputs: Iterable[Any],
        *,
        window: int = WINDOW,
        batch_tokens: int | None = None,
        progress: bool | Callable[[int], Any] = False,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """Embed inputs as they come, in memory that does not grow with their number.

        Args:
          inputs: any iterable, a generator for instance; read at most three windows ahead.
          window: inputs that are planned together.
          batch_tokens: see `encode`.
          progress: see `encode`.
          **options: `prompt_name`, `prompt`, `normalize_embeddings` and `truncate_dim` of `encode`.

        Yields:
          One vector float32 [D] per input, in their order.

        Raises:
          BadInputs: for the first window with bad inputs, all of them by their number in the
            stream; everything before that window has been yielded.
        """
        prepare, finish = self._how(**options)
        if isinstance(inputs, (str, bytes, Mapping)):
            raise UserError("encode_stream takes an iterable of inputs, not a single one")
        start = 0
        with self._decoder() as decoder, progress_bar(progress, None) as advance:
            for found in self._batches.run(
                windows_of(inputs, window),
                decoder,
                prepare=prepare,
                batch_tokens=batch_tokens,
                advance=advance,
            ):
                if isinstance(found, BadInputs):
                    problems = {start + n: problem for n, problem in found.problems.items()}
                    raise_bad_inputs(
                        "some inputs cannot be embedded", problems, advice=found.advice
                    )
                    raise found
                start += len(found)
                yield from finish(found)

    def encode_windows(
        self,
        windows: Iterable[Sequence[Any]],
        *,
        batch_tokens: int | None = None,
        advance: Callable[[int], Any] = lambda count: None,
        **options: Any,
    ) -> Iterator[np.ndarray | BadInputs]:
        """Embed lists of inputs one after the other, going on after bad ones.

        Args:
          windows: the lists, taken when they are needed.
          batch_tokens: see `encode`.
          advance: called with the number of inputs finished.
          **options: see `encode_stream`.

        Yields:
          For each list in order float32 [n, D], or a `BadInputs` (not raised) about all that is
          wrong with it, numbered within the list.
        """
        prepare, finish = self._how(**options)
        with self._decoder() as decoder:
            for found in self._batches.run(
                windows, decoder, prepare=prepare, batch_tokens=batch_tokens, advance=advance
            ):
                yield found if isinstance(found, BadInputs) else finish(found)

    def encode_encoded(self, encoded: Sequence[EncodedInput]) -> np.ndarray:
        """Embed what the processor has already encoded, float32 [N, D]."""
        return self._batches.encoded(encoded)

    # ---------------------------------------------------------------------- inner parts

    def _decoder(self) -> Decoder:
        return Decoder(self.processor, self._workers)

    def _tokens_of(self, batch_size: int, items, prepare, decoder: Decoder) -> int | None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size must be a whole number from 1 on, not {batch_size!r}")
        sizes = decoder.lengths([prepare(item) for item in items])
        return batch_size * max((s[0] for s in sizes if isinstance(s, tuple)), default=1)

    def _fill(self, rows, encoded, shape: RowShape, count: int) -> PackedBatch:
        return fill_rows(rows, encoded, shape, self.processor.visual_layout, num_rows=count)

    def _put(self, batch: PackedBatch) -> PackedBatch:
        if self._mesh is None:
            return batch  # a compiled program takes arrays of numpy faster than anything else does
        placed = NamedSharding(self._mesh, batch_spec())
        return jax.tree.map(lambda leaf: jax.device_put(leaf, placed), batch)


@functools.lru_cache(maxsize=16)
def _program(graphdef, compute: Compute) -> Callable[[Any, PackedBatch], jax.Array]:
    """One function for all models of the same form, so that another checkpoint compiles nothing."""
    return jax.jit(functools.partial(_embed, graphdef, compute))


def _embed(graphdef, compute: Compute, state, batch: PackedBatch) -> jax.Array:
    return nnx.merge(graphdef, state)(batch, compute)
