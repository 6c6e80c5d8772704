# SPDX-License-Identifier: Apache-2.0
"""What fewer bits and shorter vectors cost: how many of the ten nearest stay the ten nearest.

    python -m benchmarks.quantization [--model DIR] [--rows 4000] [--queries 200]

Made-up texts, with the tiny untrained model of the tests unless another is named: its vectors lie
closer together than a trained model's, so the losses are larger than a user's. Writes
`results/<date>-cpu-quantization.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import numpy as np

from vlm2vec_jax import Embedder
from vlm2vec_jax.embedding import vectors

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests" / "goldens" / "tiny_mha"
NOUNS = "cat dog house tree car ship bird stone river cloud lamp chair".split()
PLACES = "beach road forest table roof bridge field market".split()


def texts(rows: int, seed: int) -> list[str]:
    """Sentences of a few words, hardly any twice."""
    rng = np.random.default_rng(seed)
    return [
        f"{rng.integers(2, 99)} {rng.choice(NOUNS)}s and a {rng.choice(NOUNS)} "
        f"by the {rng.choice(PLACES)}"
        for _ in range(rows)
    ]


def nearest(queries: np.ndarray, corpus: np.ndarray, count: int = 10) -> np.ndarray:
    """Places of the nearest, [Q, count]."""
    return np.argsort(-(queries @ vectors.normalize(corpus).T), axis=1, kind="stable")[:, :count]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args()
    embedder = Embedder.from_pretrained(args.model, dtype="float32")
    corpus = embedder.encode(texts(args.rows, 0))
    queries = embedder.encode(texts(args.queries, 1))
    exact = nearest(queries, corpus)
    width = corpus.shape[1]
    ranges = vectors.value_ranges(corpus)
    results = []

    def add(name: str, stored: np.ndarray, found: np.ndarray) -> None:
        kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found)])
        first = float(np.mean(exact[:, 0] == found[:, 0]))
        size = stored.nbytes / len(stored)
        results.append({"stored": name, "bytes": size, "top10": float(kept), "top1": first})
        print(f"{name:>12}  {size:6.0f} bytes  top-10 kept {kept:.1%}  top-1 {first:.1%}")

    add("float32", corpus, exact)
    for precision in ("int8", "uint8", "binary"):
        stored = vectors.quantize_embeddings(corpus, precision, ranges)
        back = vectors.dequantize_embeddings(stored, precision, width, ranges)
        add(precision, stored, nearest(queries, back))
    for dim in (width // 2, width // 4):
        short = vectors.truncate(corpus, dim)
        add(f"{dim} of {width}", short, nearest(vectors.truncate(queries, dim), short))
    told = {
        "model": args.model.name,
        "note": "an untrained model and made-up texts: an upper estimate, not a benchmark",
        "rows": args.rows,
        "queries": args.queries,
        "results": results,
    }
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-cpu-quantization.json"
    path.write_text(json.dumps(told, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
