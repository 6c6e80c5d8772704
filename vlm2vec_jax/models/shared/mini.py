# SPDX-License-Identifier: Apache-2.0
"""What the generators of small untrained models share: texts, the folder, the command. No jax."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import IMAGE_MARKER

MANIFEST = "mini_model.json"
"""Says how a folder was made; written last, so that a folder without it is unfinished."""


def training_texts(data: str | Path) -> list[str]:
    """Read the texts of every training subset, cut at image markers as processors cut them.

    Raises:
      UserError: if there is no training parquet below the folder.
    """
    import pyarrow.parquet as pq

    root = Path(data)
    root = root / "train" if (root / "train").is_dir() else root
    files = sorted(root.glob("*/*.parquet"))
    if not files:
        raise UserError(f"no <Subset>/<split>-*.parquet below {root}: is this a training folder?")
    texts: list[str] = []
    for file in files:
        names = pq.read_schema(file).names
        columns = [name for name in ("qry", "pos_text") if name in names]
        for column in pq.read_table(file, columns=columns).columns:
            for text in column.to_pylist():
                texts += [piece for piece in IMAGE_MARKER.split(text)[::2] if piece]
    return texts


def check_output(
    output: Path, settings: Mapping[str, Any], tokenizer: Mapping[str, Any], *, force: bool
) -> None:
    """Refuse to write over anything but the same model.

    Args:
      output: the folder.
      settings: what its manifest must say.
      tokenizer: what its tokenizer.json must hold.
      force: whatever is there may be overwritten.

    Raises:
      UserError: if the folder is not empty and holds no such model.
    """
    if force or not output.is_dir() or not any(output.iterdir()):
        return
    try:
        there = json.loads((output / MANIFEST).read_text())
        words = json.loads((output / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = words = {}
    if {name: there.get(name) for name in settings} != settings or words != tokenizer:
        raise UserError(
            f"{output} is not empty and holds no mini model of these settings; "
            f"choose another folder or overwrite it with --force"
        )


def write_model(
    output: Path,
    files: Mapping[str, Any],
    weights: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Write an HF folder.

    Args:
      output: the folder, made where it is missing.
      files: name -> what is written as JSON.
      weights: tensors by HF name.
      manifest: how the model was made.

    Returns:
      The manifest with the number of parameters, as it is written.
    """
    from safetensors.numpy import save_file

    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST).unlink(missing_ok=True)
    for name, content in files.items():
        _write_json(output / name, content)
    save_file(dict(weights), output / "model.safetensors", metadata={"format": "pt"})
    manifest = {**manifest, "parameters": int(sum(w.size for w in weights.values()))}
    _write_json(output / MANIFEST, manifest)
    return manifest


def command(
    argv: Sequence[str] | None,
    about: str | None,
    name: str,
    write: Callable[..., Mapping[str, Any]],
    sizes: type | None = None,
) -> int:
    """Run a generator's command line; returns the exit code.

    Args:
      argv: the arguments; None for the process's.
      about: the generator's docstring.
      name: of the backbone.
      write: (data, output, seed, [sizes,] force=...) -> the manifest.
      sizes: a dataclass of whole numbers, each of which is a flag; None for fixed sizes.
    """
    fields = dataclasses.fields(sizes) if sizes else ()
    parser = argparse.ArgumentParser(description=(about or "").split("\n", 1)[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="mini-MMEB")
    parser.add_argument("--output", required=True, metavar="DIR", help="the model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="overwrite another model there")
    for field in fields:
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    args = vars(parser.parse_args(argv))
    chosen = [sizes(**{field.name: args[field.name] for field in fields})] if sizes else []
    try:
        made = write(args["data"], args["output"], args["seed"], *chosen, force=args["force"])
    except (UserError, OSError) as error:
        print(f"mini: {error}", file=sys.stderr)
        return 2
    print(
        f"wrote {args['output']}: untrained {name} with {made['parameters']:,} parameters "
        f"and {made['pieces']} tokenizer pieces"
    )
    return 0


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
