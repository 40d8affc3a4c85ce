"""Who is compared on stock managers, and how are their processes started and driven?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import environment
from kit import processes
from kit.stock_node import ENABLE, clean_environment

from bench import CHECKOUT

FORK_SERVER = pathlib.Path(__file__).with_name("fork_server.py")
START_DEADLINE_S = 300.0
ANSWER_DEADLINE_S = 60.0
STOCK = "sglang-0.5.23"
FIXED = "sglang-0.5.13.post1"
WITH_WHEEL = f"{STOCK} with our wheel"
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # before a fork


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to get a blacklisted session back. The settings hold for its prefill managers."""

    name: str
    environment: str
    settings: dict[str, str]
    tight: bool = False


CONTENDERS = [
    Contender("ours", WITH_WHEEL, {ENABLE: "1"}),
    Contender("native 0.5.23", STOCK, {}),
    Contender("fixed 30 s", FIXED, {ENABLE: "1"}),
    Contender("tight loop", STOCK, {ENABLE: "0"}, tight=True),
]
DECODE = Contender("decode", STOCK, {})


class ManagerEnded(Exception):
    """The process of a manager has ended, or did not answer in time; the message shows the end of its stderr."""


class ForkServer:
    """A process that has imported a release of SGLang and forks processes with managers. Ends with its `with` block.

    The kernel ends it, and it all of its managers, when the thread that made it is gone.
    """

    def __init__(self, python: pathlib.Path, folder: pathlib.Path, **settings: str) -> None:
        self.path = str(folder / "socket")
        self._stderr = folder / "stderr"
        with open(self._stderr, "w") as stderr:
            self._process = processes.start(
                [str(python), str(FORK_SERVER), self.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=clean_environment(**ONE_THREAD, **settings, PYTHONPATH=str(CHECKOUT / "test")),
                cwd=folder,
            )

    def wait_until_ready(self) -> None:
        """Wait until it has imported everything."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_DEADLINE_S)
        if not readable or self._process.stdout.readline() != "ready\n":
            raise ManagerEnded(f"the fork server is not ready; the end of its stderr:\n{self.end_of_stderr()}")

    def end_of_stderr(self) -> str:
        return self._stderr.read_text(errors="replace")[-3000:]

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        processes.end(self._process)


ForkServers = dict[str, ForkServer]


@contextlib.contextmanager
def fork_servers() -> Iterator[ForkServers]:
    """One for each environment, by its name. Makes the environments that are not there, and our wheel."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as started:
        folder = pathlib.Path(name)
        wheel = environment.built_wheel("engines", CHECKOUT, folder / "wheel")
        pythons = {
            WITH_WHEEL: environment.with_wheel(STOCK, wheel, folder / "venv"),
            STOCK: environment.python(STOCK),
            FIXED: environment.python(FIXED),
        }
        fork_servers = {}
        for number, (name, python) in enumerate(pythons.items()):
            (folder / str(number)).mkdir()
            settings = {ENABLE: "1"} if name == WITH_WHEEL else {}  # our wheel looks at it when the interpreter starts
            fork_servers[name] = started.enter_context(ForkServer(python, folder / str(number), **settings))
        for fork_server in fork_servers.values():
            fork_server.wait_until_ready()
        yield fork_servers


class Manager:
    """A process with a manager, forked by the fork server of its contender's environment. Ends with its `with` block.

    Several threads may tell it things; those that ask wait for each other.
    """

    def __init__(
        self,
        fork_servers: ForkServers,
        contender: Contender,
        role: str,
        network: str,
        timed: bool = False,
        **settings: str,
    ) -> None:
        self.name = contender.name
        self._fork_server = fork_servers[contender.environment]
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._pidfd = -1
        try:
            self._socket.connect(self._fork_server.path)
            self._answers = self._socket.makefile("r")
            settings = {**contender.settings, **settings}
            how = {"tight": contender.tight, "timed": timed}
            made = self.ask("begin", role=role, network=network, settings=settings, **how)
            self.pid, self.session, self.bootstrap = made["pid"], made["session"], made["bootstrap"]
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self._socket.close()  # which ends the process
            raise

    def ask(self, command: str, deadline_s: float = ANSWER_DEADLINE_S, **arguments: Any) -> dict[str, Any]:
        """Has the process run a command. Raises ManagerEnded, or RuntimeError if the command failed."""
        with self._lock:
            self._socket.settimeout(deadline_s)
            self._write({"do": command, **arguments})
            try:
                line = self._answers.readline()
            except OSError:
                line = ""
        if not line:
            raise ManagerEnded(
                f"{self.name} does not answer {command}; on stderr:\n{self._fork_server.end_of_stderr()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return dict(answer)

    def tell(self, command: str, **arguments: Any) -> None:
        """Have the process run a command as soon as it can, and return at once."""
        with self._lock:
            self._write({"tell": command, **arguments})

    def stop(self) -> None:
        """Stop the process (SIGSTOP) and return when the kernel says that all of its threads are stopped."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
        threads = list(pathlib.Path(f"/proc/{self.pid}/task").glob("*/stat"))
        deadline = time.monotonic() + 5
        while any(thread.read_text().rpartition(")")[2].split()[0] != "T" for thread in threads):
            if time.monotonic() > deadline:
                raise ManagerEnded(f"{self.name} does not stop")
            time.sleep(0.001)

    def resume(self) -> None:
        """Let the process go on (SIGCONT)."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def _write(self, command: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer that does not come says so
            self._socket.sendall(json.dumps(command).encode() + b"\n")

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        select.select([self._pidfd], [], [], 20)  # it has ended
        os.close(self._pidfd)
        self._answers.close()
        self._socket.close()
