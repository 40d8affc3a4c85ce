"""Do the faults that these tests inject do what they say, and is nothing left of them?"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from kit import network as network_module
from kit import processes
from kit.imposters import imposters
from kit.network import Network, why_no_network
from kit.node import Node
from kit.paths import CHECKOUT, PYTHONPATH

A_RUN_WITH_EVERYTHING = """
import os, pathlib, signal
from kit.imposters import imposters
from kit.network import Network
from kit.node import Node

def test_that_never_ends(tmp_path):
    with (
        Network() as network,
        Node("prefill", tmp_path / "prefill", network.path),
        Node("decode", tmp_path / "decode", network.path) as decode,
        imposters("silent", network=network.path),
        network.delayed(decode.handshake_port, 1),
        decode.stopped(),
    ):
        print("namespace", os.stat(network.path).st_ino, flush=True)
        signal.pause()
"""
PROCESSES_OF_THAT_RUN = 5  # the namespace's holder, two nodes, the imposter, the relay


def processes_in(namespace: int) -> list[int]:
    """The processes that keep a network namespace, which has no name, in being."""

    def is_in(pid: int) -> bool:
        try:
            return os.stat(f"/proc/{pid}/ns/net").st_ino == namespace
        except OSError:
            return False

    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_in(pid)]


@pytest.mark.skipif(bool(why_no_network()), reason=f"no test run is killed: {why_no_network()}")
def test_a_test_run_that_is_killed_leaves_no_process_and_no_namespace(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "test_killed.py"
    file.write_text(A_RUN_WITH_EVERYTHING)
    pytest_run = processes.start(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "TMPDIR": str(tmp_path)},
    )
    left: list[int] = []
    try:
        assert pytest_run.stdout is not None
        namespace = next(int(line.split()[1]) for line in pytest_run.stdout if line.startswith("namespace"))
        left = processes_in(namespace)
        assert len(left) == PROCESSES_OF_THAT_RUN

        pytest_run.kill()
        deadline = time.monotonic() + 20
        while still_there := processes.living(left) + processes_in(namespace):
            assert time.monotonic() < deadline, f"a killed test run left processes {still_there} on this machine"
            time.sleep(0.01)
    finally:
        processes.end(pytest_run)
        for pid in processes.living(left):
            processes.kill(pid)


ASK = """
import socket, sys
try:
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=float(sys.argv[2])) as connection:
        connected = True
        connection.sendall(b"anybody there?")
        print("answered" if connection.recv(100) else "closed")
except ConnectionRefusedError:
    print("refused")
except ConnectionResetError:
    print("reset")
except TimeoutError:
    print("silence" if "connected" in globals() else "not connected")
"""


def ask(network: Network, port: int, patience_s: float = 15) -> str:
    """What becomes of a question to a port of the network that waits for an answer for so long."""
    return processes.run([sys.executable, "-c", ASK, str(port), str(patience_s)], network.path).strip()


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (lambda network, port: network.dropped(port), "not connected"),
        (lambda network, port: network.dropped(port, direction="back"), "not connected"),
        (lambda network, port: network.dropped(port, direction="both"), "not connected"),
        (lambda network, port: network.dropped(port - 1, port), "not connected"),
        (lambda network, port: network.dropped(port - 1), "answered"),
        (lambda network, port: network.rejected(port), "refused"),
        (lambda network, port: network.rejected(port, direction="back"), "not connected"),
        (lambda network, port: network.cut(port), "silence"),
        (lambda network, port: network.cut(port, direction="back"), "silence"),
        (lambda network, port: network.reset(port), "reset"),
        (lambda network, port: network.delayed(port, 30), "silence"),
        (lambda network, port: network.delayed(port, 0.1), "answered"),
    ],
    ids=[
        "dropped",
        "dropped back",
        "dropped both",
        "two ports dropped",
        "another port dropped",
        "rejected",
        "rejected back",
        "cut",
        "cut back",
        "reset",
        "delayed 30 s",
        "delayed 0.1 s",
    ],
)
def test_a_network_fault_is_what_its_name_says_and_ends_with_its_block(
    network: Network, fault: Callable[[Network, int], AbstractContextManager[None]], outcome: str
) -> None:
    with imposters("echo", network=network.path) as [session]:
        port = int(session.rpartition(":")[2])
        assert ask(network, port) == "answered"
        with fault(network, port):
            nothing_comes = outcome in ("silence", "not connected")
            assert ask(network, port, patience_s=1 if nothing_comes else 15) == outcome
        assert ask(network, port) == "answered", "the fault goes on after its block"


def test_heal_ends_all_faults_at_once(network: Network) -> None:
    with imposters("echo", network=network.path) as [session]:
        port = int(session.rpartition(":")[2])
        with network.dropped(port), network.rejected(port), network.cut(port):
            network.heal()
            assert ask(network, port) == "answered"


@pytest.mark.parametrize("other_neighbour", [False, True])
def test_a_node_restarts_with_its_handshake_port_and_the_data_port_that_is_asked_for(
    network: Network, tmp_path: pathlib.Path, other_neighbour: bool
) -> None:
    with Node("decode", tmp_path / "decode", network.path, ports=(20001, 20000)) as decode:
        assert sorted(network.listening_ports(decode.process.pid)) == [20000, 20001]
        pid = decode.process.pid
        decode.restart(data_port=20002 if other_neighbour else None)
        assert decode.process.pid != pid
        assert decode.session == "127.0.0.1:20001"
        assert (decode.handshake_port, decode.data_port) == (20001, 20002 if other_neighbour else 20000)
        assert set(network.listening_ports(decode.process.pid)) == {decode.handshake_port, decode.data_port}


def test_what_is_missing_for_network_faults_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module.shutil, "which", lambda tool: None if tool == "iptables" else f"/{tool}")
    monkeypatch.setattr(network_module.os, "geteuid", lambda: 0)
    assert why_no_network() == "it needs iptables"
    monkeypatch.setattr(network_module.os, "geteuid", lambda: 1000)
    assert why_no_network() == "it needs root for a network namespace"


def test_the_report_of_the_faults_becomes_a_table(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, record_fault: Callable[..., None]
) -> None:
    report = tmp_path / "report"
    monkeypatch.setenv("FAULT_REPORT", str(report))
    for served_after_s in (1.5, 1.0, 9.0):
        record_fault("stands still", "SIGSTOP", lost=1, served_after_s=served_after_s)
    record_fault("gone", "a|b", lost=0, served_after_s=None)
    assert json.loads(report.read_text().splitlines()[0]) == {
        "fault": "stands still",
        "how": "SIGSTOP",
        "lost": 1,
        "served_after_s": 1.5,
    }

    assert processes.run([sys.executable, str(CHECKOUT / "tools" / "fault_table.py"), str(report)]).splitlines()[
        2:
    ] == [
        r"| gone | a\|b | 1 | 0 | never | never |",
        "| stands still | SIGSTOP | 3 | 3 | 1.50 s | 9.00 s |",
    ]


def test_without_a_file_for_the_report_nothing_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, record_fault: Callable[..., None]
) -> None:
    monkeypatch.delenv("FAULT_REPORT", raising=False)
    monkeypatch.chdir(tmp_path)
    record_fault("stands still", "SIGSTOP", lost=0, served_after_s=1.0)
    assert list(tmp_path.iterdir()) == []
