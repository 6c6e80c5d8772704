# SPDX-License-Identifier: Apache-2.0
"""Train steps on the scaled-down model: packed against right-padded, cached against plain, DoRA.

    python -m benchmarks.train_step [--pairs 16] [--rounds 5]

Loss and gradients (no optimizer) of a batch of pairs, full fine-tuning unless said otherwise. The
right-padded baseline is GradCache as the reference runs it, in our own code: chunks of 2 inputs
of one side, each chunk as long as its longer input, two passes. All give the same loss and
gradients, which is checked. Texts have lengths that are multiples of 16, so that the baseline
needs few programs; both sides embed the same texts.
"""

from __future__ import annotations

import argparse
import functools

from benchmarks import common

CHUNK_TOKENS = 512
"""Tokens of a chunk of the packed step: a batch of texts is several chunks then."""


GRID = 16
"""What the lengths of texts are multiples of."""


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--mixed_pairs", type=int, default=6, help="half with a photo; 0 for none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.pin()

    import numpy as np

    rng = np.random.default_rng(args.seed)

    def texts(count: int):
        lengths = common.text_lengths(rng, count)
        return [common.text(rng, n) for n in -(-lengths // GRID) * GRID]

    sides = {"texts": _split(texts(2 * args.pairs))}
    if args.mixed_pairs:
        # Queries: a photo of 1x2 crops and a question, or a text; targets are texts.
        queries = texts(args.mixed_pairs)
        queries[::2] = [common.photo(rng, 1, 2, len(item)) for item in queries[::2]]
        targets = texts(args.mixed_pairs)
        sides["mixed"] = (queries, targets)

    lines, timings = [], {}
    for name, (queries, targets) in sides.items():
        step = Step("none", queries, targets)
        timings[name] = step.compare(args.rounds)
        timing, shapes = timings[name], step.shapes()
        for what, against, ours, base, target, at_most in (
            (f"{name}: GradCache, packed", "right-padded chunks of 2", "cached", "padded 2", 1.25
             if name == "texts" else 1.6, False),
            (f"{name}: GradCache / plain step", "plain step", "cached", "plain", 1.33, True),
        ):  # fmt: skip
            ratio = timing.ratio(ours, base) if at_most else timing.ratio(base, ours)
            pair = (timing.median(ours), timing.median(base))
            lines.append(common.Comparison(what, against, ratio, target, pair, shapes, at_most))

    queries, targets = sides["texts"]
    steps = {kind: Step(kind, queries, targets) for kind in ("lora", "dora")}
    cases = {kind: functools.partial(step.cases["cached"]) for kind, step in steps.items()}
    timings["adapters"] = timing = common.alternate(cases, args.rounds)
    lines.append(
        common.Comparison(
            "texts: DoRA / LoRA, GradCache",
            "LoRA",
            timing.ratio("dora", "lora"),
            1.10,
            (timing.median("dora"), timing.median("lora")),
            steps["dora"].shapes(),
            at_most=True,
        )
    )
    path = common.report("train_step", lines, timings, options=vars(args))
    print(f"written to {path}")


def _split(items):
    half = len(items) // 2
    return items[:half], items[half:]


class Step:
    """Loss and gradients of one batch of pairs in several ways.

    Args:
      kind: what is trained: "none" (everything), "lora" or "dora" (rank 8, the reference's
        targets).
      queries, targets: encoded inputs.
    """

    def __init__(self, kind: str, queries, targets):
        import jax
        import numpy as np

        from vlm2vec_jax.models.loading import add_adapter, split_trainable
        from vlm2vec_jax.nn.compute import Compute
        from vlm2vec_jax.training.step import StepSpec, loss_and_grads
        from vlm2vec_jax.weights.adapter_config import AdapterConfig, resolve

        model = common.scaled_down()
        if kind != "none":
            adapter = AdapterConfig(8, 64, targets=TARGETS, dora=kind == "dora")
            add_adapter(model.module, resolve(adapter, model.table), dora=adapter.dora, dropout=0.0)
        graphdef, self.params, self.frozen = split_trainable(model, full=kind == "none")
        self.items, self.pairs = [*queries, *targets], len(queries)
        compute, ids = Compute("float32"), np.arange(len(queries), dtype=np.int32)

        self._packed = {}
        self.cases = {}
        for cached in (True, False):
            spec = StepSpec(compute, cached=cached)
            batch = self._pack(cached, ids)
            run = jax.jit(functools.partial(loss_and_grads, graphdef, spec))
            self.cases["cached" if cached else "plain"] = functools.partial(
                self._run, run, self.params, self.frozen, batch, jax.random.key(0)
            )
        self.cases["padded 2"] = self._padded(graphdef, compute, 2)

    @staticmethod
    def _run(function, *args):
        import jax

        return jax.block_until_ready(function(*args))

    def _pack(self, cached: bool, ids):
        """The batch as `vlm2vec_jax.train` packs it, with smaller chunks."""
        from vlm2vec_jax.training.batching import BatchPacker, choose_rows
        from vlm2vec_jax.training.step import TrainBatch

        sizes = [(len(item), item.units) for item in self.items]
        rows = choose_rows(sizes, longest=4096)
        packer = BatchPacker(rows, common.LAYOUT, chunk_tokens=CHUNK_TOKENS if cached else None)
        self._packed[cached] = packer.arrange(sizes)
        return TrainBatch(packer(self.items[: self.pairs], self.items[self.pairs :]).groups, ids)

    def _padded(self, graphdef, compute, size: int):
        """The reference's GradCache: embed all chunks, loss, embed each again with gradient."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from vlm2vec_jax.losses.contrastive import contrastive_loss

        def embed(params, frozen, batch):
            return common.embed_right_padded(nnx.merge(graphdef, params, frozen), batch, compute)

        @jax.jit
        def back(params, frozen, batch, cotangent, grads):
            pull = jax.vjp(lambda p: embed(p, frozen, batch), params)[1]
            return jax.tree.map(jnp.add, grads, pull(cotangent)[0])

        @jax.jit
        def loss(q, t):
            return jax.value_and_grad(
                lambda q, t: contrastive_loss(q, t, temperature=0.02)[0], argnums=(0, 1)
            )(q, t)

        forward = jax.jit(embed)
        self.chunks = []
        for side in (self.items[: self.pairs], self.items[self.pairs :]):
            for start in range(0, len(side), size):
                batch = common.right_padded(side[start : start + size])
                self.chunks.append(jax.tree.map(jnp.asarray, batch))

        def run():
            parts = []
            for batch in self.chunks:
                found = forward(self.params, self.frozen, batch)
                parts.append(jnp.zeros_like(found).at[batch.slot[:, 0]].set(found))
            both = jnp.concatenate(parts)
            value, (dq, dt) = loss(both[: self.pairs], both[self.pairs :])
            cotangent = jnp.concatenate([dq, dt])
            grads, start = jax.tree.map(jnp.zeros_like, self.params), 0
            for batch in self.chunks:
                rows = start + batch.slot[:, 0]
                grads = back(self.params, self.frozen, batch, cotangent[rows], grads)
                start += len(rows)
            return jax.block_until_ready((value, None, grads))

        return run

    def compare(self, rounds: int) -> common.Timing:
        """Check that all ways give one loss and one gradient, then time them."""
        import jax
        import numpy as np

        found = {name: case() for name, case in self.cases.items()}
        value, _, grads = found["plain"]
        largest = max(float(abs(g).max()) for g in jax.tree.leaves(grads))
        for name, (other, _, others) in found.items():
            np.testing.assert_allclose(other, value, rtol=1e-4, err_msg=name)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
                assert float(abs(a - b).max()) <= 1e-4 * largest + 2e-5, name
        return common.alternate(self.cases, rounds)

    def shapes(self) -> dict:
        """What the ways compute."""
        planned, chunks = self._packed[True]
        return {
            "pairs": self.pairs,
            "tokens": sum(map(len, self.items)),
            "packed_tokens": planned.run_tokens,
            "chunks": [
                f"{len(c.chunks)} of {c.shape.rows} x {c.shape.row.tokens} tokens" for c in chunks
            ],
            "padded_tokens": sum(batch.tokens.size for batch in self.chunks),
        }


TARGETS = (
    "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj"
)  # fmt: skip


if __name__ == "__main__":
    main()
