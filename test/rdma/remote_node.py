"""How do tests drive the nodes in two machines with RDMA?"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from machines import Machine

# Starting one takes 5 s, emulated, and longer beside others.
START_S = 120.0
OURS = pathlib.Path(__file__).resolve().parents[2] / "python"


class RemoteNode:
    """A standing-alone manager in a process of a machine; ended when its `with` block is left.

    With a port that is its handshake's, and it can be restarted on it. `variables` are added to its environment.
    """

    def __init__(
        self, machine: Machine, name: str, role: str, port: int = 0, python: pathlib.Path = OURS, **variables: str
    ):
        self.machine, self.name, self._role, self._port = machine, name, role, port
        ports = {"MC_MIN_RPC_PORT": str(port), "MC_MAX_RPC_PORT": str(port)} if port else {}
        self._environment = {"PYTHONPATH": str(python), "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1", **ports, **variables}
        self._start()

    def _start(self) -> None:
        command = [sys.executable, self.machine.file("guest_node.py"), self._role]
        ready = self.machine.do("start", self.name, command, self._environment, deadline_s=START_S)["value"]
        self.session, self.blocks, self.aux = ready["session"], ready["blocks"], ready["aux"]
        assert not self._port or self.session.endswith(f":{self._port}"), f"{self.session} has not port {self._port}"

    def ask(self, command: str, *arguments: Any, deadline_s: float = 60) -> Any:
        """Calls a method of `guest_node.GuestNode` there."""
        answer = self.machine.do("ask", self.name, [command, arguments], deadline_s=deadline_s)
        assert "error" not in answer, f"{self.name}: {answer['error']}"
        return answer["value"]

    def register(self, peer: RemoteNode) -> None:
        """The peer tells this prefill node its memory."""
        self.ask("register", peer.session, peer.blocks, peer.aux)

    def send_to(self, peer: RemoteNode, size: int = 65536) -> str:
        """Sends one block; empty if it arrived, else why not."""
        return str(self.ask("send", peer.session, size))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stands still meanwhile."""
        try:
            self.machine.do("signal", self.name, signal.SIGSTOP)
            yield
        finally:
            self.machine.do("signal", self.name, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; when this returns, the process is gone."""
        self.machine.do("kill", self.name)

    def restart(self) -> None:
        """Kills it and starts it on the same port: another process with other memory."""
        self.kill()
        self._start()

    def log(self) -> str:
        """What Mooncake and the manager have logged."""
        return str(self.machine.do("log", self.name))

    def clock_ahead_s(self) -> float:
        """How far the clock there is ahead of the clock here, to a few milliseconds."""
        best = (float("inf"), 0.0)
        for _ in range(5):
            began = time.monotonic()
            there = self.machine.do("clock")
            ended = time.monotonic()
            best = min(best, (ended - began, there - (began + ended) / 2))
        return best[1]

    def __enter__(self) -> RemoteNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.do("end", self.name)
