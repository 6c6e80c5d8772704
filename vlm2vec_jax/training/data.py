# SPDX-License-Identifier: Apache-2.0
"""A run's training data: subsets opened, looked through, mixed, and read batch by batch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec_jax import config as config_lib
from vlm2vec_jax.config import Config
from vlm2vec_jax.data import mmeb, verify
from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import TrainSource
from vlm2vec_jax.data.pipeline import Batches, Sharing
from vlm2vec_jax.data.pipeline import batches as read_batches
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.models.base import Processor
from vlm2vec_jax.parallel.peers import Peers
from vlm2vec_jax.record import write_json
from vlm2vec_jax.training.batching import BatchPacker, Size

CHECKED = "data_check.json"
"""What was found when the data was looked through, so that going on need not look again."""

_SAMPLED_BATCHES = 4
_SAMPLED_PAIRS = 2048
_ADVICE = "--config.data.on_bad_example=skip leaves such rows out and counts them."


@dataclasses.dataclass
class Data:
    """The training data: the mixture and what there is to say about it."""

    mixture: Mixture
    batch_size: int
    remarks: list[str]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which rows come when."""
        return self.mixture.fingerprint(self.batch_size)

    def last_step(self, config: Config) -> int:
        """The step with which the run ends, by `steps` and the stopping rule."""
        ends = self.mixture.steps(config.data.stop, self.batch_size)
        return config.steps if ends is None else min(ends, config.steps)


def open_mixture(config: Config) -> Mixture:
    """The mixture as configured, without a look into its rows.

    Raises:
      UserError: listing what is wrong with files, columns, and settings of subsets.
    """
    return _mix(config, _open(config))


def open_data(config: Config, peers: Peers | None = None, output: Path | None = None) -> Data:
    """Open and verify the subsets; each process looks through its share of the rows.

    Args:
      config: checked.
      peers: the processes of the run.
      output: the run's folder; data that was found good there before is not looked through again.

    Raises:
      UserError: listing what is wrong with files, columns, rows and images.
    """
    peers = peers or Peers()
    sources = peers.together("start/open", lambda: _open(config))
    skip = config.data.on_bad_example == "skip"
    key = _identity(config, sources)
    bad = peers.share("start/checked", _checked_before(output, key) if peers.is_main else None)[0]
    if bad is None:
        bad = _look_through(config, peers, sources)
        if not skip:
            peers.together("start/verified", lambda: _report(bad))
        if output is not None and peers.is_main:
            write_json(output / CHECKED, {"data": key, "bad": bad})
    remarks = []
    if skip and bad:
        sources, remarks = _without(sources, bad)
    mixture = peers.together("start/mixture", lambda: _mix(config, sources))
    return Data(mixture, config.batch_size, remarks)


def _open(config: Config) -> list[TrainSource]:
    """The subsets in order, each with its own split and limit."""
    data = config.data
    splits = config_lib.settings(data.splits)
    limits = {name: int(value) for name, value in config_lib.settings(data.limits).items()}
    names = config_lib.subset_names(config)
    problems: list[str] = []
    found: dict[str, TrainSource] = {}

    def read(some: Sequence[str], split: str, limit: int) -> None:
        try:
            for source in mmeb.open_train(
                data.path,
                some,
                split,
                image_root=data.image_root,
                limit=limit,
                follow_symlinks=data.follow_symlinks,
            ):
                source.target_instruction = data.target_instruction
                found[source.subset] = source
        except UserError as error:
            problems.append(str(error))

    special = [name for name in dict.fromkeys([*splits, *limits]) if not names or name in names]
    ordinary = [name for name in names if name not in special]
    if ordinary or not names:
        read(ordinary, data.split, data.max_examples_per_subset)
    for name in special:
        read(
            [name],
            splits.get(name, data.split),
            limits.get(name, data.max_examples_per_subset),
        )
    raise_problems("Cannot open the training data", problems) if len(problems) > 1 else None
    if problems:
        raise UserError(problems[0])
    known = names or tuple(sorted(found))
    strange = [
        f"data.{field} names {name!r}, which is no subset of this run"
        for field, given in (("splits", splits), ("limits", limits))
        for name in given
        if name not in known
    ]
    raise_problems("Cannot open the training data", strange)
    return [found[name] for name in known]


def _mix(config: Config, sources: Sequence[TrainSource]) -> Mixture:
    weights: dict[str, float] | None = None
    if config.data.weights == "equal":
        weights = {source.subset: 1.0 for source in sources}
    elif config.data.weights:
        given = config_lib.settings(config.data.weights)
        weights = {name: float(value) for name, value in given.items()}
    return Mixture(sources, config.seed, sub_batch=config.data.sub_batch, weights=weights)


def _identity(config: Config, sources: Sequence[TrainSource]) -> str:
    """Tells apart what was looked through: data, images, and how bad rows are treated."""
    facts = [
        (s.subset, s.split, s.limit, len(s.table), str(s.image_root), str(s.data)) for s in sources
    ]
    print_ = Mixture(sources, 0).fingerprint(1) if any(map(len, sources)) else {}
    text = json.dumps([facts, print_, config.data.on_bad_example])
    return hashlib.sha256(text.encode()).hexdigest()


def _checked_before(output: Path | None, key: str) -> list | None:
    if output is None or not (output / CHECKED).exists():
        return None
    try:
        found = json.loads((output / CHECKED).read_text(encoding="utf-8"))
        return found["bad"] if found["data"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _look_through(config: Config, peers: Peers, sources: Sequence[TrainSource]) -> list:
    """[subset, row in its file, reason, sentence] of every bad row, in order."""
    mine = [source.select(source.rows[peers.process :: peers.processes]) for source in sources]
    problems = peers.together(
        "start/look",
        lambda: verify.verify_train(mine, config.data.image_root or None, headers=True),
    )
    told = peers.share("start/bad", [[p.subset, p.index, p.kind, str(p)] for p in problems])
    order = {source.subset: i for i, source in enumerate(sources)}
    return sorted((bad for part in told for bad in part), key=lambda bad: (order[bad[0]], bad[1]))


def _report(bad: Sequence[Sequence[Any]]) -> None:
    raise_problems("The data has bad rows", [entry[3] for entry in bad], advice=_ADVICE)


def _without(sources: Sequence[TrainSource], bad: list) -> tuple[list[TrainSource], list[str]]:
    """The subsets without their bad rows, and a line about each that had some."""
    kept, remarks = [], []
    for source in sources:
        reasons: dict[int, str] = {}
        for subset, index, kind, _ in bad:
            if subset == source.subset:
                reasons.setdefault(index, kind)
        if reasons:
            rows = np.fromiter(reasons, np.int64, len(reasons))
            source = source.select(source.rows[~np.isin(source.rows, rows)])
            counts = {k: list(reasons.values()).count(k) for k in sorted(set(reasons.values()))}
            told = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            remarks.append(f"{source.subset}: rows left out: {told}")
        if len(source):
            kept.append(source)
    if not kept:
        raise_problems(
            "The data has bad rows",
            [entry[3] for entry in bad],
            advice="No row is good; is the image root right?",
        )
    return kept, remarks


def sample_sizes(
    data: Data, processor: Processor, peers: Peers | None = None, *, negatives: int = 0
) -> list[Size]:
    """Sizes of all inputs of the first batches; rows that cannot be read do not count here."""
    peers = peers or Peers()
    batches = min(_SAMPLED_BATCHES, -(-_SAMPLED_PAIRS // data.batch_size))
    drawn = [data.mixture.batch_indices(step, data.batch_size) for step in range(batches)]
    places = np.concatenate(drawn)[:_SAMPLED_PAIRS]
    sizes: list[Size] = []
    for source, position in places[peers.process :: peers.processes].tolist():
        try:
            row = data.mixture.sources[source][position]
            inputs = [row.query, row.positive, *row.negatives[:negatives]]
            sizes += [processor.length(item) for item in inputs]
        except (UserError, OSError):
            continue
    # From all processes, so that all choose the same row lengths.
    told = [tuple(size) for part in peers.share("start/sizes", sizes) for size in part]
    if not told:
        raise UserError("none of the first rows of the data can be read")
    return told


def batches(
    config: Config,
    data: Data,
    processor: Processor,
    packer: BatchPacker,
    done: int,
    peers: Peers | None = None,
    *,
    report: Callable[[str], None] | None = None,
) -> Batches:
    """Packed batches from the first step that is still to do."""
    sharing = None
    if peers is not None and peers.processes > 1:
        sharing = Sharing(
            peers.process,
            peers.processes,
            lambda name, message, stop: peers.exchange(name, message, stop=stop, report=report),
            processor.length,
            packer,
        )
    return read_batches(
        data.mixture,
        config.batch_size,
        start_step=done,
        encode=processor.encode,
        pack=packer,
        workers=config.data.workers or min(16, os.cpu_count() or 1),
        on_bad_example=config.data.on_bad_example,  # type: ignore[arg-type]
        negatives=config.loss.negatives,
        sharing=sharing,
        report=report,
    )
