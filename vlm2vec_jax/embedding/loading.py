# SPDX-License-Identifier: Apache-2.0
"""Loads a model to embed with: base, adapter or trained leaves, on the devices that are meant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.folders import ModelSource
from vlm2vec_jax.models.loading import (
    Model,
    add_adapter,
    fill,
    flatten,
    load_model,
    replace_saved,
    split_trainable,
)
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.record import identity
from vlm2vec_jax.training.checkpoint import Checkpoints
from vlm2vec_jax.weights.adapter_config import base_difference, config_from_dict, resolve
from vlm2vec_jax.weights.adapters import load_adapter


def load_source(
    source: ModelSource, *, dtype: str, mesh: Mesh | None
) -> tuple[Model, dict[str, Any]]:
    """A model with its adapter or trained leaves in place, and what identifies these."""
    model = load_model(source.base, dtype_of=lambda path: jnp.dtype(dtype), mesh=mesh)
    if source.adapter is not None:
        adapter = load_adapter(source.adapter, model.table, flatten(model.module))
        difference = base_difference(adapter.config, source.base)
        if difference:
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


def mesh_of(devices: int | str | Sequence[jax.Device] | None, mesh: Mesh | None) -> Mesh | None:
    """A mesh of the devices that the user means, each with a whole copy of the model."""
    if devices is None:
        return mesh
    if mesh is not None:
        raise UserError("both devices and mesh are given; a mesh names its devices already")
    there = jax.local_devices()
    if devices == "all":
        chosen = there
    elif isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(there):
            raise UserError(f"devices={devices}, but this process has {len(there)}")
        chosen = there[:devices]
    elif isinstance(devices, str) or not isinstance(devices, Sequence) or not len(devices):
        raise UserError(f'devices must be a number, a list of jax devices or "all": {devices!r}')
    else:
        chosen = list(devices)
    return make_mesh(devices=chosen)
