# SPDX-License-Identifier: Apache-2.0
"""What the sampler costs: microseconds per example, start-up and resuming at a million rows.

    python -m benchmarks.sampler [--rows 1000000] [--batch 1024] [--output FILE.json]

Twenty subsets of text pairs (proportional sizes as in MMEB: none more than 30 times another),
written as parquet and opened as `train` opens them. Measured: laying out the mixture and its
fingerprint; drawing batches (row by row, in sub-batches of 64, with weights); the hash of a
batch's membership; reading, encoding and packing with a processor that does nothing to speak of,
so that what is left is the pipeline's own cost; the first batch after resuming at step 0 and at
step 100,000, which must not differ; and opening with a look at every row, once and again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

SUBSETS = 20


def write(root: Path, rows: int) -> None:
    """The subsets as parquet files of text pairs."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = np.geomspace(30, 1, SUBSETS)
    counts = np.maximum((sizes / sizes.sum() * rows).astype(int), 1)
    counts[0] += rows - counts.sum()
    for s, count in enumerate(counts.tolist()):
        folder = root / f"Subset{s:02d}"
        folder.mkdir(parents=True)
        number = np.arange(count).astype(str)
        empty = np.full(count, "")
        table = pa.table(
            {
                "qry": np.char.add("Find what belongs to number ", number),
                "qry_image_path": empty,
                "pos_text": np.char.add("the target of ", number),
                "pos_image_path": empty,
            }
        )
        pq.write_table(table, folder / "original-00000-of-00001.parquet")


def encode(item: Any) -> Any:
    """As little as an encoder can do."""
    import numpy as np

    from vlm2vec_jax.inputs import EncodedInput

    tokens = np.frombuffer(item.text.encode(), np.uint8).astype(np.int32)
    places = np.arange(len(tokens), dtype=np.int32)
    return EncodedInput(tokens, np.full_like(tokens, -1), places, {}, 0)


def timed(work: Any, times: int) -> tuple[float, float]:
    """Median CPU and wall seconds of a call."""
    cpu, wall = [], []
    for _ in range(times):
        a, b = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - a)
        wall.append(time.perf_counter() - b)
    return statistics.median(cpu), statistics.median(wall)


def measure(root: Path, rows: int, batch: int) -> dict[str, float]:
    """All numbers, by name; the unit is the end of the name."""
    from vlm2vec_jax.config import Config, DataConfig
    from vlm2vec_jax.data.mixture import Mixture
    from vlm2vec_jax.data.mmeb import open_train
    from vlm2vec_jax.data.pipeline import batches
    from vlm2vec_jax.training.data import open_data

    found: dict[str, float] = {}
    begin = time.perf_counter()
    open_train(root)
    found["first_opening_with_conversion_s"] = time.perf_counter() - begin
    found["opening_s"] = timed(lambda: open_train(root), 3)[1]
    sources = open_train(root)
    names = [source.subset for source in sources]
    kinds = {
        "by_row": Mixture(sources, 0),
        "sub_batch_64": Mixture(sources, 0, sub_batch=64),
        "weighted": Mixture(sources, 0, weights={name: 1.0 + i for i, name in enumerate(names)}),
    }
    found["mixture_ms"] = 1e3 * timed(lambda: Mixture(sources, 0), 5)[0]
    found["fingerprint_ms"] = 1e3 * timed(lambda: kinds["by_row"].fingerprint(batch), 3)[0]
    for name, mixture in kinds.items():
        for place, step in (("start", 0), ("late", 10**6)):
            cpu, _ = timed(lambda m=mixture, s=step: m.batch_indices(s, batch), 20)
            found[f"draw_{name}_{place}_us_per_example"] = 1e6 * cpu / batch
    cpu, _ = timed(lambda: kinds["by_row"].membership(7, batch), 10)
    found["membership_us_per_example"] = 1e6 * cpu / batch
    cpu, _ = timed(lambda: kinds["by_row"].batch_indices(3, 131_072), 3)
    found["draw_batch_of_131072_ms"] = 1e3 * cpu

    def stream(start: int, count: int) -> None:
        with batches(
            kinds["by_row"], batch, start_step=start, encode=encode,
            pack=lambda *_: None, workers=0,
        ) as found:  # fmt: skip
            for _ in range(count):
                next(found)

    many = 4
    cpu, _ = timed(lambda: stream(0, many), 3)
    found["read_encode_collate_us_per_example"] = 1e6 * cpu / batch / many
    for step in (0, 100_000):
        wall = timed(lambda s=step: stream(s, 1), 5)[1]
        found[f"first_batch_when_resuming_at_{step}_ms"] = 1e3 * wall
    config = Config(data=DataConfig(path=str(root)), batch_size=batch)
    output = root / "output"
    output.mkdir()
    for name in ("first", "resumed"):  # every row is looked through once, then remembered
        begin = time.perf_counter()
        open_data(config, output=output)
        found[f"start_up_{name}_s"] = time.perf_counter() - begin
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="results/<date>-cpu-sampler.json by default")
    args = parser.parse_args()
    common.pin()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.rows)
        found = measure(Path(folder), args.rows, args.batch)
    for name, value in found.items():
        print(f"{name:45s} {value:12.3f}")
    path = args.output or common.RESULTS / f"{time.strftime('%Y-%m-%d')}-cpu-sampler.json"
    report = {
        "benchmark": "sampler",
        "rows": args.rows,
        "batch": args.batch,
        "subsets": SUBSETS,
        "results": {name: round(value, 4) for name, value in found.items()},
        "machine": common.machine(),
        "commit": common.git_head(),
        "load": [load, os.getloadavg()[0]],
        "note": "one pinned thread of a machine that others used at the same time; microseconds "
        "are CPU time, seconds and first batches wall time; medians of a few rounds",
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
