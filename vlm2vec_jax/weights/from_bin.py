# SPDX-License-Identifier: Apache-2.0
"""Convert a pickled checkpoint (`.bin`, `.pt`, `.pth`) to safetensors; needs torch.

    python -m vlm2vec_jax.weights.from_bin DIR|FILE --output DIR [--max_shard_size 5GB] [--force]

The package itself never opens a pickle, since that can run code. This command opens it with torch
and `weights_only=True`, which builds tensors and plain containers and refuses everything else.
Names, element types and the other files of the folder (configuration, tokenizer, ...) stay as
they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.flags import run, take_arguments
from vlm2vec_jax.weights.export import copy_files, size_of, staged
from vlm2vec_jax.weights.safetensors import write

SUFFIXES = (".bin", ".pt", ".pth")
STEMS = ("pytorch_model", "adapter_model", "model", "consolidated")
"""What weights are called, in order of preference; other pickles (optimizers) are not looked at."""
_NESTED = ("state_dict", "model_state_dict", "model", "module")


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    take_arguments(values)
    flags.DEFINE_string("output", None, "the folder to write", required=True, flag_values=values)
    flags.DEFINE_string("max_shard_size", "5GB", "a new file begins here", flag_values=values)
    flags.DEFINE_bool("force", False, "replace an existing model folder", flag_values=values)


def main(args: Any) -> None:
    """Convert and say what was written."""
    if len(args.arguments) != 1:
        raise UserError("give the folder with pickled weights, or one such file, and --output")
    count, size = convert(
        Path(args.arguments[0]),
        Path(args.output),
        shard_bytes=size_of(args.max_shard_size),
        force=args.force,
    )
    print(f"{count} tensors, {size:,} bytes, are in {args.output}")


def convert(
    source: Path, output: Path, *, shard_bytes: float, force: bool = False
) -> tuple[int, int]:
    """Write a pickled checkpoint as safetensors, with the other files of its folder.

    Args:
      source: a folder or a file.
      output: the folder to write; appears when it is complete.
      shard_bytes: a new file begins at this size; adapters stay in one.
      force: replace an existing model folder.

    Returns:
      Tensors written, and their bytes.

    Raises:
      UserError: if torch is not installed, there are no pickled weights, a shard that the index
        names is absent, a file holds anything but tensors, or the disk does not take the output.
    """
    files, expected = weight_files(source)
    folder = source if source.is_dir() else source.parent
    if output.absolute() == folder.absolute():
        raise UserError(f"{output} holds the pickled weights; write to another folder")
    torch = _torch()
    is_adapter = files[0].name.startswith("adapter")
    done: dict[str, int] = {}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for file in files:
            for name, tensor in _load(torch, file).items():
                if name in done:
                    raise UserError(f"{file}: {name} was in an earlier file already")
                array = _numpy(torch, tensor)
                done[name] = array.nbytes
                yield name, array
        raise_problems(
            f"{source} holds less than its index says", sorted(set(expected) - set(done))
        )

    with staged(output, force=force) as new:
        write(
            new,
            tensors(),
            stem="adapter_model" if is_adapter else "model",
            shard_bytes=float("inf") if is_adapter else shard_bytes,
        )
        copy_files(folder, new, adapter=True)
    return len(done), sum(done.values())


def weight_files(source: Path) -> tuple[list[Path], list[str]]:
    """The pickled files of a checkpoint, and the names that its index promises.

    Raises:
      UserError: if there are none, or an index cannot be read or names absent files.
    """
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise UserError(f"{source} is no pickled checkpoint ({', '.join(SUFFIXES)})")
        return [source], []
    if not source.is_dir():
        raise UserError(f"{source} does not exist")
    for stem in STEMS:
        for suffix in SUFFIXES:
            index = source / f"{stem}{suffix}.index.json"
            if index.is_file():
                return _indexed(index)
            if (source / f"{stem}{suffix}").is_file():
                return [source / f"{stem}{suffix}"], []
    raise UserError(f"{source} holds no pickled weights, such as pytorch_model.bin")


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [index.parent / name for name in sorted(set(places.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read as an index of shards: {error!r}") from None
    outside = [f"{file}" for file in files if file.parent != index.parent]
    raise_problems(f"{index} names files outside of its folder", outside)
    absent = [f"{file.name} is absent" for file in files if not file.is_file()]
    raise_problems(f"{index} names shards that are not beside it", absent)
    return files, list(places)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch is not installed here; converting pickled weights needs it: "
            "pip install torch (the CPU build is enough)"
        ) from None
    return torch


def _load(torch: Any, file: Path) -> dict[str, Any]:
    """A file's tensors by name, mapped from disk where torch can."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: damaged files, forbidden contents
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{file} cannot be opened as weights alone; it is damaged, or it would run code: "
            f"{reason}"
        ) from None
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{file} holds {type(state).__name__}, no tensors by name")
    strange = [
        f"{name} is {type(value).__name__}"
        for name, value in state.items()
        if not isinstance(value, torch.Tensor)
    ]
    raise_problems(f"{file} holds more than tensors", strange)
    return dict(state)


def _numpy(torch: Any, tensor: Any) -> np.ndarray:
    """A tensor's numbers in numpy, in its own type; a copy where it is not contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


if __name__ == "__main__":
    run(main, define)
