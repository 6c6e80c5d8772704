# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow: measured (or planned by the compiler), written as JSON and plotted.

    python -m benchmarks.growth [--only layers,devices] [--quick] [--output FOLDER]
    python -m benchmarks.growth --plot benchmarks/results/<date>-cpu-growth.json

On a CPU with the scaled-down model: one pinned thread, CPU seconds, the least of three runs
(of two where one takes more than a second).
Memory is the compiler's plan of the very programs that are timed (temporaries: without weights and
inputs); bytes sent are read out of programs compiled for simulated devices.
The plots (`docs/performance/*.svg`) need matplotlib, the extra `plots`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.beds import Bed, NoProcessor

PLOTS = Path(__file__).parent.parent / "docs" / "performance"
ROUNDS = 3
LONG_S = 1.0
"""What takes longer is run once less."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Figures against one quantity.

    Attributes:
      title: what is shown.
      xlabel, ylabel: with units.
      x: the quantity.
      series: name -> a figure for each x, None where it was not taken.
      expected: what theory says, in words.
      memory: the same, planned MB; empty where there is nothing to say.
      load: load average before and after.
    """

    title: str
    xlabel: str
    ylabel: str
    x: list[float]
    series: dict[str, list[float | None]]
    expected: str
    memory: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)


def least(function: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of some runs, after one that does not count."""
    start = time.process_time()
    function()
    long = time.process_time() - start > LONG_S
    found = []
    for _ in range(ROUNDS - long):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


class Embedding:
    """The Embedder's own road, and what its programs need."""

    def __init__(self, size: str):
        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.nn.compute import Compute

        self.bed = Bed(size)
        compute = Compute("float32")
        self._embedder = Embedder(self.bed.model(), NoProcessor(self.bed.layout), compute, None)

    def seconds(self, items: list[Any]) -> float:
        """CPU seconds to embed them."""
        return least(lambda: self._embedder.encode_encoded(items))

    def planned_mb(self, items: list[Any]) -> float:
        """Temporaries of the largest call."""
        ours, found = self._embedder, 0
        for rows, count, shape in ours._batches.rows([(len(i), i.units) for i in items], None):
            batch = ours._fill(rows, dict(enumerate(items)), shape, count)
            plan = ours._embed.lower(ours._state, batch).compile().memory_analysis()
            found = max(found, plan.temp_size_in_bytes)
        return found / 1e6


def _step(bench: Any, cached: bool) -> tuple[float, float]:
    """CPU seconds of a train step (loss and gradients), and planned MB."""
    import jax

    run, arguments = bench.program(cached=cached)
    program = run.lower(*arguments).compile()
    seconds = least(lambda: jax.block_until_ready(program(*arguments)))
    return seconds, program.memory_analysis().temp_size_in_bytes / 1e6


def batch_size(quick: bool) -> Curve:
    """Pairs of texts in a LoRA step, in chunks of GradCache and at once."""
    from benchmarks.common import How
    from benchmarks.train_step import Bench, text_pairs

    bed, how = Bed("tiny" if quick else "scaled"), How()
    counts = [4, 8] if quick else [4, 8, 16, 32]
    kinds = {"GradCache, chunks of 512 tokens": True, "at once": False}
    times: dict[str, list] = {kind: [] for kind in kinds}
    memory: dict[str, list] = {kind: [] for kind in kinds}
    bench = Bench(bed, how, "lora", *text_pairs(bed, how, 4))
    for count in counts:
        varied = bench.varied(sides=text_pairs(bed, how, count))
        for kind, cached in kinds.items():
            seconds, planned = _step(varied, cached)
            times[kind].append(1e3 * seconds / count)
            memory[kind].append(planned)
    return Curve(
        "A train step by its batch", "pairs of texts", "CPU ms per pair", counts, times,
        "time: a constant, GradCache half as much again; memory: a constant with GradCache, linear "
        "at once",
        memory,
    )  # fmt: skip


def crops(quick: bool) -> Curve:
    """Crops of one photograph."""
    embedding = Embedding("tiny" if quick else "scaled")
    rng = np.random.default_rng(0)
    grids = [(1, 2), (2, 2)] if quick else [(1, 2), (2, 2), (2, 3), (3, 4), (4, 4)]
    items = [embedding.bed.photo(rng, *grid, 32) for grid in grids]
    seconds = [embedding.seconds([item]) for item in items]
    flops = [embedding.bed.flops([item]) / 1e9 for item in items]
    rate = max(f / s for f, s in zip(flops, seconds))
    return Curve(
        "A photograph by its crops", "crops, global view included", "CPU s",
        [rows * columns + 1 for rows, columns in grids],
        {"measured": seconds, "useful FLOPs at the best rate": [f / rate for f in flops]},
        "linear in crops, and attention with the square of the tokens on top; memory linear",
        {"embedding": [embedding.planned_mb([item]) for item in items]},
    )  # fmt: skip


def sequence_length(quick: bool) -> Curve:
    """Tokens of one text in a row of its own."""
    embedding = Embedding("tiny" if quick else "scaled")
    rng = np.random.default_rng(0)
    lengths = [16, 32] if quick else [128, 256, 512, 1024, 2048, 4096]
    items = [embedding.bed.text(rng, length) for length in lengths]
    seconds = [1e6 * embedding.seconds([item]) / len(item) for item in items]
    flops = [embedding.bed.flops([item]) / len(item) for item in items]
    rate = max(f / s for f, s in zip(flops, seconds))
    return Curve(
        "A text by its length", "tokens", "CPU us per token", lengths,
        {"measured": seconds, "useful FLOPs at the best rate": [f / rate for f in flops]},
        "linear: attention adds a part that grows with the length; memory linear",
        {"embedding": [embedding.planned_mb([item]) for item in items]},
    )  # fmt: skip


def chunk_size(quick: bool) -> Curve:
    """Tokens of a chunk of a LoRA step with GradCache."""
    from benchmarks.common import How
    from benchmarks.train_step import Bench, text_pairs

    bed, how = Bed("tiny" if quick else "scaled"), How()
    sides = text_pairs(bed, how, 4 if quick else 20)
    tokens = [256, 512] if quick else [256, 512, 1024, 2048]
    times: dict[str, list] = {}
    memory: dict[str, list] = {}
    bench = Bench(bed, how, "lora", *sides)
    for remat in ("full",) if quick else ("none", "full"):
        kind = f"remat {remat}"
        times[kind], memory[kind] = [], []
        for count in tokens:
            seconds, planned = _step(bench.varied(chunk_tokens=count, remat=remat), True)
            times[kind].append(1e3 * seconds / len(sides[0]))
            memory[kind].append(planned)
    return Curve(
        "A GradCache step by its chunk", "tokens of a chunk", "CPU ms per pair", tokens, times,
        "time: a constant, but for what the last chunk has empty; memory: linear in the tokens of "
        "a chunk",
        memory,
    )  # fmt: skip


def candidates(quick: bool) -> Curve:
    """Candidates of a corpus that every query is ranked against."""
    from vlm2vec_jax.evaluation import corpus

    rng = np.random.default_rng(0)
    width, count = 128, 64
    queries = rng.standard_normal((count, width)).astype(np.float32)
    sizes = [100, 200] if quick else [1_000, 10_000, 100_000]
    seconds = []
    for size in sizes:
        targets = rng.standard_normal((size, width)).astype(np.float32)
        truth = [[n % size] for n in range(count)]
        run = lambda t=targets, a=truth: corpus.rank(queries, t, a)  # noqa: E731
        seconds.append(1e3 * least(run) / count)
    return Curve(
        "Ranking by the size of the corpus", "candidates", "CPU ms per query", sizes,
        {"ranks and the best ten": seconds}, "linear",
    )  # fmt: skip


def layers(quick: bool) -> Curve:
    """Layers of a decoder: seconds to compile its gradient."""
    from benchmarks.compile_time import gradient_seconds

    depths = [2, 3] if quick else [4, 8, 16, 32]
    gradient_seconds(2, False)  # the first of a process also sets the compiler up
    series = {
        name: [gradient_seconds(n, name == "unrolled") for n in depths]
        for name in ("scanned", "unrolled")
    }
    return Curve(
        "Compiling the gradient of a decoder", "layers", "CPU s", depths, series,
        "scanned: a constant; unrolled: linear",
    )  # fmt: skip


def devices(quick: bool) -> Curve:
    """Data-parallel devices: bytes that a step sends."""
    from benchmarks.scaling import collectives

    counts = [1, 2] if quick else [1, 2, 4, 8]
    found = [collectives(n) for n in counts]
    series = {kind: [sent[kind] / 1e3 for sent in found] for kind in ("all-reduce", "all-gather")}
    return Curve(
        "Bytes of a LoRA step by its devices", "devices", "kB received per device and step",
        counts, series, "a constant: adapters are summed once, embeddings gathered once",
    )  # fmt: skip


def loss_pairs(quick: bool) -> Curve:
    """Pairs of a batch: memory of the loss."""
    from benchmarks.loss import planned

    powers = [6, 7] if quick else [10, 12, 14, 16]
    series = {
        form: [planned(form, 2**p) / 1e9 for p in powers] for form in ("dense", "tiled", "ring")
    }
    return Curve(
        "Memory of the loss by the batch", "pairs", "planned GB per device",
        [2**p for p in powers], series,
        "dense: with the square; tiled and ring: linear",
    )  # fmt: skip


CURVES: dict[str, Callable[[bool], Curve]] = {
    "batch_size": batch_size,
    "crops": crops,
    "sequence_length": sequence_length,
    "chunk_size": chunk_size,
    "candidates": candidates,
    "layers": layers,
    "devices": devices,
    "loss_pairs": loss_pairs,
}


def _draw_panel(axes: Any, curve: Curve, series: dict[str, list[float | None]]) -> None:
    for label, values in series.items():
        axes.plot(curve.x, values, marker="o", label=label)
    wide = min(curve.x) > 0 and max(curve.x) >= 8 * min(curve.x)
    axes.set_xscale("log", base=2) if wide else None
    flat = [v for values in series.values() for v in values if v]
    if max(flat) > 30 * min(flat):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(curve.xlabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw(curves: dict[str, Curve], folder: Path) -> list[Path]:
    """Write an SVG per curve, all of modest size.

    Raises:
      SystemExit: in words, where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'vlm2vec-jax[plots]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"  # the same file for the same figures
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, curve in curves.items():
        panels = [(curve.series, curve.ylabel)]
        panels += [(curve.memory, "planned MB")] if curve.memory else []
        size = (5 * len(panels), 3.2)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained")
        for panel, (series, label) in zip(np.atleast_1d(axes), panels, strict=True):
            _draw_panel(panel, curve, series)
            panel.set_ylabel(label)
        figure.suptitle(curve.title, fontsize=10)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"names with commas, of {', '.join(CURVES)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--plot", type=Path, help="draw this file's curves, measure nothing")
    parser.add_argument("--output", type=Path, help="folder of the JSON file and of the plots")
    args = parser.parse_args(argv)
    plots = args.output or PLOTS
    if args.plot:
        try:
            stored = json.loads(args.plot.read_text(encoding="utf-8"))["curves"]
            curves = {name: Curve(**curve) for name, curve in stored.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--plot {args.plot}: {error}")
        print("\n".join(map(str, draw(curves, plots))))
        return 0
    names = list(CURVES) if args.only is None else args.only.split(",")
    unknown = sorted(set(names) - set(CURVES))
    if unknown:
        parser.error(f"no curve {', '.join(unknown)}; there are {', '.join(CURVES)}")
    common.pin()
    curves, told = {}, {}
    for name in names:
        start, load = time.process_time(), os.getloadavg()[0]
        curve = CURVES[name](args.quick)
        load = round(load, 2), round(os.getloadavg()[0], 2)
        curves[name] = curve = dataclasses.replace(curve, load=load)
        told[name] = round(time.process_time() - start, 1)
        print(f"{curve.title} ({told[name]} CPU s)", flush=True)
        for unit, series in ((curve.ylabel, curve.series), ("planned MB", curve.memory)):
            for label, values in series.items():
                shown = ", ".join(f"{x:g}: {value:.4g}" for x, value in zip(curve.x, values))
                print(f"  {label}, {unit}: {shown}", flush=True)
        # After each, so that a run that is stopped leaves what it has.
        record = {
            **common.machine(),
            "method": __doc__,
            "quick": args.quick,
            "cpu_s": told,
            "curves": {name: dataclasses.asdict(curve) for name, curve in curves.items()},
        }
        folder = args.output or common.RESULTS
        path = common.write(folder / f"{record['date']}-cpu-growth.json", record)
    print(path)
    print("\n".join(map(str, draw(curves, plots))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
