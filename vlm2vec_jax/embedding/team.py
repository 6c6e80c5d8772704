# SPDX-License-Identifier: Apache-2.0
"""Processes that embed one corpus together: who they are, and how bytes get from one to all."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from vlm2vec_jax.errors import UserError


class Team:
    """A single process.

    Attributes:
      index: number of this process, from 0.
      count: how many there are.
    """

    index, count = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.index == 0

    def gather(self, data: bytes) -> list[bytes]:
        """What each process has given, in their order, on all of them."""
        return [data]

    def agree(self, value: Any) -> Any:
        """The value of process 0 (JSON-able), on all of them."""
        return json.loads(self.gather(json.dumps(value).encode() if self.leads else b"")[0])

    def settle(self, error: UserError | None) -> None:
        """Raise on all processes if this or another one has a user's mistake to report.

        Raises:
          UserError: one's own, or those of the others.
        """
        said = self.gather(b"" if error is None else str(error).encode())
        if error is not None:
            raise error
        others = [f"process {k}: {text.decode()}" for k, text in enumerate(said) if text]
        if others:
            raise UserError("\n".join(others))


class DistributedTeam(Team):
    """The processes that `jax.distributed` has brought together."""

    def __init__(self) -> None:
        """To be made after `flags.join_processes`."""
        import jax

        self.index, self.count = jax.process_index(), jax.process_count()

    def gather(self, data: bytes) -> list[bytes]:
        """See `Team.gather`; the longest decides how much travels."""
        from jax.experimental import multihost_utils

        sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
        longest = int(sizes.max())
        if not longest:
            return [b""] * self.count
        padded = np.zeros(-(-longest // 4), np.int32)
        padded.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.int32)
        rows = np.ascontiguousarray(rows.reshape(self.count, -1)).view(np.uint8)
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
