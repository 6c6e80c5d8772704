# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: A and B in turn in one process, medians of ratios, rows of a table.

On a CPU one pinned thread whose CPU seconds are counted, on an accelerator wall seconds until the
result is there. Importing this file does not import jax, so that `prepare` can still set the
environment.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow")
SIMULATED = 8
"""Devices that a CPU is made to look like; all but the first are for collectives alone."""


@dataclasses.dataclass(frozen=True)
class How:
    """What the user asked for, handed to every benchmark.

    Attributes:
      device: `cpu`, `gpu` or `tpu`.
      size: of the model, a name in `beds.SIZES`.
      rounds: turns of A and B.
      quick: tiny shapes and one round, to see that everything runs; figures mean nothing.
      seed: of inputs and weights.
    """

    device: str = "cpu"
    size: str = "scaled"
    rounds: int = 5
    quick: bool = False
    seed: int = 0

    @property
    def dtype(self) -> str:
        """What the model computes in; bfloat16 on a CPU is 80 times slower than float32."""
        return "float32" if self.device == "cpu" else "bfloat16"

    def pick(self, full: Any, quick: Any) -> Any:
        """`full`, or `quick` where only running matters."""
        return quick if self.quick else full


def accelerator() -> str:
    """The kind of device that jax would take here: `cpu`, `gpu` or `tpu`."""
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if not named:
        # In a process of its own: whoever has asked jax can no longer choose its flags.
        code = "import jax; print(jax.default_backend())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        named = done.stdout.split()[-1] if done.returncode == 0 and done.stdout else "cpu"
    return {"cuda": "gpu", "rocm": "gpu"}.get(named, named)


def prepare(device: str = "cpu") -> None:
    """Set the environment; call before jax is imported.

    A CPU is bound to one processor and one thread: a shared machine slows wall time, and threads
    that wait for each other slow CPU time; one thread whose CPU seconds are counted disturbs
    itself least.
    """
    global clock
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={SIMULATED}"
    if device == "cpu":
        os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        flags += " --xla_cpu_multi_thread_eigen=false"
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = flags.strip()
    clock = time.process_time if device == "cpu" else time.perf_counter


def pin() -> None:
    """`prepare` for the CPU, whatever else is there."""
    prepare("cpu")


clock: Callable[[], float] = time.process_time
"""Seconds as the device wants them counted, see `prepare`."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each case in each round.

    Attributes:
      seconds: case -> a number per round.
      load: load average of the machine before and after.
    """

    seconds: dict[str, list[float]]
    load: tuple[float, float]

    def median(self, case: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[case])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the rounds of how many times as long `slow` took."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)


def alternate(cases: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = True) -> Timing:
    """Run all cases in turn, `rounds` times, after one run of each that does not count.

    Args:
      cases: functions that return when their result is there.
      rounds: turns.
      warm: make the run that does not count; False where the caller has just made it.
    """
    if warm:
        for function in cases.values():
            function()
    before = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        # Back and forth, so that none is always the one after.
        for name in list(cases) if turn % 2 == 0 else reversed(list(cases)):
            start = clock()
            cases[name]()
            seconds[name].append(clock() - start)
    return Timing(seconds, (before, os.getloadavg()[0]))


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
      what: was measured.
      ours: the figure, in `unit`.
      unit: of `ours` and `baseline`.
      against: the baseline in words, or what is asked for.
      baseline: its figure; None where there is none.
      ratio: how many times as good ours is (for overheads: how many times the baseline it
        costs); None where the figure speaks for itself.
      target: what `ratio` (or `ours`, if there is no ratio) must reach; None for no target.
      at_most: the target must not be exceeded.
      shapes: what was computed.
      must: a miss is a failure: the figure does not depend on how busy the machine is.
    """

    what: str
    ours: float
    unit: str = "s"
    against: str = ""
    baseline: float | None = None
    ratio: float | None = None
    target: float | None = None
    at_most: bool = False
    shapes: dict[str, Any] = dataclasses.field(default_factory=dict)
    must: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        figure = self.ours if self.ratio is None else self.ratio
        return bool(figure <= self.target if self.at_most else figure >= self.target)


@dataclasses.dataclass
class Result:
    """What a benchmark found: rows of the table, and what the JSON holds besides."""

    rows: list[Row]
    timings: dict[str, Timing] = dataclasses.field(default_factory=dict)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "rows": [{**dataclasses.asdict(row), "met": row.met} for row in self.rows],
            "timings": {case: dataclasses.asdict(timing) for case, timing in self.timings.items()},
            **self.more,
        }


def compared(
    what: str,
    against: str,
    timing: Timing,
    ours: str,
    base: str,
    target: float | None = None,
    shapes: Mapping[str, Any] | None = None,
) -> Row:
    """The row that says how many times as fast case `ours` is as case `base`."""
    return Row(
        what,
        timing.median(ours),
        "s",
        against,
        timing.median(base),
        timing.ratio(base, ours),
        target,
        shapes=dict(shapes or {}),
    )


def overhead(
    what: str,
    against: str,
    timing: Timing,
    ours: str,
    base: str,
    target: float | None = None,
    shapes: Mapping[str, Any] | None = None,
) -> Row:
    """The row that says how many times case `base` case `ours` costs."""
    row = compared(what, against, timing, ours, base, target, shapes)
    return dataclasses.replace(row, ratio=timing.ratio(ours, base), at_most=True)


def figure(value: float, unit: str) -> str:
    """A number with its unit, three digits that count."""
    if unit == "share":
        return f"{value:.1%}"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{shown} {unit}".strip()


def table(results: Mapping[str, Result], title: str):
    """All rows as one table of rich."""
    from rich.table import Table

    made = Table(title=title)
    made.add_column("benchmark", no_wrap=True)
    for column in ("what", "ours", "against", "baseline", "ratio", "target", "pass"):
        made.add_column(column)
    for name, result in results.items():
        for number, row in enumerate(result.rows):
            sign = "<=" if row.at_most else ">="
            unit = row.unit if row.ratio is None else ""
            target = "" if row.target is None else f"{sign} {figure(row.target, unit)}"
            made.add_row(
                "" if number else name,
                row.what,
                figure(row.ours, row.unit),
                row.against,
                "" if row.baseline is None else figure(row.baseline, row.unit),
                "" if row.ratio is None else f"{row.ratio:.2f}",
                target,
                {True: "yes", False: "NO", None: ""}[row.met],
            )
    return made


def show(results: Mapping[str, Result], title: str) -> None:
    """Print the table."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table(results, title))


def write(path: Path, record: Mapping[str, Any]) -> Path:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def machine() -> dict[str, Any]:
    """What a figure must be read with: date, commit, versions, processor, load average."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "git": git_head(),
        "versions": {"python": platform.python_version(), **versions},
        "cpu": f"{platform.machine()}, {os.cpu_count()} processors, one used",
        "load_average": list(os.getloadavg()),
    }


def git_head(root: Path = Path(__file__).parent.parent) -> str:
    """The commit that is checked out, "+changes" behind it if files differ; "" if unknown."""
    told = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        if done.returncode:
            return ""
        told.append(done.stdout.strip())
    return told[0] + ("+changes" if told[1] else "")
