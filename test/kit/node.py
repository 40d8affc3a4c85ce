"""How do tests drive a standing-alone manager in a process of its own, and stop, kill and restart it?

Run as a program, `node.py prefill|decode PORT`, it is that process: JSON commands on stdin, one JSON answer each on
stdout. PORT is the handshake port that it must have, 0: any.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from kit import processes
from kit.paths import PYTHONPATH

MEMORY = int(os.environ.get("NODE_MEMORY", 1 << 20))


class Node:
    """A manager in a process of its own. Ends it, stopped or not, when its `with` block is left.

    `network` is the path of a network namespace, `ports` are its handshake's and its data port, two neighbours; without
    them Mooncake chooses.
    """

    def __init__(
        self,
        role: str,
        log: pathlib.Path,
        network: str | None = None,
        ports: tuple[int, int] | None = None,
        **environment: str,
    ) -> None:
        self.role, self.log, self.network, self.environment = role, log, network, environment
        log.write_text("")
        self._start(ports)

    def _start(self, ports: tuple[int, int] | None) -> None:
        variables = {
            "PYTHONPATH": PYTHONPATH,
            "MOONCAKE_PROTOCOL": "tcp",
            "MC_TRANSFER_TIMEOUT": "5",
            "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
        }
        handshake_port = 0
        if ports:
            assert abs(ports[0] - ports[1]) == 1, (
                "Mooncake takes a range of ports, so two that it is told are neighbours"
            )
            handshake_port = ports[0]
            variables |= {"MC_MIN_RPC_PORT": str(min(ports)), "MC_MAX_RPC_PORT": str(max(ports))}
        with self.log.open("a") as stderr:
            self.process = processes.start(
                [sys.executable, __file__, self.role, str(handshake_port)],
                self.network,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **variables, **self.environment},
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self._answers), daemon=True).start()
        try:
            ready = self._answer(60)
        except BaseException:
            self.kill()
            raise
        self.session, self.address = ready["session"], ready["address"]
        self.handshake_port, self.data_port = ready["ports"]

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")

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

    def blacklist(self, peer: Node) -> float:
        """Makes one transfer fail for good reason: the peer is stopped meanwhile, and goes on afterwards.

        Returns a moment before it goes on.
        """
        with peer.stopped():
            assert "Failed to send" in self.send_to(peer)
            return time.monotonic()

    def wait_until_served(self, peer: Node, deadline_s: float) -> float:
        """Sends until a transfer goes through; returns the seconds that took. Counts refusals, not failures."""
        began = time.monotonic()
        while (why := self.send_to(peer)) != "":
            assert "is not alive" in why, f"a request was lost: {why}"
            assert time.monotonic() - began < deadline_s, f"not served after {deadline_s} s; log:\n{self.log_text()}"
            time.sleep(0.01)
        return time.monotonic() - began

    def wait_for_recoveries(self, number: int, deadline_s: float = 10) -> None:
        """Waits until so many are counted: a session is let in first, and then that is counted and told."""
        began = time.monotonic()
        while (counted := self.ask("recoveries")) < number:
            assert time.monotonic() - began < deadline_s, f"{counted} recoveries are counted, not {number}"
            time.sleep(0.02)
        assert counted == number, f"{counted} recoveries are counted, not {number}"

    def log_text(self) -> str:
        """What SGLang's loggers wrote, without Mooncake's own lines."""
        return "".join(line for line in self.log.open() if " sglang" in line or "Traceback" in line)

    def wait_for_log(self, text: str, deadline_s: float = 10, times: int = 1) -> None:
        """Waits until the log holds the text, so many times."""
        began = time.monotonic()
        while self.log_text().count(text) < times:
            assert time.monotonic() - began < deadline_s, f"no {text!r} in the log:\n{self.log_text()}"
            time.sleep(0.02)

    def stop(self) -> None:
        """SIGSTOP; when this returns, no thread runs any more."""
        processes.stop(self.process.pid)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.process.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops it, and lets it go on afterwards."""
        try:
            self.stop()
            yield
        finally:
            self.go_on()

    def kill(self) -> None:
        """SIGKILL; when this returns, the process is gone."""
        processes.end(self.process)

    def restart(self, data_port: int | None = None) -> None:
        """Kills it, if that has not happened, and starts it with the same handshake port: another process with other
        memory, so `address` changes. `data_port` is the handshake port's other neighbour, or the same as before.
        """
        self.kill()
        self._start((self.handshake_port, data_port or self.data_port))

    def misbehave(self, call: str, how: str, value: Any = None, session: str | None = None) -> None:
        """From now on a call of this node's Mooncake engine misbehaves; see `FaultyEngine.misbehave`."""
        self.ask("misbehave", call, how, value, session)

    def calls(self, call: str, session: str) -> tuple[int, int]:
        """How often a call of Mooncake was begun for the session, and how often it came back, since `misbehave`."""
        begun, returned = self.ask("calls", call).get(session, [0, 0])
        return begun, returned

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def serve(role: str, handshake_port: int) -> None:
    """The body of the process. `handshake_port` is the one it must have, 0: any."""
    from prometheus_client import REGISTRY, start_http_server
    from sglang.srt.disaggregation.mooncake import session_states, session_watch
    from sglang.srt.disaggregation.mooncake.conn import KVTransferError, PeerMemory

    from kit.faulty_engine import faulty_engine_of

    memory = (ctypes.c_char * MEMORY)()
    address = ctypes.addressof(memory)
    regions = types.SimpleNamespace(
        kv_data_ptrs=[address], kv_data_lens=[MEMORY], aux_data_ptrs=[], aux_data_lens=[], memory=memory
    )
    manager = manager_on(handshake_port, regions, role)

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

    def send_blocks(session: str, blocks: list[tuple[int, int, int]]) -> str:
        try:
            manager.send_blocks(session, [(address + offset, there, length) for offset, there, length in blocks])
        except KVTransferError as error:
            return str(error)
        return ""

    def teardown() -> float:
        began = time.monotonic()
        manager.teardown()
        return time.monotonic() - began

    def set_rule(name: str, value: float) -> None:
        modules = [module for module in (session_states, session_watch) if hasattr(module, name)]
        assert modules, f"there is no rule {name}"
        for module in modules:
            setattr(module, name, value)

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
        "cpu_s": time.process_time,
        "pending_reads": lambda: len(manager._failed_session_prober._pending._looks),
        "in_flight": lambda: manager._failed_session_prober.watch.in_flight(),
        "serve_metrics": lambda port: start_http_server(port, addr="127.0.0.1")[0].server_port,
        "teardown": teardown,
        "send_blocks": send_blocks,
        "fill_part": lambda byte, offset, length: ctypes.memset(address + offset, byte, length) and None,
        "count": lambda byte, offset, length: ctypes.string_at(address + offset, length).count(bytes([byte])),
        "read_directly": lambda session, there: manager.engine.engine.transfer_sync_read(session, address, there, 8),
        "set_rule": set_rule,
        "misbehave": lambda *fault: faulty_engine_of(manager).misbehave(*fault),
        "calls": lambda call: faulty_engine_of(manager).calls(call),
        "exit": sys.exit,
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Mooncake prints
    ready = {"session": manager.get_session_id(), "address": address, "ports": own_ports(manager)}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), file=answers, flush=True)


def manager_on(handshake_port: int, regions: types.SimpleNamespace, role: str) -> Any:
    """A manager with that handshake port. Of a range of ports Mooncake takes a random one for the handshake and another
    for data, so this makes managers until one has it. To end a wrong one takes a second.
    """
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    deadline = time.monotonic() + 50
    while True:
        try:
            manager = MooncakeKVManager(regions, role)
        except RuntimeError:  # a port is not free yet
            if time.monotonic() > deadline:
                raise
            continue
        if handshake_port in (0, own_ports(manager)[0]):
            return manager
        assert time.monotonic() < deadline, f"Mooncake does not choose port {handshake_port}"
        manager.teardown()
        del manager  # and with it the engine, which frees its ports


def own_ports(manager: Any) -> tuple[int, int]:
    """The handshake's port and the data port of the only engine in this process."""
    handshake = int(manager.get_session_id().rpartition(":")[2])
    (data,) = listening_ports() - {handshake}
    return handshake, data


def listening_ports() -> set[int]:
    """The TCP ports on which this process listens."""
    files = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it meanwhile
            files.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    tables = [pathlib.Path("/proc/self/net", table).read_text() for table in ("tcp", "tcp6")]
    sockets = [line.split() for table in tables for line in table.splitlines()[1:]]
    listening = "0A"
    return {
        int(own[1].rpartition(":")[2], 16) for own in sockets if own[3] == listening and f"socket:[{own[9]}]" in files
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    serve(sys.argv[1], int(sys.argv[2]))
