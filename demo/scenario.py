"""What is the story that both demos tell? A passing fault of a decode node, and what its session is worth afterwards.

A request is served; decode is stopped in the middle of a transfer, so that request fails and prefill blacklists the
session; decode goes on; requests are sent until one is served again, for WATCH_S seconds at most.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import time
from typing import Protocol

from .answers import Answer, Pending
from .processes import Failure

WATCH_S = 20.0
# It takes 1 to 3 s; SGLang's native probe, which must not be taken for ours, 20 s and more.
RECOVERY_S = 10.0
PAUSE_S = 0.2  # between two requests of the watch
REQUEST_DEADLINE_S = 60.0
COUNTER = "sglang:failed_session_recoveries_total"
ACTIVE = "Failed-session probe is active"  # in prefill's log where our package works
REFUSAL = "is not alive"  # in what a client is told about a blacklisted session


class Pair(Protocol):
    """A running prefill and a running decode node."""

    @property
    def log(self) -> pathlib.Path:
        """The log of prefill."""

    def request(self) -> Pending:
        """Send a request through both."""

    def wedged_request(self) -> Pending:
        """Send a request through both and stop decode before its transfer is through."""

    def continue_decode(self) -> None:
        """Let the stopped decode go on."""

    def recoveries(self) -> float | None:
        """COUNTER as prefill's /metrics has it; None where that has no such counter. Raises OSError."""

    def check(self) -> None:
        """Raise Failure if either has ended."""


class Report(Protocol):
    """Who is told how the story goes on."""

    def event(self, who: str, what: str) -> None:
        """Something happened."""

    def status(self, what: str) -> None:
        """Something is being waited for; called several times a second."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was seen. `served_after_s` counts from the moment decode goes on; None: not within WATCH_S."""

    log: pathlib.Path  # of prefill
    feature: bool
    active: bool
    first: Answer
    wedged: Answer
    refused: Answer | None
    failed_requests: int
    served_after_s: float | None
    recoveries: float | None

    def problems(self) -> list[str]:
        """What the story wants and what was not seen; empty if all of it was."""
        wanted = {
            "a request before the fault is served": self.first.served,
            "the request whose transfer is interrupted fails": not self.wedged.served,
            "the next request is refused because the session is blacklisted": self.refused is not None,
        }
        if self.feature:
            soon = self.served_after_s is not None and self.served_after_s <= RECOVERY_S
            wanted[f"{ACTIVE!r} in the log of prefill"] = self.active
            wanted[f"the session recovers and a request is served within {RECOVERY_S:.0f} s"] = soon
            wanted[f"{COUNTER} reads 1"] = self.recoveries == 1
        else:
            wanted[f"no {ACTIVE!r} in the log of prefill"] = not self.active
            wanted[f"the session stays dead for {WATCH_S:.0f} s"] = self.served_after_s is None
            wanted[f"{COUNTER} reads 0 or is not there"] = not self.recoveries
        return [f"not seen: {what}" for what, seen in wanted.items() if not seen]

    def cells(self) -> dict[str, str]:
        """What the closing table says of it, by label."""
        after_s = self.served_after_s
        told = re.search(rf"session (\S+) {REFUSAL}", self.refused.text if self.refused else "")
        return {
            "blacklisted session": told[1] if told else "not seen",
            "request before the fault": "served" if self.first.served else "failed",
            "request during the fault": "served" if self.wedged.served else "failed",
            "request after the fault": "failed" if after_s is None else "served",
            "served again after SIGCONT": f"still dead after {WATCH_S:.0f} s"
            if after_s is None
            else f"{after_s:.2f} s",
            "failed requests": str(self.failed_requests),
            "recoveries on /metrics": "not there" if self.recoveries is None else f"{self.recoveries:g}",
        }


def play(pair: Pair, feature: bool, report: Report) -> Outcome:
    """Tell the story on `pair`, whose prefill has the feature on or off. Raises Failure if a process ends by itself."""
    said = re.findall(r"Failed-session probe is .*", pair.log.read_text(errors="replace"))
    active = any(line.startswith(ACTIVE) for line in said)
    report.event("prefill", said[-1] if said else "says nothing of a failed-session probe")
    first = _wait(pair, pair.request(), report, "request 1")
    report.event("request 1", _said(first))
    pending = pair.wedged_request()
    report.event("decode", "stopped (SIGSTOP) in the middle of the transfer of request 2")
    wedged = _wait(pair, pending, report, "prefill waits for decode, request 2")
    report.event("request 2", _said(wedged))
    pending = pair.request()  # before decode goes on, for on a slow machine a probe might let the session in first
    pair.continue_decode()
    report.event("decode", "goes on (SIGCONT)")
    refused, failed, served_after_s = _watch(pair, pending, report)
    recoveries = _recoveries(pair, feature)
    report.event("metrics", f"{COUNTER} {'is not there' if recoveries is None else f'{recoveries:g}'}")
    failed += not wedged.served
    return Outcome(pair.log, feature, active, first, wedged, refused, failed, served_after_s, recoveries)


def _watch(pair: Pair, pending: Pending | None, report: Report) -> tuple[Answer | None, int, float | None]:
    """Send requests, after the one that is on its way, until one is served.

    Returns the first one that was refused because of the blacklist, how many failed, and the seconds until one was
    served, None if none was.
    """
    refused, last, failed, started = None, "", 0, time.monotonic()
    while (passed := time.monotonic() - started) < WATCH_S:
        report.status(f"{passed:.1f} s after SIGCONT; {failed} requests failed")
        answer = _wait(pair, pending or pair.request(), report, f"request {3 + failed}, {passed:.1f} s after SIGCONT")
        pending = None
        if answer.served:
            served_after_s = time.monotonic() - started
            report.event(f"request {3 + failed}", f"{_said(answer)}, {served_after_s:.2f} s after SIGCONT")
            return refused, failed, served_after_s
        if answer.text != last:
            last = answer.text
            report.event(f"request {3 + failed}", _said(answer))
        if refused is None and REFUSAL in answer.text:
            refused = answer
        failed += 1
        time.sleep(PAUSE_S)
    report.event("requests", f"{failed} FAILED, the last one {WATCH_S:.0f} s after SIGCONT: {last}")
    return refused, failed, None


def _recoveries(pair: Pair, feature: bool) -> float | None:
    """The counter; with the feature on it may take a moment until it is written."""
    deadline = time.monotonic() + 2.0
    try:
        while not (seen := pair.recoveries()) and feature and time.monotonic() < deadline:
            time.sleep(0.1)
    except OSError as error:
        raise Failure(f"/metrics of prefill does not answer: {error}", pair.log) from error
    return seen


def _wait(pair: Pair, pending: Pending, report: Report, what: str) -> Answer:
    started = time.monotonic()
    while True:
        pair.check()
        if answer := pending.wait(0.1):
            return answer
        passed = time.monotonic() - started
        if passed > REQUEST_DEADLINE_S:
            raise Failure(f"no answer to {what} in {REQUEST_DEADLINE_S:.0f} s", pair.log)
        report.status(f"{what}: {passed:.1f} s")


def _said(answer: Answer) -> str:
    return f"{'served' if answer.served else 'FAILED'} after {answer.seconds:.2f} s: {answer.text}"
