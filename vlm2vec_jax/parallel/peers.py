# SPDX-License-Identifier: Apache-2.0
"""Joining the other processes of a run, and small messages between them on the host.

Messages go through jax's coordination service, which every run of several processes has: no
device takes part, so a thread that prepares data may use it while a step computes.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.parallel.cluster import Place
from vlm2vec_jax.parallel.cluster import place as find_place
from vlm2vec_jax.parallel.rollcall import roll_call

HEARTBEAT_S = 60
"""After so long without a sign of life a process counts as dead, and jax ends the others."""

_POLL_MS = 500
_FAILED = "vlm2vec/failed"
_GIVEN_UP = "vlm2vec/given-up"
_Result = TypeVar("_Result")


class Stopped(Exception):
    """A wait for the others was given up, as this process is closing."""


class GivenUp(Exception):
    """Another process will not come to where this one waits for it; says who, and why."""


class Peers:
    """The processes of a run, this one among them.

    Attributes:
      process: number of this one.
      processes: how many there are.
      hosts: machine of each.
    """

    def __init__(
        self, process: int = 0, processes: int = 1, hosts: Mapping[int, str] | None = None
    ):
        """One process unless said otherwise."""
        self.process, self.processes = process, processes
        self.hosts = dict(hosts or {})
        self._before: dict[str, str] = {}

    @property
    def is_main(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.process == 0

    def name(self, process: int) -> str:
        """`process 3 (node-17)`."""
        host = self.hosts.get(process)
        return f"process {process}" + (f" ({host})" if host else "")

    def exchange(
        self,
        name: str,
        mine: bytes,
        *,
        stop: threading.Event | None = None,
        report: Callable[[str], None] | None = None,
        slow_s: float = 60.0,
        matter: str = "",
        timeout_s: float | None = None,
    ) -> list[bytes]:
        """Give every process the message of each.

        Args:
          name: of the exchange, `channel/...`; all processes use the same names in the same
            order within a channel, each only once in a run.
          mine: message of this process; kilobytes.
          stop: gives the wait up when it is set.
          report: gets a sentence when others have been waited for `slow_s` seconds, again after
            twice the time, and so on.
          slow_s: see `report`.
          matter: what the exchange is part of, for `give_up`.
          timeout_s: how long to wait for the others; None for as long as they live.

        Returns:
          A message per process, in order.

        Raises:
          Stopped: if `stop` was set.
          GivenUp: if another process has given `matter` up.
          TimeoutError: naming who did not come in time.
          UserError: if another process has failed (`fail`).
        """
        if self.processes == 1:
            return [mine]
        client = _client()
        client.key_value_set_bytes(f"vlm2vec/{name}/{self.process}", mine)
        started, told = time.monotonic(), slow_s
        found = []
        for other in range(self.processes):
            key = f"vlm2vec/{name}/{other}"
            while True:
                if stop is not None and stop.is_set():
                    raise Stopped
                try:
                    found.append(client.blocking_key_value_get_bytes(key, _POLL_MS))
                    break
                except jax.errors.JaxRuntimeError as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise
                failed = _said(client, _FAILED)
                if failed:
                    raise UserError(failed)
                refused = _said(client, f"{_GIVEN_UP}/{matter}") if matter else ""
                if refused:
                    raise GivenUp(refused)
                waited = time.monotonic() - started
                if timeout_s is not None and waited > timeout_s:
                    raise TimeoutError(f"{self.name(other)} did not come within {timeout_s:.0f} s")
                if report is not None and waited > told:
                    report(f"{self.name(other)} has been waited for {waited:.0f} s ({name})")
                    told *= 2
        # All have told this one, so all have heard the one before.
        channel = name.partition("/")[0]
        before = self._before.get(channel)
        self._before[channel] = name
        if before is not None:
            client.key_value_delete(f"vlm2vec/{before}/{self.process}")
        return found

    def fail(self, message: str) -> None:
        """Tell the others that this process ends; their next `exchange` raises it."""
        if self.processes > 1:
            told = f"{self.name(self.process)}: {message}".encode()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another failed before
                _client().key_value_set_bytes(_FAILED, told)

    def give_up(self, matter: str, message: str) -> None:
        """Tell the others not to wait for this process in a matter, now or later.

        Args:
          matter: as in their `exchange`.
          message: why.
        """
        if self.processes > 1:
            told = f"{self.name(self.process)}: {message}".encode()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another gave it up before
                _client().key_value_set_bytes(f"{_GIVEN_UP}/{matter}", told)

    def share(self, name: str, value: Any, **options: Any) -> list[Any]:
        """`exchange` of JSON-able values."""
        return [json.loads(m) for m in self.exchange(name, json.dumps(value).encode(), **options)]

    def together(self, name: str, work: Callable[[], _Result]) -> _Result:
        """Do something that may fail on one process alone; if it does, all of them say so.

        Args:
          name: as for `exchange`.
          work: what to do; a `UserError` of it is told to the others.

        Raises:
          UserError: with what failed, and where.
        """
        if self.processes == 1:
            return work()
        problem, result = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        told = self.share(f"{name}/outcome", problem)
        failed = {n: said for n, said in enumerate(told) if said is not None}
        if failed:
            same = len(failed) == self.processes and len(set(failed.values())) == 1
            raise UserError(
                told[0]
                if same
                else "\n".join(f"{self.name(n)}: {said}" for n, said in failed.items())
            )
        return result  # type: ignore[return-value]


def join(
    place: Place | None,
    *,
    timeout_s: int = 300,
    report: Callable[[str], None] = lambda message: None,
) -> Peers:
    """Come together with the other processes. To be called before any device is used.

    Args:
      place: which process this is; None for a run of one.
      timeout_s: how long to wait for the others, seconds.
      report: gets sentences while somebody is waited for.

    Raises:
      UserError: naming who did not come.
    """
    if place is None:
        return Peers()
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    hosts = roll_call(
        place.coordinator,
        place.processes,
        place.process,
        expected=place.hosts,
        timeout_s=timeout_s,
        report=report,
    )
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=None if place.devices is None else list(place.devices),
            cluster_detection_method="deactivate",
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not come together within {timeout_s} s (coordinator "
            f"{place.coordinator}, process {place.process} of {place.processes}): {error}"
        ) from error
    return Peers(place.process, place.processes, hosts)


def _said(client: Any, key: str) -> str:
    """The message under a key, "" if there is none."""
    try:
        return client.key_value_try_get_bytes(key).decode()
    except jax.errors.JaxRuntimeError:
        return ""


def _client() -> Any:
    # The only way to the service that jax.distributed starts; orbax goes it, too.
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("the processes have not joined")
    return client


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: int = 300,
) -> Peers:
    """`join` for those who have no environment to hand in: jax looks for it itself.

    Args:
      coordinator: `host:port` of process 0; all three are given or none.
      num_processes: how many processes take part.
      process_id: number of this one, from 0.
      timeout_s: how long to wait for the others, seconds.

    Raises:
      UserError: if only some of the three are given, or the processes do not come together.
    """
    given = (coordinator, num_processes, process_id)
    detect = all(value is None for value in given)
    place = find_place(*given, detect=detect, environment={}, timeout_s=timeout_s)
    return join(place, timeout_s=timeout_s)
