# SPDX-License-Identifier: Apache-2.0
"""Whether the memory of `embed` grows with the corpus: peak resident memory at several sizes.

    python -m benchmarks.embed_corpus [--rows 10000,100000,1000000] [--model DIR]

Each size runs as a process of its own over a jsonl file of short texts, with a model of a few
thousand parameters; what is measured is the command, not the model. Writes
`results/<date>-cpu-embed_corpus.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests" / "goldens" / "tiny_mha"

CHILD = """
import resource, sys
from vlm2vec_jax import embed, flags
code = flags.call(embed.main, embed.define, sys.argv)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
sys.exit(code)
"""


def write_corpus(path: Path, rows: int) -> None:
    """Short texts, all different."""
    with path.open("w") as file:
        for k in range(rows):
            file.write(json.dumps({"text": f"number {k} is a {'red blue green'.split()[k % 3]}"}))
            file.write("\n")


def measure(rows: int, model: Path) -> dict[str, float]:
    """Peak memory and time of one run."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "corpus.jsonl", Path(folder) / "vectors.npz"
        write_corpus(source, rows)
        given = ["--model", model, "--input", source, "--output", output, "--dtype", "float32"]
        start, cpu = time.monotonic(), os.times()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, given)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        after = os.times()
        peak = int(done.stdout.rsplit("peak ", 1)[1].split()[0])
        return {
            "rows": rows,
            "peak_mb": round(peak / 1024, 1),
            "wall_s": round(time.monotonic() - start, 1),
            "cpu_s": round(sum(after[2:4]) - sum(cpu[2:4]), 1),
            "corpus_mb": round(source.stat().st_size / 2**20, 1),
            "vectors_mb": round(output.stat().st_size / 2**20, 1),
        }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    results = []
    for rows in map(int, args.rows.split(",")):
        results.append(measure(rows, args.model))
        print(json.dumps(results[-1]), flush=True)
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-cpu-embed_corpus.json"
    told = {
        "model": args.model.name,
        "load": os.getloadavg()[0],
        "note": "one process per size on a shared machine: memory is exact, seconds are rough",
        "results": results,
    }
    path.write_text(json.dumps(told, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
