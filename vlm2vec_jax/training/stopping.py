# SPDX-License-Identifier: Apache-2.0
"""Being asked to stop: SIGTERM before a machine is taken away, or Ctrl-C.

The first signal lets the step under way finish, then the run saves and leaves with a code that
launch scripts start it again on. A second one ends it at once. Among several processes it is
enough that one gets the signal: jax agrees on a step that none of them has passed.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from jax.experimental import multihost_utils

from vlm2vec_jax.parallel.peers import Peers


class Stopping:
    """Listens for signals while it is entered (a context manager, in the main thread).

    Elsewhere (a notebook's worker thread, say) signals cannot be listened to and are left alone.
    """

    def __init__(self, peers: Peers):
        self._several = peers.processes > 1
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is not threading.main_thread():
            return self
        # Among several processes jax itself listens for SIGTERM, and tells the others.
        heard = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        for number in heard:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; the same on all processes, each asking every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()  # the next one has its ordinary effect
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()
