# SPDX-License-Identifier: Apache-2.0
"""Make a step again that was not finite, and say what in it is not.

    python -m vlm2vec_jax.replay --dump OUTPUT/non_finite/step-N [--model DIR] [--dtype float32]

A run leaves such a folder when it stops because more steps than max_skipped_steps were not finite
(docs/resuming.md). It holds the batch and the state before the step; the base model is looked for
where the run had it, or at --model. Prints the step's numbers, the examples whose embedding is not
finite, and the parameters whose gradient is not. Exit code 0 if the step is finite here (another
dtype, another machine), 1 if it is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax import config as config_lib
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import define_compilation_cache, run, use_compilation_cache


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    text = flags.DEFINE_string
    text("dump", None, "folder of the dump", required=True, flag_values=values)
    text("model", None, "the base model, if it has moved", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "compute in this type instead",
                      flag_values=values)  # fmt: skip
    define_compilation_cache(values)


def main(args: Any) -> int:
    """Replay a dump; 0 if it is finite here."""
    import jax
    import numpy as np

    from vlm2vec_jax.models.loading import flatten
    from vlm2vec_jax.parallel.mesh import make_mesh, row_shards
    from vlm2vec_jax.training import dump, setup
    from vlm2vec_jax.training.checkpoint import Checkpoints
    from vlm2vec_jax.training.step import loss_and_grads

    use_compilation_cache(args)
    folder = Path(args.dump)
    batch, said = dump.read_batch(folder)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.read_meta()
        if meta is None:
            raise UserError(f"{folder / 'checkpoints'} holds no state")
        config = config_lib.from_dict(meta["config"])
        config.model.path = args.model or config.model.path
        config.model.dtype = args.dtype or config.model.dtype
        # One device is enough, and the rows of the batch fit on any.
        mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        model, _, _ = setup.load(config, mesh)
        trainer = setup.trainer(config, model, mesh)
        found = checkpoints.restore_latest(trainer.saved())
    assert found is not None
    trainer.restore(found[1])
    spec = setup.step_spec(config, model, cached=said["cached"], shards=row_shards(mesh))
    key = jax.random.fold_in(jax.random.key(config.seed), trainer.state.step)
    placed = trainer.put(batch)
    with jax.set_mesh(mesh):
        step = jax.jit(
            lambda params, frozen, batch, key: loss_and_grads(
                trainer.graphdef, spec, params, frozen, batch, key
            )
        )
        loss, _, grads = step(trainer.state.params, trainer.frozen, placed, key)
        slots = embeddings_by_slot(trainer, spec, placed)
    squares = [float(np.square(np.asarray(g, np.float64)).sum()) for g in jax.tree.leaves(grads)]
    norm = float(np.sqrt(sum(squares)))
    print(f"step {said['step']}: loss {float(loss)}, grad_norm {norm}")
    print(f"in the run: {said['metrics']}")
    pairs = len(said["rows"])
    bad = [slot for slot, value in sorted(slots.items()) if not np.isfinite(value).all()]
    names = found[2]["mixture"]["order"]
    for slot in bad:
        # Behind the queries each pair has a target and the places of its hard negatives.
        each = (len(batch.target_id)) // pairs
        row = slot if slot < pairs else (slot - pairs) // each
        place = "query" if slot < pairs else f"target {(slot - pairs) % each}"
        source, number = said["rows"][row]
        print(f"embedding not finite: {names[source]} row {number}, {place}")
    for path, grad in sorted(flatten(grads).items()):
        count = int((~np.isfinite(np.asarray(grad))).sum())
        if count:
            print(f"gradient not finite: {path}, {count} of {grad.size} numbers")
    finite = bool(np.isfinite(float(loss)) and np.isfinite(norm))
    print("the step is finite here" if finite else "the step is not finite here either")
    return 0 if finite else 1


def embeddings_by_slot(trainer: Any, spec: Any, batch: Any) -> dict[int, Any]:
    """Each input's embedding [D] without dropout, by its slot in the batch."""
    import jax
    import numpy as np
    from flax import nnx

    from vlm2vec_jax.training.step import with_dora_norms

    @jax.jit
    def embed(params, frozen, chunk):
        graphdef, frozen = with_dora_norms(trainer.graphdef, params, frozen)
        return nnx.merge(graphdef, params, frozen)(chunk, spec.compute, key=None)

    found = {}
    for group in batch.groups:
        for k in range(int(group.num_chunks)):
            chunk = jax.tree.map(lambda leaf, k=k: leaf[k], group.batch)
            values = np.asarray(embed(trainer.state.params, trainer.frozen, chunk))
            slot = np.asarray(chunk.slot)
            real = slot >= 0
            found |= dict(zip(slot[real].tolist(), values[real], strict=True))
    return found


if __name__ == "__main__":
    run(main, define)
