# SPDX-License-Identifier: Apache-2.0
"""Train an embedding model.

    python -m vlm2vec_jax.train --config configs/NAME.py [--config.field=value ...]

The output folder receives config.json, vlm2vec.json, metrics.jsonl (a line per step) and
checkpoints/; it can be given to `evaluate`, `embed` and `export` as a model. The same command goes
on after an interruption, from the newest good checkpoint (docs/resuming.md).

Several processes train together when each is told where the others are: --distributed on SLURM
and TPU pods, or --coordinator HOST:PORT --num_processes N --process_id I. Output and data must lie
where all of them see them.

Exit codes: 0 done, 2 a mistake that you can mend, 75 interrupted by SIGTERM or Ctrl-C: the state
is saved, start the same command again.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

from absl import flags

from vlm2vec_jax import config_check
from vlm2vec_jax.config import Config
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import (
    INTERRUPTED,
    define_compilation_cache,
    define_config,
    define_processes,
    experiment,
    join_processes,
    run,
    use_compilation_cache,
)


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    define_config(values)
    define_compilation_cache(values)
    define_processes(values)


def main(args: Any) -> int:
    """Train as `--config` says."""
    config = experiment(args)
    peers = join_processes(args)
    use_compilation_cache(args)
    if peers.processes == 1:
        return train(config, peers)
    try:
        return train(config, peers)
    except BaseException as error:
        _leave(peers, error)
        raise


def _leave(peers: Any, error: BaseException) -> None:
    """End this process and let the others know, rather than wait for them at the exit."""
    known = isinstance(error, UserError)
    peers.fail(f"{error}" if known else f"{type(error).__name__}: {error}")
    if not known:
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if peers.is_main:
        time.sleep(3)  # process 0 carries the messages: let the others hear this one
    os._exit(2 if known else 1)


def train(config: Config, peers: Any = None) -> int:
    """Run an experiment from where it stands to its last step.

    Args:
      config: checked.
      peers: the processes of the run (`parallel.peers.Peers`), joined; None for this one alone.

    Returns:
      The exit code: 0, or 75 if the run was asked to stop and has saved.

    Raises:
      UserError: for whatever is wrong with configuration, data, model or folders, before the
        first step where it can be known by then.
    """
    import jax

    from vlm2vec_jax.parallel.mesh import make_mesh, row_part, row_shards
    from vlm2vec_jax.parallel.peers import Peers
    from vlm2vec_jax.training import data as data_lib
    from vlm2vec_jax.training import dump, going_on, report, settling, setup
    from vlm2vec_jax.training.best import Best
    from vlm2vec_jax.training.checkpoint import Checkpoints
    from vlm2vec_jax.training.follow import Follower
    from vlm2vec_jax.training.guard import SkippedSteps
    from vlm2vec_jax.training.loop import Finished, Loop
    from vlm2vec_jax.training.metrics import MetricsWriter
    from vlm2vec_jax.training.profiling import Profiler
    from vlm2vec_jax.training.stopping import Stopping
    from vlm2vec_jax.training.validation import Validation
    from vlm2vec_jax.training.watch import LossWatch

    peers = peers or Peers()
    warn = functools.partial(report.warn, origin="" if peers.is_main else peers.name(peers.process))

    # 1. Where: the mesh. A mesh smaller than the machine takes its first devices.
    shape = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    devices = jax.devices()
    if all(size > 0 for size in shape) and len(devices) > shape[0] * shape[1] * shape[2]:
        devices = devices[: shape[0] * shape[1] * shape[2]]
    mesh = make_mesh(*shape, devices=devices)
    part = row_part(mesh)
    output = peers.together("start/output", lambda: going_on.prepare_output(config, peers))

    # 2. What from: the data, looked through before anything is computed.
    data = data_lib.open_data(config, peers, output)
    last = data.last_step(config)

    # 3. What: the model, its adapter, its processor.
    model, processor, adapter = peers.together("start/model", lambda: setup.load(config, mesh))
    record = setup.record_of(config, model, processor, adapter, data)

    # 4. How: optimizer, state.
    sizes = data_lib.sample_sizes(data, processor, peers, negatives=config.loss.negatives)
    trainer = setup.trainer(config, model, mesh)
    watch = LossWatch(config)

    with (
        Stopping(peers) as stopping,
        Checkpoints(
            output / "checkpoints",
            config.checkpoint.keep,
            config.checkpoint.every,
            report=warn,
            peers=peers,
        ) as checkpoints,
    ):
        # 5. From where: the newest good checkpoint of the same run.
        done, saved = going_on.resume(config, checkpoints, trainer, data)

        # 6. In which pieces: chunks and what is kept, packed shapes; as before if it goes on.
        settled = settling.settle(
            config,
            model,
            trainer,
            sizes,
            processor.visual_layout,
            peers,
            before=saved.get("settled"),
            say=report.note if peers.is_main else None,
        )
        rows = setup.rows_of(settled.config, model, sizes)
        packer = setup.packer(
            settled.config, rows, model, processor.visual_layout, row_shards(mesh), part
        )
        spec = setup.step_spec(settled.config, model, cached=packer.cached, shards=row_shards(mesh))
        packer.use_shapes(going_on.shapes_of(saved, going_on.packing_of(packer)))
        packer.foresee(sizes, (2 + config.loss.negatives) * config.batch_size)
        skipped = SkippedSteps(
            config.max_skipped_steps,
            saved.get("skipped_steps", 0),
            [source.subset for source in data.mixture.sources],
        )
        if peers.is_main:
            going_on.write_records(output, config, record)
            report.start(config, mesh, model, trainer, adapter, data, packer, spec, done, output)
        step_fn = trainer.compile_step(spec)
        identity = {"record": record, **going_on.run_identity(config, data)}

        def meta(step: int, packed: Any) -> dict[str, Any]:
            if trainer.temperature is not None:
                record["temperature"] = trainer.temperature
                if peers.is_main:
                    going_on.write_records(output, config, record)
            return {
                **identity,
                "step": step,
                "skipped_steps": skipped.count,
                "settled": settled.record,
                "packing": going_on.packed_so_far(packer, packed),
            }

        follower = Follower(
            [source.subset for source in data.mixture.sources],
            mesh.devices.flatten().tolist(),
            full=adapter is None,
        )

        def look(finished: Finished) -> list[str]:
            drawn = data.mixture.membership(finished.step - 1, config.batch_size)
            finished.extra["membership"] = drawn[:16]
            finished.extra.update(
                follower.numbers(
                    finished.values,
                    finished.stats.rows[:, 0],
                    finished.packed.flops,
                    finished.extra["step_s"],
                )
            )
            return watch.look(finished.step, finished.values)

        # Looked through before the first step, so that a mistake in it costs none.
        validation = None
        if config.eval.every:
            best = Best(output, record, done, is_main=peers.is_main, report=warn, peers=peers)
            validation = Validation(config, model, processor, trainer, spec.compute, best)

        # 7. The loop.
        with (
            jax.set_mesh(mesh),
            data_lib.batches(config, data, processor, packer, done, peers, report=warn) as batches,
            MetricsWriter(
                output,
                last,
                done,
                log_every=config.log_every,
                trackers=setup.trackers(config, output, done) if peers.is_main else [],
                is_main=peers.is_main,
            ) as metrics,
        ):
            choice = [settled.words] if settled.words else []
            for message in (*choice, *config_check.remarks(config), *model.remarks, *data.remarks):
                metrics.message(message)
            if validation is not None:
                metrics.message(f"evaluation {validation.words()}")
            loop = Loop(
                trainer=trainer,
                step_fn=step_fn,
                key=trainer.key(config.seed),
                batches=batches,
                make_batch=functools.partial(setup.train_batch, options=spec.loss),
                checkpoints=checkpoints,
                meta=meta,
                metrics=metrics,
                skipped=skipped,
                stopping=stopping,
                dump=functools.partial(
                    dump.dump, output, trainer, packer, identity, skipped, peers
                ),
                watch=look,
                validation=validation,
                profiler=Profiler(config.profile, output / "profile") if peers.is_main else None,
            )
            interrupted = loop.run(done, last)
    if interrupted:
        print("interrupted and saved; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    if peers.is_main:
        print(f"trained {last} steps; the model is in {output}")
    return 0


if __name__ == "__main__":
    run(main, define)
