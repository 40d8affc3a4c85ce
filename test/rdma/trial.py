"""What becomes of requests that keep coming during a fault between two machines with RDMA, and after it?"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from machines import Pair
from remote_node import OURS, RemoteNode

RELEASE_BEFORE = "0963c7b"  # 0.1.0
REQUEST_EVERY_S = 0.5
DECODE_PORT = 20000
# After all were served: whether one that was let in too soon loses a request shows then.
AFTERWARDS_S = 5.0


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that lets sessions in again."""

    name: str
    python: Callable[[], pathlib.Path]
    let_in: str = ""  # by what of `guest_node.GuestNode.let_in`; our patch is off then

    def __str__(self) -> str:
        return self.name


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rdma-python-")


@functools.cache
def code_now() -> pathlib.Path:
    """A copy of python/ of this checkout, because machines read it for an hour."""
    copy = pathlib.Path(_copies().name, "now")
    return pathlib.Path(shutil.copytree(OURS, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")))


@functools.cache
def code_before() -> pathlib.Path:
    """The python/ of the release before this core. Skips the test where there is no git history."""
    folder = pathlib.Path(_copies().name, "before")
    archive = subprocess.run(["git", "-C", str(OURS.parent), "archive", RELEASE_BEFORE, "python"], capture_output=True)
    if archive.returncode:
        pytest.skip(f"no code of {RELEASE_BEFORE}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder)
    return folder / "python"


THIS_PATCH = Contender("this patch", code_now)
BEFORE = Contender("release 0.1.0", code_before)
NATIVE = Contender("one answer every 30 s", code_now, "native")
LIMIT = Contender("the limit: reads by hand", code_now, "limit")


@dataclasses.dataclass
class Session:
    """What the requests of one session saw. A request is `lost` if it was let through and failed."""

    lost_before_heal: int  # after the first, which blacklists the session
    lost_after_heal: int
    served_after_s: float | None  # None: not until the trial's end
    let_in_after_s: list[float]  # when a session was said to have recovered; negative: before the heal


@dataclasses.dataclass
class Trial:
    """A fault, and what was seen of it."""

    sessions: list[Session]
    fault_s: float
    said: str  # the prefill node's log lines of sessions
    mooncake: str  # and all that was logged there

    def worst_s(self) -> float:
        """When the last session was served after the heal."""
        return max(float("inf") if each.served_after_s is None else each.served_after_s for each in self.sessions)

    def lost_after_heal(self) -> int:
        return sum(each.lost_after_heal for each in self.sessions)

    def lost_before_heal(self) -> int:
        return sum(each.lost_before_heal for each in self.sessions)

    def __str__(self) -> str:
        """What a failed test shows."""
        return f"{self.sessions}, fault of {self.fault_s:.1f} s\n{self.said}"


@contextlib.contextmanager
def nodes(
    pair: Pair, contender: Contender = THIS_PATCH, sessions: int = 1, timeout_s: int = 5
) -> Iterator[tuple[RemoteNode, list[RemoteNode]]]:
    """A prefill node and so many decode nodes that have met."""
    ours = not contender.let_in
    variables = {"MC_TRANSFER_TIMEOUT": str(timeout_s), "SGLANG_ENABLE_FAILED_SESSION_PROBE": str(int(ours))}
    python = contender.python()  # here, because `cache` lets threads that ask at once each make the copy

    def start(place: int) -> RemoteNode:
        if place == 0:
            return RemoteNode(pair.prefill, "prefill", "prefill", 0, python, **variables)
        return RemoteNode(pair.decode, f"decode-{place}", "decode", DECODE_PORT + place, python, **variables)

    with contextlib.ExitStack() as running, concurrent.futures.ThreadPoolExecutor() as at_once:
        starting = [at_once.submit(start, place) for place in range(sessions + 1)]
        prefill, *decodes = (running.enter_context(node.result()) for node in starting)
        for decode in decodes:
            prefill.register(decode)
            assert prefill.send_to(decode) == "", "a transfer between healthy nodes has failed"
        if contender.let_in:
            prefill.ask("let_in", contender.let_in)
        yield prefill, decodes


def play(
    prefill: RemoteNode,
    decodes: list[RemoteNode],
    fault: Callable[[], AbstractContextManager[object]],
    seconds: float,
    served_within_s: float,
    size: int = 65536,
) -> Trial:
    """Injects a fault for so long while requests go on; looks on until all are served, or so long after the heal."""
    sessions = [decode.session for decode in decodes]
    prefill.ask("request", sessions, size, REQUEST_EVERY_S)
    time.sleep(2)
    ahead_s = prefill.clock_ahead_s()
    with fault():
        cut_at = time.monotonic()
        time.sleep(seconds)
    healed_at = time.monotonic()
    there = healed_at + ahead_s
    outcomes = _until_served(prefill, sessions, there, served_within_s)
    lines = prefill.ask("lines")
    said = [f"{at - there:8.2f} s {level} {text}" for at, level, text in lines if "ession" in text]
    recovered = [(at - there, text) for at, _, text in lines if re.search("recovered", text)]
    return Trial(
        [_session(outcomes[name], there, [at for at, text in recovered if name in text]) for name in sessions],
        healed_at - cut_at,
        "\n".join(said),
        prefill.log(),
    )


Outcomes = dict[str, list[tuple[float, float, str]]]


def _until_served(prefill: RemoteNode, sessions: list[str], healed_at: float, served_within_s: float) -> Outcomes:
    deadline = time.monotonic() + served_within_s
    while True:
        outcomes = {name: prefill.ask("outcomes", name) for name in sessions}
        served = [_served_at(outcomes[name], healed_at) for name in sessions]
        if None not in served or time.monotonic() > deadline:
            time.sleep(AFTERWARDS_S)
            return {name: prefill.ask("outcomes", name) for name in sessions}
        time.sleep(0.5)


def _served_at(outcomes: list[tuple[float, float, str]], healed_at: float) -> float | None:
    return next((ended for _, ended, why_not in outcomes if ended > healed_at and not why_not), None)


def _session(outcomes: list[tuple[float, float, str]], healed_at: float, recovered: list[float]) -> Session:
    failed = [began for began, _, why_not in outcomes if why_not]
    before = sum(began < healed_at for began in failed)
    served_at = _served_at(outcomes, healed_at)
    return Session(
        lost_before_heal=max(0, before - 1),
        lost_after_heal=len(failed) - before,
        served_after_s=None if served_at is None else round(served_at - healed_at, 2),
        let_in_after_s=[round(at, 2) for at in recovered],
    )
