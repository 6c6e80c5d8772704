# SPDX-License-Identifier: Apache-2.0
"""Which process of a run this is: from flags, from SLURM, or from what jax finds out.

Pure functions of an environment that an entry point hands in. SLURM is read here and not by jax,
which would give a process a single card; here one process a node drives all cards of the node.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from vlm2vec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among several.

    Attributes:
      coordinator: `host:port` of process 0.
      processes: how many there are.
      process: number of this one.
      devices: local device numbers of this process; None for all of the machine.
      hosts: where each process runs, as far as that is known beforehand.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None
    hosts: Mapping[int, str] = dataclasses.field(default_factory=dict)


def place(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool,
    environment: Mapping[str, str],
    timeout_s: int = 300,
) -> Place | None:
    """Where this process stands.

    Args:
      coordinator: `host:port` of process 0; goes with the next two.
      num_processes: how many processes take part.
      process_id: number of this one, from 0.
      detect: ask the surroundings (SLURM, TPU pod, Open MPI, Kubernetes) instead.
      environment: environment variables.
      timeout_s: how long the surroundings may take to answer.

    Returns:
      None for a run of one process.

    Raises:
      UserError: for flags that contradict, or surroundings that say nothing.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        return _detect(environment, timeout_s) if detect else None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "several processes need all of coordinator (host:port), num_processes and process_id; "
            f"got {coordinator!r}, {num_processes!r}, {process_id!r}"
        )
    if detect:
        raise UserError("give either distributed, or coordinator, num_processes and process_id")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(f"process_id {process_id} is not within 0..{num_processes - 1}")
    return Place(coordinator, num_processes, process_id)


def _detect(environment: Mapping[str, str], timeout_s: int) -> Place:
    if "SLURM_PROCID" in environment:
        return slurm(environment)
    # What jax.distributed.initialize itself asks; it has no public name. Asked here, because the
    # roll call must know the others before jax does.
    from jax._src.clusters import ClusterEnv

    try:
        address, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout_s
        )
    except Exception as error:  # metadata servers, name lookups, missing variables
        raise UserError(f"the surroundings do not say who takes part: {error}") from error
    if address is None or processes is None or process is None:
        raise UserError(
            "distributed is set, but this is no SLURM step, TPU pod, Open MPI or Kubernetes job "
            "that could be recognised; give coordinator, num_processes and process_id"
        )
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    hosts = dict(enumerate(name for name in names.split(",") if name))
    return Place(
        address, processes, process, None if devices is None else tuple(devices),
        hosts if len(hosts) == processes else {},
    )  # fmt: skip


def slurm(environment: Mapping[str, str]) -> Place:
    """Read a SLURM job step (what `srun` sets).

    One task a node takes all devices of the node; with several tasks each takes the device of its
    own number, unless SLURM shows it a single one.

    Raises:
      UserError: naming the variables that are missing.
    """
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    missing = [name for name in needed if name not in environment]
    missing += [] if nodes else ["SLURM_STEP_NODELIST"]
    if missing or nodes is None:
        raise UserError(f"this SLURM step lacks {', '.join(missing)}; start it with srun")
    processes, process = int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"])
    names = expand_nodes(nodes)
    tasks = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(tasks) != len(names):
        tasks = [-(-processes // len(names))] * len(names)
    placed = [name for name, count in zip(names, tasks, strict=True) for _ in range(count)]
    hosts = dict(enumerate(placed[:processes]))
    # A port in the upper range that all processes of a job derive alike, as jax does.
    port = environment.get("JAX_COORDINATOR_PORT") or str(
        int(environment["SLURM_JOB_ID"]) % 4096 + 61440
    )
    devices = None
    seen = environment.get("CUDA_VISIBLE_DEVICES", "")
    if max(tasks) > 1 and len([d for d in seen.split(",") if d]) != 1:
        devices = (int(environment.get("SLURM_LOCALID", "0")),)
    return Place(f"{names[0]}:{port}", processes, process, devices, hosts)


def expand_nodes(nodes: str) -> list[str]:
    """Spell a SLURM node list out: "a[01-03,7],b" is a01, a02, a03, a7, b."""
    names = []
    for part in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*", nodes):
        found = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            if text:
                found = [name + text for name in found]
                continue
            numbers = []
            for piece in ranges.split(","):
                first, _, last = piece.partition("-")
                span = range(int(first), int(last or first) + 1)
                numbers += [str(number).zfill(len(first)) for number in span]
            found = [name + number for name in found for number in numbers]
        names += found
    return names


def expand_counts(counts: str) -> list[int]:
    """Spell SLURM's tasks per node out: "2(x3),1" is 2, 2, 2, 1."""
    found = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [int(count)] * int(times or 1)
    return found
