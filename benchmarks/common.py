# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: one pinned thread, CPU seconds, A and B in turn, median of ratios.

Also the scaled-down model that they share and the inputs that they make up. Importing this file
does not import jax, so that `pin` can still set the environment.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.packing import PackedBatch, RowShape, fill

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def pin() -> None:
    """Bind this process to one processor and one thread; call before jax is imported.

    A shared machine slows wall time, and threads that wait for each other slow CPU time; one
    thread whose CPU seconds are counted disturbs itself least.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@dataclasses.dataclass(frozen=True)
class Timing:
    """CPU seconds of each case in each round.

    Attributes:
      seconds: case -> a number per round.
      load: load average of the machine before and after.
    """

    seconds: dict[str, list[float]]
    load: tuple[float, float]

    def median(self, case: str) -> float:
        """CPU seconds."""
        return statistics.median(self.seconds[case])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the rounds of how many times as long `slow` took."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)


def alternate(cases: Mapping[str, Callable[[], Any]], rounds: int) -> Timing:
    """Run all cases in turn, `rounds` times, after one run of each that does not count."""
    for function in cases.values():
        function()
    before = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        # Back and forth, so that none is always the one after.
        for name in list(cases) if turn % 2 == 0 else reversed(list(cases)):
            start = time.process_time()
            cases[name]()
            seconds[name].append(time.process_time() - start)
    return Timing(seconds, (before, os.getloadavg()[0]))


@dataclasses.dataclass
class Comparison:
    """A line of the result: how many times as fast `ours` is as `against`.

    Attributes:
      name: of the comparison.
      against: the baseline.
      ratio: time of the baseline / our time (for overheads: our time / the baseline's).
      target: what the ratio must reach; `at_most` says it must not exceed it.
      seconds: (ours, the baseline's), CPU seconds.
      shapes: what was computed.
    """

    name: str
    against: str
    ratio: float
    target: float
    seconds: tuple[float, float]
    shapes: dict[str, Any]
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def report(name: str, lines: Sequence[Comparison], timings: Mapping[str, Timing], **more) -> Path:
    """Print the table and write `results/<date>-<device>-<name>.json`; returns its path."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name} (one thread, CPU seconds, medians)")
    for column in ("what", "ours", "against", "baseline", "ratio", "target", "met"):
        table.add_column(column)
    for line in lines:
        sign = "<=" if line.at_most else ">="
        table.add_row(
            line.name,
            f"{line.seconds[0]:.3f} s",
            line.against,
            f"{line.seconds[1]:.3f} s",
            f"{line.ratio:.2f}",
            f"{sign} {line.target}",
            "yes" if line.met else "NO",
        )
    Console(width=110).print(table)
    loads = ", ".join(f"{case} {t.load[0]:.1f} to {t.load[1]:.1f}" for case, t in timings.items())
    print(f"load average of the machine: {loads}")
    record = {
        "benchmark": name,
        **machine(),
        "method": "one pinned thread, CPU seconds, cases in turn, median of the rounds' ratios",
        "results": [{**dataclasses.asdict(line), "met": line.met} for line in lines],
        "timings": {case: dataclasses.asdict(timing) for case, timing in timings.items()},
        **more,
    }
    path = RESULTS / f"{record['date']}-cpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """What a figure must be read with: date, commit, versions, processor, load average."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "git": git_head(),
        "versions": {"python": platform.python_version(), **versions},
        "cpu": f"{platform.machine()}, {os.cpu_count()} processors, one used",
        "load_average": list(os.getloadavg()),
    }


def git_head(root: Path = Path(__file__).parent.parent) -> str:
    """The commit that is checked out, read from the repository's files; "" where there is none."""
    try:
        head = (root / ".git/HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        loose = root / ".git" / name
        if loose.exists():
            return loose.read_text().strip()
        packed = (root / ".git/packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
    except OSError:
        return ""


SIZES = {
    "model_type": "phi3_v",
    "hidden_act": "silu",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48},
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {"name": "clip_vision_model", "image_dim_out": 128, "num_img_tokens": 144},
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 336,
        "patch_size": 14,
        "layer_norm_eps": 1e-5,
    },
}
"""Phi-3.5-Vision scaled down: crops of 336 pixels, and the shares of decoder and CLIP per image
(2.8 to 1) about as in the real model (3 to 1)."""


def scaled_down():
    """The model of `SIZES` with random weights, as `models.loading.Model`."""
    from flax import nnx

    from vlm2vec_jax.models.loading import Model
    from vlm2vec_jax.models.phi3v.backbone import BACKBONE
    from vlm2vec_jax.models.phi3v.config import from_dicts

    config = from_dicts(SIZES, SIZES["vision_config"])
    module = BACKBONE.build(config, rngs=nnx.Rngs(0))
    return Model(BACKBONE, config, Path("."), module)


LAYOUT = VisualLayout(2, 144, {"crops": ((336, 336, 3), "uint8"), "crop_info": ((5,), "int32")})


class NoProcessor:
    """What the Embedder asks of a processor when its inputs are encoded already."""

    visual_layout = LAYOUT


def text_lengths(rng: np.random.Generator, count: int, *, median=24, sigma=0.7, most=250):
    """Lognormal token counts, clipped to [2, most]."""
    drawn = rng.lognormal(np.log(median), sigma, count)
    return np.clip(np.round(drawn), 2, most).astype(int)


def text(rng: np.random.Generator, length: int) -> EncodedInput:
    """A text of random tokens."""
    tokens = rng.integers(3, SIZES["vocab_size"], length).astype(np.int32)
    place = np.arange(length, dtype=np.int32)
    return EncodedInput(tokens, np.full(length, -1, np.int32), place)


def photo(rng: np.random.Generator, rows: int, columns: int, question: int) -> EncodedInput:
    """A photograph of rows x columns crops and a question of some tokens."""
    from vlm2vec_jax.models.phi3v.hd_transform import crop_info, hd_geometry, image_feature_index

    geometry = hd_geometry(336 * columns, 336 * rows, rows * columns, 336)
    assert (geometry.rows, geometry.columns) == (rows, columns)
    info = crop_info(geometry)
    crops = rng.integers(0, 256, (len(info), 336, 336, 3), np.uint8)
    crops[0] = 0
    index = image_feature_index(rows, columns, 12, "sub_glb")
    words = text(rng, question)
    tokens = np.concatenate([np.ones(1), np.zeros(len(index)), words.tokens]).astype(np.int32)
    features = np.concatenate([[-1], index, words.feature_index]).astype(np.int32)
    place = np.arange(len(tokens), dtype=np.int32)
    visual = {"crops": crops, "crop_info": np.asarray(info, np.int32)}
    return EncodedInput(tokens, features, place, visual, len(info))


def right_padded(
    items: Sequence[EncodedInput],
    layout: VisualLayout = LAYOUT,
    multiple: int = 1,
    units: int = 0,
) -> PackedBatch:
    """One input to a row, all rows as long as the longest; inputs with images in front.

    Crops are given for those alone (the reference, too, spares texts its vision tower), so
    `visual` has fewer rows than the rest. The length is rounded up to a multiple, where a program
    for each would take too long to compile; an image has at least `units` crops.
    """
    order = sorted(range(len(items)), key=lambda i: items[i].units == 0)
    pictures = sum(item.units > 0 for item in items)
    length = -(-max(map(len, items)) // multiple) * multiple
    most = max(item.units for item in items)
    shape = RowShape(length, max(most, units) if most else 0, 1)
    batch = fill([[i] for i in order], items, shape, layout)
    return batch._replace(visual={name: leaf[:pictures] for name, leaf in batch.visual.items()})


def embed_right_padded(module, batch: PackedBatch, compute):
    """What the model does on a packed batch, on one of `right_padded`: f32 [R, D]."""
    import jax.numpy as jnp

    from vlm2vec_jax.nn.norm import l2_normalize

    pictures = len(batch.visual["crops"]) if batch.visual else 0
    x = module.input_embeddings(batch._replace(visual={}), compute)
    if pictures:
        front = PackedBatch(*(leaf[:pictures] for leaf in batch[:-1]), batch.visual)
        x = jnp.concatenate([module.input_embeddings(front, compute), x[pictures:]])
    places = module.decoder.places(batch)
    return l2_normalize(module.decoder(x, places, batch.pool_index, compute))[:, 0]


def embed_right_padded_apart(module, batch: PackedBatch, compute):
    """The same for any backbone, which need only be callable: f32 [R, D].

    Rows with images and rows without are run one after the other, all as long as the batch's
    longest: for one thread as much work as together.
    """
    import jax.numpy as jnp

    pictures = len(next(iter(batch.visual.values()))) if batch.visual else 0
    front = PackedBatch(*(leaf[:pictures] for leaf in batch[:-1]), batch.visual)
    rest = PackedBatch(*(leaf[pictures:] for leaf in batch[:-1]), {})
    parts = [part for part in (front, rest) if len(part.tokens)]
    return jnp.concatenate([module(part, compute)[:, 0] for part in parts])
