# SPDX-License-Identifier: Apache-2.0
"""XLA's flags: of tests, and for processes that they start with another number of devices."""

import importlib.metadata
import os
import re

COUNT = "--xla_force_host_platform_device_count"
# Nearly all of a test's time is compilation, and float32 on a CPU gains little from more of it.
CHEAP = {"--xla_backend_optimization_level": "0"}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # A flag that it does not know ends a process at once; newer ones know no other generator.
    CHEAP["--xla_cpu_use_fusion_emitters"] = "false"


def flags(devices: int) -> str:
    """This process's XLA_FLAGS, its cheap compilation included, for so many CPU devices."""
    others = re.sub(rf"{COUNT}=\d+", "", os.environ.get("XLA_FLAGS", "")).split()
    return " ".join([*others, f"{COUNT}={devices}"])
