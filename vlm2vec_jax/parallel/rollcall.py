# SPDX-License-Identifier: Apache-2.0
"""The roll call before several processes join: who came, and who did not.

When a process does not come, jax ends all the others without a word about which. So they meet
first over plain TCP, on the very port that jax's coordinator takes afterwards: each tells process
0 its number and the name of its machine, and hears who came. Host side, standard library only.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping

from vlm2vec_jax.errors import UserError

_TITLE = "the processes of this run did not come together"
_LINE = 1 << 20
_GRACE_S = 10.0
"""Process 0 speaks at the deadline; the others wait this much longer for what it says."""


def roll_call(
    coordinator: str,
    processes: int,
    process: int,
    *,
    host: str = "",
    expected: Mapping[int, str] | None = None,
    timeout_s: float = 300.0,
    report: Callable[[str], None] = lambda message: None,
) -> dict[int, str]:
    """Wait until all processes of a run are there.

    Args:
      coordinator: `host:port` of process 0.
      processes: how many there are.
      process: number of this one.
      host: name of this machine; by default what the system says.
      expected: where each process should run, if that is known; for messages.
      timeout_s: how long to wait, seconds.
      report: gets a sentence while somebody is waited for.

    Returns:
      The machine of each process.

    Raises:
      UserError: naming those that did not come, or what contradicts.
    """
    address, _, port = coordinator.rpartition(":")
    if not address or not port.isdigit():
        raise UserError(f"coordinator must be host:port, not {coordinator!r}")
    host = host or socket.gethostname()
    deadline = time.monotonic() + timeout_s
    if process == 0:
        return _call(int(port), processes, host, dict(expected or {}), deadline, timeout_s, report)
    said = {"process": process, "processes": processes, "host": host}
    return _answer(address.strip("[]"), int(port), said, deadline, timeout_s)


def _call(port, processes, host, expected, deadline, timeout_s, report) -> dict[int, str]:
    came, problems = {0: host}, []
    waiting: list[socket.socket] = []
    told = time.monotonic() + min(30.0, timeout_s / 2)
    with _listen(port) as server:
        try:
            while len(came) < processes and not problems and time.monotonic() < deadline:
                if time.monotonic() > told:
                    absent = _named(set(range(processes)) - set(came), expected)
                    report(f"still waiting for {absent}")
                    told = time.monotonic() + 60.0
                found = _next(server, deadline)
                if found is None:
                    continue
                connection, said = found
                waiting.append(connection)
                number = said["process"]
                if said["processes"] != processes:
                    problems.append(
                        f"{said['host']} was told of {said['processes']} processes, "
                        f"process 0 ({host}) of {processes}"
                    )
                elif not 0 < number < processes:
                    problems.append(f"{said['host']} has number {number} of {processes}")
                elif number in came and came[number] != said["host"]:
                    problems.append(
                        f"both {came[number]} and {said['host']} say they are process {number}"
                    )
                came[number] = said["host"]
            absent = sorted(set(range(processes)) - set(came))
            message = "\n".join(problems)
            if absent and not problems:
                there = _named(came, came)
                message = (
                    f"{_named(absent, expected)} did not come to {host}:{port} within "
                    f"{timeout_s:g} s; there were {there}. Look into what the missing one prints, "
                    f"and whether it reaches this port"
                )
            answer = {"came": {str(k): v for k, v in came.items()}, "problem": message}
            for connection in waiting:
                _send(connection, answer)
        finally:
            for connection in waiting:
                connection.close()
    if message:
        raise UserError(f"{_TITLE}: {message}")
    return came


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=4096, dualstack_ipv6=both, reuse_port=False
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port}: {error.strerror}. Another run on this "
            f"machine may hold it; choose another port for the coordinator"
        ) from error


def _next(server: socket.socket, deadline: float) -> tuple[socket.socket, dict] | None:
    """The next process that says who it is; None after a while, or for a stranger."""
    server.settimeout(max(0.05, min(1.0, deadline - time.monotonic())))
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return None
    said = _receive(connection, 5.0)
    if isinstance(said, dict) and {"process", "processes", "host"} <= said.keys():
        return connection, said
    connection.close()
    return None


def _answer(address, port, said, deadline, timeout_s) -> dict[int, str]:
    reason = "nobody listens there"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=5.0) as connection:
                _send(connection, said)
                heard = _receive(connection, max(1.0, deadline + _GRACE_S - time.monotonic()))
        except OSError as error:
            reason = str(error.strerror or error)
            time.sleep(0.2)
            continue
        if not isinstance(heard, dict):  # process 0 was ended, or another program listens
            reason = "it closes the connection"
            time.sleep(0.2)
            continue
        if heard["problem"]:
            raise UserError(f"{_TITLE}: {heard['problem']}")
        return {int(number): host for number, host in heard["came"].items()}
    raise UserError(
        f"process {said['process']} ({said['host']}) did not reach process 0 at {address}:{port} "
        f"within {timeout_s:g} s: {reason}. Is process 0 running there, and is the port open?"
    )


def _named(numbers, hosts: Mapping[int, str]) -> str:
    named = [f"process {n} ({hosts[n]})" if n in hosts else f"process {n}" for n in sorted(numbers)]
    shown = ", ".join(named[:10])
    return shown + (f" and {len(named) - 10} more" if len(named) > 10 else "")


def _send(connection: socket.socket, value: dict) -> None:
    try:
        connection.sendall(json.dumps(value).encode() + b"\n")
    except OSError:
        return  # it is gone; it will come again, or be missed


def _receive(connection: socket.socket, timeout_s: float) -> dict | None:
    connection.settimeout(timeout_s)
    try:
        with connection.makefile("rb") as file:
            return json.loads(file.readline(_LINE))
    except (OSError, ValueError):
        return None
