# SPDX-License-Identifier: Apache-2.0
"""Twenty losses for every kind of training, with GradCache and without, on every mesh.

    python tests/tools/every_curve.py [--output FILE.json]

LoRA, DoRA and full training of a small model in float32, with GradCache and in one piece, on one
device, on eight simulated ones as data x fsdp x tensor 8 x 1 x 1, 2 x 4 x 1 and 2 x 2 x 2, and on
two processes of four devices that talk over gloo (2 x 4 x 1): thirty runs of twenty updates. Each
is held to the plain step of its kind on one device, to 1e-5 of the loss. The suite runs a part of
this that covers every mesh, kind and form (`test_curves.py`, `test_multiprocess.py`).

Exit code 0 if all of it holds. Some minutes, nearly all of them compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KINDS = ("lora", "dora", "full")
ALONE = (1, 1, 1)
MESHES = (ALONE, (8, 1, 1), (2, 4, 1), (2, 2, 2))
OF_TWO_PROCESSES = (2, 4, 1)
TOLERANCE = 1e-5


def prepare(devices: int) -> None:
    """Say how many devices there are, and that compiling is what takes time here."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    )


def run(folder: Path, mesh: tuple[int, int, int], processes: int = 1, process: int = 0):
    """Yield every kind and form on a mesh: a dict with the losses."""
    from curves import curve

    for kind in KINDS:
        for cached in (False, True):
            started = time.process_time()
            losses = curve(folder, kind, mesh, cached=cached, part=(process, processes))
            yield {
                "training": kind,
                "mesh": list(mesh),
                "processes": processes,
                "grad_cache": cached,
                "cpu_s": round(time.process_time() - started, 1),
                "losses": losses,
            }


def one_of_two(folder: Path, port: int, process: int, output: Path) -> None:
    """What each of two processes does."""
    prepare(4)
    from vlm2vec_jax.parallel.cluster import Place
    from vlm2vec_jax.parallel.peers import join

    join(Place(f"127.0.0.1:{port}", 2, process), timeout_s=240)
    found = list(run(folder, OF_TWO_PROCESSES, 2, process))
    if process == 0:
        output.write_text(json.dumps(found))


def two_processes(folder: Path) -> list[dict]:
    """Start two processes and wait for their losses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = folder / "two.json"
    started = []
    for process in (0, 1):
        argv = ["--folder", folder, "--port", port, "--process", process, "--output", output]
        log = (folder / f"process-{process}.txt").open("w")
        command = [sys.executable, __file__, *map(str, argv)]
        started.append(subprocess.Popen(command, stdout=log, stderr=log))
    codes = [process.wait(timeout=3600) for process in started]
    if codes != [0, 0]:
        told = "\n".join((folder / f"process-{n}.txt").read_text()[-3000:] for n in (0, 1))
        raise SystemExit(f"two processes ended with {codes}:\n{told}")
    return json.loads(output.read_text())


def main() -> int:
    """Run all, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write everything here as JSON")
    for name, kind in (("folder", Path), ("port", int), ("process", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process is not None:
        one_of_two(args.folder, args.port, args.process, args.output)
        return 0
    prepare(8)
    from training_tools import mini_model

    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = mini_model(Path(temporary))
        for mesh in MESHES:
            for line in run(folder, mesh):
                found.append(line)
                print(f"{line['training']:5} {mesh} GradCache {line['grad_cache']}", flush=True)
        found += two_processes(folder)

    plain = {
        line["training"]: np.array(line["losses"])
        for line in found
        if line["mesh"] == list(ALONE) and not line["grad_cache"]
    }
    for line in found:
        wanted = plain[line["training"]]
        line["apart"] = float(np.max(np.abs(np.array(line["losses"]) - wanted) / np.abs(wanted)))
    worst = max(line["apart"] for line in found)
    print(table(found))
    print(f"at most {worst:.1e} of a loss apart; {TOLERANCE:.0e} is allowed")
    if args.output:
        from benchmarks.common import machine

        record = {
            "benchmark": "every_curve",
            **machine(),
            "method": "twenty losses each, float32, held to the plain step of the same kind on one "
            "device; `apart` is the largest relative difference; machine shared with other work",
            "tolerance": TOLERANCE,
            "results": found,
        }
        # A line to a run.
        lines = ",\n".join("  " + json.dumps(line) for line in record.pop("results"))
        head = json.dumps(record, indent=1).removesuffix("\n}")
        args.output.write_text(f'{head},\n "results": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return int(worst > TOLERANCE)


def table(found: list[dict]) -> str:
    """A markdown table: largest relative difference by mesh (rows), training and form."""
    columns = [(kind, cached) for kind in KINDS for cached in (False, True)]
    places = list(dict.fromkeys((tuple(line["mesh"]), line["processes"]) for line in found))
    by_place = {
        (tuple(n["mesh"]), n["processes"], n["training"], n["grad_cache"]): n["apart"]
        for n in found
    }
    head = [f"{kind}{', GradCache' if cached else ''}" for kind, cached in columns]
    lines = ["| data x fsdp x tensor | " + " | ".join(head) + " |", "|---" * 7 + "|"]
    for mesh, processes in places:
        name = " x ".join(map(str, mesh)) + (" in 2 processes" if processes == 2 else "")
        cells = [f"{by_place[mesh, processes, *column]:.1e}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
