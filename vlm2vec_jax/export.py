# SPDX-License-Identifier: Apache-2.0
"""Write a trained model for the Hugging Face world, or merge an adapter into its base.

    python -m vlm2vec_jax.export --checkpoint DIR --format hf|peft|merged --output DIR

`--checkpoint` is a training output folder (its newest good checkpoint is taken) or a model folder.
hf writes a model of which every parameter was trained, peft an adapter alone, merged a full model
with the adapter folded in. What comes out is a model folder like any other: `embed`, `evaluate`
and `Embedder.from_pretrained` take it, and `vlm2vec.json` in it says how it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import run
from vlm2vec_jax.models.folders import ModelSource, locate
from vlm2vec_jax.record import make_record
from vlm2vec_jax.weights.adapter_config import (
    AdapterConfig,
    config_from_dict,
    peft_config,
    read_config,
)
from vlm2vec_jax.weights.export import check_output, export_hf, export_merged, export_peft
from vlm2vec_jax.weights.safetensors import DEFAULT_SHARD_BYTES, Checkpoint

FORMATS = ("hf", "peft", "merged")


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
        "hf: a fully trained model; peft: the adapter alone; merged: the adapter folded in",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_bool("force", False, "replace an existing model folder", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "of the written weights; the base model's own by default, float32 for adapters",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "shard_bytes",
        int(DEFAULT_SHARD_BYTES),
        "a new weights file begins at this size",
        lower_bound=1,
        flag_values=values,
    )


def main(args: Any) -> None:
    """Export and say what was written."""
    said = export(
        args.checkpoint,
        args.format,
        args.output,
        force=args.force,
        dtype=args.dtype,
        shard_bytes=args.shard_bytes,
    )
    print(said)


def export(
    checkpoint: str | Path,
    format: str,
    output: str | Path,
    *,
    force: bool = False,
    dtype: str | None = None,
    shard_bytes: int = int(DEFAULT_SHARD_BYTES),
) -> str:
    """Write a model in another form.

    Args:
      checkpoint: training output folder, model folder, PEFT adapter folder, or hub id.
      format: `hf`, `peft` or `merged`.
      output: the folder to write; appears when it is complete.
      force: replace an existing model folder.
      dtype: of the written weights. By default the base model's, so that a model trained in
        float32 from a bfloat16 base is rounded once, as its users' programs would; adapters stay
        float32.
      shard_bytes: size at which a new weights file begins.

    Returns:
      A sentence for the user.

    Raises:
      UserError: if the format does not fit what was trained, or something is wrong with a folder.
    """
    source = locate(checkpoint)
    adapter = adapter_of(source)
    _check_format(source, adapter, format)
    # Told before the weights are read, which may take minutes.
    check_output(Path(output).absolute(), force)

    from vlm2vec_jax.embedder import load_source
    from vlm2vec_jax.models.loading import flatten

    own = _own_dtype(source.base)
    # What full training leaves behind is float32; adapters are that in any case.
    held = "float32" if source.trained is not None and adapter is None else own
    model, trained_as = load_source(source, dtype=held, mesh=None)
    flat, table = flatten(model.module), model.table
    record = _record(source, model, adapter, format, trained_as)
    options: dict[str, Any] = {"record": record, "force": force}
    if format == "peft":
        assert adapter is not None
        export_peft(
            flat,
            table,
            adapter,
            output,
            base=_base_name(source),
            dtype=dtype or "float32",
            **options,
        )
    else:
        options |= {"dtype": dtype or own, "shard_bytes": shard_bytes}
        if adapter is None:
            export_hf(flat, table, source.base, output, **options)
        else:
            export_merged(flat, table, adapter, source.base, output, **options)
    step = f" of step {trained_as['step']}" if "step" in trained_as else ""
    what = "adapter" if format == "peft" else "model"
    return f"the {what}{step} is in {output} ({format}, {dtype or _written(format, own)})"


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
    if adapter is None and format != "hf":
        how = "trained in full" if source.trained is not None else "a model without an adapter"
        raise UserError(
            f"{source.named} is {how}: there is nothing to write as {format}; use --format hf"
        )
    if adapter is not None and format == "hf":
        raise UserError(
            f"{source.named} is a {adapter.kind} adapter on {source.base}; use --format peft for "
            f"the adapter alone, or --format merged for a full model with the adapter folded in"
        )


def _own_dtype(folder: Path) -> str:
    """bfloat16 if all weights are; float32 holds whatever else there may be."""
    with Checkpoint(folder) as checkpoint:
        kinds = {checkpoint.dtype(name).name for name in checkpoint.names}
    return "bfloat16" if kinds == {"bfloat16"} else "float32"


def _written(format: str, own: str) -> str:
    return "float32" if format == "peft" else own


def _base_name(source: ModelSource) -> str:
    """What the adapter calls its base: a hub id as it was given, a folder by its full path."""
    named = (source.record or {}).get("base", {})
    if source.adapter is not None and not named:
        return str(read_config(source.adapter).base)
    # A relative path would hold only where the training command was typed.
    return str(source.base.resolve()) if named.get("absolute") else named["path"]


def _record(
    source: ModelSource,
    model: Any,
    adapter: AdapterConfig | None,
    format: str,
    trained_as: dict[str, Any],
) -> dict[str, Any]:
    """`vlm2vec.json` of the export: the run's, and what has been done to it since."""
    record = source.record
    if record is None:
        from vlm2vec_jax.models.loading import open_processor

        processor = open_processor(model, source, {})
        record = make_record(
            backbone=model.backbone.name,
            base=source.base,
            processor=processor.settings,
            temperature=None,
            adapter=None if adapter is None else peft_config(adapter, table=model.table),
        )
    exported = {"format": format, **{k: trained_as[k] for k in ("step",) if k in trained_as}}
    if format == "merged":
        # The folder's weights have no adapter any more; what it was is kept for the reader.
        exported["adapter"] = record["adapter"]
        record = {**record, "adapter": None}
    return {**record, "exported": exported}


if __name__ == "__main__":
    run(main, define)
