"""Who is probed next, and may it be now? One heap, places for the calls under way, and the probes allowed a second.

No clock, no lock, no thread.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple, Optional

from sglang.srt.disaggregation.mooncake.session_states import Session

NEVER = float("inf")


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """A probe under way, followed by reads if ``read``. Its answer counts only for the generation it was made in."""

    session: str
    generation: int
    made_at: float
    read: bool = False
    listen: bool = False  # if the probe fails at once, look whether the peer accepts connections
    answered: bool = False  # the probe was, and reads are being begun
    thread: int = 0  # the kernel's id of the worker thread that makes it, 0 before and after
    connects_by: float = NEVER  # if it has not connected by then, it is ended
    end_tried_at: float = -NEVER
    returns_by: float = NEVER  # if it has not by then, it was ended in vain
    ended: bool = False  # it hung, and was ended
    not_connected: bool = False  # it was ended because it had not connected


class Entry(NamedTuple):
    """When a session is due: to be probed, or to see whether its blacklisting or probation ends."""

    at: float
    tie: int  # keeps the order of entries with the same time
    session: Session
    is_end: bool

    def is_outdated(self) -> bool:
        """True if the session is now to be probed at another time."""
        return not self.is_end and self.at != self.session.due_at


class DueHeap:
    """Which session is due first? Outdated entries stay in the heap until it is their turn."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._ties = itertools.count()

    def probe_at(self, session: Session, at: float) -> None:
        """The session is to be probed then, and at no other time."""
        session.due_at = at
        heapq.heappush(self._heap, Entry(at, next(self._ties), session, False))

    def check_end(self, session: Session, at: float) -> None:
        """Its end is checked then, unless an earlier check is due."""
        if not session.has_end_check:
            session.has_end_check = True
            heapq.heappush(self._heap, Entry(at, next(self._ties), session, True))

    def first(self) -> Optional[Entry]:
        return self._heap[0] if self._heap else None

    def pop(self) -> None:
        """Takes the first entry off."""
        entry = heapq.heappop(self._heap)
        if entry.is_end:
            entry.session.has_end_check = False
        elif not entry.is_outdated():
            entry.session.due_at = NEVER

    def due(self, now: float, most: int) -> int:
        """How many entries are due, counted up to ``most``."""
        found, left = 0, [0]
        while left and found < most:
            index = left.pop()
            if index < len(self._heap) and self._heap[index][0] <= now:
                found += 1
                left += (2 * index + 1, 2 * index + 2)
        return found

    def clear(self) -> None:
        self._heap.clear()


class Places:
    """Room for calls under way: ``concurrency`` young ones, and as many again that hang."""

    # A live peer answers within 0.5 ms (p99). The allowance grows by sixteen calls in 45 ms: by then sixteen that hang
    # must have made room, so that a healthy peer among hundreds that hang is probed in time.
    YOUNG_S = 0.03
    # Between two attempts to end a call: it may be about to return, or the kernel does not tell where it waits.
    TRY_AGAIN_S = 0.25

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self._calls: dict[Call, None] = {}  # in the order in which they were made

    @property
    def most(self) -> int:
        return 2 * self.concurrency

    @property
    def most_reading(self) -> int:
        """How many calls may read: they may never return, and be such as cannot be ended."""
        return self.most - max(1, self.concurrency // 4)

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(list(self._calls))  # at once: another thread may look

    def take(self, call: Call) -> None:
        self._calls[call] = None

    def free(self, call: Call) -> None:
        self._calls.pop(call, None)

    def _young(self, now: float) -> list[Call]:
        """The calls that do not hang yet, the newest first."""
        return list(itertools.takewhile(lambda call: now < call.made_at + self.YOUNG_S, reversed(self._calls)))

    def free_now(self, now: float) -> int:
        """How many more calls may be made."""
        return min(self.concurrency - len(self._young(now)), self.most - len(self))

    def oldest_hanging(self, now: float, wanted: int) -> list[Call]:
        """The calls to end so that ``wanted`` more places become free, without those that are being ended already."""
        if len(self) < self.most:
            return []
        hanging = itertools.takewhile(lambda call: now >= call.made_at + self.YOUNG_S, self._calls)
        may_be_tried = {call: now >= call.end_tried_at + self.TRY_AGAIN_S for call in hanging}
        can_end = [call for call, may in may_be_tried.items() if may or call.ended]
        return [call for call in can_end[:wanted] if may_be_tried[call]]

    def connects_by(self) -> float:
        """When ``not_connected`` has a call, NEVER if none has to connect by any time."""
        return min((call.connects_by for call in self._calls), default=NEVER)

    def not_connected(self, now: float) -> list[Call]:
        """The calls that are to be connected by now, if they are still under way; each of them once."""
        calls = [call for call in self._calls if now >= call.connects_by]
        for call in calls:
            call.connects_by = NEVER
        return calls

    def free_at(self, now: float) -> float:
        """When there may be a place, if no call returns before."""
        if len(self) < self.most and (young := self._young(now)):
            return young[-1].made_at + self.YOUNG_S
        return now + self.TRY_AGAIN_S


class Allowance:
    """How many calls may be made in a second, all sessions together."""

    # A probe costs 0.1 ms of CPU with all that is around it, so 350 a second are 4 % of a core. If a thousand prefill
    # ranks lose a thousand decode ranks, each of these gets 350 a second, too. A rack of 64 is probed at once.
    PER_S = 350.0
    AT_ONCE = 64.0
    AT_A_TIME = 16.0

    def __init__(self, interval_s: float, now: float) -> None:
        self._interval_s = interval_s
        self._per_s = self.PER_S
        self._left = self.AT_ONCE
        self._renewed_at = now
        self.round_s = 0.0  # how long it takes to probe all blacklisted sessions once

    def renew(self, now: float, blacklisted: int) -> None:
        """Adds the calls earned since the last time, and keeps as many as the daemon thread can use when it is late."""
        # More where the blacklist is so long that it could not be probed in INTERVAL otherwise.
        self._per_s = max(self.PER_S, 1.05 * blacklisted / self._interval_s)
        self.round_s = blacklisted / self._per_s
        earned = (now - self._renewed_at) * self._per_s
        self._left = min(max(self.AT_ONCE, 2.0 * self.batch_s() * self._per_s), self._left + earned)
        self._renewed_at = now

    def batch_s(self) -> float:
        """Sessions that fall due within so long are probed one after another, because a probe costs 10 to 30 % more if
        the thread has slept since the last sixteen.

        A heal is noticed later by that: with up to two hundred by half a millisecond for each session (350 a second),
        then by 0.1 s, and by 0.3 s at most where a round takes half a minute.
        """
        return max(min(self.round_s / 6.0, 0.1), min(self.round_s / 100.0, 0.3))

    def left(self) -> int:
        return int(self._left)

    def spend(self) -> None:
        self._left -= 1.0

    def more_at(self) -> float:
        """When the next calls may be made."""
        return self._renewed_at + (self.AT_A_TIME - self._left) / self._per_s
