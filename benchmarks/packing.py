# SPDX-License-Identifier: Apache-2.0
"""How fast the packing planner is, and how full its rows are.

    python -m benchmarks.packing [--items 100000] [--output FILE.json]

Seeded inputs: short texts, and an assumed MMEB mix of queries and targets with Phi-3.5-V's crop
geometry at 4 and at 16 crops; once as one big evaluation, once as train batches of 1024 pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.packing import Plan, choose_row_tokens, chunked, plan

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


def plan_case(name: str, lengths: np.ndarray, units: np.ndarray, **options: int) -> dict:
    """Plan once for the shares, several times for the time."""
    made = plan(lengths, units, **options)
    seconds = best_time(lambda: plan(lengths, units, **options))
    return _result(name, len(lengths), seconds, made, options)


def _result(name: str, items: int, seconds: float, made: Plan, options: dict) -> dict:
    us = seconds / items * 1e6
    met = (
        us <= TARGETS["us_per_item"]
        and made.token_share >= TARGETS["token_share"]
        and made.unit_share >= TARGETS["unit_share"]
    )
    return {
        "case": name,
        "items": items,
        "us_per_item": us,
        "token_share": made.token_share,
        "unit_share": made.unit_share,
        "rows": {
            f"{g.shape.tokens}x{g.shape.units}x{g.shape.sequences}": len(g.rows)
            for g in made.groups
        },
        "options": dict(options),
        "targets_met": bool(met),
    }


def fill_case(pairs: int) -> dict:
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
    return {"case": "fill", "items": len(encoded), "us_per_item": seconds / len(encoded) * 1e6}


def main() -> None:
    """Run the cases, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args()
    n = args.items
    short = texts(np.random.default_rng(0), n, 24, 2, 250)
    results = [plan_case("text, median 24", short, np.zeros(n, np.int64))]
    for crops in (4, 16):
        lengths, units = mmeb_mix(1, n, crops)
        row = choose_row_tokens(lengths, units, candidates=range(1024, 8193, 128))
        cases = {3200: "default row"} if crops == 4 else {2048: "row 2048"}
        for tokens, label in {**cases, row: f"chosen row {row}"}.items():
            name = f"MMEB mix, {crops} crops, {label}"
            results.append(plan_case(name, lengths, units, visual_row_tokens=tokens))
    lengths, units = mmeb_mix(2, 2048, 4)
    results.append(
        plan_case(
            "train batch of 1024 pairs", lengths, units, max_row_units=20, max_row_sequences=128
        )
    )
    print(f"{'case':42} {'items':>7} {'us/item':>8} {'tokens':>7} {'units':>7}  targets met")
    for r in results:
        print(
            f"{r['case']:42} {r['items']:7d} {r['us_per_item']:8.2f} {r['token_share']:7.3f} "
            f"{r['unit_share']:7.3f}  {'yes' if r['targets_met'] else 'NO'}  {r['rows']}"
        )
    filled = fill_case(512)
    results.append(filled)
    print(f"filling a train batch: {filled['us_per_item']:.1f} us per item (28-pixel crops)")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        text = json.dumps({"targets": TARGETS, "versions": versions, "results": results}, indent=2)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
