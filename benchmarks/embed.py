# SPDX-License-Identifier: Apache-2.0
"""Packed rows against right-padded batches: the same inputs, the same model, one thread.

    python -m benchmarks.embed [--texts 128] [--photos 6] [--rounds 5] [--backbone NAME|all]

The baseline is what the reference does, in our own code: batches in random order, every input a
row, padded to the longest of its batch (of 64 for texts; of 8 and of 16 for a mixture of texts
and photographs). Both sides give the same embeddings, which is checked.

With `--backbone`, a small model of that registered backbone (`small_backbones.py`) instead of the
scaled-down Phi-3.5-Vision, and batches of 8 for the mixture; no target but that packing is not
slower.
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
    parser.add_argument("--backbone", help="a registered backbone, or `all` of them")
    args = parser.parse_args()
    common.pin()
    if args.backbone is not None:
        compare_backbones(parser, args)
    else:
        compare_scaled_down(args)


def compare_scaled_down(args: argparse.Namespace) -> None:
    """The figures of the scaled-down Phi-3.5-Vision, against their targets."""
    import numpy as np

    rng = np.random.default_rng(args.seed)
    texts = [common.text(rng, n) for n in common.text_lengths(rng, args.texts, sigma=args.sigma)]
    count = max(args.photos * 10 // 6, 1)
    mixture = [common.text(rng, n) for n in common.text_lengths(rng, count, sigma=args.sigma)]
    mixture += [common.photo(rng, 2, 2, n) for n in common.text_lengths(rng, args.photos)]
    rng.shuffle(mixture)

    bench = Bench(
        common.scaled_down(), common.NoProcessor(), common.LAYOUT, common.embed_right_padded
    )
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
        "embed",
        lines,
        timings,
        options={name: value for name, value in vars(args).items() if name != "backbone"},
        largest_difference=bench.largest_difference,
    )
    print(f"largest difference of an embedding: {bench.largest_difference:.1e}; written to {path}")


def compare_backbones(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Every small model asked for, one after the other."""
    import numpy as np

    from benchmarks import small_backbones
    from vlm2vec_jax.models.registry import BACKBONES

    names = sorted(BACKBONES) if args.backbone == "all" else [args.backbone]
    unknown = sorted(set(names) - set(small_backbones.SMALL))
    if unknown:
        known = ", ".join(sorted(small_backbones.SMALL))
        parser.error(f"no small model of {', '.join(unknown)}; there are {known}, and all")
    lines, timings, differences = [], {}, {}
    for name in names:
        rng = np.random.default_rng(args.seed)
        model, processor = small_backbones.build(name)
        texts = [
            small_backbones.text(processor, rng, n)
            for n in common.text_lengths(rng, args.texts, sigma=args.sigma)
        ]
        count = max(args.photos * 10 // 6, 1)
        mixture = [
            small_backbones.text(processor, rng, n)
            for n in common.text_lengths(rng, count, sigma=args.sigma)
        ]
        mixture += [
            small_backbones.photo(processor, rng, n) for n in common.text_lengths(rng, args.photos)
        ]
        rng.shuffle(mixture)
        bench = Bench(model, processor, processor.visual_layout, common.embed_right_padded_apart)
        for kind, items, size in (("texts", texts, 64), ("mixed", mixture, 8)):
            what = f"{name}, {kind}"
            timing = timings[what] = bench.compare(items, (size,), args.rounds)
            lines.append(
                common.Comparison(
                    what,
                    f"right-padded, batches of {size}",
                    timing.ratio(f"padded {size}", "packed"),
                    1.0,
                    (timing.median("packed"), timing.median(f"padded {size}")),
                    {**bench.shapes(items), "padded_tokens": padded_tokens(items, size)},
                )
            )
        differences[name] = bench.largest_difference
    path = common.report(
        "embed-backbones" if args.backbone == "all" else f"embed-{args.backbone}",
        lines,
        timings,
        options=vars(args),
        largest_difference=differences,
        models="random weights, decoders of equal size; see small_backbones.py",
    )
    print(f"largest difference of an embedding: {max(differences.values()):.1e}; written to {path}")


class Bench:
    """A model behind an Embedder, and behind right-padded batches."""

    def __init__(self, model, processor, layout, embed_padded):
        """Take a model and how to embed a right-padded batch: (module, batch, compute)."""
        import functools

        import jax
        from flax import nnx

        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.nn.compute import Compute

        compute = Compute("float32")
        self.layout = layout
        self.embedder = Embedder(model, processor, compute, None)
        graphdef, self.state = nnx.split(model.module)

        @functools.partial(jax.jit, static_argnums=())
        def padded(state, batch):
            return embed_padded(nnx.merge(graphdef, state), batch, compute)

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
            batch = common.right_padded(items[start : start + size], self.layout)
            found = np.asarray(self.padded(self.state, jax.tree.map(jnp.asarray, batch)))
            ordered = np.empty_like(found)
            ordered[batch.slot[:, 0]] = found
            out.append(ordered)
        return np.concatenate(out)

    def shapes(self, items) -> dict:
        """What the packed side computes."""
        rows = [
            (count, shape)
            for _, count, shape in self.embedder._batches.rows(
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
