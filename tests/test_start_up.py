# SPDX-License-Identifier: Apache-2.0
"""Coming together: SLURM's variables, the roll call, flags, and what is said when it fails."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest
from test_multiprocess import free_port

from vlm2vec_jax import flags
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.parallel.cluster import Place, expand_counts, expand_nodes, place, slurm
from vlm2vec_jax.parallel.peers import Peers, join
from vlm2vec_jax.parallel.rollcall import roll_call


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node7", ["node7"]),
        ("a,b", ["a", "b"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("gpu[1,3-4]-ib,login", ["gpu1-ib", "gpu3-ib", "gpu4-ib", "login"]),
        ("r[1-2]n[5,7]", ["r1n5", "r2n5", "r1n7", "r2n7"]),
    ],
)
def test_node_lists_are_spelled_out(text, names):
    assert sorted(expand_nodes(text)) == sorted(names)


def test_counts_are_spelled_out():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1] and expand_counts("4") == [4]


SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def test_one_task_a_node_takes_all_devices_of_the_node():
    found = slurm(SLURM)
    assert found == Place("gpu01:62344", 2, 1, None, {0: "gpu01", 1: "gpu02"})
    assert place(None, None, None, detect=True, environment=SLURM) == found


def test_several_tasks_a_node_take_a_device_each():
    several = SLURM | {
        "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "JAX_COORDINATOR_PORT": "7000",
    }  # fmt: skip
    found = slurm(several)
    assert found.devices == (1,) and found.coordinator == "gpu01:7000"
    assert found.hosts == {0: "gpu01", 1: "gpu01", 2: "gpu02", 3: "gpu02"}
    assert slurm(several | {"CUDA_VISIBLE_DEVICES": "5"}).devices is None


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="lacks SLURM_NTASKS, SLURM_STEP_NODELIST"):
        slurm({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})
    with pytest.raises(UserError, match="all of coordinator"):
        place("host:1", None, 0, detect=False, environment={})
    with pytest.raises(UserError, match="0..1"):
        place("host:1", 2, 2, detect=False, environment={})
    with pytest.raises(UserError, match="either distributed"):
        place("host:1", 2, 0, detect=True, environment={})
    assert place(None, None, None, detect=False, environment=SLURM) is None
    with pytest.raises(UserError, match="host:port"):
        roll_call("host", 2, 1, timeout_s=1)


def test_no_flag_is_one_process():
    args = SimpleNamespace(
        coordinator=None, num_processes=None, process_id=None, distributed=False, start_timeout=1
    )
    peers = flags.join_processes(args)
    assert (peers.processes, peers.is_main) == (1, True)
    assert join(None).share("x", [1]) == [[1]]
    assert peers.together("x", lambda: 5) == 5


def called(count, *, come, told=None, timeout_s=20.0, expected=None):
    """What each process hears: its machines, or an error."""
    port, heard = free_port(), {}

    def run(key, process):
        try:
            heard[key] = roll_call(
                f"127.0.0.1:{port}", (told or {}).get(key, count), process, host=f"host{key}",
                expected=expected, timeout_s=timeout_s,
            )  # fmt: skip
        except UserError as error:
            heard[key] = str(error)

    threads = [threading.Thread(target=run, args=item) for item in come.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return heard


def test_all_come():
    heard = called(4, come={"a": 0, "b": 3, "c": 1, "d": 2})
    assert set(map(str, heard.values())) == {str(heard["a"])} or all(
        h == heard["a"] for h in heard.values()
    )
    assert heard["a"] == {0: "hosta", 1: "hostc", 2: "hostd", 3: "hostb"}


def test_who_does_not_come_is_named_to_all_who_did():
    heard = called(4, come={"a": 0, "b": 3}, timeout_s=1.0, expected={1: "node-17"})
    for said in heard.values():
        assert "process 1 (node-17), process 2 did not come" in said and "hostb" in said


def test_nobody_calls():
    heard = called(2, come={"b": 1}, timeout_s=0.6)
    assert "process 1 (hostb) did not reach process 0 at 127.0.0.1:" in heard["b"]


def test_contradictions_are_told():
    heard = called(3, come={"a": 0, "b": 1, "c": 1})
    assert "both host" in heard["a"] and "say they are process 1" in heard["a"]
    heard = called(2, come={"a": 0, "b": 1}, told={"b": 3})
    assert "hostb was told of 3 processes" in heard["a"] and "told of 3" in heard["b"]


def test_a_stranger_does_not_disturb():
    port, heard = free_port(), {}

    def call(process):
        heard[process] = roll_call(f"127.0.0.1:{port}", 2, process, host="h", timeout_s=20)

    first = threading.Thread(target=call, args=(0,))
    first.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            time.sleep(0.05)
    call(1)
    first.join(20)
    assert heard[0] == heard[1] == {0: "h", 1: "h"}


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}.*another port"):
            roll_call(f"127.0.0.1:{port}", 2, 0, timeout_s=1)


def test_processes_have_names():
    peers = Peers(1, 3, {0: "a", 2: "b"})
    assert peers.name(2) == "process 2 (b)" and peers.name(1) == "process 1"
