# SPDX-License-Identifier: Apache-2.0
"""Reading one checkpoint: its document and its arrays, by one process and without the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath  # orbax's own paths

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.training.checkpoint_files import WHOLE, Damaged, parts_of, words
from vlm2vec_jax.training.fingerprint import explain_arrays

FORMAT = "vlm2vec_jax checkpoint 1"


def read_document(folder: Path, step: int) -> dict[str, Any]:
    """The stored meta document; read directly, so that it needs no arrays and no devices.

    Raises:
      Damaged: if it is not whole, or that of another step.
      UserError: if it has a format of another version.
    """
    path = folder / str(step) / "meta" / "metadata"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"its meta file cannot be read: {words(error)}") from error
    if not isinstance(document, dict) or "arrays" not in document:
        raise Damaged("its meta file is not one of ours")
    if document.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {folder / str(step)} has the format "
            f"{document.get('format')!r}; this version reads {FORMAT!r}"
        )
    if document.get("step") != step:
        raise Damaged(f"it is a copy of the checkpoint of step {document.get('step')}")
    return document


def read_arrays(folder: Path, document: dict[str, Any], abstract: Any, partial: bool) -> Any:
    """The shards of this process.

    Orbax's managers and checkpointers let a process wait for all others after it has read, also
    for one that could not read. Its handler does not.

    Args:
      folder: of the checkpoint.
      document: its meta document.
      abstract: the state as `jax.ShapeDtypeStruct` leaves.
      partial: whether `abstract` has only some of the saved keys.

    Raises:
      Damaged: if they cannot be read here.
      UserError: if the checkpoint holds other arrays.
    """
    arrays = document["arrays"]
    if partial:
        arrays = {k: v for k, v in arrays.items() if k.split("/")[0] in abstract}
    raise_problems(
        f"checkpoint {folder} belongs to another model, adapter or optimizer",
        explain_arrays(arrays, abstract),
        advice="Use the configuration it was made with, or another output folder.",
    )
    handler = ocp.StandardCheckpointHandler()
    inside = epath.Path(folder)
    try:
        read = {
            name: handler.restore(inside / name, args=ocp.args.StandardRestore(part))["value"]
            for name, part in parts_of(abstract).items()
        }
        return jax.block_until_ready(read if isinstance(abstract, dict) else read[WHOLE])
    except Exception as error:  # whatever a truncated or missing file leads to
        raise Damaged(f"its arrays cannot be read: {words(error)}") from error
    finally:
        handler.close()
