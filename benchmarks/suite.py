# SPDX-License-Identifier: Apache-2.0
"""The list of benchmarks, and running a selection of them into one table and one file."""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import How, Result

EVERYWHERE = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A benchmark: a function from `How` to `Result`, imported when it runs.

    Attributes:
      function: `module:function` below `benchmarks`.
      words: what it measures.
      devices: where it can run.
      default_on: where it runs without being asked for.
    """

    function: str
    words: str
    devices: tuple[str, ...] = EVERYWHERE
    default_on: tuple[str, ...] = EVERYWHERE

    def run(self, how: How) -> Result:
        """Import and run."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"benchmarks.{module}"), name)(how)


ENTRIES: dict[str, Entry] = {
    "peak": Entry("peak:measure", "rate of a matrix product: what 100 % is"),
    "text_embed": Entry("embed:texts", "texts, packed against right-padded"),
    "image_embed_nc4": Entry("embed:photos_4", "photographs at num_crops 4"),
    "image_embed_nc16": Entry("embed:photos_16", "photographs at num_crops 16"),
    "mixed_embed": Entry("embed:mixed", "a mixture of texts and photographs"),
    "packing": Entry("packing:measure", "real tokens among those computed, and the planner"),
    "crops": Entry("packing:crops", "real crops among those computed"),
    "train_step_direct": Entry("train_step:direct", "the plain step"),
    "train_step_gradcache": Entry("train_step:gradcache", "the step in chunks"),
    "train_rate": Entry(
        "train_rate:measure",
        "whole steps of the recipe, pairs a second; on a CPU only when named",
        default_on=("gpu", "tpu"),
    ),
    "dora_overhead": Entry("train_step:dora_overhead", "DoRA against LoRA and PEFT's form"),
    "remedies": Entry("remedies:train", "each remedy of the train step, and their product"),
    "attention": Entry("attention:measure", "the kernel of the platform, and its memory"),
    "contrastive": Entry("loss:measure", "time and memory of the loss"),
    "image_preprocess": Entry(
        "image_preprocess:measure", "preparing an image, against the reference's path"
    ),
    "input_pipeline": Entry(
        "input_pipeline:measure",
        "waiting for data, at most 3 % of a step, and what an image costs",
        default_on=(),
    ),
    "score_lists": Entry("score:measure_lists", "ranking lists of candidates"),
    "score": Entry("score:measure", "ranking a corpus"),
    "mmeb_eval_sim": Entry("evaluate:measure", "an evaluation from files to scores"),
    "compile": Entry("compile_time:measure", "seconds, and programs of a run"),
    "memory": Entry("memory:measure", "the compiler's plan of a step by remat policy"),
    "scaling_fake": Entry("scaling:measure", "what a data-parallel step sends"),
    "checkpoint": Entry("checkpoint:measure", "how long a save stops training"),
    "backbones": Entry("small_backbones:measure", "every backbone, packed", default_on=()),
    "verify": Entry("verify:measure", "checking a data set", devices=("cpu",), default_on=()),
}
"""By name, in the order in which they run."""


def select(only: str | None, device: str) -> list[str]:
    """Names to run.

    Args:
      only: names with commas, `all`, or None for the default selection.
      device: leaves out what cannot run there.

    Raises:
      ValueError: in words, for a name that is none, or one that cannot run on the device.
    """
    if only is None:
        return [n for n, entry in ENTRIES.items() if device in entry.default_on]
    if only == "all":
        return [n for n, entry in ENTRIES.items() if device in entry.devices]
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ENTRIES]
    if unknown or not wanted:
        known = ", ".join(ENTRIES)
        raise ValueError(f"no benchmark {', '.join(unknown) or 'is named'}; there are {known}")
    elsewhere = [name for name in wanted if device not in ENTRIES[name].devices]
    if elsewhere:
        raise ValueError(f"{', '.join(elsewhere)} cannot run on a {device}")
    return wanted


def run(names: Sequence[str], how: How) -> tuple[dict[str, Result], dict[str, str]]:
    """Run benchmarks one after the other; one that fails does not keep the others from running.

    Returns:
      Results by name, and what went wrong by name.
    """
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    for name in names:
        print(f"{name}: {ENTRIES[name].words} ...", flush=True)
        load, start, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
        try:
            result = ENTRIES[name].run(how)
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        if how.quick:
            for row in result.rows:
                row.target = None  # figures of shapes that mean nothing
        result.more |= {
            "wall_s": round(time.perf_counter() - start, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "load_average": [load, os.getloadavg()[0]],
        }
        results[name] = result
        missed = sum(row.met is False for row in result.rows)
        told = f", {missed} of its targets missed" if missed else ""
        print(f"{name}: {result.more['wall_s']} s{told}", flush=True)
    return results, failed


def record(results: dict[str, Result], failed: dict[str, str], how: How) -> dict:
    """What the JSON file holds."""
    return {
        **common.machine(),
        "device": device_name(how.device),
        "how": dataclasses.asdict(how),
        "method": (
            "one pinned thread, CPU seconds, cases in turn, median of the rounds' ratios"
            if how.device == "cpu"
            else "wall seconds until the result is there, cases in turn, median of the ratios"
        ),
        "benchmarks": {name: result.record() for name, result in results.items()},
        "failed": failed,
    }


def device_name(device: str) -> str:
    """`cpu`, or what an accelerator calls itself."""
    if device == "cpu":
        return "cpu"
    import jax

    return jax.devices()[0].device_kind


def output_path(device: str, folder: Path = common.RESULTS) -> Path:
    """`<folder>/<date>-<device>.json`."""
    kind = "-".join(device_name(device).lower().split())
    return folder / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{kind}.json"
