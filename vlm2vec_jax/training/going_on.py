# SPDX-License-Identifier: Apache-2.0
"""Going on: the run's folder, what a checkpoint must agree on, and what it says besides arrays."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from vlm2vec_jax import config as config_lib
from vlm2vec_jax.config import Config
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.models.folders import local_folder
from vlm2vec_jax.packing import ChunkShape, RowShape
from vlm2vec_jax.parallel.peers import Peers
from vlm2vec_jax.record import NAME, identity, write_json
from vlm2vec_jax.training.batching import BatchPacker, PackedStep
from vlm2vec_jax.training.checkpoint import Checkpoints
from vlm2vec_jax.training.data import Data
from vlm2vec_jax.training.fingerprint import explain_difference
from vlm2vec_jax.training.state import Trainer


def prepare_output(config: Config, peers: Peers | None = None) -> Path:
    """Make the output folder.

    Raises:
      UserError: if it cannot be made, holds checkpoints that are not to be resumed from, or is
        not the same folder for all processes.
    """
    output = Path(config.output)
    peers = peers or Peers()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {output}: {error}") from None
    checkpoints = output / "checkpoints"
    if not config.checkpoint.resume and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise UserError(
            f"{output} holds checkpoints of an earlier run; choose another output, remove it, or "
            f"leave checkpoint.resume on"
        )
    _check_shared(output, peers)
    return output


def _check_shared(output: Path, peers: Peers) -> None:
    """Raise unless this process sees what process 0 writes to the output folder."""
    if peers.processes == 1:
        return
    name = ""
    if peers.is_main:
        name = f".shared-{os.getpid()}-{time.time_ns()}"
        (output / name).touch()
    name = peers.share("start/shared", name)[0]
    seen = (output / name).exists()
    peers.share("start/seen", seen)
    if peers.is_main:
        (output / name).unlink()
    if not seen:
        raise UserError(
            f"{output} is not the folder that process 0 has under this name: checkpoints need "
            f"storage that all processes see"
        )


def run_identity(config: Config, data: Data) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that resumes from it."""
    return {"config": config_lib.to_dict(config), "mixture": data.fingerprint}


def resume(
    config: Config, checkpoints: Checkpoints, trainer: Trainer, data: Data
) -> tuple[int, dict[str, Any]]:
    """Put the newest good checkpoint into the trainer.

    Returns:
      The steps already done, and what the checkpoint says besides its arrays ({} without one).

    Raises:
      UserError: if the checkpoint belongs to another configuration or other data, field by field.
    """
    meta = checkpoints.read_meta()
    if meta is not None:
        before = config_lib.from_dict(meta["config"])
        # Wherever the data lies and in whatever layout: the mixture's fingerprint says what it is.
        before.data.path = config.data.path
        problems = config_lib.diff(before, config, deciding_only=True)
        mixture, now = meta["mixture"], data.fingerprint
        ignore = _sample_of_columns(mixture)
        problems += [f"data: {line}" for line in explain_difference(mixture, now, ignore)]
        trained_from = meta.get("record", {}).get("base", {}).get("identity")
        if trained_from and trained_from != identity(local_folder(config.model.path)):
            problems.append(f"model.path: {config.model.path} holds other weights than before")
        raise_problems(
            f"{config.output} was trained with another configuration or other data",
            problems,
            advice="Use the old settings, or another output.",
        )
    found = checkpoints.restore_latest(trainer.saved())
    if found is None:
        return 0, {}
    step, state, meta = found
    trainer.restore(state)
    return step, meta


def _sample_of_columns(mixture: dict[str, Any]) -> tuple[str, ...]:
    """Which of the two hashes of rows not to compare: older checkpoints have that of columns."""
    newer = all("content_sha256" in subset for subset in mixture["subsets"].values())
    unused = "sample_sha256" if newer else "content_sha256"
    return tuple(f"subsets.{name}.{unused}" for name in mixture["subsets"])


def shapes_of(meta: dict[str, Any], packing: dict[str, Any]) -> tuple[ChunkShape, ...]:
    """The packed shapes that a run had at a checkpoint, if it packs the same way now.

    With them it adds up in the same order as without the interruption, to the last bit.
    """
    saved = meta.get("packing")
    if not saved or saved["how"] != packing:
        return ()
    return tuple(
        ChunkShape(RowShape(*shape["row"]), shape["rows"], shape["chunks"])
        for shape in saved["shapes"]
    )


def packing_of(packer: BatchPacker) -> dict[str, Any]:
    """How a run packs, JSON-able: with the same, the same batch is laid out alike."""
    return {
        "rows": dataclasses.asdict(packer.rows),
        "chunk_tokens": packer.chunk_tokens,
        "row_multiple": packer.row_multiple,
    }


def packed_so_far(packer: BatchPacker, packed: PackedStep) -> dict[str, Any]:
    """What a checkpoint notes for `shapes_of`."""
    return {
        "how": packing_of(packer),
        "shapes": [
            {"row": dataclasses.astuple(s.row), "rows": s.rows, "chunks": s.chunks}
            for s in packed.shapes
        ],
    }


def write_records(output: Path, config: Config, record: dict[str, Any]) -> None:
    """Write config.json and vlm2vec.json."""
    write_json(output / "config.json", config_lib.to_dict(config))
    write_json(output / NAME, record)
