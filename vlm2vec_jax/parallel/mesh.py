# SPDX-License-Identifier: Apache-2.0
"""The device mesh (axes `data`, `fsdp`, `tensor`).

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
    try:
        return jax.make_mesh(
            tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
        )
    except NotImplementedError:
        # What jax says of a TPU slice whose sides the axes would have to cut.
        raise UserError(
            f"the mesh {asked} cannot be laid out on these {count} devices: on a TPU slice each "
            f"axis must be a product of whole sides of the slice (4 x 4 chips take 4 x 4, 1 x 16 "
            f"or 16 x 1)"
        ) from None


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


def row_part(mesh: Mesh) -> tuple[int, int]:
    """Which block of the rows the devices of this process hold: (number, of how many).

    Processes whose devices are tensor partners hold the same rows.

    Raises:
      UserError: if the rows of a process do not lie together, or processes differ in how many
        they hold.
    """
    devices = mesh.devices.reshape(row_shards(mesh), -1)
    held: dict[int, set[int]] = {}
    for shard, partners in enumerate(devices):
        for device in partners:
            held.setdefault(device.process_index, set()).add(shard)
    blocks = sorted({(min(shards), max(shards) + 1) for shards in held.values()})
    sizes = {last - first for first, last in blocks}
    whole = all(len(shards) == max(shards) + 1 - min(shards) for shards in held.values())
    apart = all(a[1] == b[0] for a, b in zip(blocks, blocks[1:], strict=False))
    mine = held.get(jax.process_index())
    if not whole or not apart or len(sizes) != 1 or mine is None:
        told = ", ".join(f"process {p} rows {sorted(s)}" for p, s in sorted(held.items()))
        raise UserError(
            f"this mesh does not give every process a block of the rows of its own ({told}): make "
            f"mesh.tensor a divisor or a multiple of the devices of a process, and use the devices "
            f"of all processes"
        )
    size = sizes.pop()
    return min(mine) // size, row_shards(mesh) // size
