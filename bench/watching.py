"""What does it cost a prefill process to watch its blacklist?

CPU, threads, memory and holds of session_lock over a minute, for closed ports and for peers that hang. Stock SGLang
managers with real Mooncake engines, one process for each contender and case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from bench.contenders import CONTENDERS, ForkServers, Manager, fork_servers
from bench.progress import say

CASES = [*(("closed", number) for number in (0, 1, 100, 10_000)), ("hung", 100), ("hung", 1200)]
COMPARED = [contender for contender in CONTENDERS if not contender.tight]
NETWORK = f"/proc/{os.getpid()}/ns/net"  # that of the bench
SETTLES_S = 2.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Levels:
    """What a process has used, and uses."""

    cpu_s: float
    threads: int
    kib: int

    @classmethod
    def of(cls, pid: int) -> Levels:
        process = pathlib.Path(f"/proc/{pid}")
        user, system = process.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        status = dict(line.split(":", 1) for line in process.joinpath("status").read_text().splitlines())
        cpu_s = (int(user) + int(system)) / TICKS_PER_S
        return cls(cpu_s, int(status["Threads"]), int(status["RssAnon"].split()[0]))


@contextlib.contextmanager
def peers(kind: str, number: int) -> Iterator[list[str]]:
    """Sessions whose port is closed, or whose handshake hangs."""
    hosts = [f"127.0.{1 + i // 250}.{1 + i % 250}" for i in range(number)]
    if kind == "closed":
        yield [f"{host}:9" for host in hosts]
        return
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as listener:
        yield [f"{host}:{listener.getsockname()[1]}" for host in hosts]


def rows(seconds: float = 60.0) -> Iterator[dict[str, Any]]:
    """One row for each case and contender, the contenders of a case side by side."""
    with fork_servers() as started:
        for number, (kind, blacklisted) in enumerate(CASES, 1):
            say("watching", f"[{number}/{len(CASES)}] {blacklisted} {kind} peers for {seconds:g} s")
            with peers(kind, blacklisted) as sessions:
                yield from watch(started, kind, sessions, seconds)


def watch(fork_servers: ForkServers, kind: str, sessions: list[str], seconds: float) -> list[dict[str, Any]]:
    """One case: from the moment the sessions are put on the blacklist, which is counted."""
    with contextlib.ExitStack() as running:
        managers = [
            running.enter_context(Manager(fork_servers, contender, "prefill", NETWORK, timed=True))
            for contender in COMPARED
        ]
        time.sleep(SETTLES_S)
        before = [Levels.of(manager.pid) for manager in managers]
        for manager in managers:
            manager.ask("held")
            manager.ask("blacklist_all", sessions=sessions)
        time.sleep(seconds)
        return [
            row(manager, kind, len(sessions), seconds, levels) for manager, levels in zip(managers, before, strict=True)
        ]


def row(manager: Manager, kind: str, blacklisted: int, seconds: float, before: Levels) -> dict[str, Any]:
    """What the minute has cost one contender."""
    after, lock = Levels.of(manager.pid), manager.ask("held")
    return {
        "contender": manager.name,
        "peers": kind,
        "blacklisted": blacklisted,
        "cpu_percent": round(100 * (after.cpu_s - before.cpu_s) / seconds, 2),
        "more_threads": after.threads - before.threads,
        "kib_each": round((after.kib - before.kib) / blacklisted, 2) if blacklisted else None,
        "lock_us_per_s": round(lock["held_us"] / seconds, 1),
        "longest_hold_us": round(lock["longest_us"]),
    }


if __name__ == "__main__":
    for result in rows():
        print(json.dumps(result), flush=True)
