# SPDX-License-Identifier: Apache-2.0
"""Which files hold the weights that a user means: one, shards with an index, or an adapter's.

Pickled weights are recognised and refused: loading one can run any code that its author put there.
"""

from __future__ import annotations

import json
from pathlib import Path

from vlm2vec_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_ADVICE = """\
Pickled weights are not read, because opening a pickle can run code. Where torch is installed, this
writes the same model as safetensors (it opens them with weights_only=True, which runs no code):
  python -m vlm2vec_jax.weights.from_bin {source} --output {target}"""


def find(path: Path) -> tuple[Path | None, list[Path]]:
    """The index (or None) and the single file behind a path that a user gave.

    Raises:
      UserError: if there are no weights, only pickled ones, or shards without an index.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return path, []
        if path.suffix in _PICKLES:
            raise UserError(_refusal([path]))
        return None, [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    single, index, adapter = path / SINGLE, path / INDEX, path / ADAPTER
    if single.is_file() and index.is_file():
        if set(weight_map(index).values()) != {SINGLE}:
            raise UserError(f"{path} holds both {SINGLE} and {INDEX}: remove the stale one")
        return index, []
    if index.is_file():
        return index, []
    for file in (single, adapter):
        if file.is_file():
            return None, [file]
    shards = sorted(path.glob("model-*.safetensors"))
    if shards:
        raise UserError(f"{path} holds {len(shards)} shards, but {INDEX} is missing")
    pickles = sorted(p for p in path.iterdir() if p.suffix in _PICKLES and "model" in p.name)
    if pickles:
        raise UserError(_refusal(pickles))
    raise UserError(f"{path} holds no weights: no {SINGLE}, {INDEX} or {ADAPTER}")


def _refusal(files: list[Path]) -> str:
    folder = files[0].parent
    advice = _PICKLE_ADVICE.format(source=folder, target=f"{folder.name}-safetensors")
    more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
    return f"{files[0]}{more} is a pickled checkpoint.\n{advice}"


def weight_map(index: Path) -> dict[str, str]:
    """What an index says: tensor -> the shard beside it that holds it.

    Raises:
      UserError: if it cannot be read, or names files elsewhere.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not found or not all(isinstance(file, str) for file in found.values()):
            raise TypeError("weight_map must map names to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read as an index of shards: {error!r}") from None
    outside = sorted({file for file in found.values() if Path(file).name != file})
    if outside:
        raise UserError(f"{index} names files outside of its folder: {', '.join(outside[:3])}")
    return found
