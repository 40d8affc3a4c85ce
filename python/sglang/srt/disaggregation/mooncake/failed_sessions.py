"""Which sessions are blacklisted, whom to ask next, and who may be let in again?

    (not tracked) --a transfer fails--> BLACKLISTED --answered, settled, verified--> PROBATION --quiet--> (not tracked)
                                          ^   |                                          |
                                          |   +--registered again / nobody asked for it--+--> (not tracked)
                                          +---------------- fails again -----------------+

No threads and no I/O: the clock is injected, and every method is called with ``session_lock`` held. Questions leave by
``take_due``, their answers come back by ``answered`` and ``verified``; ``events`` tells what happened.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
import random
import re
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Optional

from sglang.srt.environ import FailedSessionProbeSettings

# A refused probe costs 0.04 ms of CPU, so four a second are nothing; past 2.5 s the gap is a tenth of the outage. At
# most 0.5 s: with half of that and the settle time a request goes through 1.3 s after the heal, in the median. The gap
# counts from the moment a probe was sent: one that took 5 s to fail is followed after MIN_GAP_S.
MIN_GAP_S = 0.25
GAP_SHARE_OF_OUTAGE = 0.1
MAX_GAP_S = 0.5
GAP_JITTER = 0.1
# A probe costs 0.1 ms of CPU with all that is around it: 350 a second are 4 % of a core, and as many for each peer when
# a thousand prefill ranks lose a thousand decode ranks. A rack of 64 is asked at once, and after that 16 at a time.
PROBES_PER_S = 350.0
PROBES_AT_ONCE = 64.0
PROBES_AT_A_TIME = 16.0
# With many blacklisted, what falls due within this time is asked in one round, which costs as much as several probes.
LONGEST_ROUND_S = 0.1
# INTERVAL may be shorter than this, and must not make the loop spin.
LEAST_GAP_S = 0.01
# A live peer answers within 0.5 ms (p99), a dropped connection attempt ends after 5 s: 2 s tells them apart. Once as
# many are stuck as may be asked at a time, something large is wrong and most of the others will hang too: 0.1 s, two
# hundred times what a live peer takes, so that one that is well among hundreds that hang is asked in time.
STUCK_AFTER_S = 2.0
STUCK_AFTER_AMONG_MANY_S = 0.1
# Stuck probes, a thread each. The last places are for peers that were prompt the last time, as many before those for
# fresh failures.
STUCK_LIMIT = 1024
STUCK_RESERVE = 16
# A peer whose probes fail for so long may be there and know no probes: that is looked at then, and again after as long.
# A look costs as much as two more probes, so there are ten a second at most.
LISTEN_AFTER_S = 10.0
LISTEN_GAP_S = 0.1
# A transfer may take 30 s to fail (Mooncake's default), so twice that without a failure is a quiet spell; longer where
# a transfer may take longer.
PROBATION_S = 60.0
TRANSFER_TIMEOUT_S = 30.0
FIRST_HOLD_S = 1.0
# After a failed read Mooncake keeps the peer in a cooldown of 1.0 s, in which a read spins a core: stay out of it. A
# slow read spins one too, so the pause is as long as it took, then 2, 4, 8 and 10 times: the first may fail because TCP
# has not sent again yet, and is worth another soon.
MIN_VERIFY_PAUSE_S = 1.1
VERIFY_PAUSE_FACTOR = 10.0
# A peer whose process was gone can be read only after it has registered, and each failed look at it leaves Mooncake's
# lanes to it in a cooldown, so the pause grows with the time since it came back.
VERIFY_SHARE_OF_TIME_BACK = 0.5
# One verification at a time (a live peer's takes 3 ms), but one that is slow (a lane in its cooldown: 1 s, packets
# dropped: 30 s) lets another go beside it. A slow read spins a core, so they are few.
SLOW_VERIFICATION_S = 0.05
VERIFICATION_LIMIT = 4
# Sessions that one call handles, so that the lock is held for microseconds however long the blacklist is.
BATCH = 32
# With an idle timeout of days, whether a session is still wanted is looked at this often all the same: the entry for
# that look keeps what is known of a session that has registered since.
LONGEST_END_CHECK_S = 600.0
# Malformed session ids that are said, once each: what comes in from outside must not grow without a bound.
SAID_LIMIT = 1000

_SESSION_ID = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]):([1-9][0-9]{0,4})")
_NEVER = float("inf")
_in_set = set.__contains__  # looked up once: `in` runs for every chunk


def is_session_id(session: object) -> bool:
    """True for ``host:port``, brackets around an IPv6 address, port 1 to 65535: all that Mooncake parses rightly."""
    match = _SESSION_ID.fullmatch(session) if isinstance(session, str) else None
    return match is not None and int(match[1]) <= 65535


class Verdict(enum.Enum):
    """What a look at a peer's memory, right after it answered, has shown."""

    READABLE = "readable"
    READABLE_LATE = "readable after a wait"  # until one of the connections to it came back
    CANNOT_TELL = "cannot tell"  # no way to read, or no address: the answered handshake decides
    UNREADABLE = "unreadable"
    UNANSWERED = "unanswered"


class Event(enum.Enum):
    """What happened to a session, with the details in brackets. Logs and metrics listen."""

    BLACKLISTED = "blacklisted"  # relapses
    HELD = "held"  # hold_s, relapses
    UNREADABLE = "unreadable"  # why, outage_s; once an outage
    CUTS_SHORT = "cuts short"  # outage_s; once an outage
    RECOVERED = "recovered"  # outage_s, refused, unverified (the reason, or None)
    DROPPED = "dropped"  # idle_s, outage_s, refused
    MALFORMED = "malformed"
    VERIFICATION_OFF = "verification off"
    FAULT = "fault"  # error (a traceback)


@dataclasses.dataclass(eq=False)
class Question:
    """A probe or a verification under way. Its answer counts only for the generation it was asked in."""

    session: str
    generation: int
    asked_at: float
    verify: bool
    was_gone: bool = False  # of a verification: as _Session.was_gone
    listen: bool = False  # of a probe: if it is refused, does the peer take connections all the same?


class _Session:
    """What is known of a session that is blacklisted or on probation. Times are the injected clock's."""

    __slots__ = (
        "answered_since",  # first of the unbroken answers in this generation, or None
        "asked_at",
        "blacklisted",  # False: on probation
        "blacklisted_at",
        "due_at",
        "failed_at",
        "generation",
        "has_end_check",  # an entry in _end_checks
        "hold_until",
        "id",
        "late_since",  # first of the reads since it answers that had to wait, or None
        "listen_at",  # the first probe from then on listens
        "looks_in_vain",  # verifications that failed since it was last verified
        "prompt",  # the last probe in this generation was answered, or came back before it was stuck
        "refused",  # how often a request asked for it in vain
        "registration",  # on probation: what the peer had registered when it was let in
        "relapses",
        "requested_at",
        "still_unreadable",  # on probation: when it had lasted once, its memory could not be read
        "unreadable",  # why its memory could not be read in this outage, None if that was not found
        "used_at",  # on probation: when a request first used it, or None
        "uses",
        "verify_after",
        "was_gone",  # a probe in this outage was refused: its process may be another one now
    )

    def __init__(self, session: Any) -> None:
        self.id = session
        self.asked_at = 0.0
        self.looks_in_vain = 0
        self.relapses = 0
        self.verify_after = 0.0
        self.has_end_check = False

    def begin_outage(self, now: float, hold_s: float) -> None:
        self.blacklisted = True
        self.blacklisted_at = now
        self.hold_until = now + hold_s
        self.listen_at = now + LISTEN_AFTER_S
        self.refused = 0
        self.unreadable: Optional[str] = None
        self.was_gone = False

    def begin_generation(self, now: float, generation: int) -> None:
        """A transfer failed: what was answered before counts no more."""
        self.generation = generation
        self.failed_at = self.requested_at = now
        self.due_at = _NEVER
        self.answered_since: Optional[float] = None
        self.late_since: Optional[float] = None
        self.prompt = False

    def begin_probation(self, registration: object) -> None:
        self.blacklisted = False
        self.still_unreadable = False
        self.registration = registration
        self.due_at = _NEVER
        self.used_at: Optional[float] = None
        self.uses = 0


class FailedSessions(set[Any]):
    """The blacklist: SGLang's ``failed_sessions``, a set that hears its own changes.

    SGLang calls ``add``, ``discard``, ``remove``, ``clear`` and ``in``, our daemon thread the rest, all of them with
    ``session_lock`` held. Nothing here blocks. ``wake()`` is called when something fell due, ``on_removed(session)``
    when this class itself takes a session off the blacklist, and ``registration(session)`` gives the object that holds
    what its peer has registered, another one after each registration. ``sessions`` are on the blacklist from the
    start; at most ``stuck_limit`` probes (64 at least) hang at a time. A transfer fails within ``transfer_timeout_s``.
    """

    __slots__ = ("__dict__", "_tracked")  # a slot is found sooner than an entry of __dict__

    def __init__(
        self,
        settings: FailedSessionProbeSettings,
        sessions: Iterable[Hashable] = (),
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        wake: Callable[[], None] = lambda: None,
        on_removed: Callable[[Any], object] = lambda session: None,
        registration: Callable[[Any], object] = lambda session: None,
        stuck_limit: Optional[int] = None,
        transfer_timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> None:
        super().__init__()
        self.events: deque[tuple[Event, Any, dict[str, Any]]] = deque()
        self.verifying = settings.verify
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._wake = wake
        self._on_removed = on_removed
        self._registration = registration
        self._stuck_limit = stuck_limit or STUCK_LIMIT
        self._probation_factor = max(1.0, transfer_timeout_s / TRANSFER_TIMEOUT_S)
        self._unproven_limit = settings.concurrency - settings.concurrency // 4
        self._tracked: dict[Any, _Session] = {}
        self._generations = itertools.count(1)
        self._ties = itertools.count()  # orders heap entries of one moment
        self._schedule: list[tuple[float, int, _Session]] = []
        self._end_checks: list[tuple[float, int, _Session]] = []
        self._prompt: OrderedDict[_Session, None] = OrderedDict()  # lines for a free place
        self._unproven: OrderedDict[_Session, None] = OrderedDict()
        self._to_verify: OrderedDict[_Session, None] = OrderedDict()
        self._prompt_next = self._newest_next = True
        self._allowance = PROBES_AT_ONCE  # probes and verifications that may start now
        self._allowance_at = clock()
        self._listen_at = 0.0
        self._asked: dict[Any, Question] = {}
        self._young: dict[Question, bool] = {}  # in the order asked; True if to an unproven peer
        self._young_unproven = 0
        self._stuck = 0
        self._verifications: set[Question] = set()
        self._malformed_said: set[Any] = set()
        self._fault_said = False
        self.update(sessions)

    # What SGLang calls. The set itself changes first: a fault of ours leaves SGLang with a plain set.

    def add(self, session: Hashable) -> None:
        """A transfer to the session failed: a new generation, to be asked at once."""
        super().add(session)
        self._hear(self._failed, session)

    def discard(self, session: Hashable) -> None:
        """The session registered again: nothing known of it counts any more."""
        super().discard(session)
        self._hear(self._forget, session)

    def remove(self, session: Hashable) -> None:
        """As ``discard``; raises KeyError if the session is not blacklisted."""
        super().remove(session)
        self._hear(self._forget, session)

    def clear(self) -> None:
        """Forgets every session."""
        super().clear()
        self._tracked.clear()
        self._schedule.clear()
        self._end_checks.clear()
        for line in (self._prompt, self._unproven, self._to_verify):
            line.clear()
        self._wake()

    def pop(self) -> Any:
        """Removes and returns some session; raises KeyError if there is none."""
        session = super().pop()
        self._hear(self._forget, session)
        return session

    def update(self, *others: Iterable[Hashable]) -> None:
        """Adds every session of the others."""
        for session in itertools.chain(*others):
            self.add(session)

    def difference_update(self, *others: Iterable[Hashable]) -> None:
        """Discards every session of the others."""
        for session in list(itertools.chain(*others)):
            self.discard(session)

    def intersection_update(self, *others: Iterable[Hashable]) -> None:
        """Discards every session that is not in all of the others."""
        self.difference_update(set(self) - set(self).intersection(*others))

    def symmetric_difference_update(self, other: Iterable[Hashable]) -> None:
        """Discards the sessions that are in the other, and adds those that were only there."""
        other = set(other)
        only_there = other - set(self)
        self.difference_update(other)
        self.update(only_there)

    def __ior__(self, other: Any) -> FailedSessions:
        self.update(other)
        return self

    def __isub__(self, other: Any) -> FailedSessions:  # type: ignore[misc]
        self.difference_update(other)
        return self

    def __iand__(self, other: Any) -> FailedSessions:  # type: ignore[misc]
        self.intersection_update(other)
        return self

    def __ixor__(self, other: Any) -> FailedSessions:  # type: ignore[misc]
        self.symmetric_difference_update(other)
        return self

    # A copy is a plain set: what it hears is no news.

    def copy(self) -> set[Any]:
        """The sessions that are blacklisted now."""
        return set(self)

    __copy__ = copy

    def __reduce__(self) -> tuple[Any, ...]:
        return set, (list(self),)

    def __or__(self, other: Any) -> set[Any]:
        return set(self).union(other)

    def union(self, *others: Iterable[Hashable]) -> set[Any]:
        """The sessions that are blacklisted now, and all of the others."""
        return set(self).union(*others)

    def __contains__(self, session: object) -> bool:
        """True if the session is blacklisted. Notes that a request asked for it."""
        if session in self._tracked:
            self._hear(self._requested, session)
        return _in_set(self, session)

    # What the daemon thread calls.

    def take_due(self, due_by: float = _NEVER) -> list[Question]:
        """What to ask now, as far as it may start. Each question must come back in ``answered`` or ``verified``.

        What falls due later than ``due_by`` (by the clock) is left alone.
        """
        now = self._clock()
        self._note_stuck(now)
        self._end_idle_and_quiet(now)
        self._line_up_due(min(now, due_by))
        self._renew_allowance(now)
        questions: list[Question] = []
        while len(questions) < int(self._allowance):
            record = self._next_to_verify(now)
            verify = record is not None
            record = record or self._next_to_probe(now)
            if record is None:
                break
            questions.append(self._ask(record, now, verify))
        self._allowance -= len(questions)
        return questions

    def next_due_in(self) -> Optional[float]:
        """Seconds from a ``take_due`` until the next may have something to do, None while nothing is blacklisted."""
        if not len(self):
            return None
        now = self._clock()
        moments = [heap[0][0] for heap in (self._schedule, self._end_checks) if heap]
        moments += [question.asked_at + self._stuck_after_s() for question in itertools.islice(self._young, 1)]
        if self.waits_for_allowance():
            moments.append(self._allowance_at + (PROBES_AT_A_TIME - self._allowance) / self._probes_per_s())
        if self._to_verify:
            slow = (question.asked_at + SLOW_VERIFICATION_S for question in self._verifications)
            moments += [moment for moment in slow if moment > now]
        return max(0.0, min(moments) - now) if moments else None

    def waits_for_allowance(self) -> bool:
        """True if the last ``take_due`` left sessions in line because as many had been asked as may be in a second."""
        return self._allowance < 1.0 and bool(self._prompt or self._unproven or self._to_verify)

    def answered(self, question: Question, answered: bool, cut_short: bool = False) -> None:
        """A probe came back, ``answered`` if with rc 0, ``cut_short`` if by a peer that takes connections."""
        now = self._clock()
        prompt = self._free_place(question)
        record = self._still_asked_about(question, now)
        if record is None:
            return
        record.prompt = prompt or answered
        record.was_gone |= prompt and not answered
        if cut_short:
            record.listen_at = _NEVER  # said once
            self._tell(Event.CUTS_SHORT, record.id, outage_s=now - record.blacklisted_at)
        if answered:
            self._heard_from(record, now)
        else:
            self._not_heard_from(record, now)

    def verified(self, question: Question, verdict: Verdict, why: str = "") -> None:
        """A verification came back; ``why`` says what was wrong with an unreadable peer."""
        now = self._clock()
        self._free_place(question)
        record = self._still_asked_about(question, now)
        if record is None:
            return
        if not record.blacklisted:
            self._end_or_repeat_probation(record, now, verdict)
        elif verdict is Verdict.UNANSWERED:
            self._not_heard_from(record, now)
        elif verdict is Verdict.UNREADABLE:
            if record.unreadable is None:
                self._tell(Event.UNREADABLE, record.id, why=why, outage_s=now - record.blacklisted_at)
            record.unreadable = why
            record.verify_after = now + self._verify_pause_s(record, now, took_s=now - question.asked_at)
            self._schedule_next_probe(record, now)
        elif verdict is Verdict.READABLE_LATE and self._settles_again(record, now):
            record.answered_since = now
            self._heard_from(record, now)
        else:
            self._let_in(record, now, unverified=None)

    def lost(self, question: Question) -> None:
        """The answer of a question could not be taken in: its session is asked again."""
        now = self._clock()
        if self._asked.get(question.session) is question:
            self._free_place(question)
        record = self._tracked.get(question.session)
        if record is not None:
            self._schedule_at(record, now + MIN_GAP_S)

    def in_flight(self) -> int:
        """Probes and verifications under way, stuck ones included."""
        return len(self._asked)

    def stuck(self) -> int:
        """Probes under way that hang."""
        return self._stuck

    def most_stuck(self) -> int:
        """How many probes hang before hung peers take turns; what is left is for fresh failures and prompt peers."""
        return self._stuck_limit - 2 * STUCK_RESERVE

    # What was heard.

    def _hear(self, react: Callable[[Any], None], session: Any) -> None:
        try:
            react(session)
        except Exception:
            if not self._fault_said:
                self._fault_said = True
                self._tell(Event.FAULT, session, error=traceback.format_exc())
                self._wake()

    def _failed(self, session: Any) -> None:
        now = self._clock()
        record = self._tracked.get(session)
        if record is not None:
            self._to_verify.pop(record, None)
            if not record.blacklisted and self._is_past(record, now):
                record = None
        if record is None:
            record = self._tracked[session] = _Session(session)
            record.begin_outage(now, hold_s=0.0)
            self._tell(Event.BLACKLISTED, session, relapses=0)
        elif not record.blacklisted:
            record.relapses += 1
            hold_s = self._grown(FIRST_HOLD_S, record.relapses - 1)
            record.begin_outage(now, hold_s)
            self._tell(Event.BLACKLISTED, session, relapses=record.relapses)
            self._tell(Event.HELD, session, hold_s=hold_s, relapses=record.relapses)
        record.begin_generation(now, next(self._generations))
        self._check_end(record, now)
        if is_session_id(session):
            self._schedule_at(record, now)
        elif session not in self._malformed_said and len(self._malformed_said) < SAID_LIMIT:
            self._malformed_said.add(session)
            self._tell(Event.MALFORMED, session)
        self._wake()

    def _is_past(self, record: _Session, now: float) -> bool:
        """True if what is known of a session on probation counts no more."""
        # Up to SGLang 0.5.21 a registration of a session that is not blacklisted is not heard: it is seen here.
        return now >= self._ends_at(record) or self._registration(record.id) is not record.registration

    def _forget(self, session: Any) -> None:
        record = self._tracked.pop(session, None)
        if record is not None:
            self._leave_lines(record)
            if record.blacklisted:
                self._wake()  # what is told of the length of the blacklist has changed

    def _requested(self, session: Any) -> None:
        record = self._tracked[session]
        now = self._clock()
        if record.blacklisted:
            record.requested_at = now
            record.refused += 1
        elif now >= self._ends_at(record):  # this request tells: no timer runs for it
            self._probation_ends(record)
        else:
            record.uses += 1
            record.used_at = record.used_at or now

    def _tell(self, event: Event, session: Any, **details: Any) -> None:
        self.events.append((event, session, details))

    # Re-admission: settled, held long enough, verified.

    def _heard_from(self, record: _Session, now: float) -> None:
        if record.answered_since is None:
            record.answered_since = now
        settled_at = record.answered_since + self._settings.settle_s
        if now < settled_at:
            self._schedule_at(record, min(settled_at, now + self._settings.interval_s))
        elif now < record.hold_until:
            self._schedule_next_probe(record, now)
        elif not self.verifying:
            self._let_in(record, now, unverified=None)
        elif now >= self._opens_at(record) and (record.unreadable or record in self._to_verify):
            self._let_in(record, now, unverified=record.unreadable or "other verifications took all the time")
        elif now >= record.verify_after:
            self._line_up_to_verify(record, now)
        else:
            self._schedule_next_probe(record, now)

    def _not_heard_from(self, record: _Session, now: float) -> None:
        record.answered_since = record.late_since = None
        self._to_verify.pop(record, None)
        self._schedule_next_probe(record, now)

    def _settles_again(self, record: _Session, now: float) -> bool:
        """True for INTERVAL from its first read that waited for a lane: what a failed transfer has left on the other
        lanes lands up to 0.5 s after the first lane is free, and later on a slow link.
        """
        if record.late_since is None:
            record.late_since = now
        return self._settings.settle_s > 0 and now < record.late_since + self._settings.interval_s

    def _opens_at(self, record: _Session) -> float:
        """When a peer that goes on answering and cannot be verified is let in all the same."""
        assert record.answered_since is not None
        return record.answered_since + self._grown(self._settings.interval_s, record.relapses)

    def _grown(self, first_s: float, doublings: int) -> float:
        return min(first_s * 2.0 ** min(doublings, 64), self._settings.max_interval_s)

    def _let_in(self, record: _Session, now: float, unverified: Optional[str]) -> None:
        super().discard(record.id)
        self._on_removed(record.id)
        self._leave_lines(record)
        record.begin_probation(self._registration(record.id))
        if unverified is None:
            record.unreadable = None
            record.looks_in_vain = 0
        outage_s = now - record.blacklisted_at
        self._tell(Event.RECOVERED, record.id, outage_s=outage_s, refused=record.refused, unverified=unverified)

    def _verify_pause_s(self, record: _Session, now: float, took_s: float) -> float:
        pause_s = max(MIN_VERIFY_PAUSE_S, min(VERIFY_PAUSE_FACTOR, 2.0 ** min(record.looks_in_vain, 64)) * took_s)
        record.looks_in_vain += 1
        if record.was_gone and record.answered_since is not None:
            pause_s = max(pause_s, VERIFY_SHARE_OF_TIME_BACK * (now - record.answered_since))
        return pause_s

    def _probation_ends(self, record: _Session) -> None:
        # Once is no proof: a registration looks it up too (to 0.5.21), and the request that ends it has sent nothing.
        if record.uses < 2 or not (record.unreadable and self.verifying):
            self._forget(record.id)
        elif record not in self._to_verify:  # in use and healthy: can its memory still not be read?
            self._to_verify[record] = None
            self._wake()

    def _end_or_repeat_probation(self, record: _Session, now: float, verdict: Verdict) -> None:
        """Twice healthy and unreadable is a proof that reads prove nothing; once may be a blip of the data path."""
        if verdict is Verdict.UNREADABLE and self.verifying:
            if not record.still_unreadable:
                record.still_unreadable = True
                record.used_at, record.uses = now, 0
                self._check_end(record, now)
                return
            self.verifying = False
            self._tell(Event.VERIFICATION_OFF, record.id)
        self._forget(record.id)

    # The schedule.

    def _schedule_at(self, record: _Session, at: float) -> None:
        record.due_at = at  # an entry of another time is outdated
        heapq.heappush(self._schedule, (at, next(self._ties), record))

    def _schedule_next_probe(self, record: _Session, now: float) -> None:
        gap_s = min(max(MIN_GAP_S, GAP_SHARE_OF_OUTAGE * (now - record.failed_at)), MAX_GAP_S)
        gap_s = max(MIN_GAP_S, record.asked_at + gap_s - now)
        gap_s *= 1.0 + GAP_JITTER * (2.0 * self._jitter() - 1.0)
        at = now + max(LEAST_GAP_S, min(gap_s, self._settings.interval_s))
        if record.answered_since is not None:  # no later than the next moment at which an answer could let it in
            moments = (record.hold_until, record.verify_after, self._opens_at(record))
            at = min([at, *(moment for moment in moments if moment > now)])
        self._schedule_at(record, at)

    def _line_up_due(self, now: float) -> None:
        for _ in range(BATCH):
            if not self._schedule or self._schedule[0][0] > now:
                return
            at, _, record = heapq.heappop(self._schedule)
            if at == record.due_at and self._is_blacklisted(record) and record.id not in self._asked:
                record.due_at = _NEVER
                is_back = record.answered_since is not None
                line = self._prompt if is_back or record.prompt else self._unproven
                line[record] = None
                if is_back:
                    line.move_to_end(record, last=False)  # first in line

    def _leave_lines(self, record: _Session) -> None:
        for line in (self._prompt, self._unproven, self._to_verify):
            line.pop(record, None)

    def _line_up_to_verify(self, record: _Session, now: float) -> None:
        self._to_verify[record] = None  # where it is, if it is in line already
        self._schedule_at(record, now + self._settings.interval_s)  # asked meanwhile, if the line is long

    def _check_end(self, record: _Session, now: float) -> None:
        if not record.has_end_check:
            record.has_end_check = True
            at = min(self._ends_at(record), now + LONGEST_END_CHECK_S)
            heapq.heappush(self._end_checks, (at, next(self._ties), record))

    def _ends_at(self, record: _Session) -> float:
        """When it is forgotten if nothing happens: PROBATION_S after its first use, or when nobody asks for it."""
        if not record.blacklisted and record.used_at is not None:
            return record.used_at + PROBATION_S * self._probation_factor
        return record.requested_at + self._settings.idle_timeout_s

    def _end_idle_and_quiet(self, now: float) -> None:
        for _ in range(BATCH):
            if not self._end_checks or self._end_checks[0][0] > now:
                return
            _, _, record = heapq.heappop(self._end_checks)
            record.has_end_check = False
            if self._tracked.get(record.id) is not record:
                continue
            if now < self._ends_at(record):
                self._check_end(record, now)
            elif record.blacklisted:
                self._drop(record, now)
            else:
                self._probation_ends(record)

    def _drop(self, record: _Session, now: float) -> None:
        super().discard(record.id)
        self._forget(record.id)
        self._on_removed(record.id)
        idle_s, outage_s = now - record.requested_at, now - record.blacklisted_at
        self._tell(Event.DROPPED, record.id, idle_s=idle_s, outage_s=outage_s, refused=record.refused)

    def _is_blacklisted(self, record: _Session) -> bool:
        return record.blacklisted and self._tracked.get(record.id) is record

    # Allowance: what may start in a second.

    def _probes_per_s(self) -> float:
        """More for a blacklist that could not be asked in INTERVAL otherwise."""
        return max(PROBES_PER_S, 1.1 * len(self) / self._settings.interval_s)

    def _renew_allowance(self, now: float) -> None:
        per_s = self._probes_per_s()
        earned = (now - self._allowance_at) * per_s
        self._allowance = min(max(PROBES_AT_ONCE, LONGEST_ROUND_S * per_s), self._allowance + earned)
        self._allowance_at = now

    # Places: CONCURRENCY for young probes, STUCK_LIMIT for stuck ones, VERIFICATION_LIMIT for verifications.

    def _next_to_verify(self, now: float) -> Optional[_Session]:
        if len(self._verifications) >= VERIFICATION_LIMIT or any(
            now < question.asked_at + SLOW_VERIFICATION_S for question in self._verifications
        ):
            return None
        while self._to_verify:
            record, _ = self._to_verify.popitem(last=False)
            if record.id not in self._asked:  # else its answer lines it up again
                return record
        return None

    def _next_to_probe(self, now: float) -> Optional[_Session]:
        """Prompt peers (they answered or refused at once) and unproven ones (they may hang) take turns."""
        pick, other = self._next_prompt, self._next_unproven
        if not self._prompt_next:
            pick, other = other, pick
        record = pick(now) or other(now)
        self._prompt_next ^= record is not None
        return record

    def _next_prompt(self, now: float) -> Optional[_Session]:
        if self._prompt and len(self._young) < self._settings.concurrency and self._stuck < self._stuck_limit:
            return self._prompt.popitem(last=False)[0]
        return None

    def _next_unproven(self, now: float) -> Optional[_Session]:
        """The newest and the oldest in turn: a fresh failure is likeliest to be over, and nobody waits for ever."""
        if (
            not self._unproven
            or len(self._young) >= self._settings.concurrency
            or self._young_unproven >= self._unproven_limit
            or self._stuck >= self._stuck_limit - STUCK_RESERVE
        ):
            return None
        newest = self._newest_next
        if self._stuck >= self._stuck_limit - 2 * STUCK_RESERVE:
            if now - next(reversed(self._unproven)).failed_at >= STUCK_AFTER_S:
                return None
            newest = True
        self._newest_next = not newest
        return self._unproven.popitem(last=newest)[0]

    def _ask(self, record: _Session, now: float, verify: bool) -> Question:
        listen = not verify and now >= max(record.listen_at, self._listen_at)
        if listen:
            record.listen_at = now + LISTEN_AFTER_S
            self._listen_at = now + LISTEN_GAP_S
        question = Question(record.id, record.generation, now, verify, verify and record.was_gone, listen)
        record.asked_at = now
        record.due_at = _NEVER
        self._prompt.pop(record, None)
        self._unproven.pop(record, None)
        self._asked[record.id] = question
        if verify:
            self._verifications.add(question)
        else:
            self._young[question] = not record.prompt
            self._young_unproven += not record.prompt
        return question

    def _note_stuck(self, now: float) -> None:
        while self._young:
            question = next(iter(self._young))
            if now < question.asked_at + self._stuck_after_s():
                return
            self._young_unproven -= self._young.pop(question)
            self._stuck += 1

    def _stuck_after_s(self) -> float:
        """The age from which on a probe no longer counts against the limit of those under way."""
        return STUCK_AFTER_S if self._stuck < self._unproven_limit else STUCK_AFTER_AMONG_MANY_S

    def _free_place(self, question: Question) -> bool:
        """Frees what the question held; True if it came back before it was stuck."""
        del self._asked[question.session]
        if question.verify:
            self._verifications.remove(question)
        elif question in self._young:
            self._young_unproven -= self._young.pop(question)
        else:
            self._stuck -= 1
            return False
        return True

    def _still_asked_about(self, question: Question, now: float) -> Optional[_Session]:
        """The session, if the generation the question was asked in still stands; else a newer one is asked now."""
        record = self._tracked.get(question.session)
        if record is None:
            return None
        if record.generation != question.generation:
            self._schedule_at(record, now)
            return None
        return record
