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
# Who waits for the interpreter does not get it in turn, so on a slow machine it may be the seventh spell of 0.4 s.
CROWD = """
session_probe._COME_BACK_WITHIN_S *= 5
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


MOVED_ON = """
libc = ctypes.PyDLL(None)
park, go_on = session_probe._signals_to_park_and_go_on(libc)
read_end, write_end = os.pipe()
second, moved_on = threading.Event(), threading.Event()

def work():
    os.read(read_end, 1)
    second.wait()
    moved_on.set()
    outside.pause()

thread = threading.Thread(target=work, daemon=True)
thread.start()

def look():
    return session_probe._state_of(thread.native_id, libc)

def seen_to_wait(but_not=None):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        first = look()
        time.sleep(0.05)
        if first[:4] == look()[:4] != but_not and first.call not in ("running", *session_probe._PAUSE):
            return first

def was_interrupted_there(look):
    libc.tgkill(os.getpid(), thread.native_id, park)
    return session_probe._was_interrupted_there(thread.native_id, look, libc)

reading = seen_to_wait()
os.write(write_end, b"x")
seen_to_wait(but_not=reading[:4])
print(was_interrupted_there(reading))
libc.tgkill(os.getpid(), thread.native_id, go_on)
print(was_interrupted_there(seen_to_wait()))
libc.tgkill(os.getpid(), thread.native_id, go_on)
second.set()
print(moved_on.wait(10))
deadline = time.monotonic() + 10
while look().call not in session_probe._PAUSE and time.monotonic() < deadline:
    time.sleep(0.001)
print(was_interrupted_there(look()))
"""


def test_a_thread_that_came_back_between_the_look_and_the_signal_is_found_out_and_goes_on(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Parked while it waits for the interpreter, it would block the exit for ever."""
    ended = run_python(EXIT + MOVED_ON)
    assert ended.stdout.split() == ["False", "True", "True", "True", "0"], ended.stdout + ended.stderr


@pytest.fixture
def seconds_at_exit(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[[str], float]:
    """Runs a story to its exit; gives how long it took to see to the threads in the engine. None of them is left."""

    def run(story: str) -> float:
        ended = run_python(EXIT + TIMED + story)
        assert ended.returncode == 0, ended.stderr
        seconds, left = ended.stdout.split()
        assert left == "0"
        return float(seconds)

    return run


TIMED = """
session_probe._COME_BACK_WITHIN_S = 20.0  # in place of 3 s: a wait in vain is longer than a slow machine takes
park_threads = session_probe._park_threads_in_engine

def timed():
    began = time.monotonic()
    park_threads()
    print(time.monotonic() - began)

session_probe._park_threads_in_engine = timed
"""

SIGNALS_THAT_RAISE = """
was_interrupted_there = session_probe._was_interrupted_there
interrupted = set()

def interrupted_once(thread, *others):
    if thread not in interrupted:
        interrupted.add(thread)
        raise SystemExit(0)  # as the handler of a SIGTERM does
    return was_interrupted_there(thread, *others)

session_probe._was_interrupted_there = interrupted_once
start(poll)
"""

NO_DESCRIPTOR = """
import resource
start(poll)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
"""


def test_a_signal_handler_that_raises_while_a_thread_is_parked_holds_nothing_up(
    seconds_at_exit: Callable[[str], float],
) -> None:
    assert seconds_at_exit(SIGNALS_THAT_RAISE) < 10, "whoever ended the process with two signals waits"


def test_where_threads_cannot_be_seen_an_exit_does_not_wait_for_them(seconds_at_exit: Callable[[str], float]) -> None:
    """As in a process that has no descriptor left."""
    assert seconds_at_exit(NO_DESCRIPTOR) < 10, "a process that is at its limit is slow to end, too"


KEPT = """
import sys
session_probe._KEEP_INTERPRETER_S = 10.0  # in place of 0.1 s: however slow the machine
read_end, write_end = os.pipe()
came_back = threading.Event()

def wait_to_be_let_back(_):
    os.read(read_end, 1)
    came_back.set()
    outside.pause()

is_inside, had_the_interpreter = session_probe._is_inside, []

def let_it_back(*of_a_thread):
    inside = is_inside(*of_a_thread)
    if inside:
        holding_it.write(write_end, b"x", 1)
        for _ in range(10):
            holding_it.usleep(5_000)
        had_the_interpreter.append(came_back.is_set())
    return inside

CALLS = 1
start(wait_to_be_let_back)
session_probe._is_inside = let_it_back
session_probe._park_threads_in_engine()
print(had_the_interpreter[0], came_back.is_set(), sys.getswitchinterval())
"""


def test_a_thread_that_comes_back_just_before_it_is_parked_gets_the_interpreter_only_after_that(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """It would be parked with it, or while it asks for it."""
    ended = run_python(EXIT + KEPT)
    assert ended.stdout.split() == ["False", "True", "0.005", "0"], ended.stdout + ended.stderr
