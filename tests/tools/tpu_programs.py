# SPDX-License-Identifier: Apache-2.0
"""Golden figures of the presets' TPU programs: `python tests/tools/tpu_programs.py [PRESET ...]`.

Compiles the LoRA step of presets of `configs/mmeb.py` with the TPU's own compiler (some minutes
of CPU time each; pip install libtpu), writes the report to `docs/compile` and what must not get
worse to `tests/goldens/tpu_programs`. With `--reports FOLDER` reports that are there are taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "tpu_programs"
PRESETS = {"v5e-64": "v5e:8x8", "v5p-32": "v5p:2x2x4", "v6e-16": "v6e:4x4"}
"""Preset -> topology."""
KEPT = (
    *("topology", "versions", "mesh", "chips", "batch_size", "grad_cache", "chunk_tokens"),
    *("remat", "remat_vision", "groups", "hbm_bytes_per_chip", "peak_bytes_per_chip", "memory"),
    *("collectives", "flops", "parameters_trained"),
)


def compiled(preset: str, folder: Path) -> dict[str, Any]:
    """Compile a preset's LoRA step; leaves `lora_PRESET.json` and `.txt` in the folder."""
    report = folder / f"lora_{preset}.json"
    command = [sys.executable, "-m", "vlm2vec_jax.compile", "--config"]
    command += [f"configs/mmeb.py:lora,{preset}", "--topology", PRESETS[preset]]
    command += ["--config.model.path=tests/goldens/phi-3.5-vision", "--json", str(report)]
    with report.with_suffix(".txt").open("w") as words:
        subprocess.run(command, cwd=ROOT, stdout=words, check=True)
    return json.loads(report.read_text())


def golden(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report."""
    return {name: report[name] for name in KEPT}


def main() -> None:
    """Compile, or read, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--reports", type=Path)
    args = parser.parse_args()
    for preset in args.presets:
        if args.reports:
            report = json.loads((args.reports / f"lora_{preset}.json").read_text())
        else:
            report = compiled(preset, ROOT / "docs" / "compile")
        GOLDENS.mkdir(exist_ok=True)
        text = json.dumps(golden(report), indent=2) + "\n"
        (GOLDENS / f"{preset}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
