"""Does a prefill process end cleanly and at once, whatever its probes are at? Over real Mooncake engines.

FAULTS_EXITS=200 plays so many exits, spread over all ways out and peers, instead of the few that CI plays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit import processes
from kit.network import Network, why_no_network
from kit.node import Node
from kit.paths import PYTHONPATH

PROGRAM = pathlib.Path(__file__).with_name("exiting_prefill.py")
PROMISED_S = 0.5  # for all that the probe does at a stop
BAR_S = 2.0  # for the whole exit: Mooncake's engine takes up to a second of it, with the probe and without
MACHINE_S = 0.1  # to find that nothing is left to wait for
SLOW_S = 1.0
WATCHDOG_S = 45.0
SECOND_SIGNAL_AFTER_S = 0.05
UNDER_LOAD = {"failing": True, "busy": 3, "in_flight": 1}
PLACES = 32  # all that may be in flight: twice CONCURRENCY

WAYS = {  # out, and with which exit status
    "end of program": [0],
    "sys.exit": [3],
    "exception": [1],
    "SIGTERM": [0],
    "SIGTERM twice": [0, -signal.SIGTERM],  # late in its shutdown the interpreter leaves it to the kernel
    "SIGTERM unhandled": [-signal.SIGTERM],
    "SIGQUIT": [-signal.SIGKILL],
    "os._exit": [5],
}
SIGNALS = {way: getattr(signal, way.split()[0]) for way in WAYS if way.startswith("SIG")}


@dataclasses.dataclass(frozen=True)
class Peer:
    """What the probes in flight are at; ``back_after_s`` after the exit began it can be used again."""

    kind: str
    back_after_s: float | None = None


LIVE = Peer("live")
CLOSED = Peer("closed port")
DROPPED = Peer("packets dropped")
STOPPED = Peer("stopped")
SHUT = Peer("data port shut")
SHUT_TO_AN_OLD_MOONCAKE = Peer("data port shut, reads at once")  # in no system call, so these cannot be ended
UNSEEN = Peer("stopped, nothing can be ended")
BACK_AFTER_S = (0.0, 0.1, 0.2, 0.25, 0.3, 0.6)
RESUMED = {seconds: Peer("stopped", seconds) for seconds in BACK_AFTER_S}
OPENED = Peer("data port shut", 0.1)
OPENED_TO_AN_OLD_MOONCAKE = Peer("data port shut, reads at once", 0.1)
UNSEEN_AND_RESUMED = Peer("stopped, nothing can be ended", 0.6)  # after we have given up on it
PEERS = [LIVE, CLOSED, DROPPED, STOPPED, *RESUMED.values(), SHUT, SHUT_TO_AN_OLD_MOONCAKE, UNSEEN]
PEERS += [OPENED, OPENED_TO_AN_OLD_MOONCAKE, UNSEEN_AND_RESUMED]


@dataclasses.dataclass(frozen=True)
class Case:
    """One exit. Before it, the manager may be torn down; the interpreter's shutdown may last."""

    way: str
    peer: Peer
    torn_down: bool = False
    slow: bool = False

    def __str__(self) -> str:
        back = "" if self.peer.back_after_s is None else f", back after {self.peer.back_after_s:g} s"
        return f"{self.way}, {self.peer.kind}{back}{', torn down' * self.torn_down}{', slow' * self.slow}"


BY_THE_KERNEL = ["SIGTERM unhandled", "SIGQUIT", "os._exit"]  # nothing of the process runs any more
BY_THE_INTERPRETER = [way for way in WAYS if way not in BY_THE_KERNEL]
ALL = [
    *(Case(*case) for case in itertools.product(BY_THE_INTERPRETER, PEERS, (False, True), (False, True))),
    *(Case(*case) for case in itertools.product(BY_THE_KERNEL, PEERS)),
]
# In a slow shutdown a call that returns in it is sure to; without, it must return in a few milliseconds.
IN_CI = [
    *(Case("end of program", peer) for peer in PEERS),
    *(Case(way, LIVE) for way in WAYS if way != "end of program"),
    *(Case(way, RESUMED[0.25], slow=True) for way in WAYS),
    *(Case("end of program", peer, slow=True) for peer in (OPENED, OPENED_TO_AN_OLD_MOONCAKE, RESUMED[0.6])),
    *(Case(way, UNSEEN_AND_RESUMED, slow=True) for way in BY_THE_INTERPRETER),
    Case("end of program", UNSEEN_AND_RESUMED, torn_down=True, slow=True),
    Case("sys.exit", RESUMED[0.1], torn_down=True),
    Case("end of program", RESUMED[0.1], torn_down=True, slow=True),
    Case("SIGTERM", STOPPED, torn_down=True),
]


def cases() -> list[Case]:
    """The exits to play: those for CI, or as many as FAULTS_EXITS says."""
    wanted = int(os.environ.get("FAULTS_EXITS", "0"))
    shuffled = random.Random(1).sample(ALL, len(ALL))
    return list(itertools.islice(itertools.cycle(shuffled), wanted)) if wanted else IN_CI


@dataclasses.dataclass(frozen=True)
class Exit:
    """How a process ended."""

    status: int
    seconds: float  # from the line that says it begins to
    stderr: str
    core_file: bool
    ready: dict[str, Any]
    began: dict[str, Any]
    ended: dict[str, Any]  # empty if its exit handlers did not run


def play(
    folder: pathlib.Path,
    plan: dict[str, Any],
    network: str | None = None,
    back_after_s: float | None = None,
    come_back: Callable[[], None] = lambda: None,
    **settings: str,
) -> Exit:
    """Starts a process, gives it the word to end when its probes are in flight, and looks how it does."""
    folder.mkdir()
    variables = {
        "PYTHONPATH": PYTHONPATH,
        "MOONCAKE_PROTOCOL": "tcp",
        "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
    }
    with (folder / "stderr").open("w") as stderr:
        process = processes.start(
            [sys.executable, str(PROGRAM), json.dumps(plan)],
            network,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=folder,
            env={**os.environ, **variables, **settings},
        )
    with watched(process):
        ready = heard(process)
        assert ready, f"no probes are in flight: {(folder / 'stderr').read_text()[-2000:]}"
        give_the_word(process, plan["way"])
        began = heard(process) if plan["way"] != "SIGTERM unhandled" else {}
        began_at = time.monotonic()
        moments = {}
        if plan["way"] == "SIGTERM twice":
            moments[SECOND_SIGNAL_AFTER_S] = lambda: process.send_signal(signal.SIGTERM)
        if back_after_s is not None:
            moments[back_after_s] = come_back
        ended_at = wait_for_end(process.pid, began_at, moments)
        ended = heard(process)
    return Exit(
        process.returncode,
        ended_at - began_at,
        (folder / "stderr").read_text(),
        any(folder.glob("core*")),
        ready,
        began,
        ended,
    )


@contextlib.contextmanager
def watched(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ends the process, whatever happens, when the block is left or has taken much too long."""
    watchdog = threading.Timer(WATCHDOG_S, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        processes.end(process)


def heard(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that the process says; empty if it has ended."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline() or "{}")


def give_the_word(process: subprocess.Popen[str], way: str) -> None:
    """Tells the process to end: by its signal if that is the way out, else by a line."""
    assert process.stdin is not None
    if way in SIGNALS:
        process.send_signal(SIGNALS[way])
    else:
        process.stdin.write("\n")
        process.stdin.flush()


def wait_for_end(pid: int, began_at: float, moments: dict[float, Callable[[], None]]) -> float:
    """Does what is to be done so many seconds after the exit began; returns when the process ended."""
    process = os.pidfd_open(pid)
    ended_at = None
    try:
        for seconds, act in [*sorted(moments.items(), key=lambda moment: moment[0]), (WATCHDOG_S, lambda: None)]:
            left_s = max(0.0, began_at + seconds - time.monotonic())
            if ended_at is None and select.select([process], [], [], left_s)[0]:
                ended_at = time.monotonic()
            act()
    finally:
        os.close(process)
    assert ended_at is not None, "it did not end"
    return ended_at


class Peers:
    """What probes are sent to. One peer process, and one in a network of its own, serve all exits."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._open = contextlib.ExitStack()
        self._decode: Node | None = None
        self._far: tuple[Network, Node] | None = None
        self._silent: list[str] = []
        self._exits = itertools.count()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def play(self, case: Case) -> Exit:
        """Plays one exit."""
        plan = {"way": case.way, "teardown": case.torn_down, "finalization_s": SLOW_S * case.slow}
        with self._at(case.peer.kind) as (at, come_back):
            network, settings = at.pop("network", None), at.pop("settings", {})
            folder = self._folder / f"exit-{next(self._exits)}"
            return play(folder, {**plan, **at}, network, case.peer.back_after_s, come_back, **settings)

    @contextlib.contextmanager
    def stopped_decode(self) -> Iterator[list[str]]:
        """The sessions under which a decode process that is stopped meanwhile is reached."""
        sessions = self._sessions_of_decode()
        assert self._decode is not None
        with self._decode.stopped():
            yield sessions

    @contextlib.contextmanager
    def _at(self, kind: str) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
        """What of the plan, and how the process is to run, for its probes to be at such a peer; and what ends that."""
        if kind == "live":
            yield {"sessions": self._sessions_of_decode(), **UNDER_LOAD}, lambda: None
        elif kind == "closed port":
            yield {"sessions": [self._closed_port()], **UNDER_LOAD}, lambda: None
        elif kind == "packets dropped":
            yield {"sessions": self._listeners_with_a_full_backlog(), "in_flight": PLACES}, lambda: None
        elif kind.startswith("stopped"):
            with self.stopped_decode() as sessions:
                assert self._decode is not None
                plan = {"sessions": sessions, "in_flight": PLACES, "told_by_the_kernel": kind == "stopped"}
                yield plan, self._decode.go_on
        else:
            network, decode = self._far_decode()
            with contextlib.ExitStack() as shut:
                shut.enter_context(network.dropped(decode.data_port))
                at_once = {"in_flight": 1, "lacks": ["batch_transfer_async_read"]}
                plan = {"sessions": [decode.session], "address": decode.address}
                plan |= at_once if kind.endswith("at once") else {"reads": 1}
                settings = {"SGLANG_FAILED_SESSION_PROBE_SETTLE_S": "0"}
                yield {**plan, "network": network.path, "settings": settings}, shut.close

    def _sessions_of_decode(self) -> list[str]:
        """Many sessions of one process: it listens on all addresses of the loopback network."""
        if self._decode is None:
            self._decode = self._open.enter_context(Node("decode", self._folder / "decode"))
        port = self._decode.session.rpartition(":")[2]
        return [f"127.0.0.{i}:{port}" for i in range(1, 1 + PLACES)]

    def _closed_port(self) -> str:
        return f"127.0.0.1:{self._open.enter_context(bound()).getsockname()[1]}"

    def _listeners_with_a_full_backlog(self) -> list[str]:
        """To these a connection cannot be made, and nothing says so: the kernel drops the packets that ask for it."""
        for _ in range(0 if self._silent else PLACES):
            listener = self._open.enter_context(bound())
            listener.listen(0)
            self._silent.append("{}:{}".format(*listener.getsockname()))
            for _ in range(2):
                waiting = self._open.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
        return self._silent

    def _far_decode(self) -> tuple[Network, Node]:
        if why_no_network():
            pytest.skip(f"no data port is shut: {why_no_network()}")
        if self._far is None:
            network = self._open.enter_context(Network())
            self._far = network, self._open.enter_context(Node("decode", self._folder / "far_decode", network.path))
        return self._far


def bound() -> socket.socket:
    """A socket with a port of its own that nobody else gets. Nothing listens there."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    return holder


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    with Peers(tmp_path_factory.mktemp("exits")) as peers:
        yield peers


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_prefill_ends_cleanly_and_at_once_whatever_its_probes_are_at(
    case: Case, peers: Peers, record_property: Callable[[str, object], None]
) -> None:
    for _ in range(2):  # a machine that stands still for a while holds up one of two, a hung peer both
        ended = peers.play(case)
        told = {"exit": case.way, "slow": case.slow, "seconds": ended.seconds, "status": ended.status}
        told["stopped_s"] = ended.ended.get("stopped_s", 0.0)
        for name, value in told.items():
            record_property(name, value)  # for what is said at the end of the run
        assert ended.status != -signal.SIGABRT, f"the process aborted on its way out:\n{ended.stderr[-2000:]}"
        assert "terminate called" not in ended.stderr
        assert not ended.core_file, "an exit left a core file"
        assert ended.status in WAYS[case.way], f"whoever started it sees a crash:\n{ended.stderr[-2000:]}"
        if in_time := is_in_time(ended, case.slow):
            break
    assert in_time, f"{ended.seconds:.1f} s in all; {PROMISED_S:g} s are promised for {ended.began} and {ended.ended}"


def is_in_time(ended: Exit, slow: bool = False) -> bool:
    """True if neither teardown() nor the exit was held up."""
    stopped_s = ended.ended.get("stopped_s", ended.began.get("teardown_s", 0.0))
    return stopped_s < PROMISED_S + MACHINE_S and ended.seconds < BAR_S + SLOW_S * slow


def test_teardown_with_all_places_taken_takes_half_a_second_and_the_exit_after_it_is_clean(
    peers: Peers, tmp_path: pathlib.Path
) -> None:
    for attempt in range(2):  # as above
        with peers.stopped_decode() as sessions:
            plan = {"way": "sys.exit", "sessions": sessions, "in_flight": PLACES, "teardown": True}
            ended = play(tmp_path / f"exit-{attempt}", plan)
        assert ended.ready["in_flight"] == PLACES
        assert "MooncakeFailedSessionProbe" not in ended.began["threads"], "the probe loop goes on after teardown()"
        assert ended.began["in_flight"] == 0, "a call is in the engine after teardown(), which takes the memory back"
        assert ended.status in WAYS["sys.exit"], ended.stderr[-2000:]
        if is_in_time(ended):
            return
    pytest.fail(f"a switch of the role or an exit waits for hung peers: {ended.seconds:.1f} s, {ended.began}")


def test_no_signal_handler_is_installed_while_probes_hang(peers: Peers, tmp_path: pathlib.Path) -> None:
    switched_off = play(tmp_path / "off", {"way": "os._exit"}, SGLANG_ENABLE_FAILED_SESSION_PROBE="0")
    with peers.stopped_decode() as sessions:
        plan = {"way": "os._exit", "sessions": sessions, "in_flight": PLACES}
        probing = play(tmp_path / "on", plan)
    assert probing.ready["handlers"] == switched_off.ready["handlers"], "a signal of SGLang's process was taken"


@pytest.mark.parametrize(
    ("plan", "switch"),
    [({}, "0"), ({"role": "decode"}, "1"), ({"role": ""}, "1")],
    ids=["switched off", "decode", "patched and restored"],
)
def test_an_exit_without_a_prober_is_left_alone(plan: dict[str, Any], switch: str, tmp_path: pathlib.Path) -> None:
    ended = play(tmp_path / "exit", {"way": "end of program", **plan}, SGLANG_ENABLE_FAILED_SESSION_PROBE=switch)
    assert ended.status == 0
    assert ended.ended["handlers"] == ended.ready["handlers"], "a signal of SGLang's process was taken at its exit"
