"""How many requests fail, and for how long is there no service, while faults come and go?

Real Mooncake over TCP and stock SGLang managers. One prefill node of each contender sends the same steady stream of
requests to the same two decode nodes at the same time, and one script of faults happens to these.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from bench.cluster import REQUEST_DEADLINE_S, Cluster, Decode, Ended, new_room, start_request
from bench.contenders import CONTENDERS, Manager, fork_servers
from bench.progress import say as say_of

say = functools.partial(say_of, "lost")
SECONDS = 600.0
REQUESTS_PER_S = 20.0
SAY_EVERY_S = 15.0
HEALTHY = "before the first fault"
# A pause shorter than Mooncake's time limit fails no transfer over TCP, as it may over RDMA; a full queue is hard to
# bring about. So these blacklist the session as after a failed transfer, and their names say so.
BLACKLISTED = ", blacklisted as after a failed transfer"


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that happens to a decode node: at which second of SECONDS, and for how long."""

    decode: int
    at_s: float
    lasts_s: float
    how: str  # stopped, dropped, rejected, data rejected or queue full

    @property
    def name(self) -> str:
        injected = BLACKLISTED if self.is_injected else ""
        lasting = f" {self.lasts_s:g} s" if self.lasts_s else ""
        return f"{self.how}{lasting}{injected} (decode {self.decode + 1} at {self.at_s:g} s)"

    @property
    def is_injected(self) -> bool:
        return self.how in ("stopped", "queue full")

    def in_force(self, decode: Decode) -> contextlib.AbstractContextManager[None]:
        """The fault, as long as the block."""
        return {
            "stopped": decode.stopped,
            "dropped": decode.dropped,
            "rejected": decode.rejected,
            "data rejected": decode.data_rejected,
            "queue full": contextlib.nullcontext,
        }[self.how]()


# Over a minute between the faults of a node: a session that fails again sooner is held by us.
SCRIPT = [
    Fault(0, 10, 0.2, "stopped"),
    Fault(0, 90, 1, "stopped"),
    Fault(0, 170, 3, "stopped"),
    Fault(0, 250, 0, "queue full"),
    Fault(0, 330, 120, "data rejected"),
    Fault(0, 530, 0.5, "rejected"),
    Fault(1, 30, 90, "dropped"),
    Fault(1, 240, 2, "rejected"),
    Fault(1, 330, 2, "stopped"),
]
LONGEST_BLIP_S = 3.0


def has_failed(playing: concurrent.futures.Future[None]) -> bool:
    return playing.done() and playing.exception() is not None


def script_of(seconds: float) -> list[Fault]:
    """SCRIPT for another length of the run; blips stay as long as they are."""
    scale = seconds / SECONDS
    return [
        dataclasses.replace(
            fault,
            at_s=fault.at_s * scale,
            lasts_s=fault.lasts_s if fault.lasts_s <= LONGEST_BLIP_S else fault.lasts_s * scale,
        )
        for fault in SCRIPT
    ]


@dataclasses.dataclass(frozen=True)
class Span:
    """When a fault began and ended, by the monotonic clock."""

    fault: Fault
    began: float
    ended: float


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request that was sent: by whom, to which decode node, when."""

    contender: str
    decode: int
    at: float


class Run:
    """The stream of requests and the faults, and what became of them."""

    def __init__(self, cluster: Cluster, seconds: float) -> None:
        self._cluster = cluster
        self._script = script_of(seconds)
        self._over = threading.Event()
        self.sent: dict[int, Sent] = {}  # by room
        self.ended: dict[int, Ended] = {}
        self.spans: list[Span] = []
        self.began = time.monotonic()
        self.until = self.began + seconds

    def play(self) -> None:
        """All of it, to the end of the last request."""
        bodies = [functools.partial(self._play_faults, number) for number in range(len(self._cluster.decodes))]
        bodies += [functools.partial(self._send_requests, prefill) for prefill in self._cluster.prefills.values()]
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as side_by_side:
            try:
                playing = [side_by_side.submit(body) for body in bodies]
                while (left_s := self.until - time.monotonic()) > 0 and not any(map(has_failed, playing)):
                    concurrent.futures.wait(playing, min(left_s, SAY_EVERY_S), concurrent.futures.FIRST_EXCEPTION)
                    left_s = max(0.0, self.until - time.monotonic())
                    say(f"{len(self.sent)} requests are sent, {left_s:.0f} s are left")
            finally:
                self._over.set()
        for each in playing:
            each.result()

    def _play_faults(self, number: int) -> None:
        decode = self._cluster.decodes[number]
        for fault in self._script:
            if fault.decode != number:
                continue
            if self._over.wait(max(0.0, self.began + fault.at_s - time.monotonic())):
                return
            began = time.monotonic()
            with fault.in_force(decode):
                if fault.is_injected:
                    self._cluster.blacklist(decode.session)
                self._over.wait(fault.lasts_s)
                ended = time.monotonic()
            self.spans.append(Span(fault, began, ended))
            say(f"{time.monotonic() - self.began:.0f} s: over: {fault.name}")

    def _send_requests(self, prefill: Manager) -> None:
        offset = list(self._cluster.prefills).index(prefill.name) / len(self._cluster.prefills)  # they take turns
        for number in itertools.count():
            due = self.began + (number + offset) / REQUESTS_PER_S
            if self._over.wait(max(0.0, due - time.monotonic())):
                break
            room, decode = new_room(), number % len(self._cluster.decodes)
            self.sent[room] = Sent(prefill.name, decode, time.monotonic())
            start_request(prefill, self._cluster.decodes[decode], room)
        deadline = time.monotonic() + REQUEST_DEADLINE_S
        left = number
        while left and time.monotonic() < deadline:
            outcomes = prefill.ask("outcomes", wait_s=1)["ended"]
            self.ended.update((outcome["room"], Ended.of(outcome)) for outcome in outcomes)
            left -= len(outcomes)


def rows(seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """One row for each contender and fault, and one for each contender over all of the run."""
    with fork_servers() as started, Cluster(started, decodes=2) as cluster:
        run = Run(cluster, seconds)
        run.play()
        for contender in CONTENDERS:
            yield from rows_of(contender.name, run)


def rows_of(contender: str, run: Run) -> Iterator[dict[str, Any]]:
    """What became of one contender's requests. A request counts under the fault that was on, or over last, at its
    decode node when it was sent."""
    requests = {room: sent for room, sent in run.sent.items() if sent.contender == contender}
    spans = sorted(run.spans, key=lambda span: span.began)
    rooms: dict[Span | None, list[int]] = {span: [] for span in [None, *spans]}
    for room, sent in requests.items():
        before = [span for span in spans if span.fault.decode == sent.decode and span.began <= sent.at]
        rooms[before[-1] if before else None].append(room)
    served = served_at(requests, run.ended)
    gaps = {span: longest_gap(span, spans, served[span.fault.decode], run.until) for span in spans}
    for span, under in rooms.items():
        yield {
            "contender": contender,
            "fault": span.fault.name if span else HEALTHY,
            "outage_s": round(span.ended - span.began, 3) if span else 0.0,
            **counts(under, run.ended),
            "failed_after": failed_after(span, under, run) if span else 0,
            "no_service_s": round(gaps[span], 3) if span else 0.0,
        }
    yield {
        "contender": contender,
        "fault": "all",
        "outage_s": round(sum(span.ended - span.began for span in spans), 3),
        **counts(list(requests), run.ended),
        "failed_after": sum(failed_after(span, under, run) for span, under in rooms.items() if span),
        "no_service_s": round(max(gaps.values(), default=0.0), 3),
    }


def counts(rooms: list[int], ended: dict[int, Ended]) -> dict[str, int]:
    """How many were sent, and how they ended; unknown: not at all, or in another way."""
    hows = Counter(ended[room].how if room in ended else "unknown" for room in rooms)
    return {"sent": len(rooms), **{how: hows[how] for how in ("served", "refused", "lost", "unknown")}}


def failed_after(span: Span, rooms: list[int], run: Run) -> int:
    """How many of these requests failed although the fault was over when they were sent."""
    late = [room for room in rooms if run.sent[room].at > span.ended]
    return len(late) - counts(late, run.ended)["served"]


def served_at(requests: dict[int, Sent], ended: dict[int, Ended]) -> list[list[float]]:
    """For each decode node, when requests were served, in order."""
    moments: list[list[float]] = [[], []]
    for room, sent in requests.items():
        if room in ended and ended[room].how == "served":
            moments[sent.decode].append(ended[room].at)
    return [sorted(each) for each in moments]


def longest_gap(span: Span, spans: list[Span], served: list[float], until: float) -> float:
    """The longest time without a served request between the end of a fault and the next fault of that decode node."""
    later = [other.began for other in spans if other.fault.decode == span.fault.decode and other.began > span.began]
    end = min(later, default=until)
    inside = served[bisect.bisect(served, span.ended) : bisect.bisect(served, end)]
    moments = [span.ended, *inside, end]
    return max(after - before for before, after in itertools.pairwise(moments))


if __name__ == "__main__":
    for result in rows(*map(float, sys.argv[1:])):
        print(json.dumps(result), flush=True)
