# SPDX-License-Identifier: Apache-2.0
"""The real Phi-3.5-Vision as shapes: its config.json is data of the tests, its weights are not."""

from pathlib import Path

FOLDER = Path(__file__).parent / "goldens" / "phi-3.5-vision"
CONFIG = FOLDER / "config.json"
