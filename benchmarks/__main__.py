# SPDX-License-Identifier: Apache-2.0
"""Measure this package on the device that is here: one table, one JSON file.

    python -m benchmarks                          the default selection, twelve minutes of one core
    python -m benchmarks --only text_embed,peak   some of it; `all` for everything there is
    python -m benchmarks --list                   what there is
    python -m benchmarks --quick --only packing   does it run? (tiny shapes; figures mean nothing)

The table has for each figure what it stands against, their ratio and the target. The file is
`benchmarks/results/<date>-<device>.json`; a run of some benchmarks only (--only, --quick) writes
a file where --output names one. The exit code is 1 if a benchmark failed to run, or a figure that
does not depend on how busy the machine is missed its target (programs, collectives).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import common, suite


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", help="names with commas, or `all`")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of A and B")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and weights")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu", "tpu"), default="auto")
    parser.add_argument("--size", choices=("scaled", "real"), help="of the model")
    parser.add_argument("--output", type=Path, help="the file, or the folder, to write to")
    args = parser.parse_args(argv)
    if args.list:
        for name, entry in suite.ENTRIES.items():
            print(f"{name:18} {entry.words}{'' if entry.default_on else '  (only when named)'}")
        return 0
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    device = common.accelerator() if args.device == "auto" else args.device
    try:
        names = suite.select(args.only, device)
    except ValueError as error:
        parser.error(str(error))
    size = args.size or ("scaled" if device == "cpu" else "real")
    how = common.How(
        device,
        "tiny" if args.quick else size,
        1 if args.quick else args.rounds,
        args.quick,
        args.seed,
    )
    common.prepare(device)
    results, failed = suite.run(names, how)
    title = suite.device_name(device) + (", figures mean nothing" if args.quick else "")
    common.show(results, title)
    for name, why in failed.items():
        print(f"{name} FAILED: {why}")
    folder = args.output
    if folder is None and args.only is None and not args.quick:
        folder = common.RESULTS
    if folder is not None:
        path = folder if folder.suffix == ".json" else suite.output_path(device, folder)
        print(f"written to {common.write(path, suite.record(results, failed, how))}")
    missed = [
        f"{name}: {row.what}"
        for name, result in results.items()
        for row in result.rows
        if row.must and row.met is False
    ]
    if missed:
        print(f"must not miss its target: {'; '.join(missed)}")
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
