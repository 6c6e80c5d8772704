# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps, for TensorBoard's profiler or Perfetto: `--config.profile=START:STOP`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from vlm2vec_jax.config import read_range


class Profiler:
    """Traces steps START to STOP into a folder; does nothing without a range.

    A run that resumes after START traces from its first step on; one that resumes after STOP not
    at all.
    """

    def __init__(self, text: str, folder: Path):
        """Read the range (see `read_range`)."""
        self._range, self._folder, self._running = read_range(text), folder, False

    def before(self, step: int) -> None:
        """To be called before step `step` is started."""
        if self._range and not self._running and self._range[0] <= step <= self._range[1]:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, values: Any) -> str | None:
        """To be called when step `step` was started; a sentence when the trace is written.

        Args:
          step: counted from 1.
          values: of the step; waited for, so that its work is in the trace.
        """
        if not self._running or self._range is None or step < self._range[1]:
            return None
        jax.block_until_ready(values)
        return self.close()

    def close(self) -> str | None:
        """End a trace that is still going on."""
        if not self._running:
            return None
        jax.profiler.stop_trace()
        self._running = False
        return f"a trace of the steps {self._range} is in {self._folder}"
