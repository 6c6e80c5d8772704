# SPDX-License-Identifier: Apache-2.0
"""Packed rows against right-padded batches: the same inputs, the same model, one thread.

    python -m benchmarks.embed [--texts 128] [--photos 6] [--rounds 5]

The baseline is what the reference does, in our own code: batches in random order, every input a
row, padded to the longest of its batch (of 64 for texts; of 8 and of 16 for a mixture of texts
and photographs). Both sides give the same embeddings, which is checked.
"""

from __future__ import annotations

import argparse

from benchmarks import common


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--sigma", type=float, default=0.7, help="of the texts' lognormal lengths")
    parser.add_argument("--photos", type=int, default=6, help="beside 10 texts for every 6")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.pin()

    import numpy as np

    rng = np.random.default_rng(args.seed)
    texts = [common.text(rng, n) for n in common.text_lengths(rng, args.texts, sigma=args.sigma)]
    count = max(args.photos * 10 // 6, 1)
    mixture = [common.text(rng, n) for n in common.text_lengths(rng, count, sigma=args.sigma)]
    mixture += [common.photo(rng, 2, 2, n) for n in common.text_lengths(rng, args.photos)]
    rng.shuffle(mixture)

    bench = Bench()
    lines, timings = [], {}
    for name, items, sizes, target in (
        ("texts", texts, (64,), 2.0),
        ("mixed", mixture, (8, 16), 1.5),
    ):
        timings[name] = bench.compare(items, sizes, args.rounds)
        shapes = bench.shapes(items)
        for size in sizes:
            lines.append(
                common.Comparison(
                    name,
                    f"right-padded, batches of {size}",
                    timings[name].ratio(f"padded {size}", "packed"),
                    target,
                    (timings[name].median("packed"), timings[name].median(f"padded {size}")),
                    {**shapes, "padded_tokens": padded_tokens(items, size)},
                )
            )
    path = common.report(
        "embed", lines, timings, options=vars(args), largest_difference=bench.largest_difference
    )
    print(f"largest difference of an embedding: {bench.largest_difference:.1e}; written to {path}")


class Bench:
    """The scaled-down model behind an Embedder, and behind right-padded batches."""

    def __init__(self):
        import functools

        import jax
        from flax import nnx

        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.nn.compute import Compute

        model = common.scaled_down()
        compute = Compute("float32")
        self.embedder = Embedder(model, common.NoProcessor(), compute, None)  # type: ignore
        graphdef, self.state = nnx.split(model.module)

        @functools.partial(jax.jit, static_argnums=())
        def padded(state, batch):
            return common.embed_right_padded(nnx.merge(graphdef, state), batch, compute)

        self.padded = padded
        self.largest_difference = 0.0

    def compare(self, items, sizes, rounds) -> common.Timing:
        """Time packing against right-padded batches of each size."""
        import numpy as np

        cases = {"packed": lambda: self.embedder.encode_encoded(items)}
        for size in sizes:
            cases[f"padded {size}"] = lambda size=size: self.embed_padded(items, size)
        found = [function() for function in cases.values()]
        for other in found[1:]:
            difference = float(np.abs(other - found[0]).max())
            assert difference < 1e-5, difference
            self.largest_difference = max(self.largest_difference, difference)
        return common.alternate(cases, rounds)

    def embed_padded(self, items, size):
        """Embeddings [N, D] in the order of the items, batch by batch."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        out = []
        for start in range(0, len(items), size):
            batch = common.right_padded(items[start : start + size])
            found = np.asarray(self.padded(self.state, jax.tree.map(jnp.asarray, batch)))
            ordered = np.empty_like(found)
            ordered[batch.slot[:, 0]] = found
            out.append(ordered)
        return np.concatenate(out)

    def shapes(self, items) -> dict:
        """What the packed side computes."""
        rows = [
            (count, shape)
            for _, count, shape in self.embedder._rows(
                [(len(item), item.units) for item in items], None
            )
        ]
        return {
            "inputs": len(items),
            "tokens": sum(map(len, items)),
            "units": sum(item.units for item in items),
            "packed_tokens": sum(count * shape.tokens for count, shape in rows),
            "packed_units": sum(count * shape.units for count, shape in rows),
            "packed_rows": [f"{n} x {s.tokens} tokens, {s.units} units" for n, s in rows],
        }


def padded_tokens(items, size: int) -> int:
    """Tokens that right-padded batches compute."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return sum(len(part) * max(map(len, part)) for part in parts)


if __name__ == "__main__":
    main()
