"""Which threads does an exit park, and for which does it wait? In processes whose engine calls are the C library's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

# The handler registered first runs last: it tells how many are still taken to be in the engine.
EXIT = """
import atexit, ctypes, hashlib, os, queue, threading, time
from sglang.srt.disaggregation.mooncake import session_probe

outside = ctypes.CDLL(None)  # its calls run outside the interpreter, as the engine's do
holding_it = ctypes.PyDLL(None)
results = queue.SimpleQueue()
CALLS = 12
atexit.register(lambda: print(len(session_probe._in_engine), flush=True))

def wait_on_a_futex(_):
    empty = ctypes.create_string_buffer(64)
    outside.sem_init(empty, 0, 0)
    outside.sem_wait(empty)

def poll(_):
    outside.poll(None, 0, -1)

def spin(_):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)

def come_back_soon(number):
    outside.usleep(300_000 * number)

exits = threading.Event()

def hold_the_interpreter():
    exits.wait()
    while True:
        holding_it.usleep(400_000)

def start(job):
    session_probe.Workers("probe").start(job, range(CALLS), results)
    deadline = time.monotonic() + 10
    while len(session_probe._in_engine) + results.qsize() < CALLS:
        assert time.monotonic() < deadline
        time.sleep(0.001)

"""
CROWD = """
threading.Thread(target=hold_the_interpreter, daemon=True).start()
atexit.register(exits.set)
"""


@pytest.fixture
def left_at_exit(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[[str], int]:
    """Runs a story to its exit; gives how many threads that leaves neither parked nor back from the engine."""

    def run(story: str) -> int:
        ended = run_python(EXIT + story)
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout)

    return run


@pytest.mark.parametrize("job", ["wait_on_a_futex", "poll", "spin"])
def test_an_exit_parks_every_thread_that_hangs_in_the_engine_whatever_it_does_there(
    job: str, left_at_exit: Callable[[str], int]
) -> None:
    assert left_at_exit(f"start({job})") == 0, "a thread may return into what is left of the interpreter: that aborts"


def test_an_exit_sees_to_every_thread_though_it_gets_the_interpreter_late(left_at_exit: Callable[[str], int]) -> None:
    """As on a machine with much else to do: whoever returns from the engine, or looks who has, waits for its turn."""
    assert left_at_exit(f"start(come_back_soon){CROWD}") == 0, "a thread that comes back aborts the exit"
