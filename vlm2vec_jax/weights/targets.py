# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a model an adapter stands on, with which rank and scaling.

Behaviour followed: PEFT 0.11 to 0.21 (`tuners/tuners_utils`: `check_target_module_exists`;
`utils/other`: `get_pattern_key`, `_set_trainable`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.weights.rules import DEFAULT_LAYOUT, Rule, Table, collapse

if TYPE_CHECKING:
    from vlm2vec_jax.weights.adapter_config import AdapterConfig

Targets = tuple[str, ...] | str
"""Module names or their endings; or one regular expression; or "all-linear"."""


@dataclasses.dataclass(frozen=True)
class AdaptedLinear:
    """One adapted leaf.

    Layers that share a stacked leaf may have different ranks: the leaf is as wide as the largest
    and zero beyond a layer's own rank, which changes no result and no gradient.

    Attributes:
      modules: HF modules, one per layer of the leaf.
      ranks: of each; 0 where the adapter leaves a layer out.
      alphas: of each.
      scalings: of each, alpha / r or alpha / sqrt(r); 0 where there is no adapter.
    """

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scalings: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The largest rank: the width of the leaves."""
        return max(self.ranks)

    @property
    def scaling(self) -> float | np.ndarray:
        """A number where all adapted layers share it, else float32 [L]."""
        own = {s for s, rank in zip(self.scalings, self.ranks, strict=True) if rank}
        return own.pop() if len(own) == 1 else np.asarray(self.scalings, np.float32)

    @property
    def adapted(self) -> list[tuple[int, str, int]]:
        """(layer, HF module, rank) of the layers with an adapter."""
        triples = zip(range(len(self.modules)), self.modules, self.ranks, strict=True)
        return [triple for triple in triples if triple[2]]


def resolve(config: AdapterConfig, table: Table) -> dict[str, AdaptedLinear]:
    """The linear layers that an adapter stands on, with ranks and scalings.

    Raises:
      UserError: as `match_targets`.
    """
    out = {}
    for path, (modules, hit) in _matched_modules(config, table).items():
        ranks, alphas, scalings = [], [], []
        for module in modules:
            # Patterns may be written with the names of the generation that the targets have.
            rank = int(_pattern_value(config.rank_pattern, hit.get(module, ()), config.rank))
            alpha = _pattern_value(config.alpha_pattern, hit.get(module, ()), config.alpha)
            ranks.append(rank if module in hit else 0)
            alphas.append(alpha)
            scaling = alpha / math.sqrt(rank) if config.rslora else alpha / rank
            scalings.append(scaling if module in hit else 0.0)
        out[path] = AdaptedLinear(tuple(modules), tuple(ranks), tuple(alphas), tuple(scalings))
    return out


def saved_tensors(config: AdapterConfig, table: Table) -> list[str]:
    """HF names of the tensors of the modules that were trained whole (`modules_to_save`).

    PEFT's rule: a module whose name ends with an entry, and everything below it.

    Raises:
      UserError: for entries that name no module of this model.
    """
    found: dict[str, None] = {}
    problems = []
    for entry in config.saved:
        pattern = re.compile(rf"(.*){re.escape(entry)}\..*")
        names = [name for name in table.slots if pattern.fullmatch(name)]
        if not names:
            problems.append(f"{entry} is the end of no module's name")
        found |= dict.fromkeys(names)
    raise_problems("modules_to_save of the adapter do not fit this model", problems)
    return [name for name in table.slots if name in found]


def listed(
    config: AdapterConfig, table: Table, layout: str | None
) -> tuple[Any, dict[str, int], dict[str, float]]:
    """Targets and patterns for a generation: as they are if they mean the same there, else by name.

    Endings such as `q_proj` do; whole names and regular expressions may not. Patterns must also
    mean the same to every PEFT from 0.11 on: see `_old_values`.
    """
    layout = layout or DEFAULT_LAYOUT
    linears = resolve(config, table)
    plain = dataclasses.replace(config, exclude=())
    other = {
        table.spelled(module, layout): module
        for rule in table.by_leaf.values()
        for module in (_modules(rule) if rule.hf.endswith(".weight") else ())
    }
    wanted = {
        module: (rank, alpha)
        for linear in linears.values()
        for module, rank, alpha in zip(linear.modules, linear.ranks, linear.alphas, strict=True)
        if rank
    }

    def meant(spelled: str, module: str) -> tuple[float, float] | None:
        rule = table.slots[f"{module}.weight"].rule
        if not _hits(spelled, plain, rule, table, canonical=module):
            return None
        return (
            int(_pattern_value(config.rank_pattern, (spelled,), config.rank)),
            _pattern_value(config.alpha_pattern, (spelled,), config.alpha),
        )

    found = {m: value for name, m in other.items() if (value := meant(name, m)) is not None}
    spelled = {module: name for name, module in other.items()}
    old = {module: _old_values(config, spelled[module]) for module in wanted}
    if found == wanted == old and config.layers is None:
        return config.targets, dict(config.rank_pattern), dict(config.alpha_pattern)
    odd = {m: values for m, values in wanted.items() if values != (config.rank, config.alpha)}
    # Each in both: an old PEFT takes rank and alpha from one and the same pattern.
    ranks = {spelled[m]: rank for m, (rank, _) in odd.items()}
    alphas = {spelled[m]: alpha for m, (_, alpha) in odd.items()}
    return [spelled[m] for m in wanted], ranks, alphas


def _old_values(config: AdapterConfig, module: str) -> tuple[int, float]:
    """Rank and alpha that PEFT up to 0.13 gives a module (`LoraModel._create_and_replace`).

    It looks for one pattern among those of both kinds, which must follow a dot, and takes both
    values from it; without one, from an entry that is the module's whole name.
    """
    keys = [*config.rank_pattern, *config.alpha_pattern]
    key = next((key for key in keys if re.match(rf".*\.{key}$", module)), module)
    rank, alpha = config.rank_pattern, config.alpha_pattern
    return int(rank.get(key, config.rank)), alpha.get(key, config.alpha)


def _matched_modules(
    config: AdapterConfig, table: Table
) -> dict[str, tuple[list[str], dict[str, tuple[str, ...]]]]:
    """Linear path -> (its modules, those that match with their spelling)."""
    best: dict[str, tuple[list[str], dict[str, tuple[str, ...]]]] = {}
    for layout in (DEFAULT_LAYOUT, *(name for name, pairs in table.layouts.items() if pairs)):
        out, problems = _matched(config, table, layout)
        raise_problems(f"adapter targets {_shown(config.targets)} do not fit this model", problems)
        # Targets in another generation's names match best there; endings match everywhere.
        if _count(out) > _count(best):
            best = out
    if not best:
        known = sorted({rule.hf.split(".")[-2] for rule in table.linears.values()})
        raise UserError(
            f"adapter targets {_shown(config.targets)} do not fit this model: no linear layer "
            f"matches; their names end in {', '.join(known)}"
        )
    return best


def _count(matched: Mapping[str, tuple[list[str], Mapping[str, Any]]]) -> int:
    return sum(len(hit) for _, hit in matched.values())


def _matched(config: AdapterConfig, table: Table, layout: str):
    problems: list[str] = []
    out: dict[str, tuple[list[str], dict[str, tuple[str, ...]]]] = {}
    for path, rule in table.by_leaf.items():
        if not rule.hf.endswith(".weight"):
            continue
        modules = _modules(rule)
        hit = {}
        for module in modules:
            name = table.spelled(module, layout)
            if _hits(name, config, rule, table, canonical=module):
                hit[module] = (name,)
        if not hit:
            continue
        linear = path.removesuffix("/kernel")
        if linear not in table.linears:
            # "all-linear" means linear layers only; a name or a pattern that hits more is refused.
            label = collapse(modules)[0][0]
            problems.append(f"{label} is no linear layer; adapters stand on linear layers only")
        else:
            out[linear] = (modules, hit)
    return out, problems


def _modules(rule: Rule) -> list[str]:
    return [name.removesuffix(".weight") for name in rule.names()]


def _hits(module: str, config: AdapterConfig, rule: Rule, table: Table, *, canonical: str) -> bool:
    """PEFT's `check_target_module_exists`."""
    if _named(module, config.exclude):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", module) for m in config.saved):
        return False
    if config.targets == "all-linear":
        return rule.linear and canonical not in table.heads
    if not _named(module, config.targets):
        return False
    if config.layers is None or isinstance(config.targets, str):
        return True
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in patterns:
        start = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        match = re.match(rf"{start}{pattern}\.(\d+)\.", module)
        if match:
            return int(match[1]) in config.layers
    return False


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


def _pattern_value(
    patterns: Mapping[str, float], spellings: Sequence[str], default: float
) -> float:
    """PEFT's `get_pattern_key`: the first pattern that ends the module's name at a dot."""
    for pattern, value in patterns.items():
        for module in spellings:
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    return value
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression: {error}") from None
    return default
