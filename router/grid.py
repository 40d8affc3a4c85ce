"""Which routers, flags and faults are played?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

NEW, OLD = "0.3.2", "0.2.4"
DECODES = ("decode-1", "decode-2")  # the first is the one that is cut off, or killed
RETRIES = ["--retry-max-retries", "40", "--retry-max-backoff-ms", "500"]
FLAGS = {
    "defaults": [],
    "breaker 2 s": ["--cb-timeout-duration-secs", "2"],
    (ADVISED := "retries, breaker 1 s"): [*RETRIES, "--cb-timeout-duration-secs", "1"],
    (TWO := "retries, breaker 2 s"): [*RETRIES, "--cb-timeout-duration-secs", "2"],
    (OFF := "retries, breaker off"): [*RETRIES, "--disable-circuit-breaker"],
    (THRESHOLD := "retries, threshold 1000"): [*RETRIES, "--cb-failure-threshold", "1000"],
    (HEALTH := "retries, breaker 1 s, health 5 s"): [
        *RETRIES,
        *("--cb-timeout-duration-secs", "1"),
        *("--health-check-interval-secs", "5", "--health-failure-threshold", "2"),
    ],
    (TIMEOUT := "retries, breaker 1 s, time-out 10 s"): [
        *RETRIES,
        *("--cb-timeout-duration-secs", "1"),
        *("--request-timeout-secs", "10"),
    ],
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A router, and who uses it."""

    flags: str
    decodes: int = 1
    streaming: bool = False
    patch: bool = True
    version: str = NEW
    per_s: float = 2.0

    def __str__(self) -> str:
        requests = f"{self.per_s:g} {'streaming' if self.streaming else 'plain'} a second"
        patch = "" if self.patch else ", without the patch"
        return f"router {self.version}, {self.flags}, {self.decodes} decode, {requests}{patch}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fault, seen through several routers at once, each of them before a prefill node of its own.

    `how`: what is sent to the first decode node's ports of Mooncake is "rejected" or "dropped" for `fault_s`. Or, for
    good, the node is "killed" or "vanishes": what is sent to any of its ports is dropped. Watched for `watch_s` after.
    """

    fault_s: float | None
    watch_s: float
    cells: tuple[Cell, ...]
    how: str = "rejected"


def placed(trial: Trial) -> dict[Cell, str]:
    """The name of the prefill node that each cell of a trial uses: one of those with the patch, or the one without."""
    names = iter(f"prefill-{number}" for number in range(1, len(trial.cells) + 1))
    return {cell: next(names) if cell.patch else "prefill-without" for cell in trial.cells}


def prefills(trials: Sequence[Trial]) -> dict[str, bool]:
    """The prefill nodes that the trials need, each with the patch or without it."""
    return {name: cell.patch for trial in trials for cell, name in placed(trial).items()}


# Each round has servers of its own, and takes ten minutes at most. A prefill node without the patch refuses the first
# decode node from the first fault on, so it is of use only once. A decode node that was killed, or has vanished, does
# not come back, so that is the last trial of a round.
ROUNDS: list[list[Trial]] = [
    [
        Trial(9, 65, (Cell("defaults"), Cell("defaults", 2))),
        Trial(9, 15, (Cell("breaker 2 s"), Cell(OFF, 1, True))),
        Trial(9, 15, (Cell(TWO),)),
        Trial(9, 15, (Cell(OFF),)),
        Trial(9, 15, (Cell(OFF, 2), Cell(OFF, 2, True))),
        Trial(9, 15, (Cell(TWO, 2),)),
    ],
    [
        Trial(2, 65, (Cell("defaults"), Cell("defaults", 2, True))),
        Trial(2, 15, (Cell(ADVISED), Cell(OFF))),
        Trial(40, 65, (Cell("defaults"), Cell("defaults", 2, True))),
        Trial(40, 15, (Cell(OFF),)),
    ],
    [
        Trial(9, 15, (Cell(ADVISED), Cell(ADVISED, 2))),
        Trial(9, 65, (Cell("defaults", version=OLD), Cell("defaults", 2, True, version=OLD))),
        Trial(9, 15, (Cell(ADVISED, version=OLD), Cell(ADVISED, 2, version=OLD))),
        Trial(None, 40, (Cell(HEALTH, 2), Cell(HEALTH, 2, True)), "killed"),
    ],
    [
        Trial(9, 40, (Cell("defaults", 2, True), Cell("defaults", 2, True, patch=False))),
        Trial(40, 15, (Cell(TWO), Cell(ADVISED))),
        Trial(None, 30, (Cell("defaults", 2), Cell("defaults", 2, True)), "killed"),
    ],
    [Trial(None, 30, (Cell(ADVISED), Cell(ADVISED, 2)), "killed")],
    [
        Trial(9, 15, (Cell(THRESHOLD),)),
        Trial(9, 15, (Cell(ADVISED, per_s=10),)),
        Trial(9, 15, (Cell(OFF, per_s=10),)),
        Trial(9, 15, (Cell(ADVISED, 2, per_s=10),)),
        Trial(9, 15, (Cell(ADVISED, per_s=40),)),
        Trial(9, 15, (Cell(OFF, per_s=40),)),
        Trial(9, 15, (Cell("defaults", per_s=40),)),
        Trial(9, 30, (Cell(ADVISED), Cell("defaults", 2, True)), "dropped"),
        Trial(None, 40, (Cell(HEALTH, 2), Cell("defaults", 2, True)), "vanishes"),
    ],
    [
        Trial(9, 15, (Cell(TIMEOUT, per_s=40),)),
        Trial(40, 15, (Cell(TIMEOUT),)),
        Trial(None, 40, (Cell(TIMEOUT, 2), Cell(TIMEOUT, 2, True)), "killed"),
    ],
]
QUICK: list[list[Trial]] = [
    [
        Trial(9, 15, (Cell("defaults", 2, True), Cell("defaults", 2, True, patch=False))),
        Trial(9, 15, (Cell("defaults"),)),
        Trial(9, 15, (Cell(ADVISED),)),
    ]
]
