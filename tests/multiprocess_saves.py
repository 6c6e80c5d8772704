# SPDX-License-Identifier: Apache-2.0
"""One of two processes of `test_multiprocess.py`: what fails on one of them, and a dump.

    python multiprocess_saves.py FOLDER PORT PROCESS

Writes FOLDER/told-PROCESS.json: the sentences that were reported, and what else was seen.
"""

# ruff: noqa: E402 (jax is imported after the number of devices is said)
import json
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.parallel.cluster import Place
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.parallel.peers import Peers, join
from vlm2vec_jax.training.batching import BatchPacker, choose_rows
from vlm2vec_jax.training.checkpoint import Checkpoints
from vlm2vec_jax.training.dump import dump
from vlm2vec_jax.training.guard import SkippedSteps
from vlm2vec_jax.training.loop import Finished
from vlm2vec_jax.training.step import TrainBatch

PAIRS = 12


def set_full(limit: int | None) -> None:
    """Let every write beyond `limit` bytes of a file fail in this process."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard))


def state_of(mesh: jax.sharding.Mesh, seed: int) -> dict[str, jax.Array]:
    """100 kB, half of it in each process."""
    values = np.random.default_rng(seed).normal(size=(256, 100)).astype(np.float32)
    spread = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {"w": jax.make_array_from_callback(values.shape, spread, lambda i: values[i])}


def saves(folder: Path, mesh: jax.sharding.Mesh, peers: Peers) -> dict[str, Any]:
    """Four saves: one that works, one that fails late, one that fails early, one that works."""
    told: list[str] = []
    seen: dict[str, Any] = {"told": told, "errors": []}
    broken = peers.process == 1
    with Checkpoints(folder, keep=5, every=1, report=told.append, peers=peers) as checkpoints:
        checkpoints.save(1, state_of(mesh, 1), {})
        checkpoints.wait()
        for step, limit in ((2, 20_000), (3, 1_000)):
            set_full(limit if broken else None)
            began = time.monotonic()
            checkpoints.save(step, state_of(mesh, step), {})
            try:
                checkpoints.wait()
            except UserError as error:
                seen["errors"].append(str(error))
            seen[f"seconds {step}"] = time.monotonic() - began
        set_full(None)
        checkpoints.save(4, state_of(mesh, 4), {})
        checkpoints.wait()
        seen["steps"] = checkpoints.steps()
        found = checkpoints.restore_latest(state_of(mesh, 0))
        assert found is not None
        restored, wanted = found[1]["w"], state_of(mesh, 4)["w"]
        seen["restored"] = [found[0]] + [
            bool(np.array_equal(a.data, b.data))
            for a, b in zip(restored.addressable_shards, wanted.addressable_shards, strict=True)
        ]
        # What process 1 wrote last loses its data; process 0 reads nothing of that.
        if broken:
            for data in (folder / "4").glob("*/ocdbt.process_1/d/*"):
                data.write_bytes(data.read_bytes()[:1000])
        peers.exchange("damage", b"")
        began = time.monotonic()
        found = checkpoints.restore_latest(state_of(mesh, 0))
        assert found is not None
        seen["before the damage"] = found[0]
        seen["seconds damaged"] = time.monotonic() - began
    return seen


def batch_of(part: tuple[int, int]) -> tuple[BatchPacker, TrainBatch]:
    """A process's part of a batch of texts of several lengths."""
    rng = np.random.default_rng(0)
    inputs = []
    for length in rng.integers(2, 30, 2 * PAIRS):
        tokens = rng.integers(3, 400, length).astype(np.int32)
        place = np.arange(length, dtype=np.int32)
        inputs.append(EncodedInput(tokens, np.full(length, -1, np.int32), place))
    sizes = [(len(item), 0) for item in inputs]
    rows = choose_rows(sizes, longest=512)
    packer = BatchPacker(rows, VisualLayout(0, 0, {}), chunk_tokens=128, row_multiple=2, part=part)
    planned = packer.plan_step(sizes)
    packed = packer.fill(planned, {i: inputs[i] for i in packer.items(planned)}, [()] * len(inputs))
    return packer, TrainBatch(packed.groups, np.arange(PAIRS, dtype=np.int32))


def main(folder: Path, port: int, process: int) -> None:
    """Take part."""
    peers = join(Place(f"127.0.0.1:{port}", 2, process), timeout_s=100)
    mesh = make_mesh(1, 2, 1)
    seen = saves(folder / "checkpoints", mesh, peers)

    packer, batch = batch_of((process, 2))
    state = state_of(mesh, 7)
    trainer = SimpleNamespace(saved=lambda: state, mesh=mesh)
    stats = SimpleNamespace(rows=np.zeros((PAIRS, 2), np.int64))
    finished = Finished(5, {"loss": np.nan}, {}, None, stats)  # pyright: ignore
    skipped = SkippedSteps(0, 1, ["Texts"])
    try:
        dump(folder, trainer, packer, {}, skipped, peers, batch, finished)  # pyright: ignore
    except UserError as error:
        seen["dumped"] = str(error)
    (folder / f"told-{process}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
