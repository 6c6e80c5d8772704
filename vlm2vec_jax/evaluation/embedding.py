# SPDX-License-Identifier: Apache-2.0
"""From rows to vectors: a subset read once into indices, and its distinct inputs embedded once."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.evaluation import store
from vlm2vec_jax.evaluation.hosts import Hosts, Identity, arrange, share
from vlm2vec_jax.evaluation.rows import Rows, Settings, scored_from
from vlm2vec_jax.evaluation.store import Key
from vlm2vec_jax.inputs import BadInputs, MultimodalInput

INPUTS_AT_ONCE = 512
"""A dataset of MMEB has more, and is embedded by itself; smaller ones share a call."""

INPUTS_PER_CALL = 4096
"""Most inputs of one call of the encoder; what is embedded is saved after each."""


class Encoder(Protocol):
    """What turns inputs into vectors: `vlm2vec_jax.Embedder`, or anything that does the same."""

    @property
    def encode(self) -> Callable[..., np.ndarray]:
        """Takes a list of N `MultimodalInput` and options, gives embeddings float32 [N, D]."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """What an embedding depends on: model, adapter, processor settings, type. Json-able."""
        ...


def tells_roles(encoder: Any) -> bool:
    """Whether `encoder.encode` takes `roles`, a role of `store` for each input.

    Most embed an input alike wherever it stands; an input that is a query in one place and a
    target in another is then embedded once.
    """
    return bool(getattr(encoder, "tells_roles", False))


class Source(Protocol):
    """One subset of MMEB-eval (`vlm2vec_jax.data.mmeb.EvalSource`)."""

    subset: str
    image_root: Path

    def __len__(self) -> int: ...

    def unique_keys(self) -> Any:
        """Distinct keys (text, image path) and which row uses which (`data.mmeb.EvalIndex`)."""
        ...

    def input(self, key: tuple[str, str], /) -> MultimodalInput:
        """The input that a key stands for, its images as paths."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan(Rows):
    """A subset read once: its rows, and where they come from.

    Attributes:
      source: where it was read from.
      inputs: what each key stands for.
      identities: what each key is across subsets.
    """

    source: Source
    inputs: list[MultimodalInput]
    identities: list[Identity]


def plan_subset(
    source: Source,
    images: dict[str, str],
    made_with: Mapping[str, Any],
    settings: Settings | None = None,
    roles: bool = False,
) -> Plan:
    """Read a subset's rows; a candidate of a row stays as four bytes.

    Args:
      source: the subset.
      images: hashes of image files that were read already, added to.
      made_with: fingerprint of the encoder.
      settings: how it will be scored.
      roles: keep queries apart from targets of the same content.

    Raises:
      UserError: no rows, or an image that cannot be read.
    """
    if not len(source):
        raise UserError(f"subset {source.subset} has no rows")
    keys, query_index, candidates = _number(source, roles)
    inputs = [source.input((key[0], key[1])) for key in keys]
    paths, files = [], {}
    for key, item in zip(keys, inputs, strict=True):
        own = []
        for k, image in enumerate(item.images):
            if not isinstance(image, (str, os.PathLike)):
                raise TypeError("an evaluation source names images by path")
            own.append(os.path.abspath(image))
            # Named by what the row says, so that moving the folder changes nothing.
            files[key[1] if len(item.images) == 1 else f"{key[1]} {k}"] = own[-1]
        paths.append(own)
    embedded_from = {
        **made_with,
        "inputs": store.hash_rows(sorted(keys)),
        "images": store.hash_images(files, images),
    }
    # By what is in them: every dataset has a folder of its own, and copies of the same pictures.
    identities: list[Identity] = [
        (key[0], tuple(images[path] for path in own), *key[2:])
        for key, own in zip(keys, paths, strict=True)
    ]
    made_from = scored_from(embedded_from, keys, query_index, candidates, settings or Settings())
    rows = Rows(source.subset, keys, query_index, candidates, embedded_from, made_from)
    return Plan(**vars(rows), source=source, inputs=inputs, identities=identities)


def _number(source: Source, roles: bool) -> tuple[list[Key], np.ndarray, list[np.ndarray]]:
    """Keys in order of first mention, each row's query among them, and each row's candidates."""
    index = source.unique_keys()
    query, target = ((store.QUERY,), (store.TARGET,)) if roles else ((), ())
    known: dict[Key, int] = {}
    queries, targets = (
        np.array([known.setdefault(key + role, len(known)) for key in keys], np.int32)
        for keys, role in ((index.queries, query), (index.targets, target))
    )
    # The rows laid end to end: a query, its candidates, the next query.
    ends = index.offsets[1:]
    flat = np.insert(targets[index.target_of], index.offsets[:-1], queries[index.query_of_row])
    numbers, first = np.unique(flat, return_index=True)
    order = numbers[np.argsort(first)]
    rank = np.zeros(len(known), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    names = list(known)
    candidates = np.split(rank[targets[index.target_of]], ends[:-1])
    return [names[n] for n in order], rank[queries[index.query_of_row]], candidates


Done = Callable[[Plan, Mapping[Key, np.ndarray]], None]


class Embedding:
    """Embeds the inputs of the pending subsets, each distinct one once.

    Inputs that show the same image go to the encoder one after the other, in the same call, so
    that it need decode it only once. With several processes each embeds its share; with `part`
    only that share is embedded and the rest is left to other machines.
    """

    def __init__(
        self,
        encoder: Encoder,
        plans: Sequence[Plan],
        output: Path,
        options: Mapping[str, Any],
        inputs_at_once: int,
        say: Callable[[str], None],
        hosts: Hosts | None = None,
        part: tuple[int, int] | None = None,
    ):
        self.encoder, self.output, self.options, self.say = encoder, output, options, say
        self.plans, self.inputs_at_once = plans, inputs_at_once
        self.hosts = hosts or Hosts()
        # How many pending subsets still want an input; only shared ones are held in memory.
        self.wanted = collections.Counter(i for plan in plans for i in set(plan.identities))
        self.held: dict[Identity, np.ndarray] = {}
        self.files: dict[str, Any] = {}
        self.mine: set[Identity] | None = None
        if part is not None:
            everything = list(self.wanted)
            self.mine = {everything[n] for n in share(everything, *part)}

    def run(self, done: Done) -> None:
        """Call `done(plan, vectors)` for each pending subset as soon as it is embedded.

        Small subsets are embedded together: packing wastes the least with many inputs at once.
        In a process that does not write, `done` is not called.
        """
        waiting: list[Plan] = []
        stored: dict[Identity, np.ndarray] = {}
        fresh: dict[Identity, MultimodalInput] = {}
        for number, plan in enumerate(self.plans, 1):
            path = store.embeddings_path(self.output, plan.subset)
            found, why_not = (
                store.load_embeddings(path, plan.embedded_from) if self.hosts.writes else ({}, "")
            )
            found = {} if found is None else found
            there = self.hosts.agree([n for n, key in enumerate(plan.keys) if key in found])
            for n in there:
                vector = found.get(plan.keys[n])
                stored[plan.identities[n]] = _NOWHERE if vector is None else vector
            if why_not:
                self.say(f"{plan.subset}: {why_not}; embedded again")
            before = len(fresh)
            for identity, item in zip(plan.identities, plan.inputs, strict=True):
                if self.mine is not None and identity not in self.mine:
                    continue
                if not any(identity in known for known in (self.held, stored, fresh)):
                    fresh[identity] = self._from_one_file(identity, item)
            self._tell(number, plan, len(fresh) - before, len(there), path.name)
            waiting.append(plan)
            # A subset that is there already need not wait for others.
            if len(fresh) >= self.inputs_at_once or not fresh:
                self._flush(waiting, stored, fresh, done)
                waiting, stored, fresh = [], {}, {}
        self._flush(waiting, stored, fresh, done)

    def _from_one_file(self, identity: Identity, item: MultimodalInput) -> MultimodalInput:
        """The input, its images from where the same were first met: an encoder can see it."""
        images = zip(identity[1], item.images, strict=True)
        return MultimodalInput(item.text, tuple(self.files.setdefault(h, i) for h, i in images))

    def _tell(self, number: int, plan: Plan, new: int, there: int, name: str) -> None:
        where = f"[{number}/{len(self.plans)}] {plan.subset}: {len(plan.query_index)} rows"
        if there == len(plan.keys):
            self.say(f"{where}, embeddings taken from {name}")
            return
        wanted = [i for i in plan.identities if self.mine is None or i in self.mine]
        shared = len(wanted) - new - there
        more = [f"{there} taken from {name}"] if there else []
        more += [f"{shared} more are shared with subsets before it"] if shared > 0 else []
        self.say(f"{where}, {new} inputs to embed" + (f" ({', '.join(more)})" if more else ""))

    def _flush(
        self,
        waiting: list[Plan],
        stored: Mapping[Identity, np.ndarray],
        fresh: dict[Identity, MultimodalInput],
        done: Done,
    ) -> None:
        vectors = {**self.held, **stored}
        names = list(fresh)
        groups = [[names[n] for n in group] for group in arrange(names)]
        calls = _calls(groups, self.inputs_at_once)
        for call in calls:
            matrix = self._encode(waiting, call, fresh)
            vectors.update(zip(call, matrix, strict=True))
            self._at_0(lambda: self._save(waiting, vectors, stored))
        if not calls:
            self._at_0(lambda: self._save(waiting, vectors, stored))
        for plan in waiting:
            own = {
                key: vectors[i]
                for key, i in zip(plan.keys, plan.identities, strict=True)
                if i in vectors
            }
            self._hold(plan, own)
            if self.mine is None:
                self._at_0(lambda plan=plan, own=own: done(plan, own))

    def _at_0(self, work: Callable[[], None]) -> None:
        """Let process 0 do something; if it fails, all stop."""
        error = None
        if self.hosts.writes:
            try:
                work()
            except Exception as caught:
                error = caught
        self.hosts.settle(error)

    def _encode(
        self, waiting: list[Plan], names: list[Identity], inputs: dict[Identity, MultimodalInput]
    ) -> np.ndarray:
        """Vectors of all inputs of a call, float32 [N, D]; each process embeds its share."""
        shares = [share(names, k, self.hosts.count) for k in range(self.hosts.count)]
        mine = [names[n] for n in shares[self.hosts.index]]
        part, error = np.zeros((0, 0), np.float32), None
        try:
            if mine:
                part = self._encode_mine(waiting, mine, inputs)
        except Exception as caught:
            error = caught
        self.hosts.settle(error)
        return self.hosts.gather(part, shares)

    def _encode_mine(self, waiting, names: list[Identity], inputs) -> np.ndarray:
        try:
            items = [inputs[name] for name in names]
            told = {"roles": [name[2] for name in names]} if tells_roles(self.encoder) else {}
            matrix = np.asarray(self.encoder.encode(items, **self.options, **told))
        except BadInputs as error:  # what only decoding shows, such as truncated images
            problems = [f"{_where(waiting, names[n])}: {p}" for n, p in error.problems.items()]
            raise_problems("The data has bad rows", problems, advice=error.advice)
            raise
        if matrix.ndim != 2 or len(matrix) != len(names):
            raise ValueError(f"{len(names)} inputs gave embeddings of shape {matrix.shape}")
        bad = int(np.sum(~np.isfinite(matrix).all(axis=1)))
        if bad:
            subsets = ", ".join(plan.subset for plan in waiting)
            self.say(
                f"{bad} of {len(names)} embeddings for {subsets} are not finite; rows that "
                f"need them count as wrong"
            )
        return matrix.astype(np.float32)

    def _save(
        self,
        waiting: list[Plan],
        vectors: Mapping[Identity, np.ndarray],
        stored: Mapping[Identity, np.ndarray],
    ) -> None:
        """Write what is there of the waiting subsets: an interruption costs one call at most."""
        for plan in waiting:
            there = [n for n, i in enumerate(plan.identities) if i in vectors]
            if all(plan.identities[n] in stored for n in there):
                continue  # on disk already
            matrix = np.stack([vectors[plan.identities[n]] for n in there])
            path = store.embeddings_path(self.output, plan.subset)
            keys = [plan.keys[n] for n in there]
            store.save_embeddings(path, keys, matrix, plan.embedded_from)

    def _hold(self, plan: Plan, vectors: Mapping[Key, np.ndarray]) -> None:
        for identity, key in dict(zip(plan.identities, plan.keys, strict=True)).items():
            self.wanted[identity] -= 1
            if self.wanted[identity] > 0 and key in vectors:
                # A copy, lest a shared input keep the whole matrix of its subset alive.
                self.held.setdefault(identity, np.array(vectors[key]))
            else:
                self.held.pop(identity, None)


_NOWHERE = np.zeros(0, np.float32)
"""Stands for a vector that only process 0 has read."""


def _calls(groups: Sequence[Sequence[Identity]], at_once: int) -> list[list[Identity]]:
    """Inputs of each call of the encoder: whole groups, few enough to lose in an interruption."""
    most = max(at_once, INPUTS_PER_CALL)
    calls: list[list[Identity]] = [[]]
    for group in sorted(groups, key=lambda group: not group[0][1]):  # texts last
        if calls[-1] and len(calls[-1]) + len(group) > most:
            calls.append([])
        calls[-1].extend(group)
    return [call for call in calls if call]


def _where(plans: Sequence[Plan], identity: Identity) -> str:
    """The first row that needs an input, in words."""
    for plan in plans:
        if identity not in plan.identities:
            continue
        key = plan.identities.index(identity)
        row = next(
            n
            for n, query in enumerate(plan.query_index)
            if query == key or key in plan.candidates[n]
        )
        at = getattr(plan.source, "at", None)
        return at(row) if at else f"{plan.subset} row {row}"
    raise ValueError("an input that no row has")
