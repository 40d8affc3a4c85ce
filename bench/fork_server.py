"""How do many stock managers start in no time? This process imports a release of SGLang and forks one for each.

    fork_server.py SOCKET

Each connection to the Unix socket SOCKET becomes a process of its own, which answers lines of JSON on it: {"do":
COMMAND, ...} is answered, {"tell": COMMAND, ...} is not. The commands are the methods of Manager and those that it has
from ManagerProcess. It runs in the environment of an SGLang release, like stock_manager.py.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import importlib.util
import json
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
import types
from typing import Any

from kit import stock_manager
from timed_lock import TimedLock

CLONE_NEWNET = 0x40000000
SOURCE_PAGES = [3, 4, 9, 10, 11]
TARGET_PAGES = [20, 21, 40, 5, 6]
POLL_EVERY_S = 0.001
# SGLang's worker still looks at a request that has ended, and dies of one that was cleared meanwhile.
CLEAR_AFTER_S = 1.0


class Manager(stock_manager.ManagerProcess):
    """A manager whose requests go on side by side: a thread plays its side of each as far as it has come."""

    def __init__(self) -> None:
        super().__init__()
        self._open: set[int] = set()  # rooms of requests that go on
        self._unsent: set[int] = set()  # of those, the ones whose pages decode has not handed over yet
        self._ended: collections.deque[dict[str, Any]] = collections.deque()
        self._to_clear: collections.deque[tuple[float, str, Any]] = collections.deque()
        self._some_open = threading.Event()
        self._some_ended = threading.Condition()

    def begin(
        self, role: str, network: str, settings: dict[str, str], tight: bool = False, timed: bool = False
    ) -> dict[str, Any]:
        """Make the manager, in the network namespace at the path `network`; the settings stay.

        With `tight`, each session that it blacklists is probed in a tight loop. With `timed`, `held` tells how long its
        session_lock was held.
        """
        enter(network)
        os.environ.update(settings)
        if timed:  # session_lock is the only lock that this module makes
            self.conn.threading = types.SimpleNamespace(**{**vars(threading), "Lock": TimedLock})
        made = self.make(role, {})
        with_ours = importlib.util.find_spec("sglang_failed_session_probe") is not None
        if with_ours and role == "prefill" and not hasattr(self.manager, "_failed_session_prober"):
            raise RuntimeError("the patch is not active: what is measured would be SGLang as it is")
        if tight:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Mooncake says a line of each failed probe
            self.manager.failed_sessions = ProbedTightly(self.manager)
        threading.Thread(target=self._play_requests, daemon=True).start()
        return {**made, "pid": os.getpid()}

    def take(self, room: int) -> dict[str, Any]:
        """Prefill: take a request, and send its pages once decode has handed over its own."""
        self.open_request(room)
        self._unsent.add(room)
        self._play_on(room)
        return {}

    def hand_over(self, room: int, bootstrap: str) -> dict[str, Any]:
        """Decode: hand the pages for a request to the prefill at `bootstrap`."""
        self.receive(room, TARGET_PAGES, bootstrap)
        self._play_on(room)
        return {}

    def outcomes(self, wait_s: float) -> dict[str, Any]:
        """How requests have ended since the last time; waits for one, `wait_s` at most. `at` is the monotonic clock."""
        with self._some_ended:
            self._some_ended.wait_for(lambda: self._ended, wait_s)
            ended = list(self._ended)
            self._ended.clear()
        return {"ended": ended}

    def blacklist_all(self, sessions: list[str]) -> dict[str, Any]:
        """Prefill: blacklist sessions as transfer_worker does after failed transfers."""
        for session in sessions:
            self.blacklist(session)
        return {}

    def open_request(self, room: int) -> dict[str, Any]:
        """Prefill: take a request whose pages are sent by `send_chunks`."""
        own = f"127.0.0.1:{self.bootstrap_port}"
        self.transfers[room] = self.conn.MooncakeKVSender(self.manager, own, room, *self.sender_ranks())
        return {}

    def send_chunks(self, room: int, number: int) -> dict[str, Any]:
        """Prefill: send one page so many times as a chunk of its own, then the whole request. Gives the seconds."""
        import numpy

        assert self._outcome(room, "WaitingForInput", 20)["status"] == "WaitingForInput"
        page = numpy.array(SOURCE_PAGES[:1], numpy.int32)
        began = time.perf_counter()
        for _ in range(number):
            self.manager.add_transfer_request(room, page, slice(0, 1), False)
        self.send(room, SOURCE_PAGES)
        assert self._outcome(room, "Success", 50)["status"] == "Success"
        seconds = time.perf_counter() - began
        self._to_clear.append((time.monotonic() + CLEAR_AFTER_S, "Success", self.transfers.pop(room)))
        return {"seconds": seconds}

    def held(self) -> dict[str, Any]:
        """How long session_lock was held since the last time."""
        taken: dict[str, Any] = self.manager.session_lock.take()
        return taken

    def _play_on(self, room: int) -> None:
        self._open.add(room)
        self._some_open.set()

    def _play_requests(self) -> None:
        while True:
            self._some_open.wait()
            self._some_open.clear()
            while rooms := list(self._open):
                for room in rooms:
                    try:
                        self._play(room)
                    except Exception:
                        self._end(room, "Error", traceback.format_exc())
                self._clear_ended()
                time.sleep(POLL_EVERY_S)

    def _play(self, room: int) -> None:
        from sglang.srt.disaggregation.base.conn import KVPoll

        status = self.transfers[room].poll()
        if status == KVPoll.WaitingForInput and room in self._unsent:
            self._unsent.remove(room)
            self.send(room, SOURCE_PAGES)
        elif status == KVPoll.Success:
            self._end(room, "Success", "")
        elif status == KVPoll.Failed:
            self._end(room, "Failed", self.manager.failure_records.get(room, ""))

    def _end(self, room: int, status: str, reason: str) -> None:
        at = time.monotonic()
        self._to_clear.append((at + CLEAR_AFTER_S, status, self.transfers.pop(room)))
        self._open.remove(room)
        self._unsent.discard(room)
        with self._some_ended:
            self._ended.append({"room": room, "status": status, "reason": reason, "at": at})
            self._some_ended.notify()

    def _clear_ended(self) -> None:
        while self._to_clear and self._to_clear[0][0] <= time.monotonic():
            _, status, transfer = self._to_clear.popleft()
            if status == "Success":
                transfer.clear()
            else:
                stock_manager.failure_reason(transfer)  # which clears it


class ProbedTightly(set):  # type: ignore[type-arg]
    """A blacklist as nobody would run it: a thread for each session asks, and asks again a millisecond later."""

    def __init__(self, manager: Any) -> None:
        super().__init__()
        self._manager = manager

    def add(self, session: str) -> None:
        """The caller holds session_lock."""
        if session not in self:
            super().add(session)
            threading.Thread(target=self._ask_until_back, args=(session,), daemon=True).start()

    def _ask_until_back(self, session: str) -> None:
        while session in self:
            if self._manager.engine.send_probe(session) == 0:
                with self._manager.session_lock:
                    self.discard(session)
                    self._manager.session_failures.pop(session, None)
            else:
                time.sleep(0.001)


def enter(network: str) -> None:
    """Move this thread, still the only one, to the network namespace at that path."""
    descriptor = os.open(network, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {network}")
    os.close(descriptor)


def serve(connection: socket.socket) -> None:
    """The body of a forked process, until the other end of the connection is closed."""
    stock_manager.end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    random.seed()
    manager = Manager()
    for line in connection.makefile("r"):
        arguments = json.loads(line)
        asked = "do" in arguments
        command = arguments.pop("do" if asked else "tell")
        try:
            answer = getattr(manager, command)(**arguments)
        except Exception:
            logging.exception("%s failed", command)
            answer = {"error": traceback.format_exc()}
        if asked:
            connection.sendall(json.dumps(answer).encode() + b"\n")


def import_everything() -> None:
    """Import what a manager needs, without starting a thread: only this one would go on in a forked process."""
    import sglang.srt.disaggregation.mooncake.conn

    stock_manager.Release()
    with contextlib.suppress(ImportError):
        import sglang.srt.arg_groups.pipeline  # noqa: F401
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads run already: a forked process would lack all but one"


def main(path: str) -> None:
    stock_manager.end_with_parent()
    answers = stock_manager.take_stdout()
    logging.basicConfig(level=logging.ERROR)
    import_everything()
    gc.freeze()  # so that the collector does not touch, and thereby copy, the pages that the processes share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", file=answers, flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                try:
                    serve(connection)
                finally:
                    os._exit(0)
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
