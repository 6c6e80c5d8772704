# SPDX-License-Identifier: Apache-2.0
"""Folders for the Hugging Face world: full models, merged models, PEFT adapters.

A folder is written under a temporary name beside its destination and renamed when it is complete.
An existing one is replaced only by force, and is whole until the new one is.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.weights.adapter_config import CONFIG, AdapterConfig, peft_config, resolve
from vlm2vec_jax.weights.adapters import LEAVES, adapter_tensors, is_adapter_leaf, merge_leaf
from vlm2vec_jax.weights.load import copy_cast
from vlm2vec_jax.weights.rules import DEFAULT_LAYOUT, Table
from vlm2vec_jax.weights.safetensors import DEFAULT_SHARD_BYTES, Checkpoint, write

RECORD = "vlm2vec.json"
"""What users of a model must know about it; written by every export."""

_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py"}
_COPIED_NAMES = {"LICENSE", "NOTICE"}
_COPIED_FOLDERS = {"additional_chat_templates"}
# Files of a training run, of an adapter, or about weights that are not copied.
_LEFT = {RECORD, CONFIG, "trainer_state.json", "all_results.json", "train_results.json"}


def export_hf(
    flat: Mapping[str, Any],
    table: Table,
    source: str | Path,
    output: str | Path,
    *,
    record: Mapping[str, Any],
    dtype: Any = None,
    shard_bytes: float = DEFAULT_SHARD_BYTES,
    from_source: Collection[str] = (),
    force: bool = False,
) -> Path:
    """Write a full model under its original names, with the files of the model it began as.

    Args:
      flat: path -> array (numpy or jax, the latter fully addressable), all leaves of the table
        except those in `from_source`; adapter leaves are refused (see `export_merged`).
      table: the backbone's name table.
      source: HF folder of the base model: `config.json` (every field is kept, only the recorded
        element type follows `dtype`), tokenizer, processor, code and licence files are copied.
      output: the folder to write.
      record: contents of `vlm2vec.json`.
      dtype: element type of all weights; None keeps that of each leaf.
      shard_bytes: a new shard begins at this size.
      from_source: leaves that were not loaded, and whose tensors are copied from `source`.
      force: replace an existing model folder.

    Returns:
      The output folder.

    Raises:
      UserError: if the output exists (and there is no force), the source lacks `config.json` or
        tensors that it should give, or the disk does not take the folder.
      ValueError: if `flat` lacks leaves, or has leaves that the table does not know.
    """
    adapted = sorted(path for path in flat if is_adapter_leaf(path))
    if adapted:
        raise ValueError(f"unmerged adapter leaves: {', '.join(adapted[:5])}; use export_merged")
    return _export(flat, table, source, output, record, dtype, shard_bytes, from_source, {}, force)


def export_merged(
    flat: Mapping[str, Any],
    table: Table,
    config: AdapterConfig,
    source: str | Path,
    output: str | Path,
    *,
    record: Mapping[str, Any],
    dtype: Any = None,
    shard_bytes: float = DEFAULT_SHARD_BYTES,
    from_source: Collection[str] = (),
    force: bool = False,
) -> Path:
    """Write a full model with its adapter folded in, merged in float32 and rounded once.

    Args:
      flat: leaves of the base model and of the adapter.
      table: the backbone's name table.
      config: the adapter's configuration.
      source: HF folder of the base model.
      output: the folder to write.
      record: contents of `vlm2vec.json`.
      dtype: element type; None keeps that of each leaf (of merged kernels, the base kernel's).
      shard_bytes, from_source, force: as `export_hf`.

    Raises:
      UserError, ValueError: as `export_hf`.
    """
    scaling = {path: linear.scaling for path, linear in resolve(config, table).items()}
    # Adapted leaves that come unmerged from the source would silently lose their adapter.
    lost = sorted(path for path in scaling if f"{path}/kernel" in from_source)
    if lost:
        raise ValueError(f"adapted kernels must be given, not copied: {', '.join(lost[:5])}")
    return _export(
        flat, table, source, output, record, dtype, shard_bytes, from_source, scaling, force
    )


def export_peft(
    flat: Mapping[str, Any],
    table: Table,
    config: AdapterConfig,
    output: str | Path,
    *,
    record: Mapping[str, Any],
    base: str | None = None,
    dtype: Any = np.float32,
    saved: Mapping[str, np.ndarray] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    layout: str = DEFAULT_LAYOUT,
    force: bool = False,
) -> Path:
    """Write an adapter folder as PEFT does: `adapter_config.json` and safetensors.

    Args:
      flat: path -> array with the adapter's leaves; others are not looked at.
      table: the backbone's name table.
      config: the adapter's configuration.
      output: the folder to write.
      record: contents of `vlm2vec.json`.
      base: id or path of the base model to record; by default what the adapter recorded.
      dtype: element type; PEFT itself writes float32.
      saved, dtypes: as `adapters.adapter_tensors`.
      layout: transformers generation whose module names PEFT will meet. An adapter with another
        generation's names is loaded by PEFT without effect.
      force: replace an existing folder.

    Raises:
      UserError: if the output exists (and there is no force), the backbone does not know the
        generation, or the disk does not take it.
      ValueError: if leaves and targets disagree.
    """
    with staged(output, force=force) as folder:
        tensors = adapter_tensors(
            flat, table, config, dtype=dtype, saved=saved, dtypes=dtypes, layout=layout
        )
        write(folder, tensors, stem="adapter_model", shard_bytes=float("inf"))
        _write_json(folder / CONFIG, peft_config(config, base=base, table=table, layout=layout))
        _write_json(folder / RECORD, record)
    return Path(output)


@contextlib.contextmanager
def staged(output: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `output` when the block ends well.

    When the block fails the temporary folder is removed and an old output is as it was.

    Raises:
      UserError: if `output` exists and is not empty (with `force`: if it is no model folder), or
        the disk refuses.
    """
    output = Path(output).absolute()
    check_output(output, force)
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        yield folder
        folder.chmod(0o755)  # mkdtemp's folders are private
        _swap(folder, output)
    except OSError as error:
        raise UserError(f"{output} could not be written: {error}") from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def check_output(output: Path, force: bool) -> None:
    """Refuse a folder that may not be written; also for a look before anything is loaded.

    Raises:
      UserError: if it exists and is not empty (with `force`: if it is no model folder).
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise UserError(f"{output} exists already; give --force to replace it, or another folder")
    if not any((output / name).is_file() for name in (RECORD, "config.json", CONFIG)):
        raise UserError(f"{output} is no model folder, so that it is not replaced even by force")


def _swap(folder: Path, output: Path) -> None:
    if not output.exists():
        folder.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    output.rename(old / output.name)
    try:
        folder.rename(output)
    except OSError:
        (old / output.name).rename(output)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _export(
    flat: Mapping[str, Any],
    table: Table,
    source: str | Path,
    output: str | Path,
    record: Mapping[str, Any],
    dtype: Any,
    shard_bytes: float,
    from_source: Collection[str],
    scaling: Mapping[str, Any],
    force: bool,
) -> Path:
    source, output = Path(source), Path(output)
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json: the base model's folder is needed")
    if output.absolute() == source.absolute() or output.absolute() in source.absolute().parents:
        raise UserError(f"{output} holds the base model {source}: export to another folder")
    _check_flat(flat, table, from_source, scaling)
    with staged(output, force=force) as folder, contextlib.ExitStack() as stack:
        checkpoint = None
        absent: set[str] = set()
        if from_source or table.optional:
            checkpoint = stack.enter_context(Checkpoint(source))
            absent = set(table.optional) - set(table.canonical_names(checkpoint.names))
        tensors = _tensors(flat, table, dtype, scaling, checkpoint, absent)
        write(folder, tensors, shard_bytes=shard_bytes)
        _copy_files(source, folder)
        _record_dtype(source, folder, _common_dtype(flat) if dtype is None else np.dtype(dtype))
        _write_json(folder / RECORD, record)
    return output


def _check_flat(
    flat: Mapping[str, Any],
    table: Table,
    from_source: Collection[str],
    scaling: Mapping[str, Any],
) -> None:
    strange = [p for p in flat if p not in table.by_leaf and not is_adapter_leaf(p)]
    adapters = {p.rpartition("/")[0] for p in flat if is_adapter_leaf(p)}
    strange += sorted(adapters - set(scaling))
    if strange:
        raise ValueError(f"leaves that the name table does not know: {', '.join(strange[:5])}")
    missing = [p for p in table.by_leaf if p not in flat and p not in from_source]
    missing += [f"{p}/lora_a" for p in scaling if p not in adapters]
    if missing:
        raise ValueError(f"leaves missing from the model: {', '.join(missing[:5])}")


def _tensors(
    flat: Mapping[str, Any],
    table: Table,
    dtype: Any,
    scaling: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    absent: Collection[str],
) -> Iterator[tuple[str, np.ndarray]]:
    """HF names and arrays; leaves come to the host (and are merged) one at a time."""
    names = {} if checkpoint is None else table.canonical_names(checkpoint.names)
    leaf_path, leaf = None, np.empty(0)
    for name, slot in table.written():
        path = slot.rule.ours
        if path in flat:
            if path != leaf_path:
                leaf_path, leaf = path, _host_leaf(flat, path, scaling, dtype)
            part = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
            if name in absent and not part.any():
                continue
        elif checkpoint is not None and name in names:
            part = checkpoint.read(names[name])
        else:
            raise UserError(f"{name} is neither in the model nor in the base model's folder")
        wanted = part.dtype if dtype is None else np.dtype(dtype)
        out = np.empty(part.shape, wanted)
        copy_cast(out, part)
        yield name, out


def _host_leaf(
    flat: Mapping[str, Any], path: str, scaling: Mapping[str, Any], dtype: Any
) -> np.ndarray:
    linear = path.removesuffix("/kernel")
    if linear not in scaling or linear == path:
        return np.asarray(flat[path])
    a, b, m = (flat.get(f"{linear}/{leaf}") for leaf in LEAVES)
    # Rounded once, to what is written: an f32 export of a bf16 base keeps the merge's digits.
    wanted = flat[path].dtype if dtype is None else dtype
    return merge_leaf(flat[path], a, b, m, scaling[linear], dtype=wanted)


def _copy_files(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_dir() and file.name in _COPIED_FOLDERS:
            shutil.copytree(file, folder / file.name)
        if not file.is_file() or file.name in _LEFT or file.name.endswith(".index.json"):
            continue
        if file.suffix in _COPIED_SUFFIXES or file.name in _COPIED_NAMES:
            shutil.copyfile(file, folder / file.name)


def _common_dtype(flat: Mapping[str, Any]) -> np.dtype | None:
    kinds = {np.dtype(leaf.dtype) for p, leaf in flat.items() if not is_adapter_leaf(p)}
    return kinds.pop() if len(kinds) == 1 else None


def _record_dtype(source: Path, folder: Path, dtype: np.dtype | None) -> None:
    """Let config.json say the type of the weights; the file stays as it is where it does."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # transformers 5 renamed the field; say it the way the source does.
    field = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    if dtype is not None and config.get(field) != dtype.name:
        config[field] = dtype.name
        _write_json(folder / "config.json", config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
