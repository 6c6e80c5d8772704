# SPDX-License-Identifier: Apache-2.0
"""Scoring on the device against a loop over the queries, for 10^3 to 10^6 candidates.

    python -m benchmarks.score [--dim 128] [--queries 128] [--most 1000000] [--rounds 3]

The baseline is what VLM2Vec's `eval.py` does, in our own code: for each query its candidates are
looked up and stacked, their lengths and products taken, and the largest found. `lists` is MMEB's
case (1000 candidates of its own for each query, from a pool of 2000), the others are one corpus for
all queries, where ours also gives ranks, ties and the best ten. The loop runs over fewer queries
where it is slow, and seconds are compared per query; both find the same best candidate.
"""

from __future__ import annotations

import argparse

from benchmarks import common

LOOP_CANDIDATES = 2_000_000
"""The loop takes as many queries as make about so many products."""


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.pin()

    import numpy as np

    rng = np.random.default_rng(args.seed)
    queries = rng.standard_normal((args.queries, args.dim)).astype(np.float32)
    lines, timings = [], {}

    def add(name, ours, loop, count, done, candidates):
        timings[name] = timing = common.alternate({"ours": ours, "loop": loop}, args.rounds)
        share = count / done
        lines.append(
            common.Comparison(
                name,
                f"loop over {done} queries, per query",
                timing.ratio("loop", "ours") * share,
                3.0,
                (timing.median("ours") / count, timing.median("loop") / done),
                {"queries": count, "candidates": candidates, "dim": args.dim, "looped": done},
            )
        )

    add("lists", *lists(rng, queries), args.queries, args.queries, 1000)
    size = 1000
    while size <= args.most:
        targets = rng.standard_normal((size, args.dim)).astype(np.float32)
        done = max(2, min(args.queries, LOOP_CANDIDATES // size))
        add(f"corpus {size:,}", *one_corpus(queries, targets, done), args.queries, done, size)
        size *= 10
    path = common.report("score", lines, timings, options=vars(args), seconds="per query")
    print(f"written to {path}")


def lists(rng, queries):
    """Both ways for MMEB's own lists."""
    import numpy as np

    from vlm2vec_jax.evaluation import scoring

    pool = rng.standard_normal((2000, queries.shape[1])).astype(np.float32)
    rows = [rng.permutation(len(pool))[:1000] for _ in queries]
    keyed = {n: v for n, v in enumerate(pool)}

    def ours():
        return scoring.judge(queries, pool, range(len(queries)), rows).reference_prediction

    def loop():
        return np.array([best(q, keyed, row) for q, row in zip(queries, rows)])

    np.testing.assert_array_equal(ours(), loop())
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


if __name__ == "__main__":
    main()
