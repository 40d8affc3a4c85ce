"""What does the patch cost a healthy session, for each chunk that SGLang sends?

Nanoseconds of `in`, `add` and `discard` on a plain set and on ours. The two are timed in turns in one process, so that
a busy machine is busy for both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.mooncake.session_watch import SessionWatch
from sglang.srt.environ import FailedSessionProbeSettings

CALLS = 20_000
ROUNDS = 15
HEALTHY = "10.0.3.7:15412"


def sessions(number: int) -> list[str]:
    """Session ids of that many decode ranks."""
    return [f"10.1.{number // 250}.{number % 250}:15412" for number in range(number)]


def ours(blacklisted: int) -> SessionWatch:
    """The watch over our blacklist; nobody makes its calls, so it stays as it is."""
    return SessionWatch(FailedSessionProbeSettings(), sessions(blacklisted))


def plain(blacklisted: int) -> set[Any]:
    """SGLang's blacklist."""
    return set(sessions(blacklisted))


def test_healthy(blacklist: set[Any]) -> None:
    """What transfer_worker does for each chunk of a healthy session."""
    for _ in range(CALLS):
        HEALTHY in blacklist  # noqa: B015


def test_blacklisted(blacklist: set[Any]) -> None:
    """What it does for each chunk of a blacklisted one."""
    session = next(iter(blacklist), HEALTHY)
    for _ in range(CALLS):
        session in blacklist  # noqa: B015


def fail_and_register(blacklist: set[Any]) -> None:
    """A failure and a registration, which come together seldom."""
    for _ in range(CALLS // 10):
        blacklist.add(HEALTHY)
        blacklist.discard(HEALTHY)


OPERATIONS: dict[str, tuple[Callable[[set[Any]], None], int]] = {
    "in, healthy session": (test_healthy, CALLS),
    "in, blacklisted session": (test_blacklisted, CALLS),
    "add and discard": (fail_and_register, CALLS // 10),
}


def nanoseconds(operation: Callable[[set[Any]], None], calls: int, blacklist: set[Any]) -> float:
    """CPU time of one call; that of the loop around it included, for both sets alike."""
    began = time.thread_time_ns()
    operation(blacklist)
    return (time.thread_time_ns() - began) / calls


def rows() -> list[dict[str, Any]]:
    """One row for each operation and length of the blacklist."""
    rows = []
    for name, (operation, calls) in OPERATIONS.items():
        for blacklisted in (0, 100, 10_000):
            watch = ours(blacklisted)
            pair = {"plain": plain(blacklisted), "ours": watch.sessions}
            timed: dict[str, list[float]] = {which: [] for which in pair}
            for _ in range(ROUNDS):
                for which, blacklist in pair.items():
                    timed[which].append(nanoseconds(operation, calls, blacklist))
                    while watch.take_due():  # so that its schedule does not grow over the rounds
                        pass
            differences = [b - a for a, b in zip(timed["plain"], timed["ours"], strict=True)]
            rows.append(
                {
                    "operation": name,
                    "blacklisted": blacklisted,
                    **{f"{which}_ns": round(statistics.median(times)) for which, times in timed.items()},
                    "difference_ns": round(statistics.median(differences)),
                    "spread_ns": [round(min(differences)), round(max(differences))],
                }
            )
    return rows


if __name__ == "__main__":
    for row in rows():
        print(row)
