# SPDX-License-Identifier: Apache-2.0
"""Train steps: ours against the reference-shaped form, GradCache against the plain step, DoRA.

Loss and gradients of a batch of pairs (no optimizer, which costs both sides the same), full
fine-tuning unless said otherwise. All ways give the same loss and gradients, which is checked
wherever nothing is dropped. Texts have lengths that are multiples of `GRID`, so that the baseline
needs few programs; both sides embed the same texts.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import common
from benchmarks.beds import Bed
from benchmarks.common import How, Result, Row, compared, overhead
from benchmarks.peak import useful

if TYPE_CHECKING:
    from vlm2vec_jax.nn.compute import RematKind

GRID = 32
"""What the lengths of texts are multiples of."""
CHUNK_TOKENS = {"cpu": 512}
"""Tokens of a chunk of our step: few, so that a batch of texts is several chunks on a CPU, too."""
TEMPERATURE = 0.02
MOST_CROPS = 5
"""Of an image at num_crops 4."""


def direct(how: How) -> Result:
    """The whole batch at once."""
    bed = Bed(how.size)
    queries, targets = text_pairs(bed, how, how.pick(16, 3) if how.device == "cpu" else 64)
    bench = Bench(bed, how, "none", queries, targets)
    cases = {
        "ours": bench.ours(cached=False),
        "shaped": bench.shaped("reference", chunk=None),
    }
    timing = bench.compare(cases, how.rounds)
    shapes = bench.shapes(cached=False)
    against = "reference-shaped, each side right-padded"
    flops = 3 * bed.flops([*queries, *targets])
    return Result(
        [
            compared("plain step, texts", against, timing, "ours", "shaped", 1.15, shapes),
            useful(how, "plain step, useful FLOPs (3F)", flops, timing.median("ours")),
        ],
        {"texts": timing},
    )


def gradcache(how: How) -> Result:
    """Chunk by chunk: texts, and half of the queries with a photograph."""
    bed = Bed(how.size)
    rows, timings = [], {}
    many = 1 if how.device == "cpu" else 16
    kinds = {
        "texts": (text_pairs(bed, how, many * how.pick(16, 4)), (2, 4), 1.25),
        "mixed": (mixed_pairs(bed, how, many * how.pick(6, 2)), (2,), 1.6),
    }
    for name, (sides, chunks, target) in how.pick(kinds, {"mixed": kinds["mixed"]}).items():
        bench = Bench(bed, how, "none", *sides)
        cases = {"ours": bench.ours(cached=True), "plain": bench.ours(cached=False)}
        for size in chunks:
            cases[f"shaped {size}"] = bench.shaped("reference", chunk=size)
        timings[name] = timing = bench.compare(cases, how.rounds)
        shapes = bench.shapes(cached=True)
        rows += [
            compared(
                f"GradCache step, {name}", f"reference-shaped, chunks of {size}",
                timing, "ours", f"shaped {size}", target if size == 2 else None, shapes,
            )
            for size in chunks
        ]  # fmt: skip
        own = "own plain step"
        rows.append(overhead(f"GradCache step, {name}", own, timing, "ours", "plain", 1.33, shapes))
    return Result(rows, timings)


def dora_overhead(how: How) -> Result:
    """DoRA's step against LoRA's and against DoRA in PEFT's form, dropout as in the recipe."""
    import jax

    bed = Bed(how.size)
    count = how.pick(16, 3) if how.device == "cpu" else 64
    rows, timings = [], {}
    for dropout in how.pick((0.1, 0.0), (0.1,)):
        cases, benches = {}, {}
        for kind in ("lora", "dora", "peft"):
            sides = text_pairs(bed, how, count)
            benches[kind] = Bench(bed, how, kind, *sides, dropout=dropout)
            cases[kind] = benches[kind].ours(cached=True, key=jax.random.key(3))
        name = f"dropout {dropout:g}"
        timings[name] = timing = common.alternate(cases, how.rounds)
        shapes = benches["dora"].shapes(cached=True)
        rows += [
            overhead(f"DoRA step, {name}", "LoRA step", timing, "dora", "lora", 1.08, shapes),
            compared(
                f"DoRA step, {name}", "PEFT's form of DoRA",
                timing, "dora", "peft", None, shapes,
            ),
        ]  # fmt: skip
    rows += _dora_layers(how)
    return Result(rows, timings)


def _dora_layers(how: How) -> list[Row]:
    """Forward passes of one decoder layer's linears by tokens, as a chunk of the step has them."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from benchmarks.reference_shaped import PeftLinear
    from vlm2vec_jax.nn.linear import Linear, refresh_dora_norms

    width, inner, rank = how.pick((768, 2048, 16), (32, 48, 4))
    shapes = ((width, 3 * width), (width, width), (width, 2 * inner), (inner, width))
    kinds = {"lora": Linear, "dora": Linear, "peft": PeftLinear}
    functions = {}
    for kind, cls in kinds.items():
        layers = nnx.List([])
        for n, (din, dout) in enumerate(shapes):
            layer = cls(din, dout, bias=False, rngs=nnx.Rngs(n))
            leaves = {
                "lora_a": jax.random.normal(jax.random.key(n), (din, rank)) / rank,
                "lora_b": 0.02 * jax.random.normal(jax.random.key(n + 9), (rank, dout)),
            }
            if kind != "lora":
                leaves["magnitude"] = jnp.linalg.norm(layer.kernel[...], axis=0)
            layer.set_adapter(leaves, scale=2.0, dropout=0.1, fused_dropout=True)
            layers.append(layer)
        if kind == "dora":
            refresh_dora_norms(layers)
        graphdef, state = nnx.split(layers)

        @jax.jit
        def run(state, x, wide, key, graphdef=graphdef):
            layers = nnx.merge(graphdef, state)
            keys = jax.random.split(key, len(layers))
            return [layer(wide if n == 3 else x, keys[n]) for n, layer in enumerate(layers)]

        functions[kind] = functools.partial(run, state)
    rows = []
    for tokens in how.pick((64, 1024, 2048), (16,)):
        x, wide = jnp.ones((tokens, width)), jnp.ones((tokens, inner))
        key = jax.random.key(0)
        cases = {
            kind: functools.partial(_done, function, x, wide, key)
            for kind, function in functions.items()
        }
        timing = common.alternate(cases, how.rounds)
        told = {"tokens": tokens, "width": width, "inner": inner, "rank": rank}
        what = f"four linears, forward, {tokens} tokens"
        rows.append(overhead(what, "LoRA", timing, "dora", "lora", None, told))
        target = 2.0 if tokens > 64 else None
        against = "PEFT's form of DoRA"
        rows.append(compared(what, against, timing, "dora", "peft", target, told))
    return rows


def _done(function, *args):
    """Run it, and wait."""
    import jax

    return jax.block_until_ready(function(*args))


def text_pairs(bed: Bed, how: How, pairs: int):
    """Queries and targets, texts of lognormal lengths."""
    rng = np.random.default_rng(how.seed)
    items = bed.texts(rng, 2 * pairs, GRID)
    return items[:pairs], items[pairs:]


def mixed_pairs(bed: Bed, how: How, pairs: int):
    """Every other query is a photograph of 1 x 2 crops and a question; targets are texts."""
    rng = np.random.default_rng(how.seed)
    queries, targets = bed.texts(rng, pairs, GRID), bed.texts(rng, pairs, GRID)
    queries[::2] = [bed.photo(rng, 1, 2, len(item)) for item in queries[::2]]
    return queries, targets


class Bench:
    """Loss and gradients of one batch of pairs in several ways.

    Args:
      bed: the model's sizes.
      how: what the user asked for.
      kind: what is trained: "none" (everything), "lora", "dora", or "peft" (DoRA in PEFT's form).
      queries, targets: encoded inputs.
      dropout: of adapters.
    """

    def __init__(self, bed: Bed, how: How, kind: str, queries, targets, *, dropout: float = 0.0):
        from benchmarks.reference_shaped import use_peft_form
        from benchmarks.reference_step import Trained
        from vlm2vec_jax.models.loading import split_trainable
        from vlm2vec_jax.nn.compute import Compute

        self.bed, self.how, self.sides = bed, how, (queries, targets)
        full = kind == "none"
        adapter = "dora" if kind == "peft" else kind
        model = bed.model() if full else bed.adapted(adapter, dtype=how.dtype, dropout=dropout)
        if kind == "peft":
            use_peft_form(model.module)
        self.model = Trained(*split_trainable(model, full=full))
        self.compute, self.dropout = Compute(how.dtype), dropout
        self.chunk_tokens = CHUNK_TOKENS.get(how.device, 16384)
        self._packed = {}

    def varied(self, *, sides=None, chunk_tokens: int = 0, remat: RematKind | None = None) -> Bench:
        """The same model with another batch, chunk (of our step), or policy."""
        other = copy.copy(self)
        other.sides, other._packed = sides or self.sides, {}
        other.chunk_tokens = chunk_tokens or self.chunk_tokens
        other.compute = dataclasses.replace(self.compute, remat=remat or self.compute.remat)
        return other

    def ours(self, *, cached: bool, key=None):
        """A function that runs our step: `training.step` in one compiled program."""
        import jax

        run, arguments = self.program(cached=cached, key=key)

        def step():
            value, _, grads = run(*arguments)
            return jax.block_until_ready((value, grads))

        return step

    def program(self, *, cached: bool, key=None):
        """Our step as a jitted function that nothing has called yet, and its arguments."""
        import jax

        from vlm2vec_jax.training.step import StepSpec, TrainBatch, loss_and_grads

        spec = StepSpec(self.compute, TEMPERATURE, cached=cached, dropout=self.dropout > 0)
        ids = np.arange(len(self.sides[0]), dtype=np.int32)
        batch = jax.device_put(TrainBatch(self._pack(cached).groups, ids))
        run = jax.jit(functools.partial(loss_and_grads, self.model.graphdef, spec))
        key = jax.random.key(0) if key is None else key
        return run, (self.model.params, self.model.frozen, batch, key)

    def shaped(self, form, *, chunk: int | None, key=None):
        """A function that runs the step in a form: "reference" or a `Form`."""
        from benchmarks import reference_shaped, reference_step

        if form == "reference":
            form = dataclasses.replace(reference_shaped.REFERENCE, peft_dora=False)
        return reference_step.Step(
            self.model,
            self.bed.layout,
            self.compute,
            form,
            *self.sides,
            chunk=chunk,
            chunk_tokens=self.chunk_tokens,
            most_crops=MOST_CROPS,
            multiple=GRID,
            key=key,
        )

    def _pack(self, cached: bool):
        """The batch as `vlm2vec_jax.train` packs it, with chunks of our size."""
        from vlm2vec_jax.training.batching import BatchPacker, choose_rows

        sizes = [(len(item), item.units) for side in self.sides for item in side]
        rows = choose_rows(sizes, longest=4096)
        chunk = self.chunk_tokens if cached else None
        packer = BatchPacker(
            rows, self.bed.layout, chunk_tokens=chunk, finely=self.how.device == "cpu"
        )
        self._packed[cached] = packer.arrange(sizes)
        return packer(*self.sides)

    def compare(self, cases, rounds: int) -> common.Timing:
        """Check that all cases give one loss and one gradient, then time them."""
        found = {name: case() for name, case in cases.items()}
        check_equal(found, self.how.dtype)
        return common.alternate(cases, rounds, warm=False)

    def shapes(self, *, cached: bool) -> dict:
        """What our step computes."""
        planned, chunks = self._packed[cached]
        return {
            "pairs": len(self.sides[0]),
            "tokens": sum(len(item) for side in self.sides for item in side),
            "packed_tokens": planned.run_tokens,
            "chunks": [
                f"{len(c.chunks)} of {c.shape.rows} x {c.shape.row.tokens} tokens, "
                f"{c.shape.row.units} units"
                for c in chunks
            ],
        }


def check_equal(found: dict, dtype: str) -> None:
    """All (loss, gradients) are the same up to rounding.

    In float32 no number of a gradient may be off. In bfloat16 embeddings are rounded to 1 in 256
    and logits are 50 times as large, so that single numbers stray; all gradients together may
    differ by a quarter of their norm (4 % were seen with six layers).

    Raises:
      AssertionError: naming the case that differs from the first.
    """
    import jax

    exact = dtype == "float32"
    value, grads = next(iter(found.values()))
    leaves = jax.tree.leaves(grads)
    largest = max(float(abs(g).max()) for g in leaves)
    norm = sum(float((g**2).sum()) for g in leaves) ** 0.5
    for name, (other, others) in found.items():
        np.testing.assert_allclose(other, value, rtol=1e-4 if exact else 0.05, err_msg=name)
        apart = [a - b for a, b in zip(leaves, jax.tree.leaves(others), strict=True)]
        if exact:
            assert max(float(abs(d).max()) for d in apart) <= 1e-4 * largest + 2e-5, name
        else:
            assert sum(float((d**2).sum()) for d in apart) ** 0.5 <= 0.25 * norm, name
