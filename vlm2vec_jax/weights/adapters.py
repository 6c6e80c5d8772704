# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters: LoRA and DoRA tensors as `peft` saves them, to leaves beside our kernels and back.

Leaves of an adapted linear layer, all float32 (L only for stacked layers):
`lora_a` [L, in, r], `lora_b` [L, r, out] and, for DoRA, `magnitude` [L, out]. With
`s = alpha / r` (rslora: `alpha / sqrt(r)`) the effective kernel [in, out] is `W + s A B`; DoRA's
is `(m / n) (W + s A B)`, n being the norms of its columns.

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
    AdaptedLinear,
    AdapterConfig,
    read_config,
    resolve,
)
from vlm2vec_jax.weights.rules import Table, collapse
from vlm2vec_jax.weights.safetensors import ADAPTER, FLOATS, Checkpoint

PREFIX = "base_model.model."
LEAVES = ("lora_a", "lora_b", "magnitude")
"""Names of an adapter's leaves beside a kernel."""

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
    """A whole adapter: its configuration, `linears` by path, `tensors` by leaf path (float32)."""

    config: AdapterConfig
    linears: dict[str, AdaptedLinear]
    tensors: dict[str, np.ndarray]


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
      base: path -> anything with a shape, at least for the kernels of the adapted layers.
      config: what `read_config(folder)` gave, if it was read before.

    Raises:
      UserError: from `read_config` and `resolve`, for pickled weights, and listing every tensor
        that is missing, unexpected or misshapen.
    """
    config = read_config(folder) if config is None else config
    linears = resolve(config, table)
    with Checkpoint(_weights_file(Path(folder))) as checkpoint:
        names, problems = _adapter_names(checkpoint, table)
        expected = _expected(linears, table, base, dora=config.dora)
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
        parts: dict[str, list[np.ndarray]] = {}
        for name, (leaf, _) in expected.items():
            # Our layouts of A [in, r] and B [r, out] are PEFT's transposed.
            parts.setdefault(leaf, []).append(checkpoint.read(names[name]).T.astype(np.float32))
    tensors = {
        leaf: np.stack(arrays) if table.linears[leaf.rpartition("/")[0]].stacked else arrays[0]
        for leaf, arrays in parts.items()
    }
    return Adapter(config, linears, tensors)


def adapter_tensors(
    flat: Mapping[str, Any],
    table: Table,
    config: AdapterConfig,
    *,
    dtype: Any = np.float32,
) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's names and tensors of an adapter, module by module.

    Args:
      flat: leaf path -> array, at least the adapter's leaves of every adapted layer.
      table: the backbone's name table.
      config: the adapter's configuration.
      dtype: element type to write; PEFT itself writes float32.

    Raises:
      ValueError: if leaves are missing, or there are adapter leaves that the targets do not cover.
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
    for path, linear in linears.items():
        leaves = {kind: np.asarray(flat[f"{path}/{leaf}"]) for kind, leaf in kinds.items()}
        for layer, module in enumerate(linear.modules):
            for kind, array in leaves.items():
                part = array[layer] if table.linears[path].stacked else array
                yield f"{PREFIX}{module}.{kind}", np.ascontiguousarray(part.T.astype(dtype))


def merge(
    base: Mapping[str, Any],
    adapter: Mapping[str, Any],
    scaling: Mapping[str, float],
    *,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Fold an adapter into the kernels it stands on, on the host.

    Args:
      base: path -> array; adapter leaves in it are dropped.
      adapter: leaf path -> array, as in `Adapter.tensors`.
      scaling: path of the linear layer -> scaling.
      dtype: element type of the merged kernels; computed in float32 and rounded once.

    Returns:
      path -> array; leaves that no adapter touches are the same objects as in `base`.
    """
    out = {path: leaf for path, leaf in base.items() if path.rpartition("/")[2] not in LEAVES}
    for path, factor in scaling.items():
        a, b, m = (adapter.get(f"{path}/{leaf}") for leaf in LEAVES)
        out[f"{path}/kernel"] = merge_leaf(base[f"{path}/kernel"], a, b, m, factor, dtype=dtype)
    return out


def merge_leaf(
    kernel: Any,
    lora_a: Any,
    lora_b: Any,
    magnitude: Any,
    scaling: float,
    *,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Merge one leaf, layer by layer: kernel [(L,) in, out] with its adapter; see `merge`."""
    kernel, a, b = (np.asarray(leaf) for leaf in (kernel, lora_a, lora_b))
    m = None if magnitude is None else np.asarray(magnitude)
    out = np.empty(kernel.shape, np.dtype(dtype))
    for at in range(len(kernel)) if kernel.ndim == 3 else (...,):
        w = kernel[at].astype(np.float32)
        w += np.float32(scaling) * (a[at].astype(np.float32) @ b[at].astype(np.float32))
        if m is not None:
            norm = np.linalg.norm(w, axis=0)
            w *= m[at].astype(np.float32) / np.where(norm > 0, norm, 1)
        out[at] = w.astype(out.dtype)
    return out


def _kinds(dora: bool) -> dict[str, str]:
    return {hf: leaf for hf, leaf in _HF_LEAF.items() if dora or leaf != "magnitude"}


def _expected(
    linears: Mapping[str, AdaptedLinear], table: Table, base: Mapping[str, Any], *, dora: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`<module>.<kind>` -> (leaf path, PEFT's shape)."""
    out = {}
    for path, linear in linears.items():
        fan_in, fan_out = base[f"{path}/kernel"].shape[-2:]
        shapes = {
            "lora_a": (linear.rank, fan_in),
            "lora_b": (fan_out, linear.rank),
            "magnitude": (fan_out,),
        }
        for module in linear.modules:
            for kind, leaf in _kinds(dora).items():
                out[f"{module}.{kind}"] = (f"{path}/{leaf}", shapes[leaf])
    return out


def _adapter_names(checkpoint: Checkpoint, table: Table) -> tuple[dict[str, str], list[str]]:
    """`<module>.<kind>` in the table's spelling -> name in the file; and what is doubled."""
    names: dict[str, str] = {}
    problems = []
    for name in checkpoint.names:
        key = name.removeprefix(PREFIX)
        match = _KEY.fullmatch(key)
        if match is not None:
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
