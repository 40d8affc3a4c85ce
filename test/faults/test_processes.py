"""Does a prefill node's probe bear that its process is a spawned child, forks, and starts programs?"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import multiprocessing
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit.node import Node
from sglang.srt.disaggregation.mooncake.conn import KVTransferError, MooncakeKVManager, PeerMemory

MEMORY = 4096
HUNG = 16
# Refused at once, and asked again and again.
CLOSED = [f"127.0.2.{last}:1" for last in range(1, 101)]
END_WITHIN_S = 20.0  # Mooncake's engine takes up to a second of it, with the probe and without
PROBE_THREAD = "MooncakeFailedSessionProbe"
ENVIRONMENT = {
    "MOONCAKE_PROTOCOL": "tcp",
    "MC_TRANSFER_TIMEOUT": "5",
    "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
}


class Prefill:
    """What lives in the spawned child: a prefill manager on a real engine. Functions of this file act on it."""

    def __init__(self) -> None:
        self.memory = (ctypes.c_char * MEMORY)()
        self.address = ctypes.addressof(self.memory)
        self.manager: Any = MooncakeKVManager(
            types.SimpleNamespace(
                kv_data_ptrs=[self.address], kv_data_lens=[MEMORY], aux_data_ptrs=[], aux_data_lens=[]
            ),
            "prefill",
        )


def serve(commands: Any, log: str) -> None:
    """The body of the spawned child: does what the test asks for, until the test hangs up."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)  # Mooncake prints
    os.dup2(file, 2)
    logging.basicConfig(level=logging.INFO)
    prefill = Prefill()
    with contextlib.suppress(EOFError):
        while True:
            deed, arguments = commands.recv()
            commands.send(deed(prefill, *arguments))


class SpawnedPrefill:
    """A prefill node in a child that multiprocessing spawned. Ends it when its `with` block is left."""

    def __init__(self, log: pathlib.Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.log = log
        self._commands, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(log)))
        self.process.start()
        theirs.close()

    def do(self, deed: Callable[..., Any], *arguments: Any) -> Any:
        """What that function of this file gives in the child."""
        self._commands.send((deed, arguments))
        assert self._commands.poll(60), f"{deed.__name__} takes a minute; log:\n{self.log.read_text()[-3000:]}"
        return self._commands.recv()

    def end(self, within_s: float) -> int | None:
        """Lets the child's function return; its exit code, None if it has not ended in time."""
        self._commands.close()
        self.process.join(within_s)
        return self.process.exitcode

    def __enter__(self) -> SpawnedPrefill:
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.close()
        self.process.kill()
        self.process.join()
        self.process.close()


# What the child is asked to do.


def register(prefill: Prefill, session: str, there: int) -> None:
    prefill.manager.register_decode(session, PeerMemory([there]))


def send(prefill: Prefill, session: str, there: int) -> str:
    """Empty if the memory arrived, else why not."""
    try:
        prefill.manager.send_blocks(session, [(prefill.address, there, MEMORY)])
    except KVTransferError as error:
        return str(error)
    return ""


def send_until_served(prefill: Prefill, session: str, there: int, within_s: float) -> str:
    deadline = time.monotonic() + within_s
    while (why := send(prefill, session, there)) and "is not alive" in why and time.monotonic() < deadline:
        time.sleep(0.01)
    return why


def blacklist_and_send(prefill: Prefill, session: str, there: int) -> str:
    """In one go, so that the session is not let in between."""
    blacklist(prefill, [session])
    return send(prefill, session, there)


def blacklist(prefill: Prefill, sessions: list[str]) -> None:
    for session in sessions:
        with prefill.manager.session_lock:
            prefill.manager.session_failures[session] += 1
            prefill.manager.failed_sessions.add(session)


def run_program(prefill: Prefill, options: dict[str, Any]) -> Any:
    """What a program says of itself that the prefill process starts."""
    program = (
        "import json, os, signal, threading; "
        "from sglang.srt.disaggregation.mooncake import conn; "
        "print(json.dumps({'threads': [thread.name for thread in threading.enumerate()], "
        "'descriptors': sorted(int(name) for name in os.listdir('/proc/self/fd')), "
        "'blocked_signals': len(signal.pthread_sigmask(signal.SIG_BLOCK, []))}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )
    return {"code": ended.returncode, **json.loads(ended.stdout or "{}"), "said": ended.stderr}


# Forks, and what a forked child finds.


def look_around(prefill: Prefill, report: int) -> None:
    """In the forked child: writes down which threads it has, and whether its copy of the blacklist can be used."""
    signal.alarm(30)
    blacklist = prefill.manager.failed_sessions
    before = CLOSED[0] in blacklist
    blacklist.discard(CLOSED[0])
    blacklist.add("after-the-fork:7000")
    found = {
        "threads": [thread.name for thread in threading.enumerate()],
        "kernel_threads": len(os.listdir("/proc/self/task")),
        "blacklisted": [before, CLOSED[0] in blacklist, "after-the-fork:7000" in blacklist],
        "lock_is_free": prefill.manager.session_lock.acquire(timeout=0.5),
    }
    os.write(report, json.dumps(found).encode())


def fork_and_exit_at_once(prefill: Prefill, report: int) -> int:
    """As a C library does, or subprocess with a preexec_fn that fails."""
    pid = os.fork()
    if pid == 0:
        try:
            look_around(prefill, report)
        finally:
            os._exit(0)
    return ended(pid)


def fork_and_exit_from_python(prefill: Prefill, report: int) -> int:
    """The forked child's interpreter shuts down, and runs what was registered with atexit before the fork."""
    pid = os.fork()
    if pid == 0:
        look_around(prefill, report)
        sys.exit(0)
    return ended(pid)


def fork_with_multiprocessing(prefill: Prefill, report: int) -> int:
    child = multiprocessing.get_context("fork").Process(target=look_around, args=(prefill, report))
    child.start()
    assert child.pid is not None
    return ended(child.pid)


def fork_while_a_thread_holds_session_lock(prefill: Prefill, report: int) -> int:
    """As the probe loop does for some microseconds each time it looks what is due."""
    holds, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with prefill.manager.session_lock:
            holds.set()
            forked.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(10)
    code = fork_and_exit_at_once(prefill, report)
    forked.set()
    thread.join()
    return code


def ended(pid: int) -> int:
    """The exit code of a child, 128 and more for a signal. Kills it if it does not end in time."""
    deadline = time.monotonic() + END_WITHIN_S
    while (ends := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 128 + signal.SIGKILL
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(ends[1])
    return code if code >= 0 else 128 - code


def fork(prefill: Prefill, way: Callable[[Prefill, int], int]) -> tuple[int, Any]:
    """The exit code of the forked child, and what it found."""
    reading, writing = os.pipe()
    code = way(prefill, writing)
    os.close(writing)
    with open(reading) as report:
        text = report.read()
    return code, json.loads(text or "null")


# Fixtures.


@pytest.fixture
def prefill(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpawnedPrefill]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with SpawnedPrefill(tmp_path / "prefill") as prefill:
        yield prefill


@pytest.fixture
def decode(tmp_path: pathlib.Path, prefill: SpawnedPrefill) -> Iterator[Node]:
    with Node("decode", tmp_path / "decode") as decode:
        prefill.do(register, decode.session, decode.address)
        assert prefill.do(send, decode.session, decode.address) == ""  # first contact with a stopped peer takes long
        yield decode


@pytest.fixture
def busy(prefill: SpawnedPrefill) -> Iterator[SpawnedPrefill]:
    """The prefill node with probes that hang, and a probe loop that asks peers that are gone all the time."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(HUNG)]
        prefill.do(blacklist, [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners] + CLOSED)
        asked: set[socket.socket] = set()
        deadline = time.monotonic() + 20
        while len(asked) < HUNG // 2:
            asked.update(select.select(set(listeners) - asked, [], [], 1.0)[0])
            assert time.monotonic() < deadline, "no probe hangs"
        yield prefill


def assert_it_heals(prefill: SpawnedPrefill, decode: Node) -> None:
    assert "is not alive" in prefill.do(blacklist_and_send, decode.session, decode.address)
    why = prefill.do(send_until_served, decode.session, decode.address, 15.0)
    assert why == "", f"the decode node is well, and is not used: {why}"


# The stories.


def test_a_spawned_prefill_process_heals_a_session(prefill: SpawnedPrefill, decode: Node) -> None:
    with decode.stopped():
        assert "Failed to send" in prefill.do(send, decode.session, decode.address)
    assert prefill.do(send_until_served, decode.session, decode.address, 15.0) == "", "a healed node is not used"
    assert prefill.end(within_s=20) == 0, prefill.log.read_text()[-3000:]


def test_a_spawned_prefill_process_ends_promptly_and_cleanly_while_probes_hang(
    busy: SpawnedPrefill, decode: Node
) -> None:
    assert_it_heals(busy, decode)
    assert busy.end(within_s=20) == 0, (
        f"a rollout waits for a stopped peer, or dumps core:\n{busy.log.read_text()[-3000:]}"
    )


@pytest.mark.parametrize("way", [fork_and_exit_at_once, fork_and_exit_from_python, fork_with_multiprocessing])
def test_a_fork_has_no_probe_is_not_blocked_and_its_parent_goes_on_healing(
    way: Callable[[Prefill, int], int], busy: SpawnedPrefill, decode: Node
) -> None:
    for _ in range(10):
        code, found = busy.do(fork, way)
        assert found is not None, f"the forked child died before it had looked around (exit code {code})"
        assert found["kernel_threads"] == 1, f"a forked child probes too: {found['threads']}"
        assert found["threads"] == ["MainThread"]
        assert found["blacklisted"] == [True, False, True]
        assert code == 0, f"a forked child ended with {code} (137: it did not within {END_WITHIN_S:.0f} s)"
    assert_it_heals(busy, decode)


def test_session_lock_is_free_in_a_forked_child_though_a_thread_held_it_at_the_fork(busy: SpawnedPrefill) -> None:
    code, found = busy.do(fork, fork_while_a_thread_holds_session_lock)
    assert code == 0
    assert found["lock_is_free"], "the thread that held it is not in the child, which waits for it for ever"


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    "options", [{}, {"start_new_session": True}, {"preexec_fn": nothing}], ids=["plain", "new_session", "preexec_fn"]
)
def test_a_program_that_a_prefill_process_starts_inherits_nothing_of_the_probe(
    options: dict[str, Any], busy: SpawnedPrefill, decode: Node
) -> None:
    found = busy.do(run_program, options)
    assert found["code"] == 0, found
    assert found["threads"] == ["MainThread"]
    assert found["descriptors"] == [0, 1, 2, 3], "a program holds the prefill node's connections open (3 is its own)"
    assert found["blocked_signals"] == 0, "a program cannot be ended"
    assert found["said"] == ""
    assert_it_heals(busy, decode)
