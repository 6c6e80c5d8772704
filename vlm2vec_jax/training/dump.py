# SPDX-License-Identifier: Apache-2.0
"""What is left of a run that stopped because its numbers were not finite: enough to see it again.

A dump is a folder `<output>/non_finite/step-<N>/` with
  dump.json               step, metrics, rows of the batch, versions, mesh
  batch-<p>-of-<P>.npz    the packed batch, each process its rows, and the ids that the loss sees
  checkpoints/<N-1>/      the state before the step, as any checkpoint (LoRA: adapters alone)
`python -m vlm2vec_jax.replay --dump DIR` makes the step again and says what is not finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from vlm2vec_jax import __version__
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.packing import ChunkedGroup, PackedBatch
from vlm2vec_jax.parallel.mesh import describe
from vlm2vec_jax.parallel.peers import Peers
from vlm2vec_jax.record import write_json
from vlm2vec_jax.training.batching import BatchPacker
from vlm2vec_jax.training.checkpoint import Checkpoints
from vlm2vec_jax.training.guard import SkippedSteps
from vlm2vec_jax.training.loop import Finished
from vlm2vec_jax.training.state import Trainer
from vlm2vec_jax.training.step import TrainBatch

FILE = "dump.json"


def dump(
    output: Path,
    trainer: Trainer,
    packer: BatchPacker,
    identity: Mapping[str, Any],
    skipped: SkippedSteps,
    peers: Peers,
    batch: TrainBatch,
    finished: Finished,
) -> NoReturn:
    """Write a dump of a step that was not taken, and stop.

    Raises:
      UserError: always; saying where the dump is and what to do.
    """
    folder = output / "non_finite" / f"step-{finished.step}"
    folder.mkdir(parents=True, exist_ok=True)
    step = finished.step - 1
    with Checkpoints(folder / "checkpoints", peers=peers) as checkpoints:
        checkpoints.save_at_once(step, trainer.saved(), {**identity, "step": step})
    part, parts = packer.part
    with (folder / f"batch-{part}-of-{parts}.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **flat(batch))
    if peers.is_main:
        values = {name: float(v) for name, v in finished.values.items() if np.ndim(v) == 0}
        write_json(
            folder / FILE,
            {
                "step": finished.step,
                "metrics": {n: v if math.isfinite(v) else str(v) for n, v in values.items()},
                "examples": skipped.examples(finished.stats.rows, all_of_them=True),
                "rows": finished.stats.rows.tolist(),
                "cached": packer.cached,
                "parts": parts,
                "mesh": describe(trainer.mesh),
                "versions": {"vlm2vec_jax": __version__, "jax": jax.__version__},
            },
        )
    raise UserError(
        f"{skipped.count} steps were not finite, the last is step {finished.step}; no more than "
        f"max_skipped_steps ({skipped.limit}) are borne. {folder} has its batch and the state "
        f"before it: python -m vlm2vec_jax.replay --dump {folder} makes it again. A lower "
        f"optim.lr, model.dtype=float32 or optim.clip_norm may help; the checkpoints are whole"
    )


def flat(batch: TrainBatch) -> dict[str, np.ndarray]:
    """The arrays of a host batch by name; those that are None are left out."""
    arrays: dict[str, np.ndarray] = {}
    for g, group in enumerate(batch.groups):
        for name, value in group.batch._asdict().items():
            for inner, leaf in value.items() if isinstance(value, dict) else [("", value)]:
                key = f"groups/{g}/{name}" + (f"/{inner}" if inner else "")
                arrays[key] = np.asarray(leaf)
        arrays[f"groups/{g}/num_chunks"] = np.asarray(group.num_chunks)
    rest = {name: value for name, value in batch._asdict().items() if name != "groups"}
    return arrays | {name: np.asarray(v) for name, v in rest.items() if v is not None}


def read_batch(folder: Path) -> tuple[TrainBatch, dict[str, Any]]:
    """The batch of a dump, all processes' rows together, and what dump.json says.

    Raises:
      UserError: if the folder is no dump, or part of it is missing.
    """
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        parts = []
        for part in range(said["parts"]):
            with np.load(folder / f"batch-{part}-of-{said['parts']}.npz", allow_pickle=False) as f:
                parts.append(dict(f))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no dump of a step that was not finite: {error}") from error
    groups = []
    for g in range(sum(name.endswith("/num_chunks") for name in parts[0])):
        start = f"groups/{g}/"
        joined = {
            name.removeprefix(start): np.concatenate([part[name] for part in parts], axis=1)
            for name in parts[0]
            if name.startswith(start) and not name.endswith("/num_chunks")
        }
        visual = {n.removeprefix("visual/"): v for n, v in joined.items() if "visual/" in n}
        fields = {n: v for n, v in joined.items() if "visual/" not in n}
        batch = PackedBatch(**fields, visual=visual)
        groups.append(ChunkedGroup(batch, parts[0][f"{start}num_chunks"]))
    rest = {name: value for name, value in parts[0].items() if not name.startswith("groups/")}
    return TrainBatch(tuple(groups), **rest), said
