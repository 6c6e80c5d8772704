# SPDX-License-Identifier: Apache-2.0
"""How fast the packing planner is, and how full its rows are.

Seeded inputs: short texts, and an assumed MMEB mix of queries and targets with Phi-3.5-V's crop
geometry at 4 and at 16 crops; once as one big evaluation, once as train batches of 1024 pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.common import How, Result, Row
from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.packing import choose_row_tokens, chunked, plan

ASPECTS = {4 / 3: 54, 3 / 2: 18, 1.0: 8, 2**0.5: 8, 16 / 9: 5, 1100 / 850: 4, 800 / 350: 3}
"""Ratio of the longer to the shorter side (Phi-3.5-V turns tall images), per cent of images."""

TARGETS = {"us_per_item": 2.0, "token_share": 0.93, "unit_share": 0.90}


def texts(rng: np.random.Generator, n: int, median: float, least: int, most: int) -> np.ndarray:
    """Lognormal token counts, clipped to [least, most]; i64 [n]."""
    drawn = rng.lognormal(np.log(median), 0.6, n)
    return np.clip(np.round(drawn), least, most).astype(np.int64)


def crop_grid(aspect: np.ndarray, num_crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of Phi-3.5-V's crop grid: the widest that has at most `num_crops` crops."""
    columns, rows = np.ones_like(aspect, np.int64), np.ones_like(aspect, np.int64)
    for width in range(1, num_crops + 1):
        height = np.ceil(width / aspect).astype(np.int64)
        fits = width * height <= num_crops
        columns, rows = np.where(fits, width, columns), np.where(fits, height, rows)
    return rows, columns


def mmeb_mix(seed: int, n: int, num_crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and visual units of `n` inputs, half queries and half targets.

    16 of 20 queries and 7 of 20 targets carry an image; query texts have a median of 32 tokens,
    target texts 12, captions beside a target image 10.
    """
    rng = np.random.default_rng(seed)
    query = np.arange(n) < n // 2
    image = rng.random(n) < np.where(query, 16 / 20, 7 / 20)
    caption, target = texts(rng, n, 10, 2, 256), texts(rng, n, 12, 2, 256)
    text = np.where(query, texts(rng, n, 32, 8, 256), np.where(image, caption, target))
    weights = np.array(list(ASPECTS.values()), float)
    rows, columns = crop_grid(rng.choice(list(ASPECTS), n, p=weights / weights.sum()), num_crops)
    units = np.where(image, rows * columns + 1, 0)
    return text + np.where(image, 144 * units + 12 * (rows + 1) + 1, 0), units


def best_time(function: Callable[[], object], repeats: int = 3) -> float:
    """The least CPU seconds of some runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def cases(how: How):
    """(name, lengths, units, options of `plan`) of each case."""
    n = how.pick(100_000, 500)
    short = texts(np.random.default_rng(how.seed), n, 24, 2, 250)
    yield "texts, median 24", short, np.zeros(n, np.int64), {}
    for crops in (4, 16):
        lengths, units = mmeb_mix(how.seed + 1, n, crops)
        row = choose_row_tokens(lengths, units, candidates=range(1024, 8193, 128))
        yield f"MMEB mix, num_crops {crops}", lengths, units, {"visual_row_tokens": row}
    lengths, units = mmeb_mix(how.seed + 2, how.pick(2048, 64), 4)
    options = {"max_row_units": 20, "max_row_sequences": 128}
    yield f"train batch of {len(lengths) // 2} pairs", lengths, units, options


def measure(how: How) -> Result:
    """Shares of real tokens, microseconds of the planner, against right padding."""
    rows = []
    for name, lengths, units, options in cases(how):
        made = plan(lengths, units, **options)
        seconds = best_time(lambda a=lengths, b=units, o=options: plan(a, b, **o))
        us = seconds / len(lengths) * 1e6
        shapes = {
            "items": len(lengths),
            "options": dict(options),
            "unit_share": made.unit_share,
            "rows": {
                f"{g.shape.tokens}x{g.shape.units}x{g.shape.sequences}": len(g.rows)
                for g in made.groups
            },
        }
        padded = padded_share(lengths, 64)
        rows += [
            Row(
                f"{name}: real tokens", made.token_share, "share",
                "right-padded batches of 64", padded, target=TARGETS["token_share"],
                shapes=shapes,
            ),
            Row(
                f"{name}: planner", us, "us/item", "", target=TARGETS["us_per_item"],
                at_most=True, shapes=shapes,
            ),
        ]  # fmt: skip
    rows.append(fill_case(how.pick(512, 8)))
    return Result(rows)


def crops(how: How) -> Result:
    """Shares of real crops, against num_crops + 1 for every image."""
    rows = []
    for name, lengths, units, options in cases(how):
        if not units.any():
            continue
        most = 17 if "16" in name else 5
        made = plan(lengths, units, **options)
        rows.append(
            Row(
                f"{name}: real crops", made.unit_share, "share", f"{most} for every image",
                float(units.sum() / (most * (units > 0).sum())), target=TARGETS["unit_share"],
                shapes={"items": len(lengths), "options": dict(options)},
            )
        )  # fmt: skip
    return Result(rows)


def padded_share(lengths: np.ndarray, size: int) -> float:
    """Real tokens among those of right-padded batches of so many inputs."""
    whole = lengths[: len(lengths) // size * size].reshape(-1, size)
    return float(whole.sum() / (whole.max(axis=1) * size).sum())


def fill_case(pairs: int) -> Row:
    """Fill one train batch of small crops: what the host does for each item besides planning."""
    lengths, units = mmeb_mix(3, 2 * pairs, 4)
    layout = VisualLayout(2, 144, {"crops": ((28, 28, 3), "uint8")})
    encoded = []
    for length, count in zip(lengths.tolist(), units.tolist(), strict=True):
        features = np.full(length, -1, np.int32)
        features[: 144 * count] = np.arange(144 * count) + 2
        crops = {"crops": np.ones((count, 28, 28, 3), np.uint8)} if count else {}
        positions = np.arange(length, dtype=np.int32)
        encoded.append(EncodedInput(np.ones(length, np.int32), features, positions, crops, count))
    made = plan(lengths, units, max_row_units=20, max_row_sequences=128)
    seconds = best_time(lambda: chunked(made, encoded, layout, chunk_tokens=51200))
    us = seconds / len(encoded) * 1e6
    shapes = {"items": len(encoded), "crop_pixels": 28}
    return Row("filling a train batch, small crops", us, "us/item", shapes=shapes)
