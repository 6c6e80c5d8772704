# SPDX-License-Identifier: Apache-2.0
"""Feeding a device: how long a step waits for its data, and what preparing it costs.

JPEG photographs on disk, a mixture of pairs as in MMEB-train (16 of 20 queries and 7 of 20 targets
with an image), the run's own pipeline: read, decode, cut, hash, pack, all ahead of the step. The
step is made up: it hands the batch to a device and sleeps for as long as an accelerator would
compute, which leaves the processors to the pipeline as an accelerator does. Its length is that of
the target of training at 4 crops on one H200 (12.4 pairs a second), then two thirds of that.

The baseline is the reference's way: decoding and its image path (`image_path`) inside the step.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import image_path
from benchmarks.common import How, Result, Row
from vlm2vec_jax.inputs import MultimodalInput

PAIRS_PER_S = 12.4
NUM_CROPS = 4
SIZES = ((640, 480), (480, 640), (1024, 683), (1024, 1024), (1280, 720), (500, 375))
VOCABULARY = 1000


class Words:
    """A tokenizer as far as the processor needs one: a number for each word."""

    special_tokens = 1
    model_max_length = 4096
    hash = "none"

    def encode(self, text: str, max_len: int | None = None, *, truncate: bool = True) -> list[int]:
        """`<s>` and the words."""
        return [1, *(3 + len(word) % VOCABULARY for word in text.split())][: max_len or 4096]


def write(root: Path, pairs: int, seed: int) -> int:
    """Photographs and a subset of pairs; returns how many images there are to decode."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    count = 0

    def picture(wanted: bool) -> str:
        nonlocal count
        if not wanted:
            return ""
        name = f"images/{count}.jpg"
        photo = image_path.photograph(*SIZES[count % len(SIZES)], seed + count)
        photo.save(root / name, quality=90)
        count += 1
        return name

    rows = []
    for i in range(pairs):
        words = " ".join("word" for _ in range(int(rng.lognormal(3.2, 0.6)) + 1))
        query, target = picture(i % 20 < 16), picture(i % 20 < 7)
        rows.append(
            {
                "qry": f"<|image_1|> {words}" if query else words,
                "qry_image_path": query,
                "pos_text": f"<|image_1|> target {i}" if target else f"target {i}",
                "pos_image_path": target,
            }
        )
    (root / "Photos").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "Photos/original-00000-of-00001.parquet")
    return count


def open_pipeline(root: Path, batch: int, workers: int) -> Any:
    """The run's own batches over what `write` wrote."""
    from vlm2vec_jax.data.mixture import Mixture
    from vlm2vec_jax.data.mmeb import open_train
    from vlm2vec_jax.data.pipeline import batches
    from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
    from vlm2vec_jax.training.batching import BatchPacker, choose_rows

    processor = Phi3VProcessor(Words(), num_crops=NUM_CROPS)  # type: ignore[arg-type]
    mixture = Mixture(open_train(root), 0)
    rows = [mixture.sources[s][p] for s, p in mixture.batch_indices(0, batch).tolist()]
    items: list[MultimodalInput] = [item for row in rows for item in (row.query, row.positive)]
    sizes = [processor.length(item) for item in items]
    packer = BatchPacker(
        choose_rows(sizes, longest=4096), processor.visual_layout, chunk_tokens=16384
    )
    return batches(mixture, batch, encode=processor.encode, pack=packer, workers=workers)


@contextlib.contextmanager
def all_processors() -> Iterator[int]:
    """Undo the pin to one processor, which the other benchmarks want."""
    if not hasattr(os, "sched_setaffinity"):
        yield os.cpu_count() or 1
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield len(os.sched_getaffinity(0))
    finally:
        os.sched_setaffinity(0, before)


def steps(root: Path, batch: int, workers: int, seconds: float, count: int) -> dict[str, float]:
    """Waiting and working of `count` steps of `seconds`, after a first that fills the queue."""
    import jax

    with open_pipeline(root, batch, workers) as pipeline:
        waits, begun, busy = [], 0.0, 0.0
        for step in range(count + 1):
            if step == 1:
                begun, busy = time.perf_counter(), time.process_time()
                waits.clear()
            asked = time.perf_counter()
            _, packed, _ = next(pipeline)
            waits.append(time.perf_counter() - asked)
            placed = jax.device_put(packed.groups)
            time.sleep(seconds)
            jax.block_until_ready(placed)
        took, cpu = time.perf_counter() - begun, time.process_time() - busy
    return {"wait_share": sum(waits) / took, "step_s": took / count, "cpu_s": cpu / count}


def reference_ms(root: Path) -> float:
    """CPU milliseconds of decoding an image and the reference's path, one thread."""
    spent = []
    for file in sorted((root / "images").iterdir())[:24]:
        start = time.process_time()
        with Image.open(file) as image:
            image_path.process(image.convert("RGB"), NUM_CROPS)
        spent.append(time.process_time() - start)
    return 1000 * statistics.mean(spent)


def throughput(root: Path, batch: int, images: float, workers: int, count: int) -> float:
    """Images a second of wall time that the pipeline delivers when nothing else happens."""
    with open_pipeline(root, batch, workers) as pipeline:
        next(pipeline)
        start = time.perf_counter()
        for _ in range(count):
            next(pipeline)
        return images * count / (time.perf_counter() - start)


def measure(how: How) -> Result:
    """Share of waiting at two lengths of a step; what an image costs; scaling over workers."""
    batch = how.pick(40, 4)
    with tempfile.TemporaryDirectory() as place, all_processors() as processors:
        root = Path(place)
        images = write(root, batch * 2, how.seed) / 2  # of a batch, on average
        rows: list[Row] = []
        workers = max(processors, 2)
        theirs = reference_ms(root)
        found = {}
        for name, rate in (("target", PAIRS_PER_S), ("half as fast again", 1.5 * PAIRS_PER_S)):
            seconds = how.pick(batch / rate, 0.02)
            told = steps(root, batch, workers, seconds, how.pick(5, 2))
            found[name] = {**told, "compute_s": seconds}
            reference = images * theirs / 1000
            rows.append(
                Row(
                    f"waiting for data, step of {seconds:.2f} s ({name})",
                    told["wait_share"],
                    "share",
                    "decoding and preparing in the step",
                    reference / (reference + seconds),
                    target=0.03,
                    at_most=True,
                )
            )
        ours = 1000 * found["target"]["cpu_s"] / images
        rows.append(
            Row(
                "an image from disk to the batch, texts, hash and packing included",
                ours,
                "ms",
                "decoding and the reference's path alone",
                theirs,
                theirs / ours,
            )
        )
        speeds = {
            n: throughput(root, batch, images, n, how.pick(3, 1))
            for n in (1, *(n for n in (2, 4, 8, 16) if n <= processors))
        }
        most = max(speeds)
        if most > 1:
            rows.append(
                Row(
                    f"images a second with {most} workers",
                    speeds[most],
                    "/s",
                    "one worker",
                    speeds[1],
                    speeds[most] / speeds[1],
                    0.8 * most,
                )
            )
    more = {"steps": found, "images_a_batch": images, "images_per_s": speeds}
    return Result(rows, more={**more, "processors": processors, "reference_ms": theirs})
