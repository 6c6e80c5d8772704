# SPDX-License-Identifier: Apache-2.0
"""The typed experiment configuration: plain dataclasses, one `check` that speaks in words.

A file under `configs/` returns a `Config` from `get_config(arg)`; the command line overrides single
fields (`--config.optim.lr=1e-4`). The field names are a contract with users: rename none of them.
Annotations are real types here (no `from __future__ import annotations`), because the command
line reads them to parse overrides.
"""

import ast
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from vlm2vec_jax.config_groups import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
    TrackingConfig,
)
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.options import OPTIONS


@dataclasses.dataclass
class Config:
    """One experiment. The defaults are the recipe of the VLM2Vec paper for Phi-3.5-Vision.

    Attributes:
      model: where training starts.
      adapter: what is trained.
      data: what is learned from.
      optim: the optimizer.
      mesh: the devices.
      packing: shapes on the device.
      checkpoint: when the state is saved.
      loss: variations of the loss.
      tracking: where the numbers go.
      eval: a small evaluation during training; the best model so far is kept in `output/best`.
      batch_size: pairs in a step, over all devices and processes.
      steps: updates in all; the schedule ends there.
      seed: decides the data order, the fresh adapter and dropout.
      temperature: cosines are divided by it.
      output: folder that receives config.json, metrics.jsonl, checkpoints/ and the model.
      grad_cache: "on" embeds chunk by chunk and keeps no activations of the others, "off" takes
        the batch in one piece, "auto" is "off" where that fits.
      attention: "xla" (exact, anywhere), "splash" (TPU), "cudnn" or "triton" (NVIDIA), or "auto"
        for what suits platform and shapes; "dense" is all logits at once, for comparisons.
      remat: what a layer keeps for its backward pass: "none" recomputes nothing, "dots" keeps
        matrix products, "full" recomputes the layer from its input, "offload" too, but that input
        waits in the host's memory; "auto" is the fastest that fits, the vision tower's as well
        (docs/scaling.md).
      remat_vision: the same for the vision tower alone; "same" as `remat`.
      log_every: steps between two lines on the console; metrics.jsonl has every step.
      profile: "START:STOP" traces these steps into `output/profile`; empty for none.
      max_skipped_steps: steps whose loss or gradient is not finite are skipped and reported; with
        one more than so many, in all, the run stops and leaves what reproduces it.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    packing: PackingConfig = dataclasses.field(default_factory=PackingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    batch_size: int = 1024
    steps: int = 2000
    seed: int = 0
    temperature: float = 0.02
    output: str = ""
    grad_cache: str = "auto"
    attention: str = "auto"
    remat: str = "auto"
    remat_vision: str = "same"
    log_every: int = 10
    profile: str = ""
    max_skipped_steps: int = 10


LISTS = (
    "data.subsets",
    "data.splits",
    "data.limits",
    "data.weights",
    "adapter.targets",
    "loss.matryoshka",
    "eval.subsets",
)
"""Fields that hold a list of names, written as a comma list."""

NOT_DECIDING = (
    "output",
    "log_every",
    "profile",
    "tracking",
    "eval",
    "max_skipped_steps",
    "checkpoint",
    "mesh",
    "packing",
    "grad_cache",
    "attention",
    "remat",
    "remat_vision",
    "loss.form",
    "loss.tile",
    "data.image_root",
    "data.follow_symlinks",
    "data.workers",
)
"""Fields (or whole groups) that decide where and how fast, not what is learned."""


_ADDED = (
    *(o.field for n, o in OPTIONS.items() if n not in ("num_crops", "max_len")),
    *("data.splits", "data.limits", "data.weights", "data.stop", "data.target_instruction"),
)
"""Fields that older versions did not have: at their default they leave the fingerprint alone."""
_ADDED_WORDS = {"adapter.dora_dropout": "fused"}
"""The same, where the default is not empty."""


def names(value: Any) -> tuple[str, ...]:
    """Read a list of names: "A,B", the text of a list or tuple, or a real one.

    Args:
      value: a comma list, a literal such as "('A', 'B')", or a sequence of strings.

    Returns:
      The names, stripped, empty ones left out, in order.

    Raises:
      UserError: if it is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        if text[:1] in ("(", "["):
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                # A shell that eats the inner quotes leaves "(A,B)".
                value = text.strip("()[]").split(",")
            value = (value,) if isinstance(value, str) else value
        else:
            value = text.split(",")
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
        raise UserError(f"expected a comma list of names, not {value!r}")
    return tuple(v.strip() for v in value if v.strip())


def read_range(text: str) -> tuple[int, int] | None:
    """`START:STOP` as (first step, last step), counted from 1, both included; None for "".

    Raises:
      UserError: if it is something else, or no step.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"profile {text!r}: give START:STOP in steps from 1, such as 10:12")
    return int(found[1]), int(found[2])


def settings(value: Any) -> dict[str, str]:
    """Read a list of settings, "A=2,B=0.5", by name in order.

    Raises:
      UserError: for an entry that is not NAME=VALUE, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for entry in names(value):
        name, mark, setting = (part.strip() for part in entry.partition("="))
        if not mark or not name or not setting:
            raise UserError(f"expected a comma list of NAME=VALUE, not {entry!r}")
        if name in found:
            raise UserError(f"{name!r} comes twice")
        found[name] = setting
    return found


def subset_names(config: Config) -> tuple[str, ...]:
    """The names in `data.subsets`; empty means every subset found."""
    return names(config.data.subsets)


def target_names(config: Config) -> tuple[str, ...]:
    """The suffixes in `adapter.targets`."""
    return names(config.adapter.targets)


def processor_options(config: Config, known: Collection[str]) -> dict[str, Any]:
    """What the configuration chooses about encoding, None where it leaves the choice open.

    A field that was left at its default is no choice to a backbone that has no such option
    (`data.num_crops` is 4 by default, and most backbones cut no crops).
    """
    values, defaults = flatten(config), flatten(Config())
    return {
        name: values[option.field] or None
        for name, option in OPTIONS.items()
        if name in known or values[option.field] != defaults[option.field]
    }


def prefix_widths(config: Config) -> tuple[int, ...]:
    """The widths in `loss.matryoshka`, rising.

    Raises:
      UserError: if one is not a whole number above 0.
    """
    words = names(config.loss.matryoshka)
    wrong = [word for word in words if not (word.isdecimal() and int(word) > 0)]
    if wrong:
        raise UserError(f"loss.matryoshka: {', '.join(map(repr, wrong))}: widths are whole numbers")
    return tuple(sorted({int(word) for word in words}))


def field_types() -> dict[str, type]:
    """Every field by its dotted path, with its type, in the order of declaration."""
    types: dict[str, type] = {}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            for inner in dataclasses.fields(field.type):
                types[f"{field.name}.{inner.name}"] = inner.type  # pyright: ignore
        else:
            types[field.name] = field.type  # pyright: ignore
    return types


def flatten(config: Config) -> dict[str, Any]:
    """Every field by its dotted path, with its value, in the order of declaration."""
    values: dict[str, Any] = {}
    for path in field_types():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        values[path] = value
    return values


def assign(config: Config, path: str, value: Any) -> None:
    """Set the field with this dotted path."""
    *group, name = path.split(".")
    setattr(getattr(config, group[0]) if group else config, name, value)


def variant(file: str, arg: str, *kinds: Collection[str]) -> tuple[str, ...]:
    """What stands behind a configuration file's colon: words with commas between, one of a kind.

    Args:
      file: for messages.
      arg: such as "7b,v5e-64".
      kinds: the words that there are, by kind.

    Returns:
      The word of each kind, "" where none was given.

    Raises:
      UserError: for unknown words, and for two of a kind.
    """
    words = [word for word in arg.split(",") if word]
    unknown = [word for word in words if not any(word in kind for kind in kinds)]
    if unknown:
        known = ", ".join(word for kind in kinds for word in kind)
        told = ", ".join(map(repr, unknown))
        raise UserError(f"{file} has no variant {told}; known are {known}")
    chosen = [[word for word in words if word in kind] for kind in kinds]
    for found in chosen:
        if len(found) > 1:
            raise UserError(f"{file}:{arg} asks for {' and '.join(found)}")
    return tuple(found[0] if found else "" for found in chosen)


def check(config: Config) -> Config:
    """Look for every mistake that shows without opening a file, and settle the form of values.

    Lists become comma lists and whole numbers in places of fractions become floats, in place.

    Args:
      config: as a config file and the command line left it.

    Returns:
      The same object.

    Raises:
      UserError: all problems in one message, each with the field, the value and what it may be.
    """
    from vlm2vec_jax import config_check

    problems = config_check.problems(config)
    raise_problems("the configuration does not work", problems)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of plain values, for config.json."""
    result = dataclasses.asdict(config)
    for path in LISTS:
        group, name = path.split(".")
        result[group][name] = ",".join(names(result[group][name]))
    return result


def from_dict(values: Mapping[str, Any]) -> Config:
    """Read what `to_dict` wrote; fields that are absent keep their defaults.

    Raises:
      UserError: naming every unknown field.
    """
    config, known, unknown = Config(), field_types(), []
    for path, value in _flat_items(values):
        if path in known:
            assign(config, path, value)
        else:
            unknown.append(f"unknown field {path}")
    raise_problems("cannot read the stored configuration", unknown)
    return config


def _flat_items(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            items += [(f"{name}.{inner}", v) for inner, v in value.items()]
        else:
            items.append((name, value))
    return items


def deciding(config: Config) -> dict[str, Any]:
    """The fields that decide what is learned, by dotted path, in one form each.

    Left out are `NOT_DECIDING`. A folder's path is taken as written, without a trailing slash.
    """
    kept = {}
    types = field_types()
    for path, value in flatten(config).items():
        if path in NOT_DECIDING or path.split(".")[0] in NOT_DECIDING:
            continue
        if path in LISTS:
            value = ",".join(names(value))
        elif path in ("model.path", "model.adapter", "data.path") and value:
            value = os.path.normpath(value)
        elif types[path] is float:
            value = float(value)
        kept[path] = value
    return kept


def fingerprint(config: Config) -> str:
    """A SHA-256 (hex) of the fields that decide what is learned; stable across Python versions.

    Two configurations with one fingerprint train the same model up to rounding and dropout draws.
    """
    values = {
        path: v
        for path, v in deciding(config).items()
        if (v or path not in _ADDED) and v != _ADDED_WORDS.get(path)
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def diff(before: Config, now: Config, *, deciding_only: bool = False) -> list[str]:
    """Say field by field what changed, for a message on resume.

    Args:
      before: the stored configuration.
      now: the one asked for.
      deciding_only: leave out the fields that do not decide what is learned.

    Returns:
      One line per field that differs, as "optim.lr: 0.001 before, 0.002 now".
    """
    a, b = (deciding(c) if deciding_only else _settled(c) for c in (before, now))
    return [f"{p}: {a[p]!r} before, {b[p]!r} now" for p in a if a[p] != b[p]]


def _settled(config: Config) -> dict[str, Any]:
    return {p: ",".join(names(v)) if p in LISTS else v for p, v in flatten(config).items()}
