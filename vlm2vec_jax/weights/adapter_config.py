# SPDX-License-Identifier: Apache-2.0
"""`adapter_config.json`: what an adapter is, which linear layers it stands on, at what scaling.

Behaviour followed: PEFT 0.11 to 0.21 (`tuners/lora/config`, `tuners/tuners_utils`). Settings that
would change the numbers and are not implemented are errors that name them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.weights.rules import Rule, Table, collapse

CONFIG = "adapter_config.json"
Targets = tuple[str, ...] | str
"""Module names or their endings; or one regular expression; or "all-linear"."""

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
    base: str | None = None
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`lora` or `dora`."""
        return "dora" if self.dora else "lora"


@dataclasses.dataclass(frozen=True)
class AdaptedLinear:
    """One adapted leaf: rank, alpha and scaling, and the HF modules in the order of its layers."""

    rank: int
    alpha: float
    scaling: float
    modules: tuple[str, ...]


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

    Args:
      targets: a list, a regular expression or "all-linear".
      table: the backbone's name table.
      exclude: the same for layers to leave out (not "all-linear").

    Raises:
      UserError: if nothing matches, only some layers of a stack match (they share one leaf), or
        something other than a linear layer matches.
    """
    return list(_matched_modules(_targets(targets), table, exclude))


def resolve(config: AdapterConfig, table: Table) -> dict[str, AdaptedLinear]:
    """The linear layers that an adapter stands on, with rank and scaling.

    Raises:
      UserError: as `match_targets`, and if layers of one stack have different ranks or alphas.
    """
    out, problems = {}, []
    for path, modules in _matched_modules(config.targets, table, config.exclude).items():
        values = {
            (
                int(_pattern_value(config.rank_pattern, module, config.rank)),
                _pattern_value(config.alpha_pattern, module, config.alpha),
            )
            for module in modules
        }
        if len(values) > 1:
            problems.append(
                f"{collapse(modules)[0][0]}: ranks and alphas differ between layers "
                f"({', '.join(f'r={r} alpha={a}' for r, a in sorted(values))})"
            )
            continue
        rank, alpha = values.pop()
        scaling = alpha / math.sqrt(rank) if config.rslora else alpha / rank
        out[path] = AdaptedLinear(rank, alpha, scaling, modules)
    raise_problems(
        "layers that are stacked here need one rank and alpha; rank_pattern and alpha_pattern "
        "ask for several",
        problems,
    )
    return out


def base_difference(config: AdapterConfig, base: str | Path) -> str | None:
    """A sentence if the adapter names another base model than the one given, else None.

    Only the last part of paths and ids is compared, since a folder is often named after the id.
    """
    recorded = (config.base or "").rstrip("/")
    if not recorded or Path(recorded).name == Path(base).name:
        return None
    return f"the adapter was trained on {recorded}; it is applied to {base}"


def peft_config(
    config: AdapterConfig, *, base: str | None = None, table: Table | None = None
) -> dict[str, Any]:
    """`adapter_config.json` with the keys that PEFT 0.11 to 0.21 all accept.

    Args:
      config: of the adapter; settings it does not decide are kept from `config.raw`.
      base: id or path of the base model; by default what the adapter recorded.
      table: needed if layers are excluded, which old versions cannot say: the matched modules are
        then listed one by one.
    """
    targets: Any = config.targets
    if config.exclude:
        if table is None:
            raise ValueError("excluded layers can only be written out with the name table")
        targets = [m for linear in resolve(config, table).values() for m in linear.modules]
    raw = config.raw
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": raw.get("auto_mapping"),
        "base_model_name_or_path": config.base if base is None else base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": raw.get("init_lora_weights", "gaussian"),
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
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


def _matched_modules(
    targets: Targets, table: Table, exclude: Targets
) -> dict[str, tuple[str, ...]]:
    problems: list[str] = []
    out: dict[str, tuple[str, ...]] = {}
    for path, rule in table.by_leaf.items():
        if not rule.hf.endswith(".weight"):
            continue
        modules = _modules(rule)
        hit = [m for m in modules if _hits(m, targets, rule, table) and not _named(m, exclude)]
        if not hit:
            continue
        label = collapse(modules)[0][0]
        linear = path.removesuffix("/kernel")
        if linear not in table.linears:
            # "all-linear" means linear layers only; a name or a pattern that hits more is refused.
            problems.append(f"{label} is no linear layer; adapters stand on linear layers only")
        elif len(hit) < len(modules):
            problems.append(
                f"only {len(hit)} of the {len(modules)} layers {label} match; layers that are "
                "stacked here can only be adapted together"
            )
        else:
            out[linear] = tuple(modules)
    if not out and not problems:
        known = sorted({rule.hf.split(".")[-2] for rule in table.linears.values()})
        problems.append(f"no linear layer matches; their names end in {', '.join(known)}")
    raise_problems(f"adapter targets {_shown(targets)} do not fit this model", problems)
    return out


def _modules(rule: Rule) -> list[str]:
    return [name.removesuffix(".weight") for name in rule.names()]


def _hits(module: str, targets: Targets, rule: Rule, table: Table) -> bool:
    if targets == "all-linear":
        return rule.linear and module not in table.heads
    return _named(module, targets)


def _named(module: str, targets: Targets) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error as error:
            raise UserError(
                f"adapter targets {targets!r}: no regular expression: {error}"
            ) from None
    return any(module == entry or module.endswith(f".{entry}") for entry in targets)


def _shown(targets: Targets) -> str:
    return repr(targets) if isinstance(targets, str) else f"[{', '.join(targets)}]"


def _pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's `get_pattern_key`: the first pattern that ends the module's name at a dot."""
    for pattern, value in patterns.items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from None
    return default
