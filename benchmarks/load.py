# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint into shards, against reading the same files plainly.

    python -m benchmarks.load [--gigabytes 1.0] [--rounds 3] [--disk 0.5] [--folder DIR]

Writes a bf16 checkpoint of the published model's shape with fewer layers (all other widths as
published; `--gigabytes 8.3` is the whole model) and takes turns: `load` on two simulated devices
with the backbone's sharding; `read`, its files from front to back into one small buffer; `keep`,
the same into memory of their own, which is the least that a load on a CPU has to do, where the
devices' memory is the host's. The page cache is emptied of the files before each turn. `--disk`
repeats that with a disk of so many GB/s: a read of either side returns no sooner than a disk that
serves one after the other would let it.

Wall seconds count waiting for the disk and for other programs, CPU seconds what the loader itself
does. Its parts are measured by themselves, too: setting the model up, and for each gigabyte copying
it out of the page cache, looking for what is not finite, and turning it.
Memory is that of a process of its own, above what it held before, less the model, which on a CPU
lies in host memory, too. The checkpoint is removed afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import common

REAL = Path(__file__).parent.parent / "tests/goldens/phi-3.5-vision/config.json"
SHARD = 500_000_000


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="about; 8.3 is the real size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", type=float, default=None, help="GB/s of a slower, simulated disk")
    parser.add_argument("--folder", default=None, help="where to write; a temporary one by default")
    parser.add_argument("--memory_of", default=None, help="load this and print the memory taken")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2".strip()
    if args.memory_of:
        print(memory(Path(args.memory_of)))
        return
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="load-", dir=args.folder))
    try:
        measure(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Write the checkpoint, take turns, report."""
    layers, size = write_checkpoint(folder, args.gigabytes)
    files = sorted(folder.glob("*.safetensors"))
    shard = max(file.stat().st_size for file in files)
    cases = {"load": lambda: load(folder), "read": lambda: read(files), "keep": lambda: keep(files)}
    cases["load"]()  # imports and the first use of jax do not count
    before_load = os.getloadavg()[0]
    disks = {"this disk": take_turns(cases, files, args.rounds)}
    if args.disk:
        with slow_disk(args.disk * 1e9):
            disks[f"a disk of {args.disk:g} GB/s"] = take_turns(cases, files, args.rounds)
    limit = shard + 1_000_000_000
    command = [sys.executable, "-m", "benchmarks.load", "--memory_of", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    held = int(child.stdout.split()[-1]) - size
    parts = cpu_seconds_of_parts(folder, files)
    print(f"{size / 1e9:.2f} GB in {len(files)} files, {layers} decoder layers, two devices")
    report = {}
    for disk, (wall, spent) in disks.items():
        rate = {name: size / statistics.median(times) / 1e6 for name, times in wall.items()}
        busy = {name: size / statistics.median(times) / 1e6 for name, times in spent.items()}
        ratios = {
            name: statistics.median(b / a for a, b in zip(wall["load"], wall[name], strict=True))
            for name in ("read", "keep")
        }
        print(
            f"{disk}: load {rate['load']:.0f} MB/s; plain reading {rate['read']:.0f}, "
            f"ratio {ratios['read']:.2f}; reading into memory of its own {rate['keep']:.0f}, "
            f"ratio {ratios['keep']:.2f}"
        )
        print("  MB per CPU second: " + ", ".join(f"{k} {v:.0f}" for k, v in busy.items()))
        report[disk] = {
            "MB_per_s": rate,
            "speed_of_load_over": ratios,
            "MB_per_cpu_s": busy,
            "seconds": wall,
            "cpu_seconds": spent,
        }
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    print(f"CPU seconds of the parts: {told}")
    print(
        f"host memory beside the model: {held / 1e6:.0f} MB at most; "
        f"limit {limit / 1e6:.0f} MB (the largest file and 1 GB)"
    )
    record = {
        "benchmark": "load",
        **common.machine(),
        "method": "wall seconds, page cache emptied of the files before each turn, cases in turn; "
        "memory is anonymous RSS above the start, less the model's own bytes",
        "scaled_down": layers < 32,
        "bytes": size,
        "files": len(files),
        "largest_file": shard,
        "decoder_layers": layers,
        "disks": report,
        "cpu_seconds_of_parts": parts,
        "peak_bytes_beside_the_model": held,
        "limit_bytes": limit,
        "met": held <= limit,
        "machine_load": [before_load, os.getloadavg()[0]],
    }
    path = common.RESULTS / f"{record['date']}-cpu-load.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def take_turns(cases: dict, files: list[Path], rounds: int) -> tuple[dict, dict]:
    """Wall and CPU seconds of each turn of each case."""
    wall: dict[str, list[float]] = {name: [] for name in cases}
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in list(cases) if turn % 2 == 0 else reversed(list(cases)):
            forget(files)
            start, busy = time.perf_counter(), time.process_time()
            kept = cases[name]()
            wall[name].append(time.perf_counter() - start)
            spent[name].append(time.process_time() - busy)
            del kept  # two models need not fit
    return wall, spent


@contextlib.contextmanager
def slow_disk(rate: float):
    """Let every `os.preadv` wait as for a disk that serves reads in turn, `rate` bytes a second."""
    real, lock, free = os.preadv, threading.Lock(), time.perf_counter()

    def slow(fd, buffers, offset):
        nonlocal free
        asked = time.perf_counter()
        got = real(fd, buffers, offset)
        with lock:
            free = served = max(asked, free) + got / rate
        time.sleep(max(0.0, served - time.perf_counter()))
        return got

    os.preadv = slow
    try:
        yield
    finally:
        os.preadv = real


def write_checkpoint(folder: Path, gigabytes: float) -> tuple[int, int]:
    """A checkpoint of about that size; returns its decoder layers and the bytes of its tensors."""
    import ml_dtypes
    import numpy as np

    from vlm2vec_jax.models.loading import abstract_model, flatten
    from vlm2vec_jax.weights.safetensors import write

    config = json.loads(REAL.read_text())

    def sized(layers: int):
        config["num_hidden_layers"] = layers
        (folder / "config.json").write_text(json.dumps(config))
        model = abstract_model(folder)
        flat = flatten(model.module)
        return model, flat, 2 * sum(int(np.prod(leaf.shape)) for leaf in flat.values())

    sizes = {layers: sized(layers)[2] for layers in (2, 3)}
    layer = sizes[3] - sizes[2]
    layers = min(max(round((gigabytes * 1e9 - sizes[2]) / layer) + 2, 2), 32)
    model, flat, size = sized(layers)
    rng = np.random.default_rng(0)
    block = rng.normal(size=1 << 20).astype(ml_dtypes.bfloat16)

    def tensors():
        for name, slot in model.table.written():
            shape = tuple(flat[slot.rule.ours].shape)
            shape = slot.rule.hf_shape(shape if slot.layer is None else shape[1:])
            yield name, np.resize(block, shape)

    write(folder, tensors(), shard_bytes=SHARD)
    return layers, size


def memory(folder: Path) -> int:
    """Bytes that a first load takes at most, the model included."""
    import jax

    from vlm2vec_jax.models import loading, phi3v

    assert loading and phi3v and jax.devices()  # so that they do not count
    with Peak() as peak:
        model = load(folder)
    del model
    return peak.bytes


def load(folder: Path):
    """Into bf16 leaves on both devices, cut as the backbone says."""
    import jax
    import jax.numpy as jnp

    from vlm2vec_jax.models.loading import flatten, load_model
    from vlm2vec_jax.parallel.mesh import make_mesh

    model = load_model(folder, dtype_of=lambda path: jnp.bfloat16, mesh=make_mesh(1, 2))
    jax.block_until_ready(list(flatten(model.module).values()))
    return model


def cpu_seconds_of_parts(folder: Path, files: list[Path]) -> dict[str, float]:
    """Setting the model up, and what is done to each gigabyte of a cached file, block by block."""
    import ml_dtypes
    import numpy as np

    from vlm2vec_jax.models.loading import abstract_model
    from vlm2vec_jax.weights.arrays import all_finite, copy_cast

    rows, columns, turns = 170, 3072, 200
    block = np.empty((rows, columns), ml_dtypes.bfloat16)
    target = np.zeros((columns, rows * 8), ml_dtypes.bfloat16)
    view = memoryview(block.reshape(-1).view(np.uint8))
    gigabytes = turns * block.nbytes / 1e9

    def timed(work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    with files[0].open("rb", buffering=0) as file:

        def fill():
            file.seek(1 << 12)
            for _ in range(turns):
                if file.readinto(view) < len(view):
                    file.seek(1 << 12)

        fill()
        found = {"set-up": timed(lambda: abstract_model(folder))}
        found["copying 1 GB"] = timed(fill) / gigabytes
    look = timed(lambda: [all_finite(block) for _ in range(turns)])
    spans = [slice(rows * (i % 8), rows * (i % 8 + 1)) for i in range(turns)]
    turn = timed(lambda: [copy_cast(target[:, span], block.T) for span in spans])
    return {**found, "looking at 1 GB": look / gigabytes, "turning 1 GB": turn / gigabytes}


def read(files: list[Path]) -> None:
    """From front to back, 8 MB at a time, into nothing."""
    buffer = memoryview(bytearray(8 << 20))
    for file in files:
        with file.open("rb", buffering=0) as handle:
            place = 0
            while got := os.preadv(handle.fileno(), [buffer], place):
                place += got


def keep(files: list[Path]) -> list:
    """The same, into memory of their own, of which no page was used before."""
    import numpy as np

    from vlm2vec_jax.weights.arrays import aligned

    kept = [aligned((file.stat().st_size,), np.dtype(np.uint8)) for file in files]
    for file, array in zip(files, kept, strict=True):
        view, place = memoryview(array), 0
        with file.open("rb", buffering=0) as handle:
            while got := os.preadv(handle.fileno(), [view[place : place + (8 << 20)]], place):
                place += got
    return kept


def forget(files: list[Path]) -> None:
    """Ask the kernel to drop the files from its page cache."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Peak:
    """The most anonymous memory that the process held inside the block, above its start."""

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        self._start = anonymous()
        self.bytes = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, anonymous() - self._start)


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind (mapped files can be dropped)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
