# SPDX-License-Identifier: Apache-2.0
"""Several processes that evaluate together: who embeds what, and how the vectors come together.

Every process reads the data and embeds its share on its own devices; the vectors are gathered on
all of them bit for bit, so scores do not depend on the number of processes. Only process 0 writes.
Machines that do not talk to each other share the work by `--shard` and `merge` instead, by the
same rule.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError, raise_problems

Identity = tuple[Any, ...]
"""What an input is across subsets: its text, the hashes of its image files (a tuple), and its role
where the encoder tells queries from targets."""

_IMAGE_TOKENS = 800
_MESSAGE = 8192


def arrange(identities: Sequence[Identity]) -> list[list[int]]:
    """Group inputs that show the same image, in order of first mention; a text stands alone.

    Args:
      identities: distinct inputs.

    Returns:
      Groups of positions; all positions once. Inputs of several images go by the first.
    """
    groups: dict[Any, list[int]] = {}
    for n, (_, images, *_) in enumerate(identities):
        groups.setdefault(images[0] if images else n, []).append(n)
    return list(groups.values())


def share(identities: Sequence[Identity], index: int, count: int) -> list[int]:
    """The positions that one of several machines embeds, images that belong together in turn.

    The groups of `arrange` are dealt, dearest first, to whoever has least; every machine computes
    the same from the same list.

    Args:
      identities: distinct inputs, the same on all machines.
      index: which machine, from 0.
      count: how many.
    """
    groups = arrange(identities)
    if count > 1:

        def price(n: int) -> int:
            text, images, *_ = identities[n]
            return len(text) // 4 + 1 + _IMAGE_TOKENS * len(images)

        prices = [sum(price(n) for n in group) for group in groups]
        loads = [(0, k) for k in range(count)]
        mine = []
        for g in sorted(range(len(groups)), key=lambda g: -prices[g]):
            load, k = heapq.heappop(loads)
            heapq.heappush(loads, (load + prices[g], k))
            if k == index:
                mine.append(g)
        groups = [groups[g] for g in sorted(mine)]
    # Texts last: what takes longest begins first.
    groups.sort(key=lambda group: not identities[group[0]][1])
    return [n for group in groups for n in group]


class Hosts:
    """One process, alone. `Processes` is the same for several."""

    index, count = 0, 1

    @property
    def writes(self) -> bool:
        """Whether this process reads and writes the output folder."""
        return self.index == 0

    def agree(self, value: Any) -> Any:
        """Process 0's value (json-able), everywhere."""
        return value

    def gather(self, mine: np.ndarray, shares: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of all processes in their places, from [len(shares[index]), D] to [N, D]."""
        return _placed([mine], shares)

    def settle(self, error: BaseException | None) -> None:
        """Raise everywhere if any process has failed; every process must come here."""
        if error is not None:
            raise error

    def same(self, what: str, value: str) -> None:
        """Check that all processes have the same value.

        Raises:
          UserError: naming those that have another one.
        """


class Processes(Hosts):
    """The processes that `jax.distributed` has brought together."""

    def __init__(self) -> None:
        """To be called after `parallel.peers.initialize_distributed`."""
        import jax

        self.index, self.count = jax.process_index(), jax.process_count()

    def agree(self, value: Any) -> Any:
        """Process 0's value, everywhere."""
        from jax.experimental import multihost_utils

        data = json.dumps(value).encode() if self.writes else b""
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        out = np.zeros(size, np.uint8)
        if self.writes:
            out[:] = np.frombuffer(data, np.uint8)
        out = np.asarray(multihost_utils.broadcast_one_to_all(out))
        return json.loads(out.astype(np.uint8).tobytes().decode())

    def gather(self, mine: np.ndarray, shares: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of all processes in their places."""
        from jax.experimental import multihost_utils

        widths = multihost_utils.process_allgather(np.int32(mine.shape[1] if len(mine) else 0))
        width = int(np.max(widths))
        padded = np.zeros((max(map(len, shares)), width), np.float32)
        padded[: len(mine)] = mine if len(mine) else padded[:0]
        # As integers, so that every bit arrives, also of what is not a number.
        bits = multihost_utils.process_allgather(padded.view(np.int32))
        parts = np.ascontiguousarray(bits).astype(np.int32).view(np.float32)
        return _placed([part[: len(s)] for part, s in zip(parts, shares, strict=True)], shares)

    def settle(self, error: BaseException | None) -> None:
        """Raise everywhere if any process has failed."""
        message = "" if error is None else str(error) or type(error).__name__
        said = self._collect(message)
        if error is not None:
            raise error
        problems = [f"process {k}: {text}" for k, text in enumerate(said) if text]
        raise_problems("another process of this evaluation failed", problems)

    def same(self, what: str, value: str) -> None:
        """Check that all processes have the same value."""
        said = self._collect(value)
        other = [str(k) for k, text in enumerate(said) if text != said[0]]
        if other:
            raise UserError(
                f"the processes of this evaluation do not have the same {what}: process "
                f"{', '.join(other)} differs from process 0; give all of them the same flags, "
                f"model and data"
            )

    def _collect(self, text: str) -> list[str]:
        from jax.experimental import multihost_utils

        buffer = np.zeros(_MESSAGE, np.uint8)
        data = text.encode()[:_MESSAGE]
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(buffer)).reshape(self.count, -1)
        return [r.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="replace") for r in rows]


def _placed(parts: Sequence[np.ndarray], shares: Sequence[Sequence[int]]) -> np.ndarray:
    width = next((p.shape[1] for p in parts if len(p)), 0)
    out = np.zeros((sum(map(len, shares)), width), np.float32)
    for part, places in zip(parts, shares, strict=True):
        if len(places):
            out[np.asarray(places)] = part
    return out
