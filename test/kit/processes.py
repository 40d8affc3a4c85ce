"""How is a process started so that it ends with the test run, even when that is killed?"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from kit.paths import PYTHONPATH


def start(command: list[str], network: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Starts a command, in the network namespace at the path ``network`` if there is one, and talks text with it.

    The kernel kills it, also if it is stopped, as soon as the thread that called this is gone: call it from the thread
    that runs the test.
    """
    return subprocess.Popen(_ends_with_this_run(command, network), text=True, **options)


def kit_program(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of this package."""
    return ["env", f"PYTHONPATH={PYTHONPATH}", sys.executable, "-m", f"kit.{module}", *map(str, arguments)]


def run(command: list[str], network: str | None = None) -> str:
    """Runs a command to its end, 20 s at most, and gives what it printed. Raises CalledProcessError if it fails."""
    return subprocess.run(
        _ends_with_this_run(command, network), check=True, capture_output=True, text=True, timeout=20
    ).stdout


@contextlib.contextmanager
def running(command: list[str], network: str | None = None) -> Iterator[str]:
    """Starts a command and gives the first line that it prints; kills it when the block is left.

    It must keep running until its stdin is closed.
    """
    process = start(command, network, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        assert first_line, f"{command} ended with {process.wait()} before it was ready"
        yield first_line.strip()
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process, stopped or not, and closes its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not flushed has nobody to read it
                pipe.close()


def stop(pid: int, deadline_s: float = 20) -> None:
    """SIGSTOP; when this returns, no thread of the process runs any more, which is later than ``kill`` returns."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + deadline_s
    while any(state != "T" for state in _thread_states(pid)):
        assert time.monotonic() < deadline, "a stopped process has a thread that runs"
        time.sleep(0.001)


def _thread_states(pid: int) -> Iterator[str]:
    for stat in pathlib.Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended
            yield stat.read_text().rpartition(")")[2].split()[0]


def living(pids: list[int]) -> list[int]:
    """Those of the processes that still run; zombies have ended."""
    return [pid for pid in pids if _state(pid) not in ("", "Z", "X")]


def kill(pid: int) -> None:
    """SIGKILL, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _ends_with_this_run(command: list[str], network: str | None) -> list[str]:
    inside = ["nsenter", f"--net={network}"] if network else []
    return ["setpriv", "--pdeathsig", "KILL", *inside, *command]
