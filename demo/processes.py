"""How is a process started and ended so that neither a failure nor Ctrl-C leaves one behind?"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import TracebackType

_END_DEADLINE_S = 15.0
_STOP_DEADLINE_S = 5.0
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Failure(Exception):
    """A demo cannot go on; `log` is the file whose end says why, if there is one."""

    def __init__(self, message: str, log: pathlib.Path | None = None) -> None:
        super().__init__(message)
        self.log = log


class Process:
    """A process with a session of its own, which ends with the `with` block, together with all of its descendants.

    It also ends when the thread that started it does, so that even a SIGKILL to this program leaves nothing behind.
    Everything it says is appended to the file `log`; with `talks`, stdin and stdout are pipes of text instead.
    """

    def __init__(
        self, name: str, command: list[str], variables: dict[str, str], log: pathlib.Path, talks: bool = False
    ) -> None:
        self.name = name
        self.log = log
        # Orphans among its descendants become children of this program, which can then see them off.
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        with open(log, "ab") as output:
            self.popen = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                text=True,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def check(self) -> None:
        """Raise Failure if the process has ended."""
        if self.popen.poll() is not None:
            raise Failure(f"the {self.name} process has ended by itself (status {self.popen.returncode})", self.log)

    def kill(self) -> None:
        """SIGKILL it and all of its descendants, before the `with` block ends."""
        with uninterrupted():
            self._end()

    def stop(self, pid: int) -> None:
        """SIGSTOP the member `pid` of this session; when this returns, none of its threads runs any more.

        Raises Failure if it has ended or does not stop.
        """
        self._send(signal.SIGSTOP, pid)
        deadline = time.monotonic() + _STOP_DEADLINE_S
        while not _is_stopped(pid):
            if time.monotonic() > deadline:
                raise Failure(f"process {pid} of {self.name} does not stop", self.log)
            time.sleep(0.001)

    def go_on(self, pid: int) -> None:
        """SIGCONT the member `pid` of this session. Raises Failure if it has ended."""
        self._send(signal.SIGCONT, pid)

    def _send(self, number: int, pid: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError as error:
            raise Failure(f"process {pid} of {self.name} has ended by itself", self.log) from error

    def member(self, title: str) -> int:
        """The pid of the process of this session whose command line begins with `title`; Failure if there is none."""
        for pid in self._members():
            with contextlib.suppress(OSError):
                if pathlib.Path(f"/proc/{pid}/cmdline").read_text().startswith(title):
                    return pid
        raise Failure(f"the {self.name} process has no child {title!r}", self.log)

    def _members(self) -> list[int]:
        """All living processes of this session, stopped ones included."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._owns(pid)]

    def _owns(self, pid: int) -> bool:
        try:
            state, _parent, _group, session, *_ = _fields(pathlib.Path(f"/proc/{pid}"))
        except OSError:
            return False
        return int(session) == self.popen.pid and state not in "ZX"

    def _end(self) -> None:
        deadline = time.monotonic() + _END_DEADLINE_S
        shared_memory = self._shared_memory()
        killed: set[int] = set()
        while members := self._members():
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.update(members)
            if time.monotonic() > deadline:
                raise Failure(f"processes {members} of {self.name} do not end", self.log)
            time.sleep(0.01)
        self.popen.wait(_END_DEADLINE_S)
        for pid in killed - {self.popen.pid}:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for file in shared_memory:
            file.unlink(missing_ok=True)
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _shared_memory(self) -> list[pathlib.Path]:
        """The files in /dev/shm that processes of this session use, by inode; after a SIGKILL nobody removes them."""
        used: set[int] = set()
        for pid in self._members():
            with contextlib.suppress(OSError):
                maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
                used.update(int(line.split()[4]) for line in maps.splitlines() if " /dev/shm/" in line)
        return [pathlib.Path(file.path) for file in os.scandir("/dev/shm") if file.inode() in used]


def _fields(process: pathlib.Path) -> list[str]:
    """State, parent, group, session and so on of a process or thread in /proc. Raises OSError if it has ended."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def _is_stopped(pid: int) -> bool:
    """Whether all threads of the process are stopped; the signal reaches them one after another."""
    try:
        return all(_fields(thread)[0] == "T" for thread in pathlib.Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is through, as between a process's start and its registration.

    Does nothing outside the main thread, where no signal interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda caught, _: held.append(caught)) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in held:
            signal.raise_signal(caught)


def interrupt_on_termination() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does: by KeyboardInterrupt, with everything cleaned up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def last_lines(log: pathlib.Path, count: int = 40) -> str:
    """The end of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
