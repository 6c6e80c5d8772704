# SPDX-License-Identifier: Apache-2.0
"""Whole training steps as a run takes them: pairs a second, and their share of the measured peak.

LoRA and DoRA as in the recipe, and full fine-tuning with float32 masters. Pairs are MMEB's assumed
mixture at 4 crops (16 of 20 queries and 7 of 20 targets have a photograph of 2 x 2 crops). How the
step is computed is settled as for a run, from the memory of its compiled program where the device
says how much it has; the optimizer is in the time, the reading of data is not (`input_pipeline`).
"""

from __future__ import annotations

import gc
import statistics
import time

import numpy as np

from benchmarks import peak
from benchmarks.beds import Bed
from benchmarks.common import How, Result, Row

KINDS = {"lora": (3, 12.4), "dora": (3, 12.4), "none": (4, None)}
"""What is trained -> forward passes that a gradient is worth, with GradCache or recomputed layers;
pairs a second asked of one H200 (40 % of 790 TFLOP/s)."""
NAMES = {"lora": "LoRA", "dora": "DoRA", "none": "full fine-tuning"}


def measure(how: How) -> Result:
    """A row for each kind of training, and one for its useful FLOPs."""
    rows, more = [], {}
    for kind, (passes, target) in how.pick(KINDS, {"dora": KINDS["dora"]}).items():
        run = Run(how, kind, how.pick(4, 2) if how.device == "cpu" else how.pick(128, 2))
        seconds = [run() for _ in range(how.rounds + 1)][1:]
        typical = statistics.median(seconds)
        what = f"{NAMES[kind]}, {run.pairs} pairs"
        told = {"settled": run.words, "seconds": seconds, **run.memory()}
        asked = target if how.size == "real" and how.device == "gpu" else None
        rate = run.pairs / typical
        against = "one H200" if asked else ""
        rows.append(Row(what, rate, "pairs/s", against, target=asked, shapes=told))
        words = f"{what}, useful FLOPs ({passes}F)"
        rows.append(peak.useful(how, words, passes * run.flops, typical, 0.4))
        more[kind] = told
        del run
        gc.collect()  # its weights make room for the next kind's
    return Result(rows, more=more)


class Run:
    """A training run without its data: calling it takes a step and returns its wall seconds.

    Attributes:
      pairs: of the batch.
      flops: of its useful forward passes.
      words: how the step is computed.
    """

    def __init__(self, how: How, kind: str, pairs: int):
        import jax

        from vlm2vec_jax import config as config_lib
        from vlm2vec_jax.parallel.mesh import make_mesh
        from vlm2vec_jax.parallel.peers import Peers
        from vlm2vec_jax.training import settling, setup
        from vlm2vec_jax.training.step import TrainBatch

        bed = Bed(how.pick(how.size, "tiny"))
        config = config_lib.Config(
            model=config_lib.ModelConfig(dtype=how.dtype),
            adapter=config_lib.AdapterConfig(type=kind),
            batch_size=pairs,
        )
        # What full fine-tuning trains has float32 masters.
        adapter = config.adapter
        if kind == "none":
            model = bed.model()
        else:
            model = bed.adapted(kind, dtype=how.dtype, dropout=adapter.dropout, rank=adapter.rank)
        queries, targets = mixture(bed, how, pairs)
        self.pairs, self.flops = pairs, bed.flops([*queries, *targets])
        sizes = [(len(item), item.units) for item in (*queries, *targets)]
        mesh = make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            trainer = setup.trainer(config, model, mesh)
            settled = settling.settle(config, model, trainer, sizes, bed.layout, Peers(), say=print)
            rows = setup.rows_of(settled.config, model, sizes)
            packer = setup.packer(settled.config, rows, model, bed.layout, 1)
            packer.foresee(sizes, 2 * pairs)
            spec = setup.step_spec(settled.config, model, cached=packer.cached, shards=1)
            step = trainer.compile_step(spec)
            ids = np.arange(pairs, dtype=np.int32)
            batch = trainer.put(TrainBatch(packer(queries, targets).groups, ids))
            key = trainer.key(how.seed)
        self.words = settled.words
        self._mesh, self._trainer, self._step, self._args = mesh, trainer, step, (batch, key)

    def __call__(self) -> float:
        """A step.

        Raises:
          FloatingPointError: if its loss is no number.
        """
        import jax

        trainer = self._trainer
        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            trainer.state, metrics = self._step(trainer.state, trainer.frozen, *self._args)
        loss = float(metrics["loss"])
        jax.block_until_ready(trainer.state)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return time.perf_counter() - start

    def memory(self) -> dict[str, float]:
        """The most that the device has held, in GB, if it says."""
        import jax

        most = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return {} if most is None else {"peak_gb": most / 1e9}


def mixture(bed: Bed, how: How, pairs: int):
    """Queries and targets, about MMEB's shares of photographs and lengths of texts."""
    rng = np.random.default_rng(how.seed)

    def side(shown: int, median: float):
        out = []
        for place in rng.permutation(pairs) % 20:
            words = int(np.clip(rng.lognormal(np.log(median), 0.6), 4, 200))
            photo = place < shown
            out.append(bed.photo(rng, 2, 2, words) if photo else bed.text(rng, words))
        return out

    return side(16, 24), side(7, 12)
