"""How does a test drive stock managers? A StockNode is a process with one; functions play a request between two."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from sglang_failed_session_probe import SWITCH

from kit import processes

PROGRAM = pathlib.Path(__file__).with_name("stock_manager.py")
START_DEADLINE_S = 300.0
ANSWER_DEADLINE_S = 60.0
TRANSFER_TIMEOUT_S = 5  # the least that Mooncake takes for MC_TRANSFER_TIMEOUT
ENABLE = SWITCH
SOURCE_PAGES = [3, 4, 9, 10, 11]
TARGET_PAGES = [20, 21, 40, 5, 6]


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without settings of SGLang and Mooncake, plus Mooncake over TCP and `settings`."""
    ours = ("SGLANG_", "MC_", "MOONCAKE_", "PROMETHEUS_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    loopback = {"SGLANG_HOST_IP": "127.0.0.1", "MC_FORCE_TCP": "1", "MOONCAKE_PROTOCOL": "tcp"}
    return {**kept, **loopback, "MC_TRANSFER_TIMEOUT": str(TRANSFER_TIMEOUT_S), **settings}


class NodeEnded(Exception):
    """The process of a node has ended, or did not answer in time; the message shows the end of its stderr."""


class Refused(Exception):
    """A manager has refused its settings; the message is its sentence."""


class StockNode:
    """One process with a stock manager. Starting it returns at once, so that several can import side by side.

    `network` is the path of the network namespace that it is to be in. Not thread-safe. A context manager: its end ends
    the process, whatever state that is in.
    """

    def __init__(
        self, python: pathlib.Path, role: str, folder: pathlib.Path, network: str | None = None, **settings: str
    ) -> None:
        enter = ["nsenter", f"--net={network}"] if network else []
        self.role = role
        self._log = folder / "log.jsonl"
        self._stderr = folder / "stderr"
        with open(self._stderr, "w") as stderr:
            self._process = subprocess.Popen(
                [*enter, python, PROGRAM, role, self._log],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=clean_environment(**settings),
                cwd=folder,
            )
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read_answers, daemon=True)
        self._reader.start()
        self._is_ready = False
        self.session = ""
        self.bootstrap = ""

    def ask(self, command: str, deadline_s: float = ANSWER_DEADLINE_S, **arguments: Any) -> dict[str, Any]:
        """Have the process run one command of stock_manager.py. Raises NodeEnded, or RuntimeError if it failed."""
        if not self._is_ready:
            self._answer(START_DEADLINE_S)
            self._is_ready = True
        self._write({"do": command, **arguments})
        answer = self._answer(deadline_s)
        if "error" in answer:
            raise RuntimeError(f"{self.role}: {answer['error']}")
        return answer

    def make(self, role: str = "", **settings: str) -> StockNode:
        """Construct a manager in the node's role, or in `role`, with `settings` put into the process's environment.

        Raises Refused if it refuses the settings.
        """
        answer = self.ask("make", role=role or self.role, environment=settings)
        if "refused" in answer:
            raise Refused(answer["refused"])
        self.session, self.bootstrap = answer["session"], answer["bootstrap"]
        return self

    def records(self, containing: str = "", level: str = "") -> list[str]:
        """The log messages so far that contain a text and have a level."""
        records = [json.loads(line) for line in self._read_log().splitlines()]
        return [r["message"] for r in records if containing in r["message"] and level in ("", r["level"])]

    def wait_for_record(self, containing: str, deadline_s: float = 10.0) -> None:
        """Wait until the log has a message that contains the text: other threads write while this one asks."""
        deadline = time.monotonic() + deadline_s
        while not self.records(containing):
            assert time.monotonic() < deadline, f"no {containing!r} in the log of {self.role}"
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def stop(self) -> None:
        """Stop the process (SIGSTOP) and return when all of its threads are stopped."""
        processes.stop(self._process.pid)

    def resume(self) -> None:
        """Let the process go on (SIGCONT)."""
        os.kill(self._process.pid, signal.SIGCONT)

    def exit(self, deadline_s: float) -> int:
        """Have the interpreter exit as at the end of a program; return its exit status."""
        self._write({"do": "exit"})
        return self._process.wait(deadline_s)

    def __enter__(self) -> StockNode:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(20)
        self._reader.join(20)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read_log(self) -> str:
        return self._log.read_text()

    def _read_answers(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, deadline_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=deadline_s)
        except queue.Empty:
            line = ""
        if not line:
            raise NodeEnded(f"{self.role} does not answer; the end of its stderr:\n{self._stderr.read_text()[-3000:]}")
        return json.loads(line)

    def _write(self, command: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer that does not come says so


Start = Callable[..., StockNode]  # the fixture: start(role, *, python=..., network=..., **settings)


@dataclasses.dataclass(frozen=True)
class Sent:
    """How a transfer ended at the prefill, and SGLang's reason if it failed."""

    status: str
    reason: str


def hand_over(prefill: StockNode, decode: StockNode, register: bool = False, pages: list[int] = TARGET_PAGES) -> int:
    """Let decode hand pages for a new request to prefill; return the request's room.

    With `register`, decode first registers its memory again, as after it has lost the prefill's heartbeat.
    """
    room = random.randint(1, 2**62)
    decode.ask("receive", room=room, pages=pages, bootstrap=prefill.bootstrap, register=register)
    heard = prefill.ask("await_receiver", room=room)
    assert heard["status"] == "WaitingForInput", f"prefill has not heard of the request: {heard}"
    return room


def send(prefill: StockNode, room: int, pages: list[int] = SOURCE_PAGES) -> Sent:
    """Transfer new bytes, of these pages, for a request that was handed over; return when the transfer has ended."""
    begin_to_send(prefill, room, pages)
    return end_of(prefill, room)


def begin_to_send(prefill: StockNode, room: int, pages: list[int] = SOURCE_PAGES) -> None:
    """As `send`, but return at once."""
    prefill.ask("fill", seed=room % 251)
    prefill.ask("send", room=room, pages=pages)


def end_of(prefill: StockNode, room: int) -> Sent:
    """How a transfer ends that was begun."""
    ended = prefill.ask("finish", room=room, wait_s=30)
    return Sent(ended["status"], ended.get("reason", ""))


def is_served(prefill: StockNode, decode: StockNode, register: bool = False) -> bool:
    """Play one whole request; True if both ends call it a success and decode holds the bytes of prefill."""
    room = hand_over(prefill, decode, register)
    sent = send(prefill, room)
    received = decode.ask("finish", room=room, wait_s=10)
    if (sent.status, received["status"]) != ("Success", "Success"):
        return False
    return prefill.ask("digest", pages=SOURCE_PAGES) == decode.ask("digest", pages=TARGET_PAGES)


@dataclasses.dataclass(frozen=True)
class Story:
    """What was seen while a fault came and passed."""

    served_before: bool
    failed: Sent
    failed_after_s: float
    behind_it: Sent
    blacklisted: bool
    refused: Sent
    recovered: bool
    served_after: bool
    counter: float


def play_story(prefill: StockNode, decode: StockNode) -> Story:
    """Stop decode in the middle of a request with another one behind it, send one more while it is stopped, then let
    decode go on.
    """
    served_before = is_served(prefill, decode)
    first, behind, second = (hand_over(prefill, decode) for _ in range(3))
    decode.stop()
    try:
        began = time.monotonic()
        begin_to_send(prefill, first)
        begin_to_send(prefill, behind)
        failed = end_of(prefill, first)
        failed_after_s = time.monotonic() - began
        behind_it = end_of(prefill, behind)
        blacklisted = is_blacklisted(prefill, decode.session)
        refused = send(prefill, second)
    finally:
        decode.resume()
    recovered = recovers(prefill, decode.session)
    if recovered:
        prefill.wait_for_record(f"Session {decode.session} recovered via probe")  # which is told after it is counted
    return Story(
        served_before,
        failed,
        failed_after_s,
        behind_it,
        blacklisted,
        refused,
        recovered,
        is_served(prefill, decode),
        prefill.ask("counter")["value"],
    )


def is_blacklisted(prefill: StockNode, session: str) -> bool:
    """True while prefill has the session on its blacklist; asks without noting a request."""
    return session in prefill.ask("state")["failed_sessions"]


def counts(prefill: StockNode, recoveries: float, deadline_s: float = 10.0) -> bool:
    """Wait until prefill has counted so many recoveries, a moment after the session is off the blacklist."""
    deadline = time.monotonic() + deadline_s
    while prefill.ask("counter")["value"] < recoveries and time.monotonic() < deadline:
        time.sleep(0.01)
    return prefill.ask("counter")["value"] == recoveries


def recovers(prefill: StockNode, session: str, deadline_s: float = 15.0) -> bool:
    """Wait until the session is off the blacklist; False if it is not by the deadline."""
    deadline = time.monotonic() + deadline_s
    while is_blacklisted(prefill, session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
