"""How do tests run the operator's command, as a process with pipes or on a terminal?"""

from __future__ import annotations

import contextlib
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from kit import processes
from kit.paths import PYTHON_FOLDER

MODULE = ("-m", "sglang_failed_session_probe")
# A run of the tests in the background ignores it, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def start(
    *arguments: str,
    python: str = sys.executable,
    what: tuple[str, ...] = MODULE,
    network: str | None = None,
    stdout: int = subprocess.PIPE,
    in_front: pathlib.Path | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    """Starts it. Python looks into the folder `in_front` before any other; `what` runs in place of the command."""
    folders = [str(folder) for folder in (in_front, PYTHON_FOLDER) if folder]
    return processes.start(
        [python, *what, *arguments],
        network,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment},
    )


def run(*arguments: str, deadline_s: float = 30, **options: Any) -> tuple[int, str, str]:
    """Runs it to its end; gives its exit status, and what it wrote to stdout and stderr."""
    process = start(*arguments, **options)
    try:
        output, errors = process.communicate(timeout=deadline_s)
    finally:
        end(process)
    return process.returncode, output, errors


def interrupt(process: subprocess.Popen[str]) -> None:
    """A Ctrl-C. It takes 0.3 s to be heard, longer on a slow machine; what it interrupts lasts a minute or for ever."""
    process.send_signal(signal.SIGINT)
    process.wait(10)


def end(process: subprocess.Popen[str]) -> None:
    """Kills it, if it still runs, and closes its pipes."""
    processes.end(process)
    if process.stderr is not None:
        process.stderr.close()


@contextlib.contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Starts it, and kills it when the block is left."""
    process = start(*arguments, **options)
    try:
        yield process
    finally:
        end(process)


class Terminal:
    """What a command that was started with `stdout=terminal.end_of_command` shows."""

    def __init__(self) -> None:
        self._own_end, self.end_of_command = pty.openpty()
        self.shown = ""

    def wait_for(self, text: str, deadline_s: float) -> None:
        """Reads until the text was shown."""
        deadline = time.monotonic() + deadline_s
        os.set_blocking(self._own_end, False)
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} on the terminal: {self.shown!r}"
            with contextlib.suppress(BlockingIOError):
                self.shown += os.read(self._own_end, 65536).decode()
            time.sleep(0.01)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._own_end)
        os.close(self.end_of_command)
