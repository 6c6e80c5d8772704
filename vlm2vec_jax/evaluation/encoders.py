# SPDX-License-Identifier: Apache-2.0
"""Other systems behind the evaluator's protocol: vectors made elsewhere, and Python callables.

`Encoder` in `embedding` is the protocol: `encode(inputs, **options)` and `fingerprint()`. Our own
models come as `vlm2vec_jax.Embedder`, servers as `endpoint.Endpoint`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import store
from vlm2vec_jax.inputs import MultimodalInput, raise_bad_inputs

FORMATS = (".npz", ".npy", ".parquet")


def input_id(text: str, images: Sequence[str]) -> str:
    """The id of an input: 32 hex digits from its text and its image paths as the data has them.

    Args:
      text: verbatim.
      images: paths relative to the image root, with `/`.
    """
    named = json.dumps([text, [os.path.normpath(i).replace(os.sep, "/") for i in images]])
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


class SavedVectors:
    """Vectors that another system has made, found by the id of each input.

    `python -m vlm2vec_jax.evaluation.inputs` lists the inputs of a data folder with their ids.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_root: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        ids: str | os.PathLike | None = None,
        name: str | None = None,
    ):
        """Read a file of vectors.

        Args:
          path: one of
            `.npz` with `embeddings` [N, D] and `ids` [N] (strings), or one that `evaluate` wrote;
            `.parquet` with `embedding` (lists of numbers) and `id`, or `text` and `image`;
            `.npy` [N, D], or an `.npz` of `embeddings` alone (what `vlm2vec_jax.embed` writes),
            with a file of ids.
          image_root: what image paths of the inputs are taken relative to; of several folders
            the first that makes an id which the file has.
          ids: a text file with an id in each line, or the jsonl that was embedded (`id`, or `text`
            and `images`); by default `path` with the ending `.ids.txt` or `.jsonl`, if it exists.
          name: what to call the model in results; the file's name by default.

        Raises:
          UserError: a file that cannot be read, shapes that do not agree, an id that stands twice
            with different vectors.
        """
        one = isinstance(image_root, (str, os.PathLike))
        roots = [image_root] if one else image_root
        self.path, self.roots = Path(path), [os.path.abspath(r) for r in roots]  # type: ignore
        names, matrix = _read(self.path, None if ids is None else Path(ids))
        if matrix.ndim != 2 or len(matrix) != len(names) or not matrix.shape[1]:
            raise UserError(f"{path}: {len(names)} ids for vectors of shape {matrix.shape}")
        self.matrix = np.asarray(matrix, np.float32)
        self.row: dict[str, int] = {}
        for n, one in enumerate(names):
            k = self.row.setdefault(one, n)
            if k != n and not np.array_equal(self.matrix[k], self.matrix[n], equal_nan=True):
                raise UserError(f"{path}: id {one} has two different vectors, rows {k} and {n}")
        digest = hashlib.blake2b(digest_size=16)
        for one in sorted(self.row):
            digest.update(one.encode() + self.matrix[self.row[one]].tobytes())
        self._fingerprint = {"vectors": name or self.path.name, "hash": digest.hexdigest()}

    def fingerprint(self) -> dict[str, Any]:
        """The name and the hash of ids and vectors."""
        return dict(self._fingerprint)

    def encode(self, inputs: Sequence[MultimodalInput], **options: Any) -> np.ndarray:
        """Look the inputs up, float32 [N, D].

        Raises:
          BadInputs: listing those that the file lacks.
        """
        del options
        ids = [self.id_of(item) for item in inputs]
        missing = {n: f"no vector of id {i}" for n, i in enumerate(ids) if i not in self.row}
        raise_bad_inputs(
            f"{self.path} lacks vectors",
            missing,
            advice="list the inputs with their ids by python -m vlm2vec_jax.evaluation.inputs",
        )
        return self.matrix[[self.row[i] for i in ids]]

    def id_of(self, item: MultimodalInput) -> str:
        """The id of an input whose images are given by path."""
        found = []
        for root in self.roots:
            paths = []
            for image in item.images:
                if not isinstance(image, (str, os.PathLike)):
                    raise UserError("saved vectors need images that are given by path")
                paths.append(os.path.relpath(os.path.abspath(image), root))
            found.append(input_id(item.text, paths))
        return next((one for one in found if one in self.row), found[0])


def _read(path: Path, ids: Path | None) -> tuple[list[str], np.ndarray]:
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: vectors are read from {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".npz":
        return _read_npz(path, ids)
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return _ids_beside(path, ids), matrix


def _read_npz(path: Path, ids: Path | None) -> tuple[list[str], np.ndarray]:
    arrays = store.read_npz(path, ("embeddings",))
    if arrays is None:
        raise UserError(f"{path} cannot be read as an npz file that holds `embeddings`")
    matrix = arrays["embeddings"]
    named = store.read_npz(path, ("ids",))
    if named is not None:
        return [str(i) for i in named["ids"].tolist()], matrix
    keyed = store.read_npz(path, ("keys",))  # what `evaluate` keeps
    if keyed is not None:
        try:
            keys = store.keys_of(keyed["keys"])
        except (ValueError, TypeError):
            raise UserError(f"{path}: its `keys` cannot be read") from None
        if any(len(key) == 3 for key in keys):
            raise UserError(
                f"{path} holds vectors of queries apart from those of targets, and ids do not tell "
                f"them apart; evaluate with the encoder that made it"
            )
        return [input_id(text, [image] if image else []) for text, image in keys], matrix
    return _ids_beside(path, ids), matrix


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None
    there = set(table.column_names)
    if "embedding" not in there or not ({"id"} <= there or {"text", "image"} & there):
        raise UserError(
            f"{path}: needs the columns embedding and id (or text and image), has {sorted(there)}"
        )
    rows = table.column("embedding").to_pylist()
    widths = {None if r is None else len(r) for r in rows}
    if len(widths) > 1 or None in widths:
        raise UserError(f"{path}: its vectors have different lengths: {sorted(map(str, widths))}")
    matrix = np.array(rows, np.float32).reshape(len(rows), -1)
    if "id" in there:
        return [str(i) for i in table.column("id").to_pylist()], matrix
    texts, images = (
        [v or "" for v in table.column(c).to_pylist()] if c in there else [""] * len(rows)
        for c in ("text", "image")
    )
    return [input_id(t, [i] if i else []) for t, i in zip(texts, images, strict=True)], matrix


def _ids_beside(path: Path, ids: Path | None) -> list[str]:
    candidates = [ids] if ids else [path.with_suffix(s) for s in (".ids.txt", ".jsonl")]
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        raise UserError(
            f"{path} says nothing of whose vectors it holds: give --vector_ids, a text file with "
            f"an id in each line or the jsonl that was embedded"
        )
    lines = found.read_text(encoding="utf-8").splitlines()
    if found.suffix != ".jsonl":
        return [line.strip() for line in lines if line.strip()]
    names = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            names.append(
                str(value["id"])
                if "id" in value
                else input_id(value.get("text") or "", list(value.get("images") or []))
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{found} line {n} cannot be read: {error}") from None
    return names


class Callback:
    """A Python callable `encode(inputs)` or `encode(inputs, roles)`, or an object that has one.

    Attributes:
      tells_roles: whether it takes `roles`, a list of "query" and "target", one for each input.
    """

    tells_roles = False

    def __init__(self, function: Any, name: str, fingerprint: Mapping[str, Any] | None = None):
        """Wrap a callable.

        Args:
          function: takes a list of `MultimodalInput` (`text` with its image markers, `images` as
            paths) and gives vectors [N, D]: an array, nested lists, or anything with `__array__`.
          name: of the model in results; stored vectors are used again under the same name.
          fingerprint: what else stored vectors depend on.
        """
        self.function: Callable[..., Any] = getattr(function, "encode", function)
        # One that has a parameter `roles` is told which inputs are queries.
        with contextlib.suppress(TypeError, ValueError):  # builtins may have no signature
            self.tells_roles = "roles" in inspect.signature(self.function).parameters
        own = getattr(function, "fingerprint", None)
        self._fingerprint = {
            "callable": name,
            **(fingerprint or {}),
            **(store.plain(own()) if callable(own) else {}),
        }

    @classmethod
    def load(cls, spec: str, name: str | None = None) -> Callback:
        """Import `module:function` from the current folder or the environment.

        The name may be of a class, which is made without arguments. Its file's hash joins the
        fingerprint, so that stored vectors of an earlier version of it are not used.

        Raises:
          UserError: if there is no such module or name.
        """
        module_name, _, attribute = spec.partition(":")
        if not module_name or not attribute:
            raise UserError(f"--encoder {spec!r}: write module:function")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"--encoder {spec}: cannot import {module_name}: {error}") from error
        function = getattr(module, attribute, None)
        if function is None:
            raise UserError(f"--encoder {spec}: {module_name} has no {attribute}")
        if inspect.isclass(function):
            function = function()
        if not callable(getattr(function, "encode", function)):
            raise UserError(f"--encoder {spec}: neither callable nor with a method encode")
        file = getattr(module, "__file__", None)
        return cls(function, name or spec, {"file": store.hash_file(file) if file else None})

    def fingerprint(self) -> dict[str, Any]:
        """The name, the file's hash, and what the object itself says."""
        return dict(self._fingerprint)

    def encode(self, inputs: Sequence[MultimodalInput], **options: Any) -> np.ndarray:
        """Call it, float32 [N, D].

        Raises:
          UserError: if it does not give one vector of numbers for each input.
        """
        told = {"roles": options.get("roles")} if self.tells_roles else {}
        result = self.function(list(inputs), **told)
        for step in ("detach", "cpu"):  # a torch tensor, without knowing torch
            result = getattr(result, step)() if hasattr(result, step) else result
        try:
            matrix = np.asarray(result, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"the encoder's result is not an array of numbers: {error}") from None
        if matrix.ndim != 2 or len(matrix) != len(inputs) or not matrix.shape[1]:
            raise UserError(
                f"the encoder gave an array of shape {matrix.shape} for {len(inputs)} inputs; "
                f"[{len(inputs)}, D] is needed"
            )
        return matrix
