# SPDX-License-Identifier: Apache-2.0
"""Folders for the Hugging Face world: full models, merged models, PEFT adapters.

A folder is written under a temporary name beside its destination and renamed when it is complete.
An existing one is replaced only by force, and is whole until the new one is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.weights.adapter_config import CONFIG, AdapterConfig, peft_config, resolve
from vlm2vec_jax.weights.adapters import LEAVES, adapter_tensors, is_adapter_leaf, merge_leaf
from vlm2vec_jax.weights.arrays import copy_cast
from vlm2vec_jax.weights.rules import DEFAULT_LAYOUT, Table
from vlm2vec_jax.weights.safetensors import DEFAULT_SHARD_BYTES, Checkpoint, write

RECORD = "vlm2vec.json"
"""What users of a model must know about it; written by every export."""

_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".spm"}
_COPIED_STEMS = {"LICENSE", "LICENCE", "NOTICE"}
_COPIED_FOLDERS = {"additional_chat_templates"}
Extra = Sequence[Callable[[Path], Any]]
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
    extra: Extra = (),
    force: bool = False,
) -> Path:
    """Write a full model under its original names, with the files of the model it began as.

    Args:
      flat: path -> array (numpy or jax, the latter fully addressable), all leaves of the table
        except those in `from_source`; adapter leaves are refused (see `export_merged`).
      table: the backbone's name table.
      source: HF folder of the base model: `config.json` (every field is kept, only the recorded
        element type follows `dtype`, and `Table.settings` the names), tokenizer, processor, code
        and licence files are copied.
      output: the folder to write.
      record: contents of `vlm2vec.json`.
      dtype: element type of all weights; None is what each tensor has in `source`.
      shard_bytes: a new shard begins at this size.
      from_source: leaves that were not loaded, and whose tensors are copied from `source`.
      extra: functions that put further files into the folder before it takes its name.
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
    job = _Job(flat, table, Path(source), dtype, shard_bytes, from_source, {})
    return _export(job, output, record, extra, force)


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
    extra: Extra = (),
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
      dtype, shard_bytes, from_source, extra, force: as `export_hf`.

    Raises:
      UserError, ValueError: as `export_hf`.
    """
    scaling = {path: linear.scaling for path, linear in resolve(config, table).items()}
    # Adapted leaves that come unmerged from the source would silently lose their adapter.
    lost = sorted(path for path in scaling if f"{path}/kernel" in from_source)
    if lost:
        raise ValueError(f"adapted kernels must be given, not copied: {', '.join(lost[:5])}")
    job = _Job(flat, table, Path(source), dtype, shard_bytes, from_source, scaling)
    return _export(job, output, record, extra, force)


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
    extra: Extra = (),
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
      extra: as `export_hf`.
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
        for put in extra:
            put(folder)
    return Path(output)


def size_of(text: int | str) -> int:
    """Bytes of a size as `5GB`, `500MB`, `2GiB` or a plain number.

    Raises:
      UserError: if it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = 0
    if match:
        step = 1024 if match[3] else 1000
        size = int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise UserError(f"--max_shard_size {text!r} is no size; write it as 5GB, 500MB or 2GiB")
    return size


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


@dataclasses.dataclass(frozen=True)
class _Job:
    """What goes into a full model; see `export_hf` and `export_merged`."""

    flat: Mapping[str, Any]
    table: Table
    source: Path
    dtype: Any
    shard_bytes: float
    from_source: Collection[str]
    scaling: Mapping[str, Any]


def _export(
    job: _Job, output: str | Path, record: Mapping[str, Any], extra: Extra, force: bool
) -> Path:
    source, output = job.source, Path(output)
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json: the base model's folder is needed")
    if output.absolute() == source.absolute() or output.absolute() in source.absolute().parents:
        raise UserError(f"{output} holds the base model {source}: export to another folder")
    _check_flat(job)
    written: set[str] = set()
    with Checkpoint(source) as checkpoint, staged(output, force=force) as folder:
        write(folder, _tensors(job, checkpoint, written), shard_bytes=job.shard_bytes)
        copy_files(source, folder)
        _write_settings(source, folder, written, job.table)
        _write_json(folder / RECORD, record)
        for put in extra:
            put(folder)
    return output


def _check_flat(job: _Job) -> None:
    table, known = job.table, job.table.by_leaf
    strange = [p for p in job.flat if p not in known and not is_adapter_leaf(p)]
    adapters = {p.rpartition("/")[0] for p in job.flat if is_adapter_leaf(p)}
    strange += sorted(adapters - set(job.scaling))
    if strange:
        raise ValueError(f"leaves that the name table does not know: {', '.join(strange[:5])}")
    missing = [p for p in table.by_leaf if p not in job.flat and p not in job.from_source]
    missing += [f"{p}/lora_a" for p in job.scaling if p not in adapters]
    if missing:
        raise ValueError(f"leaves missing from the model: {', '.join(missing[:5])}")


def _tensors(
    job: _Job, checkpoint: Checkpoint, written: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """HF names and arrays; leaves come to the host (and are merged) one at a time.

    Copies and buffers are written where the source has them, so that what came comes out again.

    Args:
      job: what to write.
      checkpoint: of the source.
      written: receives the element types of the weights.
    """
    table, flat = job.table, job.flat
    names = table.canonical_names(checkpoint.names)
    copies: dict[str, list[str]] = {}
    for copy, original in table.copies.items():
        if copy in names:
            copies.setdefault(original, []).append(copy)

    def cast(name: str, part: np.ndarray) -> np.ndarray:
        kind = job.dtype
        if kind is None:
            kind = checkpoint.dtype(names[name]) if name in names else part.dtype
        out = np.empty(part.shape, np.dtype(kind))
        copy_cast(out, part)
        written.add(out.dtype.name)
        return out

    leaf_path, leaf = None, np.empty(0)
    for name, slot in table.written():
        path = slot.rule.ours
        if path in flat:
            if path != leaf_path:
                leaf_path, leaf = path, _host_leaf(job, path)
            part = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
            if name in table.optional and name not in names and not part.any():
                continue
        elif name in names:
            part = checkpoint.read(names[name])
        else:
            raise UserError(f"{name} is neither in the model nor in the base model's folder")
        yield name, cast(name, part)
        for copy in copies.get(name, ()):
            yield copy, cast(copy, part)
    for name, original in names.items():
        if table.skipped(name) is not None:
            yield name, checkpoint.read(original)


def _host_leaf(job: _Job, path: str) -> np.ndarray:
    linear = path.removesuffix("/kernel")
    if linear not in job.scaling or linear == path:
        return np.asarray(job.flat[path])
    a, b, m = (job.flat.get(f"{linear}/{leaf}") for leaf in LEAVES)
    # Rounded once, when it is written.
    return merge_leaf(job.flat[path], a, b, m, job.scaling[linear], dtype=np.float32)


def copy_files(source: Path, folder: Path, *, adapter: bool = False) -> None:
    """Copy what belongs to a model besides its weights and card (of an adapter, its settings)."""
    for file in sorted(source.iterdir()):
        if file.is_dir() and file.name in _COPIED_FOLDERS:
            shutil.copytree(file, folder / file.name)
        left = _LEFT - {CONFIG} if adapter else _LEFT
        if not file.is_file() or file.name in left or file.name.endswith(".index.json"):
            continue
        if file.suffix in _COPIED_SUFFIXES or file.stem in _COPIED_STEMS:
            shutil.copyfile(file, folder / file.name)


def _write_settings(source: Path, folder: Path, kinds: Collection[str], table: Table) -> None:
    """Let config.json fit names and type of the weights; the file stays as it is where it does.

    Weights of several types are left to what the source says of them.
    """
    before = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = dict(before) if table.settings is None else table.settings(before)
    # transformers 5 renamed the field; say it the way the source does.
    field = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    if len(kinds) == 1 and config.get(field) not in kinds:
        config[field] = next(iter(kinds))
    if config != before:
        _write_json(folder / "config.json", config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
