# SPDX-License-Identifier: Apache-2.0
"""Compilation: scanned against unrolled layers, warm against cold, and how many programs a run has.

A run that compiles after its warm-up loses minutes for each stray shape, so the targets on
programs must be met: the suite fails otherwise.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.beds import TARGETS, Bed
from benchmarks.common import How, Result, Row

DEPTH = 32
MOST_PROGRAMS = 10
WARM_UP = 3
"""Steps, or windows of an embedder, within which all programs of a run must be there."""


def measure(how: How) -> Result:
    """All four."""
    rows = [scanned_against_unrolled(how), warm_against_cold(how), *programs_of_training(how)]
    return Result([*rows, *programs_of_embedding(how)])


def scanned_against_unrolled(how: How) -> Row:
    """Seconds to trace and compile the gradient of a deep and narrow decoder."""
    depth = how.pick(DEPTH, 4)
    seconds = {name: gradient_seconds(depth, name == "unrolled") for name in ("scan", "unrolled")}
    ratio = seconds["scan"] / seconds["unrolled"]
    what = f"gradient of {depth} decoder layers, scanned"
    return Row(
        what, seconds["scan"], "s", "unrolled", seconds["unrolled"], ratio, 0.25, at_most=True
    )


def gradient_seconds(layers: int, unrolled: bool) -> float:
    """CPU seconds to trace and compile the gradient of a decoder of the tiny width."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.reference_shaped import right_padded
    from vlm2vec_jax.nn.compute import Compute

    bed = Bed("tiny", layers=layers)
    batch = right_padded([bed.text(np.random.default_rng(0), 16)], bed.layout)
    graphdef, state = nnx.split(bed.model().module)
    compute = Compute("float32")

    def value(state):
        module = nnx.merge(graphdef, state)
        x = module.input_embeddings(batch, compute)
        places = module.decoder.places(batch)
        if unrolled:
            return module.decoder.norm(module.decoder.hidden_states(x, places, compute)[-1]).sum()
        return module.decoder(x, places, jnp.asarray(batch.pool_index), compute).sum()

    with programs_in(None):
        start = time.process_time()
        jax.jit(jax.grad(value)).lower(state).compile()
        return time.process_time() - start


def warm_against_cold(how: How) -> Row:
    """Seconds to trace and compile a train step, with an empty and with a full cache."""
    import jax
    import numpy as np

    from benchmarks.train_step import Bench, mixed_pairs

    bed = Bed("tiny", layers=how.pick(None, 2))
    bench = Bench(bed, how, "dora", *mixed_pairs(bed, how, 4))
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="bench_compile_") as folder:
        for name in ("cold", "warm"):
            with programs_in(folder):
                step = bench.ours(cached=True)
                start = time.process_time()
                value = step()[0]
                seconds[name] = time.process_time() - start
    assert np.isfinite(jax.device_get(value))
    ratio = seconds["warm"] / seconds["cold"]
    what = "first GradCache step, programs kept from before"
    return Row(what, seconds["warm"], "s", "none kept", seconds["cold"], ratio, 0.2, at_most=True)


@contextlib.contextmanager
def programs_in(folder: str | None) -> Iterator[None]:
    """Keep compiled programs in this folder alone, or nowhere, inside the block."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    wanted: dict[str, Any] = {
        "jax_enable_compilation_cache": folder is not None,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.clear_caches()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def programs_of_training(how: How) -> list[Row]:
    """Shapes of many steps at the real sizes (planned only), and programs of a few real steps."""
    bed = Bed("real")
    steps, pairs = how.pick((60, 1024), (4, 64))
    found = planned_steps(bed, how, steps, pairs, chunk_tokens=16384)
    rows = _rows(f"shapes of {steps} train steps of {pairs} pairs", found, WARM_UP, must=True)
    return rows + _real_steps(how)


def planned_steps(bed: Bed, how: How, steps: int, pairs: int, chunk_tokens: int) -> list[Any]:
    """The shapes of each step's program, as `train` packs an assumed mixture at num_crops 4."""
    import dataclasses

    from vlm2vec_jax.models.phi3v.flops import image_size
    from vlm2vec_jax.training.assumed import Mix
    from vlm2vec_jax.training.batching import BatchPacker, choose_rows

    sizes = Mix().sizes(steps * pairs, lambda w, h: image_size(bed.config, 4, w, h))
    queries, targets = sizes[: steps * pairs], sizes[steps * pairs :]
    rows = choose_rows([*queries[:1000], *targets[:1000]], longest=1 << 17)
    packer = BatchPacker(rows, bed.layout, chunk_tokens=chunk_tokens)
    packer.foresee([*queries[:1000], *targets[:1000]], 2 * pairs)
    found = []
    for n in range(steps):
        own = slice(n * pairs, (n + 1) * pairs)
        _, chunks = packer.arrange([*queries[own], *targets[own]])
        found.append(tuple(dataclasses.astuple(c.shape.row) + c.shape[1:] for c in chunks))
    return found


def _real_steps(how: How) -> list[Row]:
    """Programs that jax makes in a few steps of the tiny model, batch after batch."""
    import jax
    import numpy as np

    from vlm2vec_jax.compilation import Programs
    from vlm2vec_jax.models.loading import add_adapter
    from vlm2vec_jax.nn.compute import Compute
    from vlm2vec_jax.parallel.mesh import make_mesh
    from vlm2vec_jax.training.batching import BatchPacker, choose_rows
    from vlm2vec_jax.training.optimizer import AdamW, make_schedule
    from vlm2vec_jax.training.state import Trainer
    from vlm2vec_jax.training.step import StepSpec, TrainBatch
    from vlm2vec_jax.weights.adapter_config import AdapterConfig, resolve

    bed, rng = Bed("tiny"), np.random.default_rng(how.seed)
    pairs, steps = 16, how.pick(10, 3)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = bed.model()
    adapter = AdapterConfig(4, 8.0, targets=TARGETS)
    add_adapter(model.module, resolve(adapter, model.table), dora=False, dropout=0.0, mesh=mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model.module = jax.device_put(model.module, whole)
    optimizer = AdamW(make_schedule("constant", 1e-3, 0, 100))
    trainer = Trainer.create(model, optimizer, mesh, full=False)

    def side():
        return [
            bed.photo(rng, 1, 2, n) if rng.random() < 0.5 else bed.text(rng, n)
            for n in rng.integers(4, 40, pairs)
        ]

    sample = [(len(item), item.units) for _ in range(4) for item in side()]
    packer = BatchPacker(choose_rows(sample, longest=4096), bed.layout, chunk_tokens=512)
    packer.foresee(sample, 2 * pairs)
    counts = []
    with jax.set_mesh(mesh):
        step = trainer.compile_step(StepSpec(Compute("float32")))
        for _ in range(steps):
            groups = packer(side(), side()).groups
            batch = trainer.put(TrainBatch(groups, np.arange(pairs, dtype=np.int32)))
            with Programs(only="train_step") as programs:
                out = step(trainer.state, trainer.frozen, batch, jax.random.key(0))
                trainer.state = jax.block_until_ready(out)[0]
            counts.append(programs.count)
    assert sum(counts) > 0, "no program was counted at all"
    late = sum(counts[WARM_UP:])
    return [
        Row(
            f"programs made in {steps} steps of the tiny model", sum(counts), "",
            target=MOST_PROGRAMS, at_most=True, shapes={"by_step": counts}, must=True,
        ),
        Row(
            f"of them after {WARM_UP} steps", late, "", target=0, at_most=True,
            shapes={"by_step": counts}, must=True,
        ),
    ]  # fmt: skip


def programs_of_embedding(how: How) -> list[Row]:
    """Shapes of an embedder's calls over many windows of a mixture at the real sizes (planned)."""
    found = planned_calls(how, how.pick(24, 4), how.pick(2048, 200))
    return _rows(f"shapes of {len(found)} windows of an embedder", found, WARM_UP, must=True)


def planned_calls(how: How, windows: int, size: int) -> list[set[Any]]:
    """The (rows, row shape) of an embedder's calls, window by window."""
    import dataclasses

    from vlm2vec_jax.embedding.batches import Batches, Device
    from vlm2vec_jax.models.phi3v.backbone import BACKBONE
    from vlm2vec_jax.models.phi3v.flops import image_size
    from vlm2vec_jax.training.assumed import Mix

    bed = Bed("real")

    def never(*args):
        raise AssertionError("only planned")

    batches = Batches(
        dimension=bed.config.hidden_size,
        price=BACKBONE.price(bed.config),
        max_tokens=1 << 17,
        device=Device("gpu", 1, 16384),
        fill=never,
        compute=never,
    )
    sizes = Mix().sizes(windows * size // 2, lambda w, h: image_size(bed.config, 4, w, h))
    import numpy as np

    order = np.random.default_rng(how.seed).permutation(len(sizes))
    found = []
    for n in range(windows):
        own = [sizes[i] for i in order[n * size : (n + 1) * size]]
        found.append({(count, dataclasses.astuple(s)) for _, count, s in batches.rows(own, None)})
    return found


def _rows(what: str, found: Sequence[Any], warm_up: int, *, must: bool = False) -> list[Row]:
    """How many programs there are in all, and how many first appear after the warm-up."""
    seen: set[Any] = set()
    new = []
    for shapes in found:
        own = shapes if isinstance(shapes, set) else {shapes}
        new.append(len(own - seen))
        seen |= own
    told = {"new_by_turn": new, "shapes": sorted(map(str, seen))}
    return [
        Row(what, len(seen), "", target=MOST_PROGRAMS, at_most=True, shapes=told, must=True),
        Row(
            f"of them first seen after {warm_up}", sum(new[warm_up:]), "", target=0,
            at_most=True, shapes=told, must=must,
        ),
    ]  # fmt: skip
