"""How do tests drive a standing-alone manager in a process of its own, with faults between it and its peers?

Run as a program, `node.py prefill|decode`, it is that process: JSON commands on stdin, one JSON answer each on stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

MEMORY = 1 << 20
PYTHON_FOLDER = pathlib.Path(__file__).resolve().parents[2] / "python"


class Node:
    """A manager in a process of its own. Ends it, stopped or not, when its `with` block is left."""

    def __init__(self, role: str, log: pathlib.Path, network: str | None = None, **environment: str) -> None:
        enter = ["nsenter", f"--net={network}"] if network else []
        variables = {
            "PYTHONPATH": str(PYTHON_FOLDER),
            "MOONCAKE_PROTOCOL": "tcp",
            "MC_TRANSFER_TIMEOUT": "5",
            "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
        }
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [*enter, sys.executable, __file__, role],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **variables, **environment},
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        ready = self._answer(30)
        self.session, self.address = ready["session"], ready["address"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, deadline_s: float) -> Any:
        answer = self._answers.get(timeout=deadline_s)
        assert answer, f"the process has ended; its log:\n{self.log.read_text()[-3000:]}"
        return json.loads(answer)

    def ask(self, command: str, *arguments: Any, deadline_s: float = 60) -> Any:
        """Sends a command and returns its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer(deadline_s)

    def send_to(self, peer: Node) -> str:
        """Sends all of the memory to the peer; empty if it arrived, else why not."""
        return str(self.ask("send", peer.session, peer.address))

    def register(self, peer: Node) -> None:
        """The peer tells this prefill node its memory."""
        self.ask("register", peer.session, peer.address)

    def blacklist(self, peer: Node) -> None:
        """Makes one transfer fail for good reason: the peer is stopped meanwhile, and goes on afterwards."""
        with peer.stopped():
            assert "Failed to send" in self.send_to(peer)

    def wait_until_served(self, peer: Node, deadline_s: float) -> float:
        """Sends until a transfer goes through; returns the seconds that took. Counts refusals, not failures."""
        began = time.monotonic()
        while (why := self.send_to(peer)) != "":
            assert "is not alive" in why, f"a request was lost: {why}"
            assert time.monotonic() - began < deadline_s, f"not served after {deadline_s} s; log:\n{self.log_text()}"
            time.sleep(0.01)
        return time.monotonic() - began

    def log_text(self) -> str:
        """What SGLang's loggers wrote, without Mooncake's own lines."""
        return "".join(line for line in self.log.open() if " sglang" in line or "Traceback" in line)

    def wait_for_log(self, text: str, deadline_s: float) -> None:
        """Waits until a line of the log holds the text."""
        began = time.monotonic()
        while text not in self.log_text():
            assert time.monotonic() - began < deadline_s, f"no {text!r} in the log:\n{self.log_text()}"
            time.sleep(0.02)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT afterwards."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 5
            while not _stands_still(self.process.pid):  # kill() returns before all threads do
                assert time.monotonic() < deadline, "a stopped process has a thread that runs"
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def _stands_still(pid: int) -> bool:
    stats = pathlib.Path(f"/proc/{pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats)


class Network:
    """A network namespace without a name: it is gone when its last process is."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n"
        self.path = f"/proc/{self._holder.pid}/ns/net"

    def listening_ports(self, pid: int) -> list[int]:
        """The ports that a process listens on."""
        lines = self._run("ss", "-ltnpH").splitlines()
        return [int(line.split()[3].rpartition(":")[2]) for line in lines if f"pid={pid}," in line]

    @contextlib.contextmanager
    def closed(self, port: int, target: str) -> Iterator[None]:
        """Packets to the port are rejected (`REJECT`, with a reset) or dropped (`DROP`)."""
        how = ["REJECT", "--reject-with", "tcp-reset"] if target == "REJECT" else [target]
        rule = ["INPUT", "-p", "tcp", "--dport", str(port), "-j", *how]
        self._run("iptables", "-I", *rule)
        try:
            yield
        finally:
            self._run("iptables", "-D", *rule)

    def _run(self, *command: str) -> str:
        return subprocess.run(
            ["nsenter", f"--net={self.path}", *command], check=True, capture_output=True, text=True, timeout=20
        ).stdout

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()


def why_no_network() -> str:
    """Why a network namespace cannot be had here; empty if it can."""
    if os.geteuid() != 0:
        return "it needs root for a network namespace"
    missing = [tool for tool in ("unshare", "nsenter", "ip", "ss", "iptables") if shutil.which(tool) is None]
    return f"it needs {', '.join(missing)}" if missing else ""


def serve(role: str) -> None:
    """The body of the process."""
    from prometheus_client import REGISTRY
    from sglang.srt.disaggregation.mooncake.conn import KVTransferError, MooncakeKVManager, PeerMemory

    memory = (ctypes.c_char * MEMORY)()
    address = ctypes.addressof(memory)
    manager = MooncakeKVManager(
        types.SimpleNamespace(
            kv_data_ptrs=[address], kv_data_lens=[MEMORY], aux_data_ptrs=[], aux_data_lens=[], memory=memory
        ),
        role,
    )

    def send(session: str, there: int) -> str:
        try:
            manager.send_blocks(session, [(address, there, MEMORY)])
        except KVTransferError as error:
            return str(error)
        return ""

    def fail(sessions: list[str]) -> None:
        for session in sessions:
            with manager.session_lock:
                manager.session_failures[session] += 1
                manager.failed_sessions.add(session)

    def teardown() -> float:
        began = time.monotonic()
        manager.teardown()
        return time.monotonic() - began

    commands: dict[str, Callable[..., Any]] = {
        "send": send,
        "register": lambda session, there: manager.register_decode(session, PeerMemory([there])),
        "fill": lambda byte: ctypes.memset(address, byte, MEMORY) and None,
        "first_and_last": lambda: [memory.raw[0], memory.raw[-1]],
        "fail": fail,
        "blacklisted": lambda: sorted(manager.failed_sessions),
        "failures": lambda: dict(manager.session_failures),
        "threads": lambda: sorted(thread.name for thread in threading.enumerate()),
        "recoveries": lambda: REGISTRY.get_sample_value("sglang:failed_session_recoveries_total"),
        "teardown": teardown,
        "exit": sys.exit,
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Mooncake prints
    print(json.dumps({"session": manager.get_session_id(), "address": address}), file=answers, flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    serve(sys.argv[1])
