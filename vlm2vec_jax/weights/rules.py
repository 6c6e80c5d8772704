# SPDX-License-Identifier: Apache-2.0
"""The name table: which tensor of a Hugging Face checkpoint is which leaf of ours, and how.

A `Table` is data and works in both directions. A `Rule` names one HF tensor (or one per layer:
`{l}`) and one leaf. The operations are leading singleton axes and a permutation, so that every
rule can be inverted exactly and a slice of a leaf is a slice of each HF tensor behind it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError

Index = tuple[slice, ...]

DEFAULT_LAYOUT = "4.46"
"""The transformers generation whose names all later ones still load (see `Table.layouts`)."""
_SPELLINGS = 64
"""Spellings of one name that are tried at most, so that renames which only grow a name end."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf and the HF tensor, or the stack of HF tensors, that fills it.

    Attributes:
      hf: HF name; `{l}` stands for the number of the layer.
      ours: path of the leaf. With `{l}` in `hf` the leaf leads with a layer axis.
      permute: axes of `numpy.transpose` from HF to ours, e.g. (1, 0) for a linear layer
        ([out, in] to [in, out]), (2, 3, 1, 0) for a convolution; None keeps the order.
      layers: HF layer numbers [start, stop) that are stacked in this leaf.
      lead_ones: singleton axes in front of the HF tensor that the leaf does not have.
      tied_to: HF name of the tensor that this one equals by definition (tied embeddings): the
        leaf is read from there, a copy in the file is checked, and none is written.
    """

    hf: str
    ours: str
    permute: tuple[int, ...] | None = None
    layers: tuple[int, int] | None = None
    lead_ones: int = 0
    tied_to: str | None = None

    def __post_init__(self) -> None:
        if ("{l}" in self.hf) != (self.layers is not None):
            raise ValueError(f"rule {self.hf}: a range of layers goes with {{l}} in the name")
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"rule {self.hf}: {self.layers} is not a range of layers")
        if self.layers is not None and self.tied_to is not None:
            raise ValueError(f"rule {self.hf}: a stack cannot be tied")
        if self.permute is not None and sorted(self.permute) != list(range(len(self.permute))):
            raise ValueError(f"rule {self.hf}: {self.permute} is not a permutation")

    @property
    def linear(self) -> bool:
        """Whether the leaf is the kernel of a linear layer (which adapters can stand on)."""
        return self.permute == (1, 0) and self.hf.endswith(".weight")

    @property
    def stacked(self) -> bool:
        """Whether the leaf leads with a layer axis."""
        return self.layers is not None

    @property
    def depth(self) -> int:
        """How many HF tensors the leaf holds."""
        return 1 if self.layers is None else self.layers[1] - self.layers[0]

    @property
    def rows_axis(self) -> int:
        """The axis of the leaf (without its layer axis) along which the HF tensor has its rows."""
        return 0 if self.permute is None else self.permute.index(0)

    def names(self) -> list[str]:
        """HF names in the order of the layer axis."""
        if self.layers is None:
            return [self.hf]
        return [self.hf.replace("{l}", str(layer)) for layer in range(*self.layers)]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """A view of one HF tensor in the leaf's layout (one layer of a stacked leaf)."""
        if array.shape[: self.lead_ones] != (1,) * self.lead_ones:
            raise ValueError(f"{self.hf}: shape {array.shape} has no {self.lead_ones} leading ones")
        array = array.reshape(array.shape[self.lead_ones :])
        return array if self.permute is None else array.transpose(self.permute)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.permute is not None:
            array = array.transpose(tuple(int(axis) for axis in np.argsort(self.permute)))
        return array.reshape((1,) * self.lead_ones + array.shape)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the HF tensor for the shape of the leaf without its layer axis."""
        if self.permute is not None:
            if len(shape) != len(self.permute):
                raise ValueError(f"{self.ours}: shape {shape} has not {len(self.permute)} axes")
            shape = tuple(shape[axis] for axis in np.argsort(self.permute))
        return (1,) * self.lead_ones + tuple(shape)

    def our_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of one layer of the leaf for an HF shape; None where the rule cannot apply."""
        if tuple(shape[: self.lead_ones]) != (1,) * self.lead_ones:
            return None
        shape = tuple(shape[self.lead_ones :])
        if self.permute is None:
            return shape
        if len(shape) != len(self.permute):
            return None
        return tuple(shape[axis] for axis in self.permute)

    def hf_index(self, index: Index) -> Index:
        """Slices of the HF tensor for slices of the leaf without its layer axis."""
        if self.permute is not None:
            index = tuple(index[axis] for axis in np.argsort(self.permute))
        return (slice(0, 1),) * self.lead_ones + tuple(index)


@dataclasses.dataclass(frozen=True)
class Alias:
    """An HF name that, where a file has it, is an equal copy of another and fills no leaf."""

    hf: str
    of: str


@dataclasses.dataclass(frozen=True)
class Skip:
    """HF names (a regular expression, matched in full) that are no parameters, and why."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one HF tensor goes: its rule, and its place on the layer axis (None: no such axis)."""

    rule: Rule
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Table:
    """All names of a backbone, both ways.

    Attributes:
      rules: one per leaf.
      aliases: copies that files may hold.
      skips: buffers that files may hold.
      renames: (regular expression, replacement) tried on names that the table does not know, one
        by one and one after another, until a known name comes out: spellings of older or newer
        saves.
      heads: HF module names of output heads, which "all-linear" adapters leave out.
      optional: HF names that a file may lack, because nothing that is computed here needs them
        (output heads of saves without one). Their leaves are zeros then, and exports leave them
        out.
      layouts: transformers generation -> (regular expression, replacement) pairs, applied one
        after another, from the names of this table to the module names of that generation.
        Adapters are written for a generation; full models always have this table's names.
      settings: from a model's `config.json` to what is written beside these names, so that the
        generation that has them reads it as well as the newest; None where the source's is both.

    Raises:
      ValueError: on construction, if an HF name or a leaf occurs twice, or an alias or a tie
        points to no rule.
    """

    rules: tuple[Rule, ...]
    aliases: tuple[Alias, ...] = ()
    skips: tuple[Skip, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    heads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    layouts: Mapping[str, tuple[tuple[str, str], ...]] = dataclasses.field(default_factory=dict)
    settings: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        leaves: set[str] = set()
        for rule in self.rules:
            if rule.ours in leaves:
                raise ValueError(f"two rules fill the leaf {rule.ours}")
            leaves.add(rule.ours)
            for name in rule.names():
                if name in seen:
                    raise ValueError(f"{name} would fill both {seen[name]} and {rule.ours}")
                seen[name] = rule.ours
        for alias in self.aliases:
            if alias.hf in seen or alias.of not in seen:
                raise ValueError(f"alias {alias.hf} of {alias.of} does not fit the rules")
            seen[alias.hf] = f"a copy of {alias.of}"
        for rule in self.rules:
            if rule.tied_to is not None and (
                rule.tied_to not in self.slots or self.slots[rule.tied_to].rule.tied_to is not None
            ):
                raise ValueError(f"{rule.hf} is tied to {rule.tied_to}, which is no own tensor")
        for name in self.optional:
            if name not in seen:
                raise ValueError(f"{name} is optional, but no rule has it")
        for skip in self.skips:
            hit = next((name for name in seen if re.fullmatch(skip.pattern, name)), None)
            if hit is not None:
                raise ValueError(f"skip {skip.pattern} covers {hit}, which is a parameter")

    @functools.cached_property
    def slots(self) -> dict[str, Slot]:
        """HF name -> slot, in the order of the rules: the bijection itself."""
        return {
            name: Slot(rule, layer if rule.stacked else None)
            for rule in self.rules
            for layer, name in enumerate(rule.names())
        }

    @functools.cached_property
    def by_leaf(self) -> dict[str, Rule]:
        """Leaf path -> rule; without the stacks of no layers, which have no leaf."""
        return {rule.ours: rule for rule in self.rules if rule.depth}

    @functools.cached_property
    def linears(self) -> dict[str, Rule]:
        """Path of a linear layer (its kernel's without "/kernel") -> rule of the kernel."""
        return {
            path.removesuffix("/kernel"): rule
            for path, rule in self.by_leaf.items()
            if rule.linear and path.endswith("/kernel")
        }

    @functools.cached_property
    def _copies(self) -> dict[str, str]:
        copies = {alias.hf: alias.of for alias in self.aliases}
        copies |= {rule.hf: rule.tied_to for rule in self.rules if rule.tied_to is not None}
        return copies

    @property
    def copies(self) -> dict[str, str]:
        """HF name that may be absent -> the name that it must equal where it is present."""
        return dict(self._copies)

    def knows(self, name: str) -> bool:
        """Whether the table says what to do with this HF name."""
        return name in self.slots or name in self._copies or self.skipped(name) is not None

    def skipped(self, name: str) -> str | None:
        """The reason for which an HF name is skipped, or None."""
        for skip in self.skips:
            if re.fullmatch(skip.pattern, name):
                return skip.reason
        return None

    def canonical(self, name: str) -> str:
        """This table's spelling of an HF name; unknown names come back unchanged."""
        if self.knows(name):
            return name
        # A name may differ in several ways at once (a wrapper's prefix and a newer module tree).
        tried, pending = {name}, [name]
        for start in pending:
            for pattern, replacement in self.renames:
                other = re.sub(pattern, replacement, start)
                if other in tried:
                    continue
                if self.knows(other):
                    return other
                if len(tried) < _SPELLINGS:
                    tried.add(other)
                    pending.append(other)
        return name

    def canonical_module(self, module: str) -> str:
        """This table's spelling of an HF module name that holds a `weight`."""
        return self.canonical(f"{module}.weight").removesuffix(".weight")

    def spelled(self, name: str, layout: str) -> str:
        """A tensor's or module's name in a transformers generation (see `layouts`).

        Raises:
          UserError: if the backbone has no such generation.
        """
        known = {DEFAULT_LAYOUT: (), **self.layouts}
        if layout not in known:
            raise UserError(
                f"names of transformers {layout} are not known; known: {', '.join(sorted(known))}"
            )
        for pattern, replacement in known[layout]:
            name = re.sub(pattern, replacement, name)
        return name

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """This table's spelling -> spelling in the file, for all names of a file.

        Raises:
          UserError: if two spellings of one tensor are in the same file.
        """
        found: dict[str, str] = {}
        for name in names:
            canonical = self.canonical(name)
            if canonical in found:
                raise UserError(
                    f"the checkpoint holds {canonical} twice: as {found[canonical]} and as {name}"
                )
            found[canonical] = name
        return found

    def written(self) -> Iterator[tuple[str, Slot]]:
        """HF names that an export writes (no copies, no ties), leaf by leaf."""
        return ((name, slot) for name, slot in self.slots.items() if slot.rule.tied_to is None)


def collapse(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Group names that differ in layer numbers only: (`a.{0-31}.b`, the names), in order.

    Only the first number between dots counts as the layer.
    """
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        if match is None:
            groups.setdefault((name, ""), []).append((0, name))
        else:
            key = (name[: match.start()], name[match.end() :])
            groups.setdefault(key, []).append((int(match.group()), name))
    out = []
    for (before, after), members in groups.items():
        if len(members) == 1:
            out.append((members[0][1], [members[0][1]]))
            continue
        members.sort()
        out.append(
            (f"{before}{{{_ranges([n for n, _ in members])}}}{after}", [s for _, s in members])
        )
    return out


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as text: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
