# SPDX-License-Identifier: Apache-2.0
"""How fast a data set is checked: rows per second of one core, at three depths.

    python benchmarks/verify.py [--rounds 5]

Mini-MMEB at a fifth of its size, training and evaluation rows, tables already converted: the quick
form that `train` and `evaluate` run (rows and folder listings), the same with every image opened
and hashed but not decoded, and with every image decoded. One process on one processor; CPU
seconds, the depths in turn, the median of the rounds. The issue asks for 2,000 rows/s without
decoding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common
from benchmarks.common import How, Result, Row

WANTED = 2000
"""Rows a second without decoding, on one core."""


def main(argv: list[str] | None = None) -> int:
    """The same by itself, with options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--scale", type=float, default=0.2, help="of mini-MMEB")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    common.pin()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), args.scale, args.rounds)
    common.show({"verify": result}, "rows of a data set checked on one core")
    return 0 if all(row.met is not False for row in result.rows) else 1


def measure(how: How) -> Result:
    """A row for each depth."""
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), how.pick(0.2, 0.01), how.rounds)


def compare(folder: Path, scale: float, rounds: int) -> Result:
    """Write the data, look through it at each depth."""
    from vlm2vec_jax.data import inspection
    from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb

    write_mini_mmeb(folder / "data", 0, scale)
    parts = [folder / "data" / "train", folder / "data" / "eval"]

    def look(**how):
        found = [inspection.inspect(part, **how) for part in parts]
        assert not any(f.errors for f in found)
        return found

    found = look()  # converts the tables and fills the page cache
    rows = sum(part.rows for f in found for part in f.parts)
    images = sum(f.images for f in found)
    timing = common.alternate(
        {
            "quick": lambda: look(images=False),
            "opened and hashed": lambda: look(decode=False),
            "decoded": look,
        },
        rounds,
    )
    shapes = {"rows": rows, "images": images, "scale": scale}
    lines = []
    for case, target in (("quick", 1.0), ("opened and hashed", 1.0), ("decoded", None)):
        seconds = timing.median(case)
        speed = rows / seconds
        lines.append(
            Row(case, speed, "rows/s", "wanted", WANTED, speed / WANTED, target, shapes=shapes)
        )
    return Result(lines, {"verify": timing})


if __name__ == "__main__":
    sys.exit(main())
