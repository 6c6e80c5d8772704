# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters: LoRA and DoRA tensors as `peft` saves them, to leaves beside our kernels and back.

Leaves of an adapted linear layer, all float32 (L only for stacked layers):
`lora_a` [L, in, r], `lora_b` [L, r, out] and, for DoRA, `magnitude` [L, out]. With
`s = alpha / r` (rslora: `alpha / sqrt(r)`) the effective kernel [in, out] is `W + s A B`; DoRA's
is `(m / n) (W + s A B)`, n being the norms of its columns. Layers of a stack with a smaller rank
than r, or without an adapter, have zeros there; DoRA's magnitudes of the latter are the norms of W.

Behaviour followed: PEFT 0.11 to 0.21 (`utils/save_and_load`, `tuners/lora/layer`). Where PEFT
passes over tensors in silence, this reader stops and names them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.weights.adapter_config import (
    CONFIG,
    AdapterConfig,
    read_config,
)
from vlm2vec_jax.weights.arrays import all_finite
from vlm2vec_jax.weights.files import ADAPTER
from vlm2vec_jax.weights.rules import DEFAULT_LAYOUT, Slot, Table, collapse
from vlm2vec_jax.weights.safetensors import FLOATS, Checkpoint
from vlm2vec_jax.weights.targets import AdaptedLinear, resolve, saved_tensors

PREFIX = "base_model.model."
LEAVES = ("lora_a", "lora_b", "magnitude")
"""Names of an adapter's leaves beside a kernel."""
SCALE = "adapter_scale"
"""Name of the leaf with the scalings of a stack's layers, where they differ; not stored."""

_HF_LEAF = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
}
# Adapter names stand inside keys that were not written by `save_pretrained`; 0.12 and later hold
# the magnitude in a module, whose `.weight` some saves keep.
_KEY = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A whole adapter.

    Attributes:
      config: its configuration.
      linears: the layers it stands on, by path.
      tensors: its leaves by path, float32.
      saved: HF name -> tensor of the modules that were trained whole, as the file has them.
      dtypes: PEFT's name without prefix -> element type in the file.
      layout: transformers generation in whose names the file is written.
    """

    config: AdapterConfig
    linears: dict[str, AdaptedLinear]
    tensors: dict[str, np.ndarray]
    saved: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, np.dtype] = dataclasses.field(default_factory=dict)
    layout: str = DEFAULT_LAYOUT


def load_adapter(
    folder: str | Path,
    table: Table,
    base: Mapping[str, Any],
    *,
    config: AdapterConfig | None = None,
) -> Adapter:
    """Read an adapter folder.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      table: the backbone's name table.
      base: path -> leaf of the base model, at least for the kernels of the adapted layers and the
        leaves of modules that were trained whole. Shapes are enough, except to use a DoRA adapter
        that leaves out layers of a stack.
      config: what `read_config(folder)` gave, if it was read before.

    Raises:
      UserError: from `read_config` and `resolve`, for pickled weights, and listing every tensor
        that is missing, unexpected or misshapen, no floating-point number or not finite.
    """
    config = read_config(folder) if config is None else config
    linears = resolve(config, table)
    with Checkpoint(_weights_file(Path(folder))) as checkpoint:
        names, problems = _adapter_names(checkpoint, table)
        expected = _expected(linears, base, dora=config.dora)
        saved = saved_tensors(config, table)
        expected |= {name: (None, _saved_shape(table.slots[name], base)) for name in saved}
        missing = [name for name in expected if name not in names]
        unexpected = [name for name in names if name not in expected]
        for label, members in collapse(missing):
            near = difflib.get_close_matches(members[0], unexpected, n=1, cutoff=0.8)
            hint = f"; the file has, unexpected, {near[0]}" if near else ""
            problems.append(f"missing: {label}{_count(members)}{hint}")
        for label, members in collapse(unexpected):
            problems.append(f"unexpected: {label}{_count(members)}")
        for name, (_, shape) in expected.items():
            if name in names:
                kind = checkpoint.dtype_name(names[name])
                if checkpoint.shape(names[name]) != shape:
                    found = checkpoint.shape(names[name])
                    problems.append(f"misshapen: {name} is {found}, should be {shape}")
                elif kind not in FLOATS:
                    problems.append(f"no weight: {name} is {kind}")
        raise_problems(
            f"{checkpoint.path} does not fit its {CONFIG} on this base model: {len(missing)} "
            f"missing, {len(unexpected)} unexpected tensors",
            problems,
            advice="Was the adapter trained on another base model or with other targets?"
            + ("" if config.dora else " (Magnitudes belong to use_dora = true.)"),
        )
        read = {name: checkpoint.read(names[name]) for name in expected}
        layout = _layout(names, table)
    bad = [name for name, array in read.items() if not all_finite(array)]
    raise_problems(
        f"{folder} holds weights that are not finite",
        [f"{label}{_count(members)}" for label, members in collapse(bad)],
    )
    tensors = {}
    for path, linear in linears.items():
        tensors |= _leaves(path, linear, read, base[f"{path}/kernel"], config.dora)
    return Adapter(
        config,
        linears,
        tensors,
        {name: read[name] for name in saved},
        {name: array.dtype for name, array in read.items()},
        layout,
    )


def _leaves(
    path: str, linear: AdaptedLinear, read: Mapping[str, np.ndarray], kernel: Any, dora: bool
) -> dict[str, np.ndarray]:
    """Our leaves of one linear layer from PEFT's tensors of its modules."""
    *stack, fan_in, fan_out = kernel.shape
    rank = linear.rank
    out = {
        f"{path}/lora_a": np.zeros((*stack, fan_in, rank), np.float32),
        f"{path}/lora_b": np.zeros((*stack, rank, fan_out), np.float32),
    }
    if dora:
        magnitude: Any = np.ones((*stack, fan_out), np.float32)
        left_out = [layer for layer, rank in enumerate(linear.ranks) if not rank]
        # There are none to read where only shapes are given.
        for layer in left_out if hasattr(kernel, "__getitem__") else ():
            plain = np.asarray(kernel[layer]).astype(np.float32)
            magnitude[layer] = np.sqrt(np.sum(plain * plain, axis=0))
        out[f"{path}/magnitude"] = magnitude
    for layer, module, rank in linear.adapted:
        for kind, leaf in _kinds(dora).items():
            target = out[f"{path}/{leaf}"]
            # Our layouts of A [in, r] and B [r, out] are PEFT's transposed.
            _own(target[layer] if stack else target, leaf, rank)[...] = read[f"{module}.{kind}"].T
    return out


def _own(array: np.ndarray, leaf: str, rank: int) -> np.ndarray:
    """The part of a layer's leaf that its own rank fills."""
    return {"lora_a": array[..., :rank], "lora_b": array[:rank], "magnitude": array}[leaf]


def adapter_tensors(
    flat: Mapping[str, Any],
    table: Table,
    config: AdapterConfig,
    *,
    dtype: Any = np.float32,
    saved: Mapping[str, np.ndarray] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    layout: str = DEFAULT_LAYOUT,
) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's names and tensors of an adapter, module by module.

    Args:
      flat: leaf path -> array, at least the adapter's leaves of every adapted layer.
      table: the backbone's name table.
      config: the adapter's configuration.
      dtype: element type to write; PEFT itself writes float32.
      saved: HF name -> tensor of modules that were trained whole.
      dtypes: element types by PEFT's name without prefix, instead of `dtype` where they are given.
      layout: transformers generation to name the modules for.

    Raises:
      ValueError: if leaves are missing, or there are adapter leaves that the targets do not cover.
      UserError: if the backbone has no such generation.
    """
    linears = resolve(config, table)
    kinds = _kinds(config.dora)
    wanted = {f"{path}/{leaf}" for path in linears for leaf in kinds.values()}
    present = {path for path in flat if path.rpartition("/")[2] in LEAVES}
    if wanted != present:
        raise ValueError(
            "adapter leaves and targets disagree: "
            f"missing {sorted(wanted - present)[:5]}, unexpected {sorted(present - wanted)[:5]}"
        )
    dtypes = dtypes or {}
    for path, linear in linears.items():
        leaves = {leaf: np.asarray(flat[f"{path}/{leaf}"]) for leaf in kinds.values()}
        for layer, module, rank in linear.adapted:
            spelled = table.spelled(module, layout)
            for kind, leaf in kinds.items():
                part = leaves[leaf][layer] if table.linears[path].stacked else leaves[leaf]
                wanted = np.dtype(dtypes.get(f"{module}.{kind}", dtype))
                tensor = _own(part, leaf, rank).T.astype(wanted)
                yield f"{PREFIX}{spelled}.{kind}", np.ascontiguousarray(tensor)
    for name, tensor in (saved or {}).items():
        wanted = np.dtype(dtypes.get(name, dtype))
        yield f"{PREFIX}{table.spelled(name, layout)}", tensor.astype(wanted)


def merge(
    base: Mapping[str, Any],
    adapter: Mapping[str, Any],
    scaling: Mapping[str, float | np.ndarray],
    *,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Fold an adapter into the kernels it stands on, on the host.

    Args:
      base: path -> array; adapter leaves in it are dropped.
      adapter: leaf path -> array, as in `Adapter.tensors`.
      scaling: path of the linear layer -> scaling; [L] where layers differ.
      dtype: element type of the merged kernels; computed in float32 and rounded once.

    Returns:
      path -> array; leaves that no adapter touches are the same objects as in `base`.
    """
    out = {path: leaf for path, leaf in base.items() if not is_adapter_leaf(path)}
    for path, factor in scaling.items():
        a, b, m = (adapter.get(f"{path}/{leaf}") for leaf in LEAVES)
        out[f"{path}/kernel"] = merge_leaf(base[f"{path}/kernel"], a, b, m, factor, dtype=dtype)
    return out


def merge_leaf(
    kernel: Any,
    lora_a: Any,
    lora_b: Any,
    magnitude: Any,
    scaling: float | np.ndarray,
    *,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Merge one leaf, layer by layer: kernel [(L,) in, out] with its adapter; see `merge`.

    Layers that the adapter leaves out keep their bits.
    """
    kernel, a, b = (np.asarray(leaf) for leaf in (kernel, lora_a, lora_b))
    m = None if magnitude is None else np.asarray(magnitude)
    out = np.empty(kernel.shape, np.dtype(dtype))
    for at in range(len(kernel)) if kernel.ndim == 3 else (...,):
        w = kernel[at].astype(np.float32)
        if not a[at].any() and not b[at].any():
            if m is None or np.array_equal(m[at], np.sqrt(np.sum(w * w, axis=0))):
                out[at] = kernel[at].astype(out.dtype)
                continue
        factor = scaling if np.ndim(scaling) == 0 else np.asarray(scaling)[at]
        w += np.float32(factor) * (a[at].astype(np.float32) @ b[at].astype(np.float32))
        if m is not None:
            norm = np.linalg.norm(w, axis=0)
            w *= m[at].astype(np.float32) / np.where(norm > 0, norm, 1)
        out[at] = w.astype(out.dtype)
    return out


def _kinds(dora: bool) -> dict[str, str]:
    return {hf: leaf for hf, leaf in _HF_LEAF.items() if dora or leaf != "magnitude"}


def _expected(
    linears: Mapping[str, AdaptedLinear], base: Mapping[str, Any], *, dora: bool
) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """`<module>.<kind>` -> (leaf path, PEFT's shape)."""
    out = {}
    for path, linear in linears.items():
        fan_in, fan_out = base[f"{path}/kernel"].shape[-2:]
        for _, module, rank in linear.adapted:
            shapes = {
                "lora_a": (rank, fan_in),
                "lora_b": (fan_out, rank),
                "magnitude": (fan_out,),
            }
            for kind, leaf in _kinds(dora).items():
                out[f"{module}.{kind}"] = (f"{path}/{leaf}", shapes[leaf])
    return out


def _saved_shape(slot: Slot, base: Mapping[str, Any]) -> tuple[int, ...]:
    shape = base[slot.rule.ours].shape
    return slot.rule.hf_shape(tuple(shape if slot.layer is None else shape[1:]))


def _layout(names: Mapping[str, str], table: Table) -> str:
    """The generation whose names a file has, going by the modules that generations call apart."""
    for layout in table.layouts:
        if layout != DEFAULT_LAYOUT and any(
            table.spelled(ours, layout) != ours and table.spelled(ours, layout) in theirs
            for ours, theirs in ((name.rsplit(".lora_")[0], file) for name, file in names.items())
        ):
            return layout
    return DEFAULT_LAYOUT


def is_adapter_leaf(path: str) -> bool:
    """Whether a leaf belongs to an adapter and not to the model under it."""
    return path.rpartition("/")[2] in (*LEAVES, SCALE)


def _adapter_names(checkpoint: Checkpoint, table: Table) -> tuple[dict[str, str], list[str]]:
    """`<module>.<kind>` in the table's spelling -> name in the file; and what is doubled."""
    names: dict[str, str] = {}
    problems = []
    for name in checkpoint.names:
        key = name.removeprefix(PREFIX)
        match = _KEY.fullmatch(key)
        if match is None:
            key = table.canonical(re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", key))
        else:
            kind = match["kind"] + ("" if match["kind"].endswith("vector") else ".weight")
            key = f"{table.canonical_module(match['module'])}.{kind}"
        if key in names:
            problems.append(f"{names[key]} and {name} are the same tensor")
        names[key] = name
    return names, problems


def _weights_file(folder: Path) -> Path:
    """The adapter's own file, also where the folder holds a whole model beside it."""
    file = folder / ADAPTER
    if file.is_file():
        return file
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        return pickled  # `Checkpoint` refuses it and says what to do
    raise UserError(f"{folder} holds no {ADAPTER}")


def _count(members: Sequence[str]) -> str:
    return f" ({len(members)} tensors)" if len(members) > 1 else ""
