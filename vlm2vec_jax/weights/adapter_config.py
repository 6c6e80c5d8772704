# SPDX-License-Identifier: Apache-2.0
"""`adapter_config.json`: what an adapter is, which linear layers it stands on, at what scaling.

Behaviour followed: PEFT 0.11 to 0.21 (`tuners/lora/config`, `tuners/tuners_utils`). Settings that
would change the numbers and are not implemented are errors that name them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.weights.rules import Table
from vlm2vec_jax.weights.targets import Targets, listed, resolve

CONFIG = "adapter_config.json"
# Settings that change nothing about the weights, whatever they say.
_INERT = {
    "auto_mapping",
    "peft_version",
    "task_type",
    "inference_mode",
    "revision",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
    "ephemeral_gpu_offload",
}
# Settings with a value under which this code gives PEFT's result.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Only how the adapter began; other methods (pissa, olora, loftq) change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


_READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says, as far as it decides the numbers.

    Attributes:
      rank: r, where `rank_pattern` says nothing else.
      alpha: where `alpha_pattern` says nothing else.
      dropout: of the adapter's input while training.
      targets: which linear layers.
      exclude: layers left out even if they are targets.
      dora: weight-decomposed (with magnitudes).
      rslora: scaling alpha/sqrt(r).
      rank_pattern, alpha_pattern: module name, or the regular expression of its ending -> value.
      saved: names of modules that were trained whole and are stored beside the adapter.
      layers: numbers of the layers that are adapted; None is all.
      layers_pattern: names of the lists that `layers` counts in; () is any.
      base: base model's id or path as the adapter records it.
      raw: the whole file, so that a written adapter keeps what it does not decide.
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    targets: Targets = ()
    exclude: Targets = ()
    dora: bool = False
    rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    saved: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    base: str | None = None
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`lora` or `dora`."""
        return "dora" if self.dora else "lora"


def read_config(folder: str | Path) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises:
      UserError: if it is absent or unreadable, or asks for something that is not implemented;
        all such settings in one message.
    """
    file = Path(folder) / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it must hold a JSON object")
    except FileNotFoundError:
        raise UserError(f"{file} is missing: is {folder} a PEFT adapter?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    return config_from_dict(raw, origin=str(file))


def config_from_dict(raw: Mapping[str, Any], *, origin: str = CONFIG) -> AdapterConfig:
    """Check the fields of an `adapter_config.json`; see `read_config` for what it raises."""
    problems: list[str] = []
    for name, value in raw.items():
        if name in _ACCEPTED:
            if not any(value is good or value == good for good in _ACCEPTED[name]):
                problems.append(f"{name} = {value!r} is not supported")
        elif name not in _INERT and name not in _READ and value not in (None, False, {}, []):
            problems.append(f"{name} = {value!r} is not supported")

    def get(name: str, default: Any, good) -> Any:
        value = raw.get(name, default)
        if not good(value):
            problems.append(f"{name} = {value!r} makes no sense")
            return default
        return value

    config = AdapterConfig(
        rank=get("r", 8, lambda v: _number(v) and v == int(v) > 0),
        alpha=get("lora_alpha", 8, _number),
        dropout=get("lora_dropout", 0.0, lambda v: _number(v) and 0 <= v < 1),
        targets=_targets(get("target_modules", (), _names_or_pattern)),
        exclude=_targets(get("exclude_modules", None, lambda v: v is None or _names_or_pattern(v))),
        dora=bool(get("use_dora", False, lambda v: v in (True, False, None))),
        rslora=bool(get("use_rslora", False, lambda v: v in (True, False, None))),
        rank_pattern=get("rank_pattern", {}, _numbers) or {},
        alpha_pattern=get("alpha_pattern", {}, _numbers) or {},
        saved=tuple(get("modules_to_save", None, _names) or ()),
        layers=_layers(get("layers_to_transform", None, _layer_numbers)),
        layers_pattern=_words(
            get("layers_pattern", None, lambda v: v is None or _names_or_pattern(v) or v == "")
        ),
        base=raw.get("base_model_name_or_path"),
        raw=dict(raw),
    )
    raise_problems(f"{origin} describes an adapter that this code cannot apply", problems)
    return config


def match_targets(
    targets: Targets | Sequence[str], table: Table, *, exclude: Targets = ()
) -> list[str]:
    """Which of our linear layers PEFT would adapt: their paths, in the table's order.

    PEFT's rule on HF module names: a list matches a module that equals an entry or ends with "."
    and the entry; a string is a regular expression for the whole name; "all-linear" is every
    linear layer but the output head. Every layer of the vision tower counts, unused ones too.
    Names of the table are tried first, then those of other transformers generations.

    Args:
      targets: a list, a regular expression or "all-linear".
      table: the backbone's name table.
      exclude: the same for layers to leave out (not "all-linear").

    Raises:
      UserError: if nothing matches, or something other than a linear layer matches.
    """
    return list(resolve(AdapterConfig(targets=_targets(targets), exclude=exclude), table))


def base_difference(config: AdapterConfig, base: str | Path) -> str | None:
    """A sentence if the adapter names another base model than the one given, else None.

    Only the last part of paths and ids is compared, since a folder is often named after the id.
    """
    recorded = (config.base or "").rstrip("/")
    if not recorded or Path(recorded).name == Path(base).name:
        return None
    return f"the adapter was trained on {recorded}; it is applied to {base}"


def peft_config(
    config: AdapterConfig,
    *,
    base: str | None = None,
    table: Table | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """`adapter_config.json` with the keys that PEFT 0.11 to 0.21 all accept.

    Args:
      config: of the adapter; settings it does not decide are kept from `config.raw`.
      base: id or path of the base model; by default what the adapter recorded.
      table: needed if layers are excluded, which old versions cannot say: the matched modules are
        then listed one by one.
      layout: transformers generation whose module names are wanted; None leaves targets and
        patterns as they came, unless an old PEFT would read the patterns otherwise.
    """
    targets: Any = config.targets
    rank_pattern, alpha_pattern = dict(config.rank_pattern), dict(config.alpha_pattern)
    layers: Any = None if config.layers is None else list(config.layers)
    patterns = table is not None and (rank_pattern or alpha_pattern)
    if config.exclude or layout is not None or patterns:
        if table is None:
            raise ValueError("layers can only be listed one by one with the name table")
        targets, rank_pattern, alpha_pattern = listed(config, table, layout)
        layers = None
    raw = config.raw
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": raw.get("auto_mapping"),
        "base_model_name_or_path": config.base if base is None else base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": raw.get("init_lora_weights", "gaussian"),
        "layer_replication": None,
        "layers_pattern": (list(config.layers_pattern) or None) if layers is not None else None,
        "layers_to_transform": layers,
        "loftq_config": {},
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": list(config.saved) or None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": rank_pattern,
        "revision": raw.get("revision"),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "task_type": raw.get("task_type"),
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_number, value.values())))


def _names_or_pattern(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _targets(value: Any) -> Targets:
    return value if isinstance(value, str) else tuple(value or ())


def _names(value: Any) -> bool:
    return value is None or (
        isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    )


def _layer_numbers(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return value is None or all(_number(v) and v == int(v) >= 0 for v in values)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    return tuple(map(int, value)) if isinstance(value, (list, tuple)) else (int(value),)


def _words(value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)
