# SPDX-License-Identifier: Apache-2.0
"""Scoring on the device against a loop over the queries, for 10^3 to 10^6 candidates.

The baseline is what VLM2Vec's `eval.py` does, in our own code: for each query its candidates are
looked up and stacked, their lengths and products taken, and the largest found. `lists` are MMEB's
case (1000 queries with 1000 candidates of their own), from a pool as large, as labels are, and from
one of twice the size; for rows that share nothing there are lists of few queries. The others are
one corpus for all queries, where ours also gives ranks, ties and the best ten. The loop runs over
fewer queries where it is slow, and seconds are compared per query; both find the same best
candidate. Vectors are as wide as the real model's, for 10^6 candidates as wide as truncated ones,
which fit in memory.
"""

from __future__ import annotations

from benchmarks import common
from benchmarks.common import How, Result, Row

LOOP_CANDIDATES = 1_000_000
"""The loop takes as many queries as make about so many products."""
WIDTH = 3072
"""Of an embedding of the real model."""
TRUNCATED = 256
"""Of a million of them, 1 GB."""


def measure_lists(how: How) -> Result:
    """A row for each kind of MMEB's lists."""
    import numpy as np

    rng = np.random.default_rng(how.seed)
    width, count = how.pick((WIDTH, 128), (32, 8))
    rows, timings = [], {}
    n = how.pick(1000, 20)
    many = rng.standard_normal((n, width)).astype(np.float32)
    few = many[: how.pick(32, 4)]
    for name, asking, pool, target in (
        (f"lists of {n:,}, all of the same", many, n, 25.0),
        (f"lists of {n:,} from {2 * n:,}", many, 2 * n, 25.0),
        (f"lists of {n:,} that share nothing", few, n * len(few), None),
    ):
        looped = min(count, len(asking))
        ours, loop = lists(rng, asking, n, pool, looped)
        timings[name] = common.alternate({"ours": ours, "loop": loop}, how.rounds)
        rows.append(_row(name, timings[name], len(asking), looped, n, width, target))
    return Result(rows, timings)


def measure(how: How) -> Result:
    """A row for each size of a corpus."""
    import numpy as np

    rng = np.random.default_rng(how.seed)
    width, count = how.pick((WIDTH, 128), (32, 8))
    queries = rng.standard_normal((count, width)).astype(np.float32)
    rows, timings = [], {}
    for size in how.pick((1000, 10_000, 100_000, 1_000_000), (100,)):
        own = min(width, TRUNCATED) if size >= 1_000_000 else width
        pool = rng.standard_normal((size, own), np.float32)
        done = max(2, min(count, LOOP_CANDIDATES // size))
        ours, loop = one_corpus(np.ascontiguousarray(queries[:, :own]), pool, done)
        name = f"corpus of {size:,}"
        timings[name] = common.alternate({"ours": ours, "loop": loop}, how.rounds)
        rows.append(_row(name, timings[name], count, done, size, own))
    return Result(rows, timings)


def _row(name, timing, count, looped, candidates, width, target=None) -> Row:
    return Row(
        name,
        timing.median("ours") / count * 1e3,
        "ms/query",
        "loop over the queries",
        timing.median("loop") / looped * 1e3,
        timing.ratio("loop", "ours") * count / looped,
        target,
        shapes={"queries": count, "candidates": candidates, "width": width, "looped": looped},
    )


def lists(rng, queries, size, pool, done):
    """Both ways for MMEB's own lists; the loop over the first `done` queries."""
    import numpy as np

    from vlm2vec_jax.evaluation import scoring

    vectors = rng.standard_normal((pool, queries.shape[1]), np.float32)
    if pool == size * len(queries):
        rows = np.arange(pool).reshape(len(queries), size)
    else:
        rows = [rng.permutation(pool)[:size] for _ in queries]
    keyed = {n: v for n, v in enumerate(vectors)}

    def ours():
        return scoring.judge(queries, vectors, range(len(queries)), rows).reference_prediction

    def loop():
        return np.array([best(q, keyed, row) for q, row in zip(queries[:done], rows)])

    np.testing.assert_array_equal(ours()[:done], loop())
    return ours, loop


def one_corpus(queries, targets, done):
    """Both ways for one corpus; the loop over the first `done` queries."""
    import numpy as np

    from vlm2vec_jax.evaluation import corpus

    keyed = {n: v for n, v in enumerate(targets)}
    names = range(len(targets))
    truth = [[n % len(targets)] for n in range(len(queries))]

    def ours():
        return corpus.rank(queries, targets, truth).top[:, 0]

    def loop():
        return np.array([best(q, keyed, names) for q in queries[:done]])

    np.testing.assert_array_equal(ours()[:done], loop())
    return ours, loop


def best(query, keyed, names):
    """The reference's choice among a query's candidates."""
    import numpy as np

    stacked = np.stack([keyed[n] for n in names])
    scores = (stacked @ query) / (np.linalg.norm(stacked, axis=1) * np.linalg.norm(query))
    return int(np.argmax(scores))
