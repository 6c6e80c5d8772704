# SPDX-License-Identifier: Apache-2.0
"""Feeding a device: how long a step waits for its data, and what preparing it costs.

JPEG photographs on disk, a mixture of pairs as in MMEB-train (16 of 20 queries and 7 of 20 targets
with an image), and a run's own road with the workers that a run takes by itself: read, decode,
cut, hash, pack, transfer, the training loop. The device is made up: it takes each batch when it is
there and sleeps for as long as an accelerator would compute, which leaves the processors to the
pipeline as an accelerator does. A step is as long as one H200 needs for its pairs at 40 % of its
peak (12.4 pairs a second at 4 crops, `docs/performance.md`), and then a quarter of that: four such
cards on this host.

The baseline is the reference's way: decoding and its image path (`image_path`) inside the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import image_path
from benchmarks.common import How, Result, Row

PAIRS_PER_S = 12.4
CARDS = (1, 4)
LIMIT = 0.03
"""Share of a step that may be waiting."""
SKIPPED = 2
"""First steps that do not count: the queue is being filled, as while the step is compiled."""
NUM_CROPS = 4
SIZES = ((640, 480), (480, 640), (1024, 683), (1024, 1024), (1280, 720), (500, 375))


def write(root: Path, pairs: int, seed: int) -> int:
    """Photographs, a subset of pairs, a tokenizer; returns how many images there are to decode."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from vlm2vec_jax.models.phi3v.mini_tokenizer import build_tokenizer, tokenizer_config

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

    syllables = np.array("ka lo mi ren tu so ven dal ir po sha ner".split())
    lexicon = ["".join(rng.choice(syllables, n)) for n in rng.integers(1, 4, 300)]

    def words(median: float) -> str:
        return " ".join(rng.choice(lexicon, int(rng.lognormal(np.log(median), 0.6)) + 1))

    rows = []
    for i in range(pairs):
        query, target = picture(i % 20 < 16), picture(i % 20 < 7)
        rows.append(
            {
                "qry": f"{'<|image_1|> ' * bool(query)}Find what it shows: {words(24)}",
                "qry_image_path": query,
                "pos_text": f"{'<|image_1|> ' * bool(target)}{words(10)} {i}",
                "pos_image_path": target,
            }
        )
    (root / "data/Photos").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "data/Photos/original-00000-of-00001.parquet")
    tokenizer = build_tokenizer([row["qry"] + row["pos_text"] for row in rows], 1000)
    settings = tokenizer_config(len(tokenizer["model"]["vocab"]))
    for name, content in (("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (root / f"{name}.json").write_text(json.dumps(content))
    return count


class Road:
    """What a run reads by, over what `write` wrote: mixture, processor, packer, batches."""

    def __init__(self, root: Path, batch: int):
        from vlm2vec_jax.config import Config
        from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
        from vlm2vec_jax.models.tokenizer import load_tokenizer
        from vlm2vec_jax.training import data as data_lib
        from vlm2vec_jax.training.batching import BatchPacker, choose_rows

        self.config = Config(batch_size=batch)
        self.config.data.path = str(root / "data")
        self.config.data.image_root = str(root)
        mixture = data_lib.open_mixture(self.config)
        self._data = data_lib.Data(mixture, batch, [])
        self._processor = Phi3VProcessor(
            load_tokenizer(root, tokenizer_class="LlamaTokenizerFast"), num_crops=NUM_CROPS
        )
        sizes = data_lib.sample_sizes(self._data, self._processor)
        self._packer = BatchPacker(
            choose_rows(sizes, longest=4096), self._processor.visual_layout, chunk_tokens=16384
        )
        self._packer.foresee(sizes, 2 * batch)

    def batches(self, workers: int = 0) -> Any:
        """The run's packed batches; 0 workers for as many as it takes by itself."""
        from vlm2vec_jax.training import data as data_lib

        self.config.data.workers = workers
        return data_lib.batches(self.config, self._data, self._processor, self._packer, 0)


class Device:
    """An accelerator as the loop sees one: takes a batch, is busy, hands over numbers in the end.

    A step begins when the one before has ended and its batch is there, whatever the host does.

    Attributes:
      spans: when each step began and ended.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._arriving = ThreadPoolExecutor(1, "device")
        self._computing = ThreadPoolExecutor(1, "device")
        self.spans: list[tuple[float, float]] = []

    def __call__(self, state: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        """A step; returns at once, as jax does."""
        there = self._arriving.submit(_arrival, batch)
        return state, {"loss": _Later(self._computing.submit(self._step, there))}

    def _step(self, there: Future) -> None:
        begun = max(there.result(), *(end for _, end in self.spans[-1:]), 0.0)
        self.spans.append((begun, begun + self._seconds))
        time.sleep(max(self.spans[-1][1] - time.perf_counter(), 0.0))

    def idle_share(self) -> float:
        """Of the time from the end of the first steps to the end of the last one."""
        spans = self.spans[SKIPPED - 1 :]
        idle = sum(after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False))
        return idle / (spans[-1][1] - spans[0][1])


def _arrival(batch: Any) -> float:
    """When a batch is on the device."""
    import jax

    jax.block_until_ready(batch.groups)
    return time.perf_counter()


class _Later:
    """A number that is there when the step has been computed."""

    def __init__(self, step: Future):
        self._step = step

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self._step.result()
        return np.zeros((), np.float32)


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


def busy() -> float:
    """Seconds that all programs have used all processors, less this one's; NaN where unknown."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return float("nan")
    fields = [int(field) for field in line.split()[1:]]
    own = os.times()
    total = (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")
    return total - own.user - own.system


def train(road: Road, seconds: float, count: int) -> dict[str, float]:
    """The training loop on a made-up device; `count` steps of `seconds` are counted."""
    import functools

    import jax
    from rich.console import Console

    from vlm2vec_jax.losses.options import LossOptions
    from vlm2vec_jax.parallel.mesh import make_mesh
    from vlm2vec_jax.training import setup
    from vlm2vec_jax.training.guard import SkippedSteps
    from vlm2vec_jax.training.loop import Loop
    from vlm2vec_jax.training.metrics import FILE, MetricsWriter, read_metrics
    from vlm2vec_jax.training.state import Trainer

    class Untrained(Trainer):
        def saved(self) -> dict[str, Any]:
            return {}

    device, last = Device(seconds), count + SKIPPED
    mesh, begun, others = make_mesh(devices=jax.devices()[:1]), time.perf_counter(), busy()
    marks: dict[int, float] = {}

    def watch(finished: Any) -> tuple[str, ...]:
        marks[finished.step] = time.process_time()
        return ()

    with (
        tempfile.TemporaryDirectory() as output,
        open(os.devnull, "w") as nowhere,
        MetricsWriter(output, last, console=Console(file=nowhere)) as metrics,
        road.batches() as batches,
    ):
        nothing: Any = None
        Loop(
            trainer=Untrained(nothing, nothing, nothing, nothing, mesh),
            step_fn=device,
            key=nothing,
            batches=batches,
            make_batch=functools.partial(setup.train_batch, options=LossOptions()),
            checkpoints=SimpleNamespace(  # type: ignore[arg-type]
                is_due=lambda step: False, save_at_once=lambda *_: None
            ),
            meta=lambda step, packed: {},
            metrics=metrics,
            skipped=SkippedSteps(10, 0, ["Photos"]),
            stopping=SimpleNamespace(asked=lambda step: False),  # type: ignore[arg-type]
            dump=lambda batch, finished: None,
            watch=watch,
        ).run(0, last)
        told = read_metrics(Path(output) / FILE)[SKIPPED:]
    elsewhere = (busy() - others) / (time.perf_counter() - begun)
    took = sum(step["step_s"] for step in told)
    return {
        "wait_share": sum(step["data_wait_s"] for step in told) / took,
        "idle_share": device.idle_share(),
        "step_s": took / count,
        "cpu_s": (marks[last] - marks[SKIPPED]) / count,
        "compute_s": seconds,
        **({} if np.isnan(elsewhere) else {"processors_used_by_others": round(elsewhere, 3)}),
    }


def reference_ms(root: Path) -> float:
    """CPU milliseconds of decoding an image and the reference's path, one thread."""
    spent = []
    for file in sorted((root / "images").iterdir())[:24]:
        start = time.process_time()
        with Image.open(file) as image:
            image_path.process(image.convert("RGB"), NUM_CROPS)
        spent.append(time.process_time() - start)
    return 1000 * statistics.mean(spent)


def throughput(road: Road, images: float, workers: int, count: int) -> float:
    """Images a second of wall time that the pipeline delivers when nothing else happens."""
    with road.batches(workers) as pipeline:
        for _ in range(SKIPPED):
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
        road = Road(root, batch)
        theirs = reference_ms(root)
        rows: list[Row] = []
        found = {}
        for cards in CARDS:
            seconds = how.pick(batch / PAIRS_PER_S / cards, 0.02)
            told = train(road, seconds, how.pick(max(4, round(16 / seconds)), 2))
            found[f"{cards} H200"] = told
            reference = images * theirs / 1000
            name = f"steps of {seconds:.2f} s, as long as {cards} H200 take{'s' * (cards == 1)}"
            against = "decoding and preparing in the step", reference / (reference + seconds)
            for words, share in (("waiting for data", "wait"), ("the device idle", "idle")):
                figure = told[f"{share}_share"]
                rows.append(
                    Row(f"{words}, {name}", figure, "share", *against, target=LIMIT, at_most=True)
                )
        ours = 1000 * found[f"{CARDS[-1]} H200"]["cpu_s"] / images
        rows.append(
            Row(
                "an image from disk to the device, texts, hash and packing included",
                ours,
                "ms",
                "decoding and the reference's path alone",
                theirs,
                theirs / ours,
            )
        )
        rates: dict[int, list[float]] = {}
        for _ in range(how.rounds):
            for workers in (1, *(n for n in (2, 4, 8, 16) if n <= processors)):
                rate = throughput(road, images, workers, how.pick(3, 1))
                rates.setdefault(workers, []).append(rate)
        speeds = {workers: statistics.median(of) for workers, of in rates.items()}
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
    more = {
        "steps": found,
        "pairs_a_batch": batch,
        "images_a_batch": images,
        "images_per_s": rates,
        "h200_per_processor": 1000 / ours / (PAIRS_PER_S * images / batch),
    }
    return Result(rows, more={**more, "processors": processors, "reference_ms": theirs})
