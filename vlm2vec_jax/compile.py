# SPDX-License-Identifier: Apache-2.0
"""Compile the train step and the embedding function for a TPU slice, and say what they need.

    python -m vlm2vec_jax.compile --config configs/mmeb.py --topology v5e:8x8 [--json FILE]

Any machine will do, and some minutes of its CPU time. Nothing runs and no weights are read: the
model folder needs its config.json only, and the data is an assumed mixture, which is printed. The
compiler is the TPU's own (pip install libtpu). Mesh, chunks and everything else come from the
configuration:

    python -m vlm2vec_jax.compile --config configs/mmeb.py:lora,v5e-64 --topology v5e:8x8

docs/scaling.md says how to read the report; docs/compile/ has some.
"""

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import define_config, experiment, run

CHIPS = {
    "v5e": ("v5litepod-{chips}", 16, 2),
    "v5p": ("v5p-{cores}", 95, 3),
    "v6e": ("v6e-{chips}", 32, 2),
}
"""Generation -> accelerator type (v5p counts two cores a chip), GiB of a chip, axes of a slice."""


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    define_config(values)
    flags.DEFINE_string(
        "topology",
        None,
        "chips, such as v5e:8x8, v5p:2x2x4 or v6e:4x4",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string("json", None, "write the report here as well", flag_values=values)
    flags.DEFINE_bool(
        "search_chunk",
        False,
        "compile up to four more chunk sizes to find the largest that fits, not just estimate it",
        flag_values=values,
    )


def main(args: Any) -> None:
    """Compile and report."""
    config = experiment(args)
    accelerator, hbm = read_topology(args.topology)
    # Read by libtpu when jax is first imported.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No chip is touched, so several compilations may go on at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["TPU_ACCELERATOR_TYPE"] = accelerator

    import jax

    from vlm2vec_jax.parallel.mesh import make_mesh
    from vlm2vec_jax.training import plan, plan_words

    # Programs out of a cache have no text, and their compiling costs nothing that could be told.
    jax.config.update("jax_enable_compilation_cache", False)

    shape = config.mesh
    mesh = make_mesh(shape.data, shape.fsdp, shape.tensor, devices=devices(args.topology))
    found = plan.check(config, mesh, hbm, search_chunk=args.search_chunk)
    report = {"topology": args.topology, "versions": versions(), **found}
    told = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    for name, words in [("topology", args.topology), ("versions", told), *plan_words.words(report)]:
        print(f"{name:12}{words}")
    print(f"\n{report.pop('sharding')}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of what decides how a program is compiled."""
    from importlib import metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu", "flax"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def read_topology(name: str) -> tuple[str, int]:
    """Accelerator type and bytes of a chip.

    Raises:
      UserError: if the name is not `GENERATION:AxB` or `GENERATION:AxBxC` of a known generation.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise UserError(f"--topology {name}: the generation must be one of {', '.join(CHIPS)}")
    accelerator, gib, axes = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != axes - 1:
        wanted = "x".join("ABC"[:axes])
        raise UserError(f"--topology {name}: {generation} wants {generation}:{wanted} in chips")
    chips = math.prod(int(n) for n in shape.split("x"))
    return accelerator.format(chips=chips, cores=2 * chips), gib * 1024**3


def devices(topology: str) -> list[Any]:
    """The chips of a slice, to be compiled for.

    Raises:
      UserError: if the TPU compiler is not installed or does not know the slice.
    """
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # the plugin raises several kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"--topology {topology}: the TPU compiler (pip install libtpu) cannot make it: {reason}"
        ) from None


if __name__ == "__main__":
    run(main, define)
