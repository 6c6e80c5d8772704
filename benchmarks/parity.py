# SPDX-License-Identifier: Apache-2.0
"""Measure the difference from the reference on every golden, and write docs/parity.md.

    python -m benchmarks.parity --write docs/parity.md     (ten minutes of CPU)
    python -m benchmarks.parity --only forward,adapters --save part1.json
    python -m benchmarks.parity --join part1.json part2.json --write docs/parity.md

The section mini_qwen2_vl needs torch and transformers' models (the environment of `make
test-torch`); measure it there, or all of them.

The goldens are numbers that the reference computed (tests/goldens/README.md); the tests hold the
same limits. Everything runs in float32 with exact products, except where bfloat16 is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.parity_parts import backbones, inference, training
from benchmarks.parity_parts.tools import ROOT, Row

SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "tokens": inference.tokens,
    "pixels": inference.pixels,
    "forward": inference.forward,
    "losses": training.losses,
    "full": training.full,
    "adapters": training.adapters,
    "scores": inference.scores,
    "end_to_end": inference.end_to_end,
    "curves": training.curves,
    "backbones": backbones.backbones,
    "mini_qwen2_vl": backbones.mini_qwen2_vl,
}


def document(rows: list[Row]) -> str:
    """The text of docs/parity.md."""
    from benchmarks.common import git_head, machine

    versions = ", ".join(f"{k} {v}" for k, v in machine()["versions"].items())
    today = time.strftime("%Y-%m-%d", time.gmtime())
    lines = [
        "# Measured differences from the reference",
        "",
        "Written by `python -m benchmarks.parity --write docs/parity.md`, which computes every",
        "number anew; do not edit. The goldens are outputs of the reference PyTorch implementation",
        "on tiny models with random weights, or, for other backbones, of transformers' classes",
        "(`tests/goldens/README.md` describes them and where the limits come from), and the tests",
        "hold the same limits. Float32 with exact products",
        "on a CPU, unless bfloat16 is named. A number is the largest absolute difference unless",
        "the last column says otherwise; 0 means equal.",
        "",
        f"Measured on {today} at {git_head()[:12]} ({versions}).",
        "",
        "| compared | golden | measured | required | how |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        sign = "at least " if row.at_least else ""
        met = "" if row.met else " **not met**"
        measured = f"{row.measured:.6f}" if row.at_least else _number(row.measured)
        lines.append(
            f"| {row.what} | {row.golden} | {measured}{met} | {sign}{row.required:g} | {row.note} |"
        )
    return "\n".join(lines) + "\n" + REMARKS


REMARKS = """
Where this project departs from the reference on purpose, and a switch lets the tests follow it:

* The rope table (short or long) is chosen by each sequence's own length. The reference chooses it
  by the padded length of the batch, so that a long neighbour changes everybody's embedding; the
  rows above force its choice where a recorded batch has rows of both kinds.
* CLIP's key biases are not compared after optimizer steps: softmax does not see them, their true
  gradient is zero, and Adam turns rounding noise into whole steps.
* Ties and values that are not finite never count as correct; the reference's number stands beside
  ours wherever the two differ.
"""


def _number(value: float) -> str:
    return f"{value:g}" if value == int(value) else f"{value:.1e}"


def measure(sections: list[str]) -> dict[str, list[Row]]:
    """Run sections, printing each line as it is known."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    # The recorded batches are read by the same helper as in the tests.
    sys.path.insert(0, str(ROOT / "tests"))
    measured: dict[str, list[Row]] = {}
    for name in sections:
        measured[name] = []
        for row in SECTIONS[name]():
            measured[name].append(row)
            mark = "" if row.met else "  NOT MET"
            print(f"{row.what:42} {row.golden:34} {row.measured:11.4e}  "
                  f"({row.required:g}) {row.note}{mark}", flush=True)  # fmt: skip
    return measured


def main() -> int:
    """Measure, print, write; exit code 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, default=None, help="the document to write")
    parser.add_argument("--only", default="", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--save", type=Path, default=None, help="a file for what was measured")
    parser.add_argument("--join", type=Path, nargs="+", help="saved files, instead of measuring")
    args = parser.parse_args()
    measured: dict[str, list[Row]] = {}
    if args.join:
        for file in args.join:
            for name, rows in json.loads(file.read_text()).items():
                measured[name] = [Row(**row) for row in rows]
    else:
        chosen = [name for name in args.only.split(",") if name] or list(SECTIONS)
        if "mini_qwen2_vl" in chosen and not importlib.util.find_spec("torch"):
            parser.error(
                "mini_qwen2_vl needs torch (the environment of `make test-torch`): measure the "
                "others with --only and --save, that one there, and put both together with --join"
            )
        measured = measure(chosen)
    if args.save:
        saved = {name: [dataclasses.asdict(r) for r in rows] for name, rows in measured.items()}
        args.save.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    missing = [name for name in SECTIONS if name not in measured]
    rows = [row for name in SECTIONS for row in measured.get(name, [])]
    if args.write:
        if missing:
            parser.error(f"the document holds all sections; missing: {', '.join(missing)}")
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(document(rows), encoding="utf-8")
        print(f"written to {args.write}")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
