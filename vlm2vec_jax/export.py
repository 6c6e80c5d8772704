# SPDX-License-Identifier: Apache-2.0
"""Write a trained model for the Hugging Face world, or merge an adapter into its base.

    python -m vlm2vec_jax.export --checkpoint DIR --output DIR \\
        --format hf|peft|merged|sentence-transformers

`--checkpoint` is a training output folder (its newest good checkpoint is taken), a model folder or
an adapter folder. hf writes a model of which every parameter was trained, peft an adapter alone,
merged a full model with the adapter folded in, sentence-transformers a full model with that
library's files. What comes out is a model folder like any other: `embed`, `evaluate` and
`Embedder.from_pretrained` take it, and `vlm2vec.json` in it says how it was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import define_compilation_cache, run, use_compilation_cache
from vlm2vec_jax.models.folders import ModelSource, locate
from vlm2vec_jax.models.registry import backbone_of
from vlm2vec_jax.record import make_record
from vlm2vec_jax.weights.adapter_config import (
    AdapterConfig,
    config_from_dict,
    peft_config,
    read_config,
)
from vlm2vec_jax.weights.card import model_card
from vlm2vec_jax.weights.export import (
    check_output,
    export_hf,
    export_merged,
    export_peft,
    size_of,
)
from vlm2vec_jax.weights.rules import DEFAULT_LAYOUT
from vlm2vec_jax.weights.safetensors import DEFAULT_SHARD_BYTES, FLOATS, Checkpoint
from vlm2vec_jax.weights.sentence_transformers import (
    SentenceTransformers,
    check_settings,
    remark,
    write_files,
)

FORMATS = ("hf", "peft", "merged", "sentence-transformers")
DTYPES = {"f32": "float32", "bf16": "bfloat16", "float32": "float32", "bfloat16": "bfloat16"}


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    for name, words in (
        ("checkpoint", "a training output folder, a model folder, or a PEFT adapter folder"),
        ("output", "the folder to write"),
    ):
        flags.DEFINE_string(name, None, words, required=True, flag_values=values)
    flags.DEFINE_enum(
        "format",
        None,
        FORMATS,
        "hf: a fully trained model; peft: the adapter alone; merged: the adapter folded in; "
        "sentence-transformers: a full model (adapters merged) for that library",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "model",
        None,
        "the base model, where --checkpoint is an adapter on another than the one it names",
        flag_values=values,
    )
    flags.DEFINE_bool("force", False, "replace an existing model folder", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        None,
        list(DTYPES),
        "of the written weights; by default the base model's own, and of adapters what they had "
        "(float32 from training)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "max_shard_size",
        f"{int(DEFAULT_SHARD_BYTES) // 10**9}GB",
        "a new weights file begins at this size: bytes, or as 500MB, 5GB, 2GiB",
        flag_values=values,
    )
    flags.DEFINE_string(
        "hf_layout",
        None,
        "of adapters: the transformers generation whose module names PEFT will meet; by default "
        f"the one that an adapter came in, {DEFAULT_LAYOUT} from training",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "measure",
        True,
        "of merged models: embed some sample inputs before and after, and print the difference",
        flag_values=values,
    )
    define_compilation_cache(values)


def main(args: Any) -> None:
    """Export and say what was written."""
    use_compilation_cache(args)
    said = export(
        args.checkpoint,
        args.format,
        args.output,
        base=args.model,
        force=args.force,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        hf_layout=args.hf_layout,
        measure=args.measure,
    )
    print(said)


def export(
    checkpoint: str | Path,
    format: str,
    output: str | Path,
    *,
    base: str | Path | None = None,
    force: bool = False,
    dtype: str | None = None,
    max_shard_size: int | str = int(DEFAULT_SHARD_BYTES),
    hf_layout: str | None = None,
    measure: bool = True,
) -> str:
    """Write a model in another form.

    Args:
      checkpoint: training output folder, model folder, PEFT adapter folder, or hub id.
      format: one of `FORMATS`.
      output: the folder to write; appears when it is complete.
      base: the base model of an adapter; by default the one that it names.
      force: replace an existing model folder.
      dtype: of the written weights, a key of `DTYPES`. By default the base model's, tensor by
        tensor, so that a model trained in float32 from a bfloat16 base is rounded once, as its
        users' programs would; adapters stay as they are.
      max_shard_size: size at which a new weights file begins; bytes or text, see `size_of`.
      hf_layout: transformers generation in whose module names an adapter is written.
      measure: embed sample inputs before and after merging, see `merge_difference`.

    Returns:
      Sentences for the user.

    Raises:
      UserError: if the format does not fit what was trained, or something is wrong with a folder.
    """
    shard_bytes = size_of(max_shard_size)
    source = locate(checkpoint) if base is None else locate(base, checkpoint)
    adapter = adapter_of(source)
    _check_format(source, adapter, format)
    backbone = backbone_of(source.base)
    form = backbone.sentence_transformers
    if format == "sentence-transformers" and isinstance(form, str):
        raise UserError(
            f"{source.named} cannot become a folder for sentence-transformers: {form}. "
            f"Use --format {'hf' if adapter is None else 'merged'}"
        )
    if format == "sentence-transformers":
        assert isinstance(form, SentenceTransformers)
        check_settings(form, _settings(source), source.named)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; known: {', '.join(DTYPES)}")
    # Told before the weights are read, which may take minutes.
    check_output(Path(output).absolute(), force)
    writer = _Writer(source, adapter, format, Path(output), DTYPES.get(dtype or ""), force, base)
    if format == "peft":
        assert adapter is not None
        return writer.peft(adapter, hf_layout)
    if hf_layout is not None:
        raise UserError("--hf_layout is for adapters; full models have names that all can load")
    return writer.full(adapter, shard_bytes, form, measure)


class _Writer:
    """One export: what is common to its forms."""

    def __init__(
        self,
        source: ModelSource,
        adapter: AdapterConfig | None,
        format: str,
        output: Path,
        dtype: str | None,
        force: bool,
        base: str | Path | None,
    ):
        self.source, self.adapter, self.format = source, adapter, format
        self.output, self.dtype, self.force, self.base = output, dtype, force, base

    def peft(self, adapter: AdapterConfig, layout: str | None) -> str:
        """Write the adapter alone."""
        from vlm2vec_jax.models.loading import abstract_model, flatten
        from vlm2vec_jax.weights.adapters import load_adapter

        trained_as: dict[str, Any] = {}
        if self.source.adapter is not None:
            # The base model's weights are not needed, and the adapter's go out as they came.
            model = abstract_model(self.source.base)
            loaded = load_adapter(self.source.adapter, model.table, flatten(model.module))
            flat, layout = loaded.tensors, layout or loaded.layout
            options: dict[str, Any] = {"saved": loaded.saved}
            if self.dtype is None:
                options["dtypes"] = loaded.dtypes
            kinds = {str(kind) for kind in loaded.dtypes.values()}
        else:
            model, trained_as = self._load("float32")
            flat, options, kinds = flatten(model.module), {}, {"float32"}
        layout = layout or DEFAULT_LAYOUT
        kind = self.dtype or "/".join(sorted(kinds))
        record = self._record(model, trained_as, dtype=kind, hf_layout=layout)
        base = _base_name(self.source, self.base)
        export_peft(
            flat,
            model.table,
            adapter,
            self.output,
            record=record,
            base=base,
            dtype=self.dtype or "float32",
            layout=layout,
            extra=[self._card(record, base)],
            force=self.force,
            **options,
        )
        return self._said("adapter", trained_as, f"{kind}, names of transformers {layout}")

    def full(
        self,
        adapter: AdapterConfig | None,
        shard_bytes: int,
        form: SentenceTransformers | str,
        measure: bool,
    ) -> str:
        """Write a full model, with the adapter folded in if there is one."""
        from vlm2vec_jax.models.loading import flatten

        held, own = _own_dtype(self.source.base)
        # What full training leaves behind, and modules saved whole, are float32.
        wide = (self.source.trained is not None and adapter is None) or (
            adapter is not None and bool(adapter.saved)
        )
        model, trained_as = self._load("float32" if wide else held)
        flat, table = flatten(model.module), model.table
        record = self._record(model, trained_as, dtype=self.dtype or own)
        extra: list[Callable[[Path], Any]] = [
            self._card(record, _base_name(self.source, self.base))
        ]
        told = ""
        if self.format == "sentence-transformers":
            assert isinstance(form, SentenceTransformers)
            settings = _settings(self.source)
            told = remark(settings)
            told = told and f"\n{told}"
            prompts = record.get("prompts") or {}
            width = model.backbone.width(model.config)
            files = {"width": width, "prompts": prompts, "settings": settings}
            extra.append(lambda folder: write_files(folder, form, **files))
        options: dict[str, Any] = {
            "record": record,
            "dtype": self.dtype,
            "shard_bytes": shard_bytes,
            "extra": extra,
            "force": self.force,
        }
        if adapter is None:
            export_hf(flat, table, self.source.base, self.output, **options)
            return self._said("model", trained_as, self.dtype or own) + told
        before = None
        if measure:
            from vlm2vec_jax.embedding.merging import embed_samples, merge_difference

            before = embed_samples(model, self.source)
        export_merged(flat, table, adapter, self.source.base, self.output, **options)
        said = self._said("model", trained_as, self.dtype or own) + told
        if before is None:
            return said
        del model, flat  # the merged one needs the memory
        return f"{said}\n{merge_difference(before, self.output, self.dtype or held)}"

    def _load(self, dtype: str):
        from vlm2vec_jax.embedding.loading import load_source

        return load_source(self.source, dtype=dtype, mesh=None)

    def _card(self, record: dict[str, Any], base: str | None) -> Callable[[Path], Any]:
        text = model_card(record, base=base, source=self.source.base)
        return lambda folder: (folder / "README.md").write_text(text, encoding="utf-8")

    def _said(self, what: str, trained_as: dict[str, Any], how: str) -> str:
        step = f" of step {trained_as['step']}" if "step" in trained_as else ""
        return f"the {what}{step} is in {self.output} ({self.format}, {how})"

    def _record(self, model: Any, trained_as: dict[str, Any], **written: str) -> dict[str, Any]:
        """`vlm2vec.json` of the export: the run's, and what has been done to it since."""
        from vlm2vec_jax.models.loading import open_processor

        record = self.source.record
        if record is None:
            processor = open_processor(model, self.source, {})
            spec = None if self.adapter is None else peft_config(self.adapter, table=model.table)
            record = make_record(
                backbone=model.backbone.name,
                base=self.source.base,
                processor=processor.settings,
                temperature=None,
                adapter=spec,
            )
        exported = {"format": self.format, **written}
        step = trained_as.get("step", record.get("exported", {}).get("step"))
        if step is not None:
            exported["step"] = step
        if self.format != "peft" and self.adapter is not None:
            # The folder's weights have no adapter any more; what it was is kept for the reader.
            exported["adapter"] = record["adapter"]
            record = {**record, "adapter": None}
        return {**record, "exported": exported}


def adapter_of(source: ModelSource) -> AdapterConfig | None:
    """The adapter of a model; None if it has none."""
    if source.adapter is not None:
        return read_config(source.adapter)
    if source.trained is not None:
        spec = (source.record or {})["adapter"]
        return None if spec is None else config_from_dict(spec)
    return None


def _check_format(source: ModelSource, adapter: AdapterConfig | None, format: str) -> None:
    if format not in FORMATS:
        raise UserError(f"--format {format} is not known; known: {', '.join(FORMATS)}")
    if adapter is None and format in ("peft", "merged"):
        how = "trained in full" if source.trained is not None else "a model without an adapter"
        raise UserError(
            f"{source.named} is {how}: there is nothing to write as {format}; use --format hf"
        )
    if adapter is not None and format == "hf":
        raise UserError(
            f"{source.named} is a {adapter.kind} adapter on {source.base}; use --format peft for "
            f"the adapter alone, or --format merged for a full model with the adapter folded in"
        )


def _settings(source: ModelSource) -> dict[str, Any]:
    """Of the processor that `embed` and `evaluate` would use."""
    from vlm2vec_jax.models.loading import abstract_model, open_processor

    return open_processor(abstract_model(source.base), source, {}).settings


def _own_dtype(folder: Path) -> tuple[str, str]:
    """What to hold the weights of a folder in without loss, and what they are, in words."""
    with Checkpoint(folder) as checkpoint:
        names = [name for name in checkpoint.names if checkpoint.dtype_name(name) in FLOATS]
        kinds = sorted({checkpoint.dtype(name).name for name in names})
    return "bfloat16" if kinds == ["bfloat16"] else "float32", "/".join(kinds)


def _base_name(source: ModelSource, given: str | Path | None) -> str:
    """What an export calls its base: a hub id as it was given, a folder by its full path."""
    if given is not None:
        return str(Path(given).resolve()) if Path(given).is_dir() else str(given)
    named = (source.record or {}).get("base")
    if source.adapter is not None and not named:
        return str(read_config(source.adapter).base)
    if not named:
        return source.named
    # A relative path would hold only where the training command was typed.
    return str(source.base.resolve()) if named.get("absolute") else named["path"]


if __name__ == "__main__":
    run(main, define)
