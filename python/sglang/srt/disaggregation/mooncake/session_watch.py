"""What is done with all sessions that are blacklisted or on probation? Carries out what each of them decides.

No threads and no I/O: the clock is injected, and every method is called with ``session_lock`` held. ``take_due`` gives
the calls to make and ``to_end`` those to end; ``answered`` and ``read`` are told how they ended. ``events`` says what
happened.
"""

from __future__ import annotations

import enum
import itertools
import random
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Optional

from sglang.srt.disaggregation.mooncake.failed_sessions import FailedSessions
from sglang.srt.disaggregation.mooncake.probe_schedule import NEVER, Allowance, Call, DueHeap, Places
from sglang.srt.disaggregation.mooncake.session_states import (
    LISTEN_AFTER_S,
    READ_HANGS_S,
    TRANSFER_TIMEOUT_S,
    Decision,
    Forget,
    LetIn,
    ProbeAt,
    ReadAt,
    Rules,
    Session,
    SwitchVerificationOff,
    Verdict,
)
from sglang.srt.environ import FailedSessionProbeSettings

# Sessions that one ``take_due`` handles, so that the lock is held for microseconds however long the blacklist is.
BATCH = 32
# To look whether a peer cuts probes short costs as much as two more probes, so three times a second is enough.
LISTEN_GAP_S = 0.3
# After the session whose turn it is, in case it has no more need of it, the others of its machine are read.
LATER_S = 1.0
# Why a session is let in unverified that was not read.
NO_PLACE_TO_READ = "earlier reads of its memory, or of others', have not ended"
# How many sessions are remembered for which something was logged: memory must not grow with what comes from outside.
SAID_LIMIT = 1000

_SESSION_ID = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]):([1-9][0-9]{0,4})")


def is_session_id(session: object) -> bool:
    """True for ``host:port``, brackets around an IPv6 address, port 1 to 65535: Mooncake misreads anything else."""
    match = _SESSION_ID.fullmatch(session) if isinstance(session, str) else None
    return match is not None and int(match[1]) <= 65535


class Event(enum.Enum):
    """What happened to a session; the comments name the details. The log and the metrics listen."""

    BLACKLISTED = "blacklisted"  # relapses
    HELD = "held"  # hold_s, relapses
    UNREADABLE = "unreadable"  # why, outage_s; once an outage
    CUTS_SHORT = "cuts short"  # outage_s; once an outage
    RECOVERED = "recovered"  # outage_s, refused, unverified (the reason, or None)
    DROPPED = "dropped"  # idle_s, outage_s, refused
    MALFORMED = "malformed"
    VERIFICATION_OFF = "verification off"
    FAULT = "fault"  # traceback


class Said:
    """For which sessions was something logged already? Remembers the latest SAID_LIMIT. Any thread."""

    def __init__(self) -> None:
        self._latest: OrderedDict[int, None] = OrderedDict()  # hashes: an id may be of any length

    def is_new(self, session: Hashable) -> bool:
        """True if the session is not remembered. From now on it is."""
        said = hash(session)
        is_new = said not in self._latest
        self._latest[said] = None
        self._latest.move_to_end(said)
        if len(self._latest) > SAID_LIMIT:
            self._latest.popitem(last=False)
        return is_new

    def forget(self, session: Hashable) -> None:
        self._latest.pop(hash(session), None)


class SessionWatch:
    """Listens to the blacklist, ``sessions``, and says whom to probe.

    Those in ``blacklisted`` are on it from the start. ``wake()`` is called when something is due, and
    ``on_removed(session)`` when a session is taken off here. ``registrations()`` returns what peers have registered, by
    session: a new object with each registration. A transfer fails within ``transfer_timeout_s``.
    """

    def __init__(
        self,
        settings: FailedSessionProbeSettings,
        blacklisted: Iterable[Hashable] = (),
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        wake: Callable[[], None] = lambda: None,
        on_removed: Callable[[Any], object] = lambda session: None,
        registrations: Callable[[], Mapping[Any, object]] = dict,
        transfer_timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> None:
        self.events: deque[tuple[Event, Any, dict[str, Any]]] = deque()
        self.known: dict[Any, Session] = {}
        self.rules = Rules(settings, jitter, transfer_timeout_s, settings.verify, has_others=self._has_others)
        self._clock = clock
        self._wake = wake
        self._on_removed = on_removed
        self._registrations = registrations
        self._generations = itertools.count(1)
        self._due = DueHeap()
        self.places = Places(settings.concurrency)
        self._allowance = Allowance(settings.interval_s, clock())
        self._in_flight: dict[Any, Call] = {}  # by session: one at a time
        self._to_end: list[Call] = []
        self._connecting_too_long: list[Call] = []
        self._neighbours: dict[str, dict[Session, None]] = {}  # by machine: sessions that take turns to be read
        self._listen_at = 0.0
        self._malformed_said = Said()
        self._fault_said = False
        self.sessions = FailedSessions(self)
        self.sessions.update(blacklisted)

    # What the blacklist tells.

    def failed(self, session: Any) -> None:
        """A transfer to the session failed: a new generation, to be probed at once."""
        now = self._clock()
        known = self.known.get(session)
        again = known is not None and known.blacklisted
        if known is not None and known.is_past(now, self._registrations().get(session)):
            self._forget(session)
            known = None
        if known is None:
            known = Session(session, self.rules, now)
        decision = known.failed(now, next(self._generations))
        self.known[session] = known  # only now, because ``look`` reads it without the lock
        if not again:
            self._tell(Event.BLACKLISTED, session, relapses=known.relapses)
            if known.hold_s:
                self._tell(Event.HELD, session, hold_s=known.hold_s, relapses=known.relapses)
        self._check_end(known, now)
        if is_session_id(session):
            self._carry_out(known, decision, now)
        elif self._malformed_said.is_new(session):
            self._tell(Event.MALFORMED, session)
        self._wake()

    def left(self, session: Any) -> None:
        """The session was taken off, because its peer registered again: all that is known of it is dropped."""
        known = self._forget(session)
        if known is None:
            return
        now = self._clock()
        waiting = self._neighbours_waiting(known, now)
        if waiting:  # perhaps for this one
            following = min(waiting, key=lambda other: other.read_at)
            self._carry_out(following, following.wait_for_turn(now, now), now)
        if waiting or known.blacklisted:
            self._wake()  # the gauge of blacklisted sessions has changed, too

    def cleared(self) -> None:
        """As ``left``, of every session."""
        self.known.clear()
        self._neighbours.clear()
        self._due.clear()
        self._wake()

    def requested(self, session: Any) -> None:
        """A request looked the session up. No timer runs for a probation: the first request after it ends it."""
        now = self._clock()
        known = self.known[session]
        decision = known.requested(now)
        if not known.blacklisted:
            self._carry_out(known, decision, now)
        if decision is not None:
            self._wake()

    def fault(self, session: Any, error: str) -> None:
        """A fault of our own in one of the methods above; ``error`` is the traceback."""
        if not self._fault_said:
            self._fault_said = True
            self._tell(Event.FAULT, session, traceback=error)
            self._wake()

    # What the daemon thread calls.

    def take_due(self, due_by: float = NEVER) -> list[Call]:
        """The calls to make now, in the order they fell due, as far as places and the allowance permit.

        ``answered`` must be called for each. What falls due later than ``due_by`` (by the clock) is left alone.
        """
        now = self._clock()
        due_by = min(due_by, now)
        self._connecting_too_long = self.places.not_connected(now)
        self._allowance.renew(now, len(self.sessions))
        self.rules.round_s = self._allowance.round_s
        room = min(self._allowance.left(), self.places.free_now(now))
        calls: list[Call] = []
        for _ in range(BATCH):
            first = self._due.first()
            if first is None or first.at > due_by:
                break
            known = first.session
            if first.is_outdated() or self.known.get(known.id) is not known:
                self._due.pop()
            elif first.is_end or known.id in self._in_flight:
                self._due.pop()
                self._come_up(known, first.is_end, now)
            elif len(calls) < room:
                self._due.pop()
                calls.append(self._call(known, now))
            else:
                break
        return calls

    def to_end(self) -> list[Call]:
        """The calls to end now: those that hang while their places are wanted, those that hang though a newer failure
        makes their answer void, and those that read and hang or are in the way of others.
        """
        now = self._clock()
        wanted = min(self._allowance.left(), self.places.concurrency)
        calls = self.places.oldest_hanging(now, self._due.due(now, wanted))
        calls += [call for call in self._to_end if call in self.places]
        self._to_end.clear()
        for call in calls:
            call.end_tried_at = now
            call.returns_by = min(call.returns_by, now + READ_HANGS_S)
        return calls

    def to_end_if_connecting(self) -> list[Call]:
        """The calls to end after the last ``take_due``, unless they have connected."""
        return self._connecting_too_long

    def next_due_in(self) -> Optional[float]:
        """Seconds from one ``take_due`` until the next is worth while, None while nothing is blacklisted."""
        now = self._clock()
        first = self._due.first()
        if first is None or (first.at > now and not len(self.sessions)):
            return None
        at = first.at
        is_call = not (first.is_end or first.is_outdated() or first.session.id in self._in_flight)
        if at <= now and is_call:  # it waits for a place or the allowance
            if not self._allowance.left():
                at = self._allowance.more_at()
            elif not self.places.free_now(now):
                return max(0.0, self.places.free_at(now) - now)
        if at <= now:
            return 0.0
        at = min(at, self.places.connects_by())
        return max(at - now, self._allowance.batch_s())

    def waits_for_allowance(self) -> bool:
        """True if the last ``take_due`` left due sessions, because the allowance is used up."""
        first = self._due.first()
        return not self._allowance.left() and first is not None and first.at <= self._clock()

    def answered(
        self,
        call: Call,
        answered: bool,
        refused: bool = False,
        cuts_short: bool = False,
        reading: bool = False,
        said: str = "",
    ) -> None:
        """A call returned: ``answered`` with rc 0 (``reading``: reads have begun, ``read`` tells of their end),
        ``refused`` at once, or ``cuts_short`` by a peer that accepts connections. ``said`` is all of it in words.
        """
        now = self._clock()
        known = self._come_back(call, now)
        if known is None:
            return
        known.probe_said = said
        if cuts_short:
            known.listen_at = NEVER  # said once
            self._tell(Event.CUTS_SHORT, known.id, outage_s=now - known.blacklisted_at)
        if not known.blacklisted:
            if not reading:
                self._carry_out(known, Forget(), now)
        elif not answered:
            self._carry_out(known, known.not_answered(now, refused), now)
        else:
            self._carry_out(known, known.answered(now, reading), now)

    def read(self, call: Call, verdict: Verdict, why: str = "", held_up: float = 1.0) -> None:
        """The reads that a call has begun have ended; ``why`` says why they failed. ``held_up`` is the share of
        their time for which transfers to others may have had to wait.
        """
        now = self._clock()
        if not self.waits_for(call):
            return
        known = self.known[call.session]
        known.reads_said = why or verdict.value
        if verdict is Verdict.UNREADABLE and known.blacklisted and known.unreadable is None:
            self._tell(Event.UNREADABLE, known.id, why=why, outage_s=now - known.blacklisted_at)
        if verdict is not Verdict.UNREADABLE:  # its machine can be reached again, so none there waits for its turn
            for other in self._neighbours_of(known):
                other.neighbour_was_read(now)
            for other in self._neighbours_waiting(known, now):
                self._carry_out(other, other.needs_no_turn(now), now)
        decision = known.read(now, verdict, why, held_up)
        if verdict is Verdict.UNREADABLE and isinstance(decision, (ProbeAt, ReadAt)):
            decision = self._hand_turn_over(known, decision, now)
        self._carry_out(known, decision, now)

    def _neighbours_of(self, known: Session) -> list[Session]:
        """The other sessions of its machine, over RDMA."""
        return [other for other in self._neighbours.get(_machine(known.id), ()) if other is not known]

    def _neighbours_waiting(self, known: Session, now: float) -> list[Session]:
        """Those that wait for their turn to be read. The sessions of the only machine do not wait for one another."""
        waiting = [other for other in self._neighbours_of(known) if other.waits_for_turn(now)]
        return waiting if waiting and self._has_other_machines(known) else []

    def _hand_turn_over(self, known: Session, decision: Decision, now: float) -> Decision:
        """Reads of a session have failed. In its machine's next turn the one is read that was read longest ago, and the
        others only if that one has no more need of it.
        """
        waiting = self._neighbours_waiting(known, now)
        if not waiting:
            return decision
        following = min(waiting, key=lambda other: other.read_at)
        for other in waiting:
            at = known.turn_at if other is following else known.turn_at + LATER_S
            self._carry_out(other, other.wait_for_turn(now, at), now)
        return known.wait_for_turn(now, known.turn_at + LATER_S)

    def _neighbour_is_read_until(self, known: Session, now: float) -> float:
        """Until when a session may not be read over RDMA, because another of its machine is being read or waits for its
        turn: one tells of all, and reads of all would hold up other machines, also those that are blacklisted by now. 0
        if it may be read now.
        """
        if not self.rules.over_rdma:
            return 0.0
        self._neighbours.setdefault(_machine(known.id), {})[known] = None
        if known.has_turn or not self._has_other_machines(known):
            return 0.0
        others = (other for other in self._neighbours_of(known) if other.blacklisted)
        until = max((self._goes_first_until(other, known, now) for other in others), default=0.0)
        return until if now < until else 0.0

    def _goes_first_until(self, other: Session, known: Session, now: float) -> float:
        """Until when a session waits for another one of its machine: for the turn that this has, or until it is read if
        it was read longer ago and, while it is read, for INTERVAL at most. Reads end after 10 s, and if they never do,
        a loop of 30 s would let the others in.
        """
        call = self._in_flight.get(other.id)
        begun_at = call.made_at if call and call.read else other.reads_since
        if begun_at is not None:
            return begun_at + self.rules.interval_s
        is_first = other.is_read_next(now) and other.read_at < known.read_at
        return max(other.turn_at, max(other.due_at, now + LATER_S) if is_first else 0.0)

    def _has_others(self) -> bool:
        return any(
            (known := self.known.get(session)) is None or not known.blacklisted
            for session in list(self._registrations())
        )

    def _has_other_machines(self, known: Session) -> bool:
        machine = _machine(known.id)
        return any(_machine(session) != machine for session in list(self._registrations()))

    def waits_for(self, call: Call) -> bool:
        """True if the result of a call's reads still counts. Any thread, with or without the lock."""
        known = self.known.get(call.session)
        return known is not None and known.generation == call.generation

    def lost(self, call: Call) -> None:
        """The answer of a call could not be processed: its session is probed again."""
        now = self._clock()
        self.places.free(call)
        if self._in_flight.get(call.session) is call:
            del self._in_flight[call.session]
        known = self.known.get(call.session)
        if known is not None and known.blacklisted:
            self._carry_out(known, known.not_answered(now, refused=False), now)

    def calls_lost(self) -> None:
        """After a fault of our own: calls that no thread makes were perhaps never made."""
        for call in list(self.places):
            if not call.thread:
                self.lost(call)

    def look(self) -> list[tuple[Session, Optional[Call]]]:
        """What is known of each session, and the call under way for it. Any thread, without the lock: some of it may
        change meanwhile.
        """
        return [(known, self._in_flight.get(known.id)) for known in list(self.known.values())]

    def in_flight(self) -> int:
        """Calls under way, those that hang included."""
        return len(self.places)

    # How a decision is carried out.

    def _carry_out(self, known: Session, decision: Decision, now: float) -> None:
        match decision:
            case ProbeAt(at):
                known.read_next = False
                self._due.probe_at(known, at)
            case ReadAt(at):
                known.read_next = True
                self._due.probe_at(known, at)
            case LetIn(unverified):
                call = self._in_flight.get(known.id)
                if not unverified or call is None or call.answered:
                    self._let_in(known, now, unverified)
                elif now >= call.made_at + READ_HANGS_S:  # else its answer decides in a moment
                    self._to_end.append(call)
            case Forget():
                self._forget(known.id)
            case None:
                self._check_end(known, now)
            case SwitchVerificationOff():
                self.rules.verifying = False
                self._tell(Event.VERIFICATION_OFF, known.id)
                self._forget(known.id)

    def _let_in(self, known: Session, now: float, unverified: Optional[str]) -> None:
        self.sessions.take_off(known.id)
        self._on_removed(known.id)
        known.due_at = NEVER
        known.let_in(now, next(self._generations), self._registrations().get(known.id), unverified)
        outage_s = now - known.blacklisted_at
        self._tell(Event.RECOVERED, known.id, outage_s=outage_s, refused=known.refused, unverified=unverified)

    def _forget(self, session: Any) -> Optional[Session]:
        known = self.known.pop(session, None)
        if known is not None:
            known.due_at = NEVER
            neighbours = self._neighbours.get(_machine(known.id), {})
            neighbours.pop(known, None)
            if not neighbours:
                self._neighbours.pop(_machine(known.id), None)
        return known

    def _drop(self, known: Session, now: float) -> None:
        """Forgets a session that no request wanted in IDLE_TIMEOUT."""
        self.sessions.take_off(known.id)
        self._forget(known.id)
        self._on_removed(known.id)
        idle_s, outage_s = now - known.requested_at, now - known.blacklisted_at
        self._tell(Event.DROPPED, known.id, idle_s=idle_s, outage_s=outage_s, refused=known.refused)

    def _come_up(self, known: Session, is_end: bool, now: float) -> None:
        """Its entry is due, for its end or while a call is under way."""
        if not is_end:
            self._look_at_call(known, self._in_flight[known.id], now)
        elif now < known.ends_at():
            self._check_end(known, now)
        elif known.blacklisted:
            self._drop(known, now)
        else:
            self._carry_out(known, known.probation_ends(now), now)

    def _look_at_call(self, known: Session, call: Call, now: float) -> None:
        """Has a call ended whose reads hang. A probe may hang, because it is answered as soon as the peer resumes; one
        from before a failure is ended INTERVAL after that.
        """
        if call.generation != known.generation and not call.answered:  # perhaps in a connection that is dead
            end_at = known.failed_at + self.rules.interval_s
            self._to_end += [call] if now >= end_at else []
            self._due.probe_at(known, max(end_at, now + READ_HANGS_S))
            return
        if not call.read:
            return
        if not call.answered or now < call.made_at + READ_HANGS_S:
            self._due.probe_at(known, now + READ_HANGS_S)
            return
        self._to_end.append(call)
        if call.generation == known.generation:
            self._carry_out(known, known.read_hangs(now), now)
        elif call.end_tried_at < call.made_at:
            self._due.probe_at(known, now + READ_HANGS_S)
        else:  # it cannot be ended, and only its reads are under way: the probe for a newer failure need not wait
            del self._in_flight[known.id]
            self._due.probe_at(known, now)

    def _check_end(self, known: Session, now: float) -> None:
        """Schedules the check of its end, or the next one if that has passed and reads are awaited.

        It is every ten minutes at least, also with an idle timeout of days: until then the entry keeps a session in
        memory that has registered since.
        """
        soonest_s, latest_s = self.rules.interval_s, 600.0
        ends_at = known.ends_at()
        self._due.check_end(known, min(ends_at if now < ends_at else now + soonest_s, now + latest_s))

    def _call(self, known: Session, now: float) -> Call:
        listen_at = max(known.listen_at, known.blacklisted_at + LISTEN_AFTER_S, self._listen_at)
        listen = not known.read_next and now >= listen_at
        if listen:
            known.listen_at = now + LISTEN_AFTER_S
            self._listen_at = now + LISTEN_GAP_S
        read = known.read_next and self.rules.verifying
        if read and known.blacklisted and (until := self._neighbour_is_read_until(known, now)):
            known.read_again_at = until
            read = False
        if read and (in_the_way := self._reads_in_the_way(known)):
            untried = [call for call in in_the_way if call.end_tried_at < call.made_at]
            self._to_end += [call for call in untried if now >= call.made_at + self.places.YOUNG_S]
            may_return = untried or any(call.ended and now < call.returns_by for call in in_the_way)
            known.cannot_read(now, "" if may_return else NO_PLACE_TO_READ)
            read = False
        call = Call(known.id, known.generation, now, read, listen, connects_by=known.connects_by(now))
        known.probed_at = now
        if read:
            known.read_at = now
            self._due.probe_at(known, now + READ_HANGS_S)
        self.places.take(call)
        self._allowance.spend()
        self._in_flight[known.id] = call
        return call

    def _reads_in_the_way(self, known: Session) -> list[Call]:
        """The calls that read, if they leave no place for its own. Each session may have two."""
        reading = [call for call in self.places if call.read]
        own = [call for call in reading if call.session == known.id]
        return own if len(own) > 1 else reading if len(reading) >= self.places.most_reading else []

    def _come_back(self, call: Call, now: float) -> Optional[Session]:
        """The session, if there is no newer generation than the call's; else None, and that one is probed now."""
        self.places.free(call)
        if self._in_flight.get(call.session) is not call:
            return None
        del self._in_flight[call.session]
        known = self.known.get(call.session)
        if known is None:
            return None
        if known.generation != call.generation:
            if known.blacklisted:
                self._carry_out(known, ProbeAt(now), now)
            return None
        known.due_at = NEVER
        return known

    def _tell(self, event: Event, session: Any, **details: Any) -> None:
        self.events.append((event, session, details))


def _machine(session: object) -> str:
    return str(session).rpartition(":")[0]
