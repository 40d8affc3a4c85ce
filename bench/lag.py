"""How long after a decode node can be used again does a request go through?

Real Mooncake over TCP and stock SGLang managers. In each trial one decode node fails for a prefill node of each
contender at once, all freshly started in a network of their own; many trials go on side by side.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import random
import statistics
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, Optional

from bench.cluster import Cluster, Decode, request
from bench.contenders import CONTENDERS, ForkServers, Manager, fork_servers
from bench.progress import say as say_of

say = functools.partial(say_of, "lag")
# One takes a second of CPU to start, 1 to 2 % of a core while it waits, 0.3 s of CPU in the seconds after the heal,
# and 130 MB of memory.
CLUSTERS = 24
STARTING = threading.BoundedSemaphore(2)
START_S = 20.0
TRIALS = 5
TRIALS_OF_LONG_CELLS = 3
PAUSED_S = 0.5  # by the garbage collector
# The native loop and the fixed one make a pass every 30 s: a fault begins anywhere in between.
LONGEST_PHASE_S = 30.0
# An outage is longer or shorter than its cell says by a fifth at most, and by 3 s: a probe of a peer whose packets are
# dropped takes 5 s, and the heal is to fall anywhere into one.
LARGEST_DEVIATION_S = 3.0
SHARE_OF_DEVIATION = 0.2
# A request every 20 ms, and then every fiftieth of the lag so far, so that the bench does not slow what it measures.
LEAST_GAP_S = 0.02
GAP_SHARE_OF_LAG = 0.02
SAY_EVERY_S = 15.0
INFINITE = float("inf")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A fault of one decode node, how long it lasts, and how many hung peers are on the blacklist meanwhile."""

    fault: str
    outage_s: float
    hung: int = 0

    @property
    def trials(self) -> int:
        return TRIALS_OF_LONG_CELLS if self.outage_s >= 300 else TRIALS

    @property
    def cap_s(self) -> float:
        """The longest that a contender is waited for."""
        return round(120 + self.outage_s / 2)

    @property
    def expected_s(self) -> float:
        """How long a trial is likely to take; the long ones start first."""
        return self.outage_s + (self.cap_s if self.hung else min(30.0 + self.outage_s, self.cap_s))


CELLS = [
    Cell("paused", PAUSED_S),
    *(Cell(fault, outage_s) for outage_s in (1, 5, 20, 60, 300) for fault in ("stopped", "dropped", "rejected")),
    *(Cell("stopped", outage_s, hung) for outage_s in (5, 60) for hung in (8, 64)),
    *(Cell(fault, 20, 64) for fault in ("dropped", "rejected")),
]
QUICK_CELLS = [Cell("paused", PAUSED_S), Cell("dropped", 1), Cell("rejected", 1)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """When in a trial the fault begins, counted from the contenders' start, and how long it lasts."""

    cell: Cell
    phase_s: float
    outage_s: float

    @classmethod
    def of(cls, cell: Cell, chance: random.Random) -> Plan:
        deviation_s = min(LARGEST_DEVIATION_S, SHARE_OF_DEVIATION * cell.outage_s)
        outage_s = cell.outage_s + chance.uniform(-deviation_s, deviation_s)
        return cls(cell, chance.uniform(0.0, LONGEST_PHASE_S), outage_s)


@dataclasses.dataclass(frozen=True)
class Lag:
    """Seconds from the heal to the first request that was served, None if there was none; requests lost meanwhile."""

    seconds: Optional[float]
    lost: int


Trial = dict[str, Lag]  # by contender


class Halted(Exception):
    """The run is over before its end."""


class Halt(threading.Event):
    """Set when the run is to end."""

    def sleep(self, seconds: float) -> None:
        """Let time pass. Raises Halted as soon as the run is to end."""
        if self.wait(seconds):
            raise Halted


def play(fork_servers: ForkServers, plan: Plan, halt: Halt) -> Trial:
    """One trial: fault and heal of a decode node that was used before. All contenders blacklist it as it begins."""
    cell = plan.cell
    with contextlib.ExitStack() as stack:
        with STARTING:
            cluster = stack.enter_context(Cluster(fork_servers))
        stack.enter_context(cluster.hung_peers(cell.hung))
        (decode,) = cluster.decodes
        halt.sleep(plan.phase_s)
        with fault(decode, cell.fault):
            cluster.blacklist(decode.session)
            halt.sleep(plan.outage_s)
            healed = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(cluster.prefills)) as side_by_side:
            lags = side_by_side.map(
                lambda prefill: lag_of(prefill, decode, healed, cell.cap_s, halt), cluster.prefills.values()
            )
            return dict(zip(cluster.prefills, lags, strict=True))


def fault(decode: Decode, name: str) -> contextlib.AbstractContextManager[None]:
    """The fault of that name, as long as its block."""
    how = {"paused": decode.stopped, "stopped": decode.stopped, "dropped": decode.dropped, "rejected": decode.rejected}
    return how[name]()


def lag_of(prefill: Manager, decode: Decode, healed: float, cap_s: float, halt: Halt) -> Lag:
    """Send one request after another until one is served."""
    lost = 0
    while (waited_s := time.monotonic() - healed) < cap_s:
        ended = request(prefill, decode)
        if ended.how == "served":
            return Lag(ended.at - healed, lost)
        if ended.how == "unknown":
            say(f"a request of {prefill.name} has neither been served nor refused nor lost: {ended.why}")
        lost += ended.how != "refused"
        halt.sleep(max(LEAST_GAP_S, GAP_SHARE_OF_LAG * waited_s))
    return Lag(None, lost)


def rows(
    cells: list[Cell] = CELLS, clusters: int = CLUSTERS, trials: Optional[int] = None, seed: int = 1
) -> Iterator[dict[str, Any]]:
    """One row for each cell and contender, as soon as all trials of the cell are over."""
    chance = random.Random(seed)
    plans = [Plan.of(cell, chance) for cell in cells for _ in range(trials or cell.trials)]
    plans.sort(key=lambda plan: -plan.cell.expected_s)
    say(f"{len(plans)} trials, {clusters} at a time: about {expected_s(plans, clusters) / 60:.0f} minutes")
    halt = Halt()
    with fork_servers() as started, concurrent.futures.ThreadPoolExecutor(clusters) as pool:
        try:
            playing = {pool.submit(play, started, plan, halt): plan.cell for plan in plans}
            done: dict[Cell, list[Optional[Trial]]] = {cell: [] for cell in cells}
            for number, future in enumerate(as_they_end(set(playing)), 1):
                cell = playing[future]
                done[cell].append(result_of(future))
                say(f"[{number}/{len(plans)}] {in_words(cell, done[cell][-1])}")
                if len(done[cell]) == (trials or cell.trials):
                    for contender in CONTENDERS:
                        yield row(cell, contender.name, done[cell])
        finally:
            halt.set()
            pool.shutdown(cancel_futures=True)


def expected_s(plans: list[Plan], clusters: int) -> float:
    """How long it is likely to take: no less than its longest trial does."""
    each = [START_S + plan.phase_s + plan.cell.expected_s for plan in plans]
    return START_S + max(max(each), sum(each) / clusters)


def as_they_end(playing: set[concurrent.futures.Future[Trial]]) -> Iterator[concurrent.futures.Future[Trial]]:
    """The trials as they end; says that it waits while none does."""
    while playing:
        ended, playing = concurrent.futures.wait(playing, SAY_EVERY_S, concurrent.futures.FIRST_COMPLETED)
        if not ended:
            say(f"{sum(trial.running() for trial in playing)} trials go on, {len(playing)} are left")
        yield from ended


def result_of(future: concurrent.futures.Future[Trial]) -> Optional[Trial]:
    """The trial; None if it broke, which is said and does not end the run."""
    error = future.exception()
    if error is None:
        return future.result()
    say("".join(traceback.format_exception(error)))
    return None


def row(cell: Cell, contender: str, trials: list[Optional[Trial]]) -> dict[str, Any]:
    """What came out of all trials of one cell for one contender. A lag is None if it was over the cap."""
    lags = [trial[contender] for trial in trials if trial is not None]
    seconds = [None if lag.seconds is None else round(lag.seconds, 3) for lag in lags]
    in_order = sorted(INFINITE if lag is None else lag for lag in seconds)
    return {
        "contender": contender,
        "fault": cell.fault,
        "outage_s": cell.outage_s,
        "hung": cell.hung,
        "trials": seconds,
        "median_s": finite(statistics.median(in_order or [INFINITE])),
        "worst_s": finite(max(in_order, default=INFINITE)),
        "cap_s": cell.cap_s,
        "over_cap": seconds.count(None),
        "lost": sum(lag.lost for lag in lags),
        "broken_trials": trials.count(None),
    }


def finite(seconds: float) -> Optional[float]:
    return None if seconds == INFINITE else round(seconds, 3)


def in_words(cell: Cell, trial: Optional[Trial]) -> str:
    """What came out of a trial, for a line of progress."""
    lags = ", ".join(
        f"{name} >{cell.cap_s:g} s" if lag.seconds is None else f"{name} {lag.seconds:.2f} s"
        for name, lag in (trial or {}).items()
    )
    beside = f" beside {cell.hung} hung" if cell.hung else ""
    return f"{cell.fault} {cell.outage_s:g} s{beside}: {lags or 'broken'}"


if __name__ == "__main__":
    for result in rows():
        print(json.dumps(result), flush=True)
