# SPDX-License-Identifier: Apache-2.0
"""Data as TFDS data sets, written and read without TensorFlow: `prepare --tfds` writes them.

Training pairs become `vlm2vec_pairs` (`tfds_train.py`), evaluation rows `vlm2vec_eval`
(`tfds_eval.py`), a config for each subset. Training and evaluation take the folder as their data.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm2vec_jax.data import tfds_eval, tfds_records, tfds_train, verify
from vlm2vec_jax.data.folders import tfds_folders
from vlm2vec_jax.data.mmeb import EvalSource, TrainSource
from vlm2vec_jax.data.tfds_eval import TfdsEvalSource
from vlm2vec_jax.data.tfds_records import VERSION
from vlm2vec_jax.data.tfds_train import TfdsSource
from vlm2vec_jax.errors import UserError, raise_problems

__all__ = ["VERSION", "TfdsEvalSource", "TfdsSource", "open_tfds", "open_tfds_eval", "write"]


def write(
    sources: Sequence[TrainSource | EvalSource], folder: str | Path
) -> Iterator[tuple[str, int]]:
    """Write subsets as TFDS data sets, one at a time; done ones are left alone.

    Args:
      sources: opened subsets; splits of one subset go together. Every row and image is checked
        before the first is written.
      folder: the TFDS `data_dir`.

    Yields:
      The folder of each subset, and the rows in it.

    Raises:
      UserError: bad rows, or a folder that holds other data under this name.
    """
    there = [s.subset for s in sources if isinstance(s, (TfdsSource, TfdsEvalSource))]
    if there:
        raise UserError(f"{', '.join(there)}: this is a TFDS data set already")
    training = [source for source in sources if isinstance(source, TrainSource)]
    evaluation = [source for source in sources if isinstance(source, EvalSource)]
    problems = verify.verify_train(training, headers=True)
    verify.report(problems + verify.verify_eval(evaluation, headers=True))
    for form, own in ((tfds_train.FORM, training), (tfds_eval.FORM, evaluation)):
        for subset in dict.fromkeys(source.subset for source in own):
            parts = [source for source in own if source.subset == subset]
            splits: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {}
            for source in parts:
                splits |= _splits(source)
            made_of = tfds_records.origin(parts)
            place = tfds_records.write(form, subset, splits, made_of, folder)
            yield str(place), sum(len(source) for source in parts)


def _splits(
    source: TrainSource | EvalSource,
) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    if isinstance(source, TrainSource):
        return {source.split: functools.partial(tfds_train.examples, source)}
    return {
        source.split: functools.partial(tfds_eval.rows, source),
        source.split + tfds_eval.IMAGES: functools.partial(tfds_eval.images, source),
    }


def open_tfds(
    data: str | os.PathLike,
    subsets: Sequence[str] = (),
    split: str = "original",
    *,
    limit: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[TrainSource]:
    """Open several training subsets of a TFDS data set (all if none are named).

    Raises:
      UserError: one message with everything wrong with any of them.
    """

    def one(name: str) -> TrainSource:
        return TfdsSource(data, name, split, limit=limit, cache_dir=cache_dir)

    return _open(one, data, subsets, split, tfds_train.FORM)


def open_tfds_eval(
    data: str | os.PathLike,
    subsets: Sequence[str] = (),
    split: str = "test",
    *,
    image_root: str | os.PathLike | None = None,
    limit: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[EvalSource]:
    """The same for evaluation subsets; `image_root` is where their images are already."""

    def one(name: str) -> EvalSource:
        return TfdsEvalSource(data, name, image_root, limit, split=split, cache_dir=cache_dir)

    return _open(one, data, subsets, split, tfds_eval.FORM)


def _open(
    one: Callable[[str], Any],
    data: str | os.PathLike,
    subsets: Sequence[str],
    split: str,
    form: tfds_records.Form,
) -> list[Any]:
    opened = []
    problems = [
        f"subset {n!r} is listed twice" for n in sorted(set(subsets)) if list(subsets).count(n) > 1
    ]
    names = list(subsets) or list(tfds_folders(data, form.holds[0]))
    if not names:
        problems.append(f"no data set with the feature {form.holds[0]}")
    for name in names:
        try:
            opened.append(one(name))
        except UserError as error:
            problems.append(str(error))
    raise_problems(f"Cannot read split {split!r} of {data}", problems)
    return opened
