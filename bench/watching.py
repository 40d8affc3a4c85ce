"""What does it cost a prefill process to watch its blacklist?

CPU, threads, memory and holds of session_lock over a minute, for closed ports and for peers that hang, with our probe
and with a fixed loop that asks one session after another. Each case is a process of its own with a real Mooncake
engine; run as a program, this file is that process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from typing import Any

import processes

from bench import CHECKOUT
from bench.progress import say

NUMBERS = (0, 1, 100, 10_000)
MEMORY = 1 << 20


class TimedLock:
    """session_lock, which notes how long it was held: the time of the thread, not what others took meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = 0
        self.holds = 0
        self.held_ns = 0
        self.longest_ns = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._began = time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        held_ns = time.thread_time_ns() - self._began
        self.holds += 1
        self.held_ns += held_ns
        self.longest_ns = max(self.longest_ns, held_ns)
        self._lock.release()


@contextlib.contextmanager
def peers(kind: str, number: int) -> Iterator[list[str]]:
    """Sessions whose port is closed, or whose handshake hangs."""
    if kind == "closed":
        yield [f"127.0.{1 + i // 250}.{1 + i % 250}:9" for i in range(number)]
        return
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as listener:
        port = listener.getsockname()[1]
        yield [f"127.0.{1 + i // 250}.{1 + i % 250}:{port}" for i in range(number)]


def manager_of(contender: str) -> Any:
    """A prefill manager with a lock that is timed, with our probe or with the fixed loop."""
    os.environ["SGLANG_ENABLE_FAILED_SESSION_PROBE"] = "1" if contender == "ours" else "0"
    from sglang.srt.disaggregation.mooncake import conn

    page = mmap.mmap(-1, MEMORY)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    arguments = types.SimpleNamespace(
        kv_data_ptrs=[address], kv_data_lens=[MEMORY], aux_data_ptrs=[], aux_data_lens=[], page=page
    )
    conn.threading = types.SimpleNamespace(**{**vars(threading), "Lock": TimedLock})  # type: ignore
    manager = conn.MooncakeKVManager(arguments, "prefill")
    assert isinstance(manager.session_lock, TimedLock)
    if contender != "ours":
        threading.Thread(target=ask_every_30_s, args=(manager,), daemon=True).start()
    return manager


def ask_every_30_s(manager: Any) -> None:
    """The fixed loop: all that is blacklisted, one after another, then a pause."""
    while True:
        time.sleep(30)
        with manager.session_lock:
            sessions = list(manager.failed_sessions)
        for session in sessions:
            if manager.engine.send_probe(session) == 0:
                with manager.session_lock:
                    manager.failed_sessions.discard(session)


def resident_kib() -> int:
    """Memory of this process."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE // 1024


def watch(contender: str, kind: str, number: int, seconds: float) -> dict[str, Any]:
    """The body of the process: one case."""
    manager = manager_of(contender)
    with peers(kind, number) as sessions:
        time.sleep(1)
        memory, cpu = resident_kib(), time.process_time()
        for session in sessions:
            with manager.session_lock:
                manager.failed_sessions.add(session)
        time.sleep(seconds)
        cpu_share = (time.process_time() - cpu) / seconds
        lock = manager.session_lock
        return {
            "contender": contender,
            "peers": kind,
            "blacklisted": number,
            "cpu_percent": round(100 * cpu_share, 2),
            "threads": threading.active_count(),
            "kib_each": round((resident_kib() - memory) / number, 2) if number else 0,
            "lock_us_per_s": round(lock.held_ns / 1000 / seconds, 1),
            "longest_hold_us": round(lock.longest_ns / 1000),
        }


def rows(seconds: float = 60.0) -> Iterator[dict[str, Any]]:
    """One row for each case. Two at a time, one for each core."""
    cases = [(who, "closed", number) for number in NUMBERS for who in ("ours", "fixed 30 s")]
    cases += [(who, "hung", number) for number in (100, 1200) for who in ("ours", "fixed 30 s")]
    for number, pair in enumerate(zip(cases[::2], cases[1::2], strict=True), 1):
        say("watching", f"[{number}/{len(cases) // 2}] {pair[0][2]} {pair[0][1]} peers for {seconds:g} s")
        running = [start(*case, seconds) for case in pair]
        try:
            for process in running:
                output, _ = process.communicate(timeout=seconds + 120)
                yield result_of(output)
        finally:
            for process in running:
                process.kill()
                process.wait()


def result_of(output: str) -> dict[str, Any]:
    """The row that a case has printed. Raises RuntimeError with what it has printed instead."""
    last = (output.splitlines() or [""])[-1]
    if not last.startswith("{"):
        raise RuntimeError(f"a case has ended without a row:\n{output[-3000:]}")
    return dict(json.loads(last))


def start(contender: str, kind: str, number: int, seconds: float) -> subprocess.Popen[str]:
    """One case in a process of its own."""
    variables = {"MOONCAKE_PROTOCOL": "tcp", "PYTHONPATH": str(CHECKOUT / "python"), "GLOG_minloglevel": "3"}
    return processes.start(
        [sys.executable, "-m", "bench.watching", contender, kind, str(number), str(seconds)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # Mooncake says a line of each probe that fails
        cwd=CHECKOUT,
    )


if __name__ == "__main__":
    contender, kind, number, seconds = sys.argv[1:]
    try:
        print(json.dumps(watch(contender, kind, int(number), float(seconds))), flush=True)
    except Exception:
        print(traceback.format_exc(), flush=True)
    os._exit(0)  # probes hang
