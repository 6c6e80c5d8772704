# SPDX-License-Identifier: Apache-2.0
"""Programs of our own in place of `gcloud`, `kubectl` and `sbatch`, for the tests of launch/."""

import os
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"
TRAIN = ["--", "--config", "configs/mini.py", "--config.output=a folder"]


class Stubs:
    """Programs of our own on the PATH that note how they were called."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "calls"

    def add(self, name: str, body: str = ""):
        """A program that notes its arguments and then runs `body` (bash, `$*` the arguments)."""
        path = self.folder / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {self.log}\n{body}\n')
        path.chmod(0o755)
        return self

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def run(self, script: str, *args, **environment) -> subprocess.CompletedProcess:
        path = f"{self.folder}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, **environment}
        command = ["bash", str(LAUNCH / script), *map(str, args)]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, cwd=self.folder
        )
