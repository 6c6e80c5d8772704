# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the three forms of the loss, for batches of 2^10 to 2^17 pairs of width 3072.

    python -m benchmarks.loss_sizes [--measured 14] [--powers 14,17]

Memory is the compiler's plan for loss and gradient, per device: `dense` and `tiled` on one device,
`ring` on eight simulated ones. Loss and gradient are really computed for up to 2^`measured` pairs
in tiles (the other forms up to 2^12), in CPU seconds of all threads, so of all devices of the ring.
`benchmarks.loss` is the short form of this in the suite.
Writes `results/<date>-cpu-loss_sizes.json`.
"""

from __future__ import annotations

import argparse
import os
import time

from benchmarks import common, loss

FORMS = ("dense", "tiled", "ring")
OTHERS_MEASURED = 12


def main() -> None:
    """Plan, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=int, default=14, help="largest power of two to run")
    parser.add_argument("--powers", default="10,11,12,13,14,15,16,17", help="of two, batches")
    args = parser.parse_args()
    # Not pinned to one processor: the devices of the ring wait for each other, each in a thread.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = ("--xla_cpu_multi_thread_eigen=false", "--xla_force_host_platform_device_count")
    os.environ["XLA_FLAGS"] = f"{flags[0]} {flags[1]}={loss.DEVICES}"
    lines = []
    for power in map(int, args.powers.split(",")):
        for form in FORMS:
            line = {"pairs": 2**power, "form": form, "bytes": loss.planned(form, 2**power)}
            if power <= (args.measured if form == "tiled" else OTHERS_MEASURED):
                line["cpu_s"] = seconds(form, 2**power)
            lines.append(line)
            print(line, flush=True)
    show(lines)
    machine = common.machine()
    record = {
        "benchmark": "loss_sizes",
        **machine,
        "method": "memory: compiler's plan of loss and gradient, per device; time: one call, CPU "
        "seconds of all threads, machine shared with other work",
        "width": loss.WIDTH,
        "ring_devices": loss.DEVICES,
        "results": lines,
    }
    print(common.write(common.RESULTS / f"{machine['date']}-cpu-loss_sizes.json", record))


def seconds(form: str, pairs: int) -> float:
    """CPU seconds of a call."""
    call = loss.timed(form, pairs, loss.WIDTH)
    start = time.process_time()
    value, _ = call()
    took = time.process_time() - start
    assert 0 < float(value) < 20, value
    return round(took, 2)


def show(lines: list[dict]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"loss at width {loss.WIDTH}: GB per device, CPU seconds")
    for column in ("pairs", *(f"{form}, GB" for form in FORMS), *(f"{form}, s" for form in FORMS)):
        table.add_column(column, justify="right")
    for pairs in sorted({line["pairs"] for line in lines}):
        row = {line["form"]: line for line in lines if line["pairs"] == pairs}
        sizes = [f"{row[form]['bytes'] / 1e9:.2f}" for form in FORMS]
        times = [f"{row[form]['cpu_s']:.1f}" if "cpu_s" in row[form] else "-" for form in FORMS]
        table.add_row(f"{pairs:,}", *sizes, *times)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
