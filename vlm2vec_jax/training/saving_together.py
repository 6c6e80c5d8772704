# SPDX-License-Identifier: Apache-2.0
"""What processes tell each other about saving and reading: what fails for one fails for all.

Orbax lets a process wait for the others until a time-out of many minutes, also where one of them
has failed and will not come. Here that one says so, and the others stop waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from vlm2vec_jax.parallel.peers import Peers
from vlm2vec_jax.training.checkpoint_files import check_writable

_OPENED = itertools.count()
_SLOW_S = 300.0


class Together:
    """The saves and readings of one folder of checkpoints, one after the other.

    Args:
      peers: the processes that save and read.
      report: gets a sentence when one is waited for very long.
    """

    def __init__(self, peers: Peers, report: Callable[[str], None]):
        # Opened in the same order on all processes, so the number is a name that they share.
        self._name = f"checkpoint-{next(_OPENED)}"
        self._peers, self._report = peers, report
        self._save = self._reading = 0

    @property
    def alone(self) -> bool:
        """Whether there is but one process."""
        return self._peers.processes == 1

    def begin(self, folder: Path) -> str | None:
        """Before a save: what keeps a process from writing to the folder; None if nothing does.

        In orbax a process that fails early lets the others wait, so this is looked at before.
        """
        self._save += 1
        if self.alone:
            return None
        return self._shared(f"{self._matter()}/able", check_writable(folder, self._peers.process))

    def end(self, problem: str | None) -> str | None:
        """After a save: what failed, wherever; None if nothing did.

        Args:
          problem: what failed here.
        """
        if problem is not None:
            self._peers.give_up(self._matter(), problem)
        return self._shared(f"{self._matter()}/outcome", problem)

    def read(self, problem: str | None) -> str | None:
        """After a checkpoint was read: what could not be, wherever; None if all of it could.

        Args:
          problem: what could not be read here.
        """
        self._reading += 1
        return self._shared(f"{self._name}/read-{self._reading}", problem)

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Where a process that has written waits for the others: orbax's `barrier_sync_fn`.

        Args:
          key: of the place in a save.
          timeout_ms: how long to wait.

        Raises:
          GivenUp: if the save has failed for another.
          TimeoutError: if another does not come.
        """
        # Orbax meets here, too, when it notes that a save has begun or ended, also one that failed
        # on a process, while the others still wait for its arrays. Nobody asks for that note.
        if "set_value" in key:
            return
        name = f"{self._name}-written/{self._save}/{key}"
        self._peers.exchange(
            name,
            b"",
            matter=self._matter(),
            report=self._report,
            slow_s=_SLOW_S,
            timeout_s=timeout_ms / 1000,
        )

    def _matter(self) -> str:
        return f"{self._name}/{self._save}"

    def _shared(self, name: str, problem: str | None) -> str | None:
        told = self._peers.share(name, problem)
        failed = {n: said for n, said in enumerate(told) if said is not None}
        if self.alone or not failed:
            return problem
        return "; ".join(f"{self._peers.name(n)}: {words}" for n, words in failed.items())
