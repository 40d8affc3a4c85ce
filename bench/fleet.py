"""How often is a decode node asked, and how late is it let in, when a whole fleet loses many at once?

A discrete-event simulation in virtual time. Our prefill ranks run the real state machine; its rivals are a fixed
interval of 30 s and a backoff from 30 to 300 s, one session after another as SGLang's native probe asks them. The
prefill ranks do not depend on each other: they are simulated one by one, and what each decode rank hears is added up.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import operator
import random
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Optional

from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.session_states import Verdict
from sglang.srt.disaggregation.mooncake.session_watch import Event, SessionWatch
from sglang.srt.environ import FailedSessionProbeSettings

# As measured on real Mooncake over TCP.
ANSWER_S = 0.0003
REFUSAL_S = 0.0001
READS_S = 0.002
SILENCE_S = 60.0  # a probe of a stopped peer
UNREACHABLE_S = 5.0  # a probe whose packets are dropped
SYN_AGAIN_S = (1.0, 3.0)  # after these times the kernel tries to connect once more


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a decode rank in a span of time. ``kind``: stopped, dropped or refused."""

    begins: float
    ends: float
    kind: str


Faults = tuple[Fault, ...]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What happens to which decode ranks, as one prefill rank sees it."""

    name: str
    faults: Callable[[int, int], Faults]  # of a decode rank, seen from a prefill rank
    lasts_s: float


class Heard:
    """What all decode ranks have heard from some prefill ranks, and how late they were let in."""

    def __init__(self, decodes: int, lasts_s: float) -> None:
        self.seconds = int(lasts_s) + 1
        self.probes = array("L", bytes(8 * decodes * self.seconds))  # of each decode rank, second by second
        self.lags = array("d")
        self.never = 0
        self.last_s = 0.0  # from the last heal to the last re-admission
        self.kept_out_s = 0.0  # how long decode ranks that were well were kept out, by all prefill ranks together

    def add(self, other: Heard) -> None:
        """What they have heard from other prefill ranks besides."""
        self.probes = array("L", map(operator.add, self.probes, other.probes))
        self.lags += other.lags
        self.never += other.never
        self.kept_out_s += other.kept_out_s
        self.last_s = max(self.last_s, other.last_s)

    def probes_of(self, decode: int) -> array[int]:
        """What one decode rank has heard, second by second."""
        return self.probes[decode * self.seconds : (decode + 1) * self.seconds]


def fault_at(faults: Faults, now: float) -> Optional[Fault]:
    """The fault that a decode rank has now, if any."""
    for fault in faults:
        if fault.begins <= now < fault.ends:
            return fault
    return None


def well_s(faults: Faults, begin: float, end: float) -> float:
    """How long a decode rank was well in this span of time."""
    return end - begin - sum(max(0.0, min(end, fault.ends) - max(begin, fault.begins)) for fault in faults)


def answer_of(faults: Faults, now: float) -> tuple[float, bool]:
    """When a probe sent now comes back, and whether it was answered."""
    fault = fault_at(faults, now)
    if fault is None:
        return now + ANSWER_S, True
    if fault.kind == "refused":
        return now + REFUSAL_S, False
    if fault.kind == "dropped":
        for again_s in SYN_AGAIN_S:
            if fault_at(faults, now + again_s) is None:
                return now + again_s + ANSWER_S, True
        return now + UNREACHABLE_S, False
    if fault.ends < now + SILENCE_S:
        return fault.ends + ANSWER_S, True
    return now + SILENCE_S, False


class Rank:
    """One prefill rank and the decode ranks that fail for it. The subclass decides when to ask."""

    def __init__(self, number: int, scenario: Scenario, decodes: int, heard: Heard) -> None:
        self.now = 0.0
        self.random = random.Random(number)
        self.heard = heard
        self.scenario = scenario
        self.faults = [scenario.faults(number, decode) for decode in range(decodes)]
        self._last_heal = max((fault.ends for faults in self.faults for fault in faults), default=0.0)
        self._out_since: dict[int, float] = {}
        self._ties = itertools.count()
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        for decode, faults in enumerate(self.faults):
            for fault in faults:
                # A request is under way to each of them all the time, so each fails a moment after its fault began.
                self.at(fault.begins + self.random.uniform(0.0, 0.5), self.fails, decode)

    def at(self, moment: float, what: Callable[[Any], None], subject: Any) -> None:
        """Has something happen later."""
        heapq.heappush(self._events, (moment, next(self._ties), what, subject))

    def run(self) -> None:
        """Tells the whole story."""
        while self._events and self._events[0][0] <= self.scenario.lasts_s:
            self.now, _, what, subject = heapq.heappop(self._events)
            what(subject)
        for decode, since in self._out_since.items():
            faults = self.faults[decode]
            self.heard.kept_out_s += well_s(faults, since, self.scenario.lasts_s)
            self.heard.never += fault_at(faults, self.scenario.lasts_s) is None

    def ask(self, decode: int) -> tuple[float, bool]:
        """Counts a probe that is sent now; gives when it comes back, and whether it was answered."""
        self.heard.probes[decode * self.heard.seconds + int(self.now)] += 1
        return answer_of(self.faults[decode], self.now)

    def let_in(self, decode: int) -> None:
        """A decode rank is used again: requests fail if it is not well."""
        fault = fault_at(self.faults[decode], self.now)
        if fault is not None:
            self.at(self.now + 0.01, self.fails, decode)
            return
        healed = max((fault.ends for fault in self.faults[decode] if fault.ends <= self.now), default=self.now)
        self.heard.lags.append(self.now - healed)
        self.heard.kept_out_s += well_s(self.faults[decode], self._out_since.pop(decode), self.now)
        self.heard.last_s = max(self.heard.last_s, self.now - self._last_heal)

    def fails(self, decode: int) -> None:
        """A request to a decode rank fails, if that is not well again."""
        if fault_at(self.faults[decode], self.now) is not None:
            self._out_since.setdefault(decode, self.now)
            self.blacklist(decode)

    def blacklist(self, decode: int) -> None:
        raise NotImplementedError


class OurRank(Rank):
    """The real state machine, and the daemon thread in virtual time."""

    def __init__(self, number: int, scenario: Scenario, decodes: int, heard: Heard) -> None:
        super().__init__(number, scenario, decodes, heard)
        self._next_round = float("inf")
        self.watch = SessionWatch(
            FailedSessionProbeSettings(),
            clock=lambda: self.now,
            jitter=self.random.random,
            wake=lambda: self._round_at(self.now),
        )
        self._names = [f"decode:{decode + 1}" for decode in range(decodes)]
        self._decodes = {name: decode for decode, name in enumerate(self._names)}

    def blacklist(self, decode: int) -> None:
        self.watch.sessions.add(self._names[decode])

    def _round_at(self, moment: float) -> None:
        if moment < self._next_round:
            self._next_round = moment
            self.at(moment, self._round, moment)

    def _round(self, moment: float) -> None:
        if moment != self._next_round:
            return
        self._next_round = float("inf")
        together: dict[float, list[tuple[Call, bool]]] = {}  # by the moment at which they come back
        for call in self.watch.take_due():
            back_at, answered = self.ask(self._decodes[call.session])
            if call.read and answered:
                back_at += READS_S
            together.setdefault(back_at, []).append((call, answered))
        for back_at, answers in together.items():
            self.at(back_at, self._answers, answers)
        self._note_events()
        if (due_in := self.watch.next_due_in()) is not None:
            self._round_at(self.now + due_in)

    def _answers(self, came: list[tuple[Call, bool]]) -> None:
        for call, answered in came:
            self.watch.answered(call, answered, refused=not answered, reading=call.read and answered)
            if call.read and answered:
                self.watch.read(call, Verdict.READABLE)
        self._note_events()
        self._round_at(self.now)

    def _note_events(self) -> None:
        while self.watch.events:
            event, session, _ = self.watch.events.popleft()
            if event is Event.RECOVERED:
                self.let_in(self._decodes[session])


class NativeRank(Rank):
    """Asks one session after another, each at its own time; an answer lets it in."""

    longest_s = 300.0

    def __init__(self, number: int, scenario: Scenario, decodes: int, heard: Heard) -> None:
        super().__init__(number, scenario, decodes, heard)
        self._out: dict[int, tuple[float, float]] = {}  # when it is asked next, and the gap after that
        self.at(self.random.uniform(0.0, 30.0), self._pass, None)

    def blacklist(self, decode: int) -> None:
        self._out.setdefault(decode, (self.now + 30.0, 30.0))

    def _pass(self, _: Any) -> None:
        self._next(iter([decode for decode, (due, _) in self._out.items() if due <= self.now]))

    def _next(self, due: Iterator[int]) -> None:
        decode = next(due, None)
        if decode is None:
            self.at(self.now + self.pause_s(), self._pass, None)
        else:
            back_at, answered = self.ask(decode)
            self.at(back_at, self._came, (decode, answered, due))

    def pause_s(self) -> float:
        """From the end of a pass to the next."""
        soonest = min((due for due, _ in self._out.values()), default=self.now + 30.0)
        return max(1.0, soonest - self.now)

    def _came(self, came: Any) -> None:
        decode, answered, due = came
        if answered:
            self._out.pop(decode, None)
            self.let_in(decode)
        elif decode in self._out:
            gap_s = min(2 * self._out[decode][1], self.longest_s)
            self._out[decode] = self.now + gap_s, gap_s
        self._next(due)


class FixedRank(NativeRank):
    """The same every 30 s."""

    longest_s = 30.0

    def pause_s(self) -> float:
        return 30.0


CONTENDERS: dict[str, type[Rank]] = {"ours": OurRank, "fixed 30 s": FixedRank, "backoff 30 to 300 s": NativeRank}


def run(contender: type[Rank], scenario: Scenario, prefills: range, decodes: int) -> Heard:
    """One scenario with one contender, for these prefill ranks."""
    heard = Heard(decodes, scenario.lasts_s)
    for number in prefills:
        contender(number, scenario, decodes, heard).run()
    return heard
