# SPDX-License-Identifier: Apache-2.0
"""Reading the collectives out of a compiled program: what is sent, how large, inside which loop.

The loss says nothing about how a program is spread; its text does. `collectives` walks from the
entry computation through calls and loops, so that every operation comes with the loops around it:
a gather inside the layer loop costs as often as there are layers, and again for every chunk.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Operations that move data between chips."""

_BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16},
    **{"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128},
    **{"f8e4m3fn": 8, "f8e5m2": 8},
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations)="
    r"\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)\}?"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r" = s32\[\](?:\{[^}]*\})? constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a collective: dtype as HLO writes it, shape on one chip."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return -(-math.prod(self.shape) * _BITS.get(self.dtype, 32) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      arrays: what a chip holds afterwards; several where XLA joined operations.
      loops: trip counts of the loops around it, outermost first; None where the count is known at
        run time only.
      source: the jax operation that it came from, for messages.
    """

    kind: str
    arrays: tuple[Array, ...]
    loops: tuple[int | None, ...]
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of the result on one chip, each time that it runs."""
        return sum(array.bytes for array in self.arrays)

    def total(self, unknown: int = 1) -> int:
        """Bytes over all passes of its loops, taking `unknown` passes where none is known."""
        return self.bytes * math.prod(unknown if n is None else n for n in self.loops)

    def __str__(self) -> str:
        around = " in " + " x ".join("?" if n is None else str(n) for n in self.loops)
        arrays = " ".join(map(str, self.arrays))
        return f"{self.kind} {arrays}{around if self.loops else ''} ({self.source})"


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a compiled program, in its place.

    Attributes:
      line: whole, with its attributes.
      opcode: such as `fusion`.
      loops: trip counts of the loops around it, outermost first; None where nobody knows.
      beside: the lines of its computation by name.
    """

    line: str
    opcode: str
    loops: tuple[int | None, ...]
    beside: Mapping[str, str]

    @property
    def name(self) -> str:
        """What other operations call it."""
        return _name(self.line)

    @property
    def result(self) -> tuple[Array, ...]:
        """Its arrays."""
        return _result(self.line, self.opcode)

    @property
    def operands(self) -> list[tuple[Array, ...]]:
        """The arrays of each thing that it takes."""
        inside = self.line.split(f" {self.opcode}(", 1)[1].split(")", 1)[0]
        lines = [self.beside[name] for name in _NAME.findall(inside)]
        return [_result(line, _opcode(line)) for line in lines]

    @property
    def source(self) -> str:
        """The jax operation that it came from; "" if nobody knows."""
        found = _SOURCE.search(self.line)
        return found.group(1) if found else ""


def walk(
    text: str,
    visit: Callable[[Operation], bool | None],
    runs: Callable[[str], int | None] = lambda line: None,
) -> None:
    """Go through a compiled program from its entry, once for each way to get somewhere.

    Args:
      text: of the program.
      visit: called with every operation; True keeps out of what that one calls.
      runs: the line of a loop whose count the program does not say -> how often it runs.
    """
    bodies, entry = _computations(text)
    beside = {name: {_name(line): line for line in lines} for name, lines in bodies.items()}

    def through(name: str, loops: tuple[int | None, ...]) -> None:
        for line in bodies.get(name, ()):
            op = Operation(line, _opcode(line), loops, beside[name])
            if visit(op):
                continue
            around = loops
            if op.opcode == "while":
                trips = _trips(line, bodies)
                around = (*loops, runs(line) if trips is None else trips)
            for called in _called(line):
                through(called, around)

    through(entry, ())


def collectives(program: Any) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    Args:
      program: `jax.jit(...).lower(...).compile()`, or its text.
    """
    found: list[Collective] = []
    seen: set[tuple] = set()

    def visit(op: Operation) -> bool:
        kind = op.opcode.removesuffix("-start")
        if kind not in KINDS:
            return False
        channel = _CHANNEL.search(op.line)
        # A TPU writes an asynchronous collective once more into each fusion that it overlaps, be
        # it inside a loop; the channel is the same, and the start comes first.
        same = (kind, channel.group(1) if channel else (op.line, op.loops))
        if same not in seen:
            found.append(Collective(kind, op.result, op.loops, op.source))
        seen.add(same)
        return True  # what it calls is the sum of two numbers

    walk(program if isinstance(program, str) else program.as_text(), visit)
    return found


def by_kind(found: Iterable[Collective], unknown: int = 1) -> dict[str, dict[str, dict[str, int]]]:
    """Sums: where ("outside", "inside" loops) -> kind -> operations, largest and total bytes.

    Args:
      found: from `collectives`.
      unknown: passes to take for loops whose count is known at run time only.
    """
    sums: dict[str, dict[str, dict[str, int]]] = {"outside": {}, "inside": {}}
    for op in found:
        empty = {"operations": 0, "largest_bytes": 0, "total_bytes": 0}
        entry = sums["inside" if op.loops else "outside"].setdefault(op.kind, empty)
        entry["operations"] += 1
        entry["largest_bytes"] = max(entry["largest_bytes"], op.bytes)
        entry["total_bytes"] += op.total(unknown)
    return sums


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header.group(2)
            bodies[name] = []
            entry = name if header.group(1) else entry
        elif line.rstrip() == "}":  # a kernel's metadata has lines that only begin so
            name = None
        elif name is not None and _LINE.match(line):
            bodies[name].append(line)
        elif name is not None and bodies[name]:  # the rest of that metadata
            bodies[name][-1] += line
    return bodies, entry


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a loop runs: as XLA noted it, or the one number that its condition compares to."""
    noted = _TRIPS.search(line)
    if noted:
        return int(noted.group(1))
    condition = _CONDITION.search(line)
    pending, limits = [condition.group(1)] if condition else [], []
    while pending:
        for inner in bodies.get(pending.pop(), ()):
            limits += [int(n) for n in _LIMIT.findall(inner)]
            pending += _called(inner)
    return limits[0] if len(limits) == 1 else None


def _opcode(line: str) -> str:
    """`while` of `%w = (f32[2], /*index=1*/ s32[]) while(%t), body=...`."""
    found = _OPCODE.search(line.split(" = ", 1)[1])
    return found.group(1) if found else ""


def _name(line: str) -> str:
    found = _LINE.match(line)
    return found.group(1) if found else ""


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays that a text names, such as the type of a result, in order."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", text))
    )


def _result(line: str, opcode: str) -> tuple[Array, ...]:
    """Arrays of the result; of an asynchronous start, which lists operands too, the results."""
    shown = line.split(" = ", 1)[1].split(f" {opcode}(", 1)[0]
    found = arrays(shown)
    if opcode == "all-gather-start":
        return found[len(found) // 2 :]
    if opcode == "collective-permute-start":
        return found[len(found) // 2 :][:1] if len(found) <= 2 else found[1:2]
    return found


def _called(line: str) -> list[str]:
    names = [name for group in _CALLS.findall(line) for name in group.split(",")]
    names += [name for group in _BRANCHES.findall(line) for name in group.split(",")]
    return [name.strip().lstrip("%") for name in names]
