"""Is a healthy peer that fails for reasons of the prefill's own ever used less than with SGLang's fixed 30 s loop?

An hour of requests in virtual time, the same failures for both side by side.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from virtual_prober import DATA_PORT_REJECTED, HEALTHY, READS_NEVER_END, Peer, VirtualProber

D = "10.0.0.2:17001"
HOUR_S = 3600.0
FIXED_INTERVAL_S = 30.0
REQUEST_EVERY_S = 0.25


class Loop(Protocol):
    """What lets a session in again."""

    now: float

    def pass_time(self, seconds: float) -> None: ...
    def is_refused(self) -> bool: ...
    def fail(self) -> None: ...


class FixedLoop:
    """One answer lets a session in, at the next multiple of 30 s."""

    def __init__(self, phase_s: float = 0.0) -> None:
        self.now = phase_s
        self._out = False

    def pass_time(self, seconds: float) -> None:
        """Passes so many seconds."""
        passes = (self.now + seconds) // FIXED_INTERVAL_S - self.now // FIXED_INTERVAL_S
        self.now += seconds
        self._out = self._out and not passes

    def is_refused(self) -> bool:
        """True if a request is refused now."""
        return self._out

    def fail(self) -> None:
        """The transfer of a request that was let through fails."""
        self._out = True


class OurLoop:
    """The watch, with a peer that answers."""

    def __init__(self, peer: Peer = HEALTHY, **settings: Any) -> None:
        self.prober = VirtualProber(**settings)
        self._peer = peer

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.prober.clock.now

    def pass_time(self, seconds: float) -> None:
        """Passes so many seconds."""
        self.prober.run(seconds)

    def is_refused(self) -> bool:
        """True if a request is refused now."""
        return self.prober.request(D)

    def fail(self) -> None:
        """The transfer of a request that was let through fails."""
        self.prober.fail(D, peer=self._peer)


# What fails: told of each request that is let through (when, seconds of use so far, uses so far), says if it fails.
Failures = Callable[[float, float, int], bool]


@dataclasses.dataclass
class Hour:
    """What became of the requests of an hour."""

    served: int = 0
    failed: int = 0
    refused: int = 0

    @property
    def in_use(self) -> float:
        """The share of the requests that were served."""
        return self.served / (self.served + self.failed + self.refused)


def an_hour(loop: Loop, fails: Failures, every_s: float = REQUEST_EVERY_S, takes_s: float = 0.0) -> Hour:
    """Requests come every so many seconds, one after another; one that fails does so after ``takes_s``."""
    hour, began = Hour(), loop.now
    used_s = 0.0
    while loop.now < began + HOUR_S:
        if loop.is_refused():
            hour.refused += 1
        elif fails(loop.now - began, used_s, hour.served + hour.failed):
            hour.failed += 1
            loop.pass_time(takes_s)
            loop.fail()
        else:
            hour.served += 1
            used_s += every_s
        loop.pass_time(every_s)
    return hour


def by_use(seconds: float) -> Failures:
    """One failure for every so many seconds of use."""
    failed_at = 0.0

    def fails(now: float, used_s: float, uses: int) -> bool:
        nonlocal failed_at
        if used_s < failed_at + seconds:
            return False
        failed_at = used_s
        return True

    return fails


def by_clock(seconds: float) -> Failures:
    """The first use after each multiple of so many seconds fails."""
    last = 0.0

    def fails(now: float, used_s: float, uses: int) -> bool:
        nonlocal last
        before, last = last, now // seconds
        return last > before

    return fails


def in_windows(of_s: float, every_s: float) -> Failures:
    """All fail for some seconds, again and again."""
    return lambda now, used_s, uses: now % every_s < of_s


def at_random(share: float) -> Failures:
    """So many of the uses fail."""
    dice = random.Random(1)
    return lambda now, used_s, uses: dice.random() < share


def in_bursts(number: int, every_s: float) -> Failures:
    """So many uses in a row fail, again and again."""
    left, last = 0, 0.0

    def fails(now: float, used_s: float, uses: int) -> bool:
        nonlocal left, last
        before, last = last, now // every_s
        left = number if last > before else left
        left -= 1
        return left >= 0

    return fails


def both(*patterns: Failures) -> Failures:
    """What fails in any of the patterns."""

    def fails(now: float, used_s: float, uses: int) -> bool:
        told = [pattern(now, used_s, uses) for pattern in patterns]  # each hears of each use
        return any(told)

    return fails


def fixed_loop_in_use(pattern: Callable[[], Failures]) -> float:
    """The mean share that the fixed loop serves, whichever of its passes comes first."""
    hours = [an_hour(FixedLoop(phase_s), pattern()) for phase_s in (0.0, 7.0, 15.0, 22.0)]
    return sum(hour.in_use for hour in hours) / len(hours)


PATTERNS: dict[str, Callable[[], Failures]] = {
    **{
        f"once for every {s} s of use": lambda s=s: by_use(s)
        for s in (0.25, 0.5, 1, 2, 3, 5, 8, 10, 12, 20, 31, 50, 300)
    },
    **{f"once in {s} s by the clock": lambda s=s: by_clock(s) for s in (2, 3, 5, 12, 20, 31, 50, 100, 300)},
    **{f"{p:.0%} of all uses": lambda p=p: at_random(p) for p in (0.01, 0.05, 0.1, 0.3, 0.5)},
    **{
        f"{n} uses in a row every {s} s": lambda n=n, s=s: in_bursts(n, s)
        for n, s in ((2, 60), (3, 60), (5, 60), (5, 300))
    },
    **{
        f"all for {of} s every {s} s": lambda of=of, s=s: in_windows(of, s)
        for of, s in ((2, 60), (8, 60), (8, 600), (20, 600))
    },
    "all for 10 minutes, then once for every 10 s of use": lambda: both(
        lambda now, used_s, uses: now < 600, by_use(10)
    ),
    "once for every 12 s of use and 3 in a row every 300 s": lambda: both(by_use(12), in_bursts(3, 300)),
}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_healthy_peer_is_never_used_less_than_with_a_fixed_loop(pattern: Callable[[], Failures]) -> None:
    ours, fixed = an_hour(OurLoop(), pattern()).in_use, fixed_loop_in_use(pattern)
    assert ours >= fixed, f"{ours:.1%} of an hour's requests are served, with a fixed loop {fixed:.1%}"


@pytest.mark.parametrize(
    ("peer", "every_s", "at_least"),
    [
        (HEALTHY, 12.0, 0.85),
        (HEALTHY, 50.0, 0.95),
        (DATA_PORT_REJECTED, 12.0, 0.85),
        (DATA_PORT_REJECTED, 50.0, 0.95),
        (READS_NEVER_END, 12.0, 0.80),  # after each failure it takes a second more to see that they do not end
        (READS_NEVER_END, 50.0, 0.94),
    ],
)
def test_a_peer_that_fails_once_in_a_while_for_a_local_reason_is_nearly_always_used(
    peer: Peer, every_s: float, at_least: float
) -> None:
    """Even where its memory cannot be read, though it works."""
    assert an_hour(OurLoop(peer), by_use(every_s)).in_use >= at_least


@pytest.mark.parametrize("peer", [DATA_PORT_REJECTED, READS_NEVER_END], ids=["reads fail", "reads never end"])
@pytest.mark.parametrize("every_s", [40.0, 100.0, 130.0])
def test_a_peer_that_cannot_be_read_and_has_bad_moments_is_used_more_than_with_a_fixed_loop(
    peer: Peer, every_s: float
) -> None:
    """In which its first use fails, too, or while it is being read at the end of its probation."""
    ours = an_hour(OurLoop(peer), in_windows(2, every_s)).in_use
    assert ours >= fixed_loop_in_use(lambda: in_windows(2, every_s))


@pytest.mark.parametrize("every_s", [5.0, 12.0, 20.0, 100.0])
def test_a_healthy_peer_whose_reads_are_always_slow_is_used_more_than_with_a_fixed_loop(every_s: float) -> None:
    ours = an_hour(OurLoop(Peer(read_takes=0.5)), by_use(every_s)).in_use
    assert ours >= fixed_loop_in_use(lambda: by_use(every_s))


def test_a_peer_that_works_for_ten_seconds_and_fails_again_and_again_is_used_most_of_the_time() -> None:
    assert an_hour(OurLoop(), by_use(10.0)).in_use >= 0.85


@pytest.mark.parametrize("takes_s", [0.0, 30.0], ids=["at once", "after 30 s"])
@pytest.mark.parametrize("interval_s", [30.0, 10.0, 5.0])
@pytest.mark.parametrize(
    ("peer", "at_most"),
    [(DATA_PORT_REJECTED, 15), (READS_NEVER_END, 15), (HEALTHY, 21)],
    ids=["reads fail", "reads hang", "readable"],
)
def test_a_peer_whose_every_first_use_fails_costs_a_handful_of_requests_an_hour(
    peer: Peer, at_most: int, interval_s: float, takes_s: float
) -> None:
    """One that can be read is held for 1, 2, 4, ... s: nine of the requests are lost in the first four minutes."""
    hour = an_hour(OurLoop(peer, interval_s=interval_s), lambda now, used_s, uses: True, takes_s=takes_s)
    assert hour.failed <= at_most
