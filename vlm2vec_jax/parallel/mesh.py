# SPDX-License-Identifier: Apache-2.0
"""The device mesh (axes `data`, `fsdp`, `tensor`) and start-up of several processes.

Axis types are always Auto: jax.make_mesh would otherwise make them Explicit, and code that
leaves the placement of intermediate values to the compiler would no longer trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from vlm2vec_jax.errors import UserError, raise_problems

AXES = ("data", "fsdp", "tensor")
"""Mesh axes, slowest first: neighbours on `tensor` talk most, so they sit closest together."""

ROWS = ("data", "fsdp")
"""The axes over which rows (examples) are spread: every chip but the tensor partners."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arrange the devices as (data, fsdp, tensor).

    Args:
      data: copies of the (sharded) model that see different rows; -1 takes what the other two
        leave. At most one of the three may be -1.
      fsdp: shards of every weight; each shard group sees different rows, too.
      tensor: shards of every matrix product.
      devices: the devices to use, all of them; by default `jax.devices()`.

    Returns:
      A mesh with Auto axes of the names in `AXES`.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    raise_problems(
        "the mesh is not possible",
        [
            f"mesh.{name} = {size!r}: must be a whole number from 1 on, or -1 for what is left"
            for name, size in sizes.items()
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1)
        ],
    )
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"only one mesh axis can be -1, not {' and '.join(free)}")
    fixed = 1
    for size in sizes.values():
        fixed *= 1 if size == -1 else size
    count = len(devices)
    asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if count % fixed or (not free and fixed != count):
        hint = "" if free else "; set one of them to -1 to use all devices"
        raise UserError(
            f"the mesh {asked} needs "
            f"{'a multiple of ' if free else ''}{fixed} devices, but there are {count}{hint}"
        )
    if free:
        sizes[free[0]] = count // fixed
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_spec(leading: int = 0) -> PartitionSpec:
    """How an array of rows is spread: rows over `data` and `fsdp`, the rest whole.

    Args:
      leading: axes before the row axis (1 for chunked batches [K, R, ...]).
    """
    return PartitionSpec(*(None,) * leading, ROWS)


def row_shards(mesh: Mesh) -> int:
    """Into how many pieces the rows of a batch are cut: a row count must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def describe(mesh: Mesh) -> str:
    """One line about the mesh for the start-up report, as `8 cpu devices: data 2, fsdp 4 ...`."""
    devices = mesh.devices.flatten()
    kind = getattr(devices[0], "device_kind", devices[0].platform)
    processes = len({d.process_index for d in devices})
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    plural = "s" if devices.size > 1 else ""
    hosts = f" in {processes} processes" if processes > 1 else ""
    return f"{devices.size} {kind} device{plural}{hosts}: {axes}"


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: int = 300,
) -> None:
    """Join the other processes of this run. To be called by an entry point before any device use.

    Args:
      coordinator: `host:port` of process 0. With all three arguments left out jax asks the
        surroundings (TPU pod, SLURM, Open MPI, Kubernetes) for them.
      num_processes: how many processes take part.
      process_id: number of this one, from 0.
      timeout_s: how long to wait for the others, seconds.

    Raises:
      UserError: if only some of the three are given, the numbers do not fit, or the processes do
        not come together.
    """
    given = (coordinator, num_processes, process_id)
    if any(v is None for v in given) and any(v is not None for v in given):
        raise UserError(
            "several processes need all of coordinator (host:port), num_processes and process_id, "
            f"or none of them; got {coordinator!r}, {num_processes!r}, {process_id!r}"
        )
    if num_processes is not None and process_id is not None:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"process_id {process_id} is not within 0..{num_processes - 1}")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout_s
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not come together within {timeout_s} s "
            f"(coordinator {coordinator or 'from the surroundings'}, process "
            f"{'?' if process_id is None else process_id} of {num_processes or '?'}): {error}"
        ) from error
