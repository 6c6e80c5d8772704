# SPDX-License-Identifier: Apache-2.0
"""Train an embedding model.

    python -m vlm2vec_jax.train --config configs/NAME.py [--config.field=value ...]

The output folder receives config.json, vlm2vec.json, metrics.jsonl (a line per step) and
checkpoints/; it can be given to `evaluate`, `embed` and `export` as a model. The same command goes
on after an interruption, from the newest good checkpoint.
"""

from __future__ import annotations

import time
from typing import Any

from absl import flags

from vlm2vec_jax import config_check
from vlm2vec_jax.config import Config
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import define_config, experiment, run


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    define_config(values)


def main(args: Any) -> None:
    """Train as `--config` says."""
    train(experiment(args))


def train(config: Config) -> None:
    """Run an experiment from where it stands to its last step.

    Args:
      config: checked.

    Raises:
      UserError: for whatever is wrong with configuration, data, model or folders, before the
        first step where it can be known by then.
    """
    import jax

    from vlm2vec_jax.parallel.mesh import make_mesh, row_shards
    from vlm2vec_jax.training import report, setup
    from vlm2vec_jax.training.checkpoint import Checkpoints
    from vlm2vec_jax.training.metrics import MetricsWriter
    from vlm2vec_jax.training.watch import LossWatch

    # 1. Where: the mesh. A mesh smaller than the machine takes its first devices.
    shape = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    devices = jax.devices()
    if all(size > 0 for size in shape) and len(devices) > shape[0] * shape[1] * shape[2]:
        devices = devices[: shape[0] * shape[1] * shape[2]]
    mesh = make_mesh(*shape, devices=devices)
    output = setup.prepare_output(config)

    # 2. What from: the data, looked through before anything is computed.
    data = setup.open_data(config)

    # 3. What: the model, its adapter, its processor.
    model, processor, adapter = setup.load(config, mesh)
    record = setup.record_of(config, model, processor, adapter, data)

    # 4. How: packed shapes, optimizer, state.
    rows, plain = setup.choose_packing(config, data, processor, model, row_shards(mesh))
    packer = setup.packer(config, rows, plain, processor, row_shards(mesh))
    trainer = setup.trainer(config, model, mesh)
    spec = setup.step_spec(config, model, cached=packer.cached, shards=row_shards(mesh))
    watch = LossWatch(config)

    with Checkpoints(
        output / "checkpoints", config.checkpoint.keep, config.checkpoint.every, report=report.warn
    ) as checkpoints:
        # 5. From where: the newest good checkpoint of the same run.
        done = setup.resume(config, checkpoints, trainer, data)
        setup.write_records(output, config, record)
        report.start(config, mesh, model, trainer, adapter, data, packer, spec, done, output)
        step_fn = trainer.compile_step(spec)
        key = jax.random.key(config.seed)

        # 6. The loop. A step's metrics are fetched while the next one runs.
        meta = {"record": record, **setup.run_identity(config, data)}
        with (
            jax.set_mesh(mesh),
            setup.batches(config, data, processor, packer, done) as batches,
            MetricsWriter(
                output,
                config.steps,
                done,
                log_every=config.log_every,
                trackers=setup.trackers(config, output, done),
            ) as metrics,
        ):
            for message in (*config_check.remarks(config), *model.remarks, *data.remarks):
                metrics.message(message)
            waiting = None
            started = time.perf_counter()
            while done < config.steps:
                asked = time.perf_counter()
                _, packed, stats = next(batches)
                waited = time.perf_counter() - asked
                batch = trainer.put(setup.train_batch(packed, stats, spec.loss))
                trainer.state, values = step_fn(trainer.state, trainer.frozen, batch, key)
                done += 1
                if waiting is not None:
                    started = _finish(metrics, *waiting, started, config, watch)
                for message in stats.skipped:
                    metrics.message(f"skipped: {message}")
                extra = {
                    "real_tokens": packed.real_tokens,
                    "real_units": packed.real_units,
                    "data_wait_s": waited,
                    "skipped": len(stats.skipped),
                }
                waiting = (done, values, extra)
                if done == config.steps or checkpoints.is_due(done):
                    started = _finish(metrics, *waiting, started, config, watch)
                    waiting = None
                    state = trainer.saved()
                    if trainer.temperature is not None:
                        record["temperature"] = trainer.temperature
                        setup.write_records(output, config, record)
                    checkpoints.save(done, state, {**meta, "step": done}, force=True)
    print(f"trained {done} steps; the model is in {output}")


def _finish(metrics, step: int, values, extra, started: float, config: Config, watch) -> float:
    """Fetch and write a step's numbers; returns when that was."""
    import jax

    values = {name: float(value) for name, value in jax.device_get(values).items()}
    now = time.perf_counter()
    extra = {**extra, "step_s": now - started, "pairs_per_s": config.batch_size / (now - started)}
    metrics.write(step, {**values, **extra})
    for message in watch.look(step, values):
        metrics.message(f"warning: {message}")
    if values["loss"] != values["loss"]:
        raise UserError(
            f"the loss of step {step} is not a number; the checkpoints before it are whole. "
            f"A lower optim.lr or model.dtype=float32 may help"
        )
    return now


if __name__ == "__main__":
    run(main, define)
