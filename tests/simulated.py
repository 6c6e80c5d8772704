# SPDX-License-Identifier: Apache-2.0
"""XLA's flags for processes that tests start: as this one's, with another number of devices."""

import os
import re

COUNT = "--xla_force_host_platform_device_count"


def flags(devices: int) -> str:
    """This process's XLA_FLAGS, its cheap compilation included, for so many CPU devices."""
    others = re.sub(rf"{COUNT}=\d+", "", os.environ.get("XLA_FLAGS", "")).split()
    return " ".join([*others, f"{COUNT}={devices}"])
