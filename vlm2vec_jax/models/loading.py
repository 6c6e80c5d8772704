# SPDX-License-Identifier: Apache-2.0
"""A model in memory: built abstractly, filled from a checkpoint, adapted, split for training.

Modules are nnx modules used as plain pytrees; leaves are named by path (`decoder/norm/scale`).
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlm2vec_jax import options as options_lib
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.base import Backbone, Processor
from vlm2vec_jax.models.folders import ModelSource, of_the_reference
from vlm2vec_jax.models.registry import backbone_of
from vlm2vec_jax.nn.linear import linears
from vlm2vec_jax.nn.quantization import is_quantized
from vlm2vec_jax.parallel import sharding
from vlm2vec_jax.weights.load import load as load_leaves
from vlm2vec_jax.weights.safetensors import Checkpoint
from vlm2vec_jax.weights.targets import AdaptedLinear


@dataclasses.dataclass
class Model:
    """A model with what is needed to use it.

    Attributes:
      backbone: its family.
      config: the family's configuration.
      folder: the HF folder that it came from.
      module: nnx module; called as `module(batch, compute, key=...)`.
      remarks: what a user should be told about how the model is used.
    """

    backbone: Backbone
    config: Any
    folder: Path
    module: Any
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def table(self):
        """HF names of the leaves."""
        return self.backbone.table(self.config)


def abstract_model(folder: str | Path) -> Model:
    """The model of a folder as shapes only: no weights are read, no memory is taken."""
    backbone = backbone_of(folder)
    config = backbone.read_config(Path(folder))
    graphdef, state = _shapes(backbone.build, config)
    # A copy: what is merged keeps the variables that it is given, and owners fill theirs.
    module = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    return Model(backbone, config, Path(folder), module)


@functools.lru_cache(maxsize=16)
def _shapes(build: Callable[..., nnx.Module], config: Any) -> Any:
    """A module of this configuration, split; tracing it takes longer than most of a test."""
    return nnx.split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))


def load_model(
    folder: str | Path,
    *,
    dtype_of: Callable[[str], Any],
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Read a model folder's weights straight into (sharded) device arrays.

    Args:
      folder: a local HF folder.
      dtype_of: leaf path -> dtype to hold it in.
      mesh: spread the leaves by the backbone's rules; None puts them on the first device.

    Raises:
      UserError: for whatever is wrong with the folder, everything of a kind in one message.
    """
    model = abstract_model(folder)
    flat = flatten(model.module)
    placed = sharding.shardings(flat, mesh, model.backbone.sharding) if mesh is not None else {}
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype_of(path), sharding=placed.get(path))
        for path, leaf in flat.items()
    }
    with Checkpoint(Path(folder)) as checkpoint:
        leaves = load_leaves(checkpoint, model.table, abstract, check_finite=True)
        model.module = fill(model.module, leaves)
    return model


def open_processor(model: Model, source: ModelSource, given: Mapping[str, Any]) -> Processor:
    """The processor of a model.

    Args:
      model: of the folder `source.base`; gets a remark where VLM2Vec's own use is followed.
      source: where the model comes from; its record says how it was trained.
      given: processor options that the user chose; None is not chosen.

    Raises:
      UserError: for options that mean nothing to this backbone, and bad files.
    """
    backbone = model.backbone
    recorded = (source.record or {}).get("processor", {})
    published = backbone.reference_options.get(of_the_reference(source) or "", {})
    recorded = published or recorded
    options = options_lib.choose(backbone.name, backbone.options, given, recorded)
    if published:
        told = ", ".join(f"{name}={options[name]}" for name in published)
        model.remarks.append(
            f"{source.named} is taken for one of VLM2Vec's own checkpoints: {told}. Options of "
            f"these names choose otherwise"
        )
    return backbone.processor(source.base, model.config, **options)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a module or a State by path."""
    state = tree if isinstance(tree, nnx.State) else nnx.state(tree)
    # Through the tree, because a Variable that holds a shape cannot be indexed.
    pairs = nnx.to_flat_state(state)
    return {"/".join(map(str, path)): jax.tree.leaves(leaf)[0] for path, leaf in pairs}


def fill(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The module or State with other leaves; the paths must be the same."""
    if not isinstance(tree, nnx.State):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, fill(state, leaves))
    old = nnx.to_flat_state(tree)
    paths = {"/".join(map(str, path)) for path, _ in old}
    if paths != set(leaves):
        raise ValueError(f"paths differ: {sorted(paths ^ set(leaves))[:5]}")
    new = [(path, leaf.replace(leaves["/".join(map(str, path))])) for path, leaf in old]
    return nnx.from_flat_state(new)


def add_adapter(
    module: Any,
    adapted: Mapping[str, AdaptedLinear],
    *,
    dora: bool,
    dropout: float,
    fused_dropout: bool = False,
    seed: int = 0,
    tensors: Mapping[str, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Put adapters on linear layers, in place.

    Args:
      module: the model; works on shapes (inside `nnx.eval_shape`), too.
      adapted: linear path -> rank and scaling.
      dora: with magnitudes.
      dropout: of the adapter's input, in training.
      fused_dropout: how DoRA drops, see `nn.linear.Linear`.
      seed: of new adapters; each layer draws from its own path, so targets do not disturb
        each other.
      tensors: leaves of a trained adapter by path; None makes new ones.
      mesh: adapters are whole on every chip of it.
    """
    place = None
    if mesh is not None:
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    layers = linears(module)
    made = {}
    if tensors is None:
        # Under jit, so that no float32 copy of a kernel is ever written; all in one program.
        make = jax.jit(_new_adapters, static_argnums=(1, 2, 3), out_shardings=place)
        kernels = {path: layers[path].kernel[...] for path in adapted}
        ranks = tuple((path, spec.ranks) for path, spec in adapted.items())
        made = make(kernels, ranks, dora, seed)
    for path, spec in adapted.items():
        if tensors is not None:
            names = ("lora_a", "lora_b", "magnitude")[: 3 if dora else 2]
            leaves = {name: jnp.asarray(tensors[f"{path}/{name}"]) for name in names}
            leaves = jax.device_put(leaves, place) if place is not None else leaves
        else:
            leaves = made[path]
        scale = spec.scaling
        if not isinstance(scale, float):
            scale = jnp.asarray(scale)
            scale = jax.device_put(scale, place) if place is not None else scale
        layers[path].set_adapter(leaves, scale=scale, dropout=dropout, fused_dropout=fused_dropout)


def replace_saved(model: Model, saved: Mapping[str, Any]) -> None:
    """Put the tensors of modules that an adapter stores whole into a model, in place.

    Args:
      model: not adapted yet.
      saved: HF name -> tensor, as in `weights.adapters.Adapter.saved`.
    """
    table = model.table
    leaves = flatten(model.module)
    for name, tensor in saved.items():
        rules = [table.slots[name].rule, *(r for r in table.rules if r.tied_to == name)]
        for rule in rules:
            old = leaves[rule.ours]
            new = jnp.asarray(rule.to_ours(tensor)).astype(old.dtype)
            layer = table.slots[name].layer
            new = new if layer is None else old.at[layer].set(new)
            leaves[rule.ours] = jax.device_put(new, old.sharding)
    model.module = fill(model.module, leaves)


def _new_adapters(
    kernels: Mapping[str, jax.Array],
    ranks: tuple[tuple[str, tuple[int, ...]], ...],
    dora: bool,
    seed: int,
) -> dict[str, dict[str, jax.Array]]:
    """Leaves by linear path; each layer draws from its own."""
    return {
        path: _new_adapter(
            kernels[path],
            jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())),
            own,
            dora,
        )
        for path, own in ranks
    }


def _new_adapter(
    kernel: jax.Array, key: jax.Array, ranks: tuple[int, ...], dora: bool
) -> dict[str, jax.Array]:
    """A normal with deviation 1/r (PEFT's gaussian), B zero, magnitudes the norms of W."""
    *stack, din, dout = kernel.shape
    rank = max(ranks)
    if len(set(ranks)) == 1:
        width = jnp.full((), rank, jnp.float32)
    else:
        width = jnp.asarray(ranks, jnp.float32)[:, None, None]
    a = jax.random.normal(key, (*stack, din, rank), jnp.float32) / jnp.maximum(width, 1)
    leaves = {
        "lora_a": jnp.where(jnp.arange(rank) < width, a, 0),
        "lora_b": jnp.zeros((*stack, rank, dout), jnp.float32),
    }
    if dora:
        wide = kernel.astype(jnp.float32)
        leaves["magnitude"] = jnp.sqrt(jnp.sum(wide * wide, axis=-2))
    return leaves


def split_trainable(model: Model, *, full: bool) -> tuple[Any, nnx.State, nnx.State]:
    """(graphdef, trained leaves, frozen leaves).

    Args:
      model: adapted or not.
      full: train every leaf that influences an embedding; otherwise the adapters on such leaves.

    Raises:
      UserError: if the weights were quantized: those are for inference.
    """
    if is_quantized(model.module):
        raise UserError(
            "weights in 8 bits are for inference and cannot be trained, nor can an adapter on "
            "them; load the model without quantize"
        )

    def trained(path, variable) -> bool:
        name = "/".join(map(str, path))
        if not isinstance(variable, nnx.Param if full else nnx.LoRAParam):
            return False
        return not model.backbone.is_unused(name)

    graphdef, params, frozen = nnx.split(model.module, trained, ...)
    return graphdef, params, frozen
