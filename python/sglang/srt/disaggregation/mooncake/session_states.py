"""Which states does one session go through, and what is to be done with it next?

    (not tracked) --a transfer fails--> BLACKLISTED --answered, settled, verified--> PROBATION --quiet--> (not tracked)
                                          ^   |                                          |
                                          |   +--registered again / nobody asked for it--+--> (not tracked)
                                          +---------------- fails again -----------------+

A method is told what happened and returns a decision, which the watch over all sessions carries out. No clock, no lock,
no heap, no I/O: ``now`` is the time in seconds of a monotonic clock.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from sglang.srt.environ import FailedSessionProbeSettings

# A live peer's reads end after some milliseconds, refused ones within a second.
READ_HANGS_S = 1.0
# A transfer may take 30 s to fail (Mooncake's default), so it takes twice that to see that none fails.
PROBATION_S = 60.0
TRANSFER_TIMEOUT_S = 30.0
# After so long without an answer, and then as often, we look whether the peer is up and only its Mooncake is too old.
LISTEN_AFTER_S = 10.0


class ProbeAt(NamedTuple):
    """Probe the session at this time."""

    at: float


class ReadAt(NamedTuple):
    """Probe the session at this time, and read its memory if it answers."""

    at: float


class LetIn(NamedTuple):
    """Take the session off the blacklist, on probation; ``unverified`` is the reason if it could not be verified."""

    unverified: Optional[str]


class Forget(NamedTuple):
    """Drop all that is known of the session."""


class SwitchVerificationOff(NamedTuple):
    """Reads prove nothing on this transport: make no more of them. Forget the session, too."""


Decision = ProbeAt | ReadAt | LetIn | Forget | SwitchVerificationOff | None  # None: wait for what is under way


class Verdict(enum.Enum):
    """What reads of a peer's memory, begun right after it answered, have shown."""

    READABLE = "readable"
    READABLE_LATE = "readable after a wait"  # for a free connection
    READABLE_UNSEEN = "readable, perhaps after a wait"  # this process was too busy to look in time
    READABLE_TOO_SOON = "readable, but bytes of a failed transfer may still land"  # the kernel sends them again
    CANNOT_TELL = "cannot tell"  # there is no way to read, or no address is known: the answered probe decides
    UNREADABLE = "unreadable"


def backoff_s(first_s: float, doublings: int, longest_s: float) -> float:
    """``first_s`` doubled so many times, ``longest_s`` at most."""
    return min(first_s * 2.0 ** min(doublings, 64), longest_s)


@dataclasses.dataclass
class Rules:
    """What all sessions share: the settings, and what was learnt about the transport."""

    settings: FailedSessionProbeSettings
    jitter: Callable[[], float]  # uniform in [0, 1)
    transfer_timeout_s: float
    verifying: bool
    round_s: float = 0.0  # how long it takes to probe all blacklisted sessions once
    over_rdma: bool = False
    has_others: Callable[[], bool] = lambda: False  # are there registered sessions that are not blacklisted?
    next_turn_at: float = 0.0  # to read a peer whose reads have failed

    @property
    def interval_s(self) -> float:
        """INTERVAL, but never so short that the daemon thread would spin."""
        return max(0.01, self.settings.interval_s)

    @property
    def loop_s(self) -> float:
        """In which a loop like SGLang's own lets every session in once: 30 s, or INTERVAL if that is longer."""
        return max(30.0, self.settings.interval_s)

    def turn_to_read_at(self, now: float, took_s: float, held_up: float) -> float:
        """When a peer whose reads failed after ``took_s`` may be read again: in INTERVAL at the latest.

        Over RDMA Mooncake tries to connect nine times before reads fail. Where its threads have to wait meanwhile,
        transfers to others wait, too. So where there are others, such peers take turns, with pauses of twice the time
        that the reads took. It costs others no more than a request in each INTERVAL, as there is without us. A thread
        was seen waiting for 55 to 90 % of the time if the peer's address had to be looked up, else for up to 18 %
        (emulated, where a handshake takes 0.1 s).
        """
        needs_no_pause = 1 / 3  # what reads that hold up others all the time do to them with these pauses
        if not self.over_rdma or held_up <= needs_no_pause or not self.has_others():
            return now
        takes_s = min(took_s, 10.0)  # it takes longer only beside other reads that fail
        turn_at = min(max(self.next_turn_at, now + 2.0 * takes_s), now + self.interval_s)
        self.next_turn_at = turn_at + 3.0 * takes_s  # the reads and their pause
        return turn_at


@dataclasses.dataclass(eq=False, slots=True)
class Session:
    """What is known of a session that is blacklisted or on probation."""

    id: Any
    rules: Rules
    blacklisted_at: float
    blacklisted: bool = True  # False: on probation
    generation: int = 0  # of its newest failure or re-admission: the answer to an earlier probe does not count
    failed_at: float = 0.0
    requested_at: float = 0.0
    refused: int = 0  # how many requests were refused
    # Probes.
    probed_at: float = 0.0
    probe_said: str = ""  # how the last one since its failure ended, in words; empty before that
    answered_since: Optional[float] = None  # first of the unbroken answers in this generation
    listen_at: float = 0.0  # from then on a probe may look whether the peer cuts probes short
    patient_at: float = 0.0  # from then on a probe may take its time to connect
    was_gone: bool = False  # a probe in this outage was refused: there may be a new process now
    # Reads.
    read_next: bool = False  # the next probe is followed by reads
    read_at: float = 0.0  # when it was to be read last
    read_again_at: float = 0.0  # when it may be read next, after reads that failed
    reads_since: Optional[float] = None  # when the reads that are pending were begun
    reads_said: str = ""  # as probe_said
    unreadable: Optional[str] = None  # why its memory could not be read in this outage
    reads_mislead: bool = False  # it worked, though its reads had failed or waited before it was let in
    late_since: Optional[float] = None  # when reads first had to wait, since it answers
    bytes_since: Optional[float] = None  # when it first settled again since its failure, because bytes could land
    is_too_soon: bool = False  # it is let in while bytes of a failed transfer may still land
    bytes_mislead: bool = False  # it worked, though it was let in while they could
    # Turns to be read.
    turn_at: float = 0.0  # when its machine may be read next, after reads that failed
    has_turn: bool = False  # a session of its machine could be read just now, so it does not wait for its turn
    machine_read_at: Optional[float] = None  # when reads of another one there first worked in this outage
    # Probation and hold.
    registration: object = None  # what the peer had registered when it was let in
    uses: int = 0
    used_at: float = 0.0  # when a request first used it
    last_used_at: float = 0.0
    still_unreadable: bool = False  # it was in use for a whole probation, and still could not be read
    hold_s: float = 0.0  # how long it is held in this outage or, on probation, was in the last one
    relapses: int = 0  # how often it has failed on probation since it last worked for a second
    failed_first_uses: int = 0  # how often in a row its first use has failed
    # For the schedule.
    due_at: float = 0.0  # a heap entry of this session with another time is outdated
    has_end_check: bool = False  # the heap has an entry for the end of this session

    # Blacklisted: when is it probed?

    def failed(self, now: float, generation: int) -> Decision:
        """A transfer failed. Earlier answers count no more. On probation it may be a relapse."""
        if not self.blacklisted:
            self._begin_outage(now, self._hold_after_probation_s())
        self.generation = generation
        self.failed_at = self.requested_at = now
        self.has_turn = False
        self.answered_since = self.late_since = self.reads_since = self.bytes_since = None
        self.probe_said = self.reads_said = ""
        return ProbeAt(now)

    def not_answered(self, now: float, refused: bool) -> Decision:
        """A probe was not answered; ``refused`` if it failed at once."""
        self.was_gone |= refused
        if not refused:
            self.listen_at = max(self.listen_at, now + LISTEN_AFTER_S)
        self.answered_since = self.late_since = self.reads_since = None
        return ProbeAt(max(now + self._gap_s(now), self._probed_in_hold_at(now)))

    def _gap_s(self, now: float) -> float:
        """Until the next probe of a peer that does not answer.

        A tenth of the outage, 0.25 s at least (a refused probe costs 0.04 ms of CPU, so four a second are nothing), 0.5
        s at most: with half of that and the settle time a request goes through 1.3 s after the heal, in the median.
        Counted from when the probe was sent: one that took 5 s to fail is followed after 0.25 s.
        """
        least_s, most_s, share_of_outage, jitter = 0.25, 0.5, 0.1, 0.1
        gap_s = min(max(least_s, share_of_outage * (now - self.failed_at)), most_s)
        gap_s = max(gap_s, self.rules.round_s)  # else due sessions queue up, and a new failure waits behind them
        gap_s = max(least_s, self.probed_at + gap_s - now)
        gap_s *= 1.0 + jitter * (2.0 * self.rules.jitter() - 1.0)
        return min(gap_s, self.rules.interval_s)

    def connects_by(self, now: float) -> float:
        """Until when a probe that is made now may take to connect: if it has not by then, it is ended.

        Packets that were dropped are sent again after a second, by Linux before 6.5 after 1, 3 and 7 s, and Mooncake
        gives up after 5 s; so the next probe notices a heal sooner, unless the blacklist is so long that it is far off.
        Within 0.3 s they have gone round the world. Should that take longer: a peer that has answered may take its
        time, and any other in the time in which a loop of 30 s would let it in.
        """
        round_trip_s = 0.3
        if not self.blacklisted or self.answered_since is not None or self.rules.round_s > 2.0 * round_trip_s:
            return math.inf
        if now >= max(self.patient_at, self.blacklisted_at + self.rules.loop_s):
            self.patient_at = now + self.rules.loop_s
            return math.inf
        return now + round_trip_s

    def _probed_in_hold_at(self, now: float) -> float:
        """As no answer lets it in before its hold ends, it is probed once in INTERVAL and SETTLE before that end."""
        return min(self.hold_ends_at() - self.rules.settings.settle_s, now + self.rules.interval_s)

    # Re-admission: answered, settled, held long enough, verified.

    def answered(self, now: float, reading: bool = False) -> Decision:
        """The peer answered a probe; ``reading``: reads of its memory are pending."""
        if self.answered_since is None:
            self.answered_since = now
        if reading:
            self.reads_since = now
        return self._next(now)

    def read(self, now: float, verdict: Verdict, why: str, held_up: float) -> Decision:
        """Reads have ended; ``why`` says why they failed, or why there were none. ``held_up`` is the share of
        their time for which transfers to others may have had to wait.
        """
        if not self.blacklisted and verdict is not Verdict.UNREADABLE:
            return Forget()  # reads do work, even if late
        if self.reads_since is None:
            return None  # it has stopped answering since, or was let in while they hung
        began, took_s = self.reads_since, now - self.reads_since
        self.reads_since = None
        if not self.blacklisted:
            return self._read_on_probation(now, verdict)
        if verdict is Verdict.UNREADABLE:
            self.unreadable = why
            self.is_too_soon = False
            if now >= self._opens_at():
                return LetIn(unverified=why)
            is_reachable = self.machine_read_at is not None and self.machine_read_at >= began
            turn_at = now if is_reachable else self.rules.turn_to_read_at(now, took_s, held_up)
            self.turn_at = max(now + self._pause_s(now), turn_at)
            self.read_again_at = self.turn_at
            self.has_turn = False
            return self._read_again(now)
        too_soon = verdict is Verdict.READABLE_TOO_SOON
        if self._waits_for_bytes(now) if too_soon else self._settles_again(now, verdict):
            self.answered_since = now
            return self._next(now)
        self.is_too_soon = too_soon
        return LetIn(unverified=why or None)

    def waits_for_turn(self, now: float) -> bool:
        """True if it answers and waits to be read."""
        return self.blacklisted and self.answered_since is not None and now < self.read_again_at

    def is_read_next(self, now: float) -> bool:
        """True if it answers, and is read now or in its turn; not if it is held."""
        return self.answered_since is not None and self.read_next and self.due_at <= max(now, self.read_again_at)

    def wait_for_turn(self, now: float, at: float) -> Decision:
        """It may be read at this time: reads of another session on the same machine have failed, or that has left."""
        self.read_again_at = at
        return self._next(now)

    def needs_no_turn(self, now: float) -> Decision:
        """Reads of another session on the same machine have worked: it is read now."""
        self.has_turn = True
        return self.wait_for_turn(now, now)

    def neighbour_was_read(self, now: float) -> None:
        """Reads of another session on the same machine have worked: if its own are pending and fail, they are repeated
        soon. Once in an outage, because its reads may be what makes the other one fail again and again.
        """
        if self.machine_read_at is None:
            self.machine_read_at = now

    def _read_again(self, now: float) -> Decision:
        """When it is read next, or probed before: to be let in unverified, or because it is a whole INTERVAL off."""
        at = max(now, self.read_again_at)
        sooner = self.probed_at + self.rules.interval_s
        if self.unreadable:  # else nothing opens: it has not been read yet
            sooner = min(sooner, self._opens_at())
        return ReadAt(at) if at <= max(now, sooner) else ProbeAt(max(now, sooner))

    def read_hangs(self, now: float) -> Decision:
        """The call that is to read its memory has not returned; told after a second, and then each second."""
        if not self.blacklisted:
            return None
        if self.answered_since is not None and now >= self._opens_at():
            return LetIn(unverified=_hang_for(now - self.probed_at))
        return ReadAt(now + READ_HANGS_S)

    def cannot_read(self, now: float, why: str) -> None:
        """It is about to be probed, and no reads may follow. ``why`` is empty if they may in a moment; else it is tried
        again after a second, and if that goes on the session is let in unverified.
        """
        moment_s = 0.03  # in which calls are ended
        self.unreadable = self.unreadable or why or None
        self.read_again_at = now + (max(READ_HANGS_S, self.rules.round_s) if why else moment_s)

    def _next(self, now: float) -> Decision:
        """What to do with a peer that answers."""
        assert self.answered_since is not None
        settings = self.rules.settings
        ready_at = max(self.answered_since + settings.settle_s, self.hold_ends_at())
        if now < ready_at:
            in_hold_at = self._probed_in_hold_at(now)
            at = in_hold_at if now < in_hold_at else min(ready_at, now + self.rules.interval_s)
            return ReadAt(at) if at == ready_at and self.rules.verifying else ProbeAt(at)
        if not self.rules.verifying:
            return LetIn(unverified=None)
        if now >= self._opens_at() and (reason := self._why_unverified(now)):
            return LetIn(unverified=reason)
        if self.reads_since is None:
            return self._read_again(now)
        hangs_at = max(self._opens_at(), self.reads_since + READ_HANGS_S)
        # Reads mostly end at once: entries of the heap that are then outdated must not pile up for a long INTERVAL.
        return ProbeAt(min(hangs_at, now + min(max(10.0, self.rules.round_s), self.rules.interval_s)))

    def _waits_for_bytes(self, now: float) -> bool:
        """True if it must settle once more, because the kernel sends bytes to its host again: they would land on the
        memory of the next request.

        They do up to as long after the heal as the fault lasted. This goes on for as long as a loop would take to let
        it in at most, and not at all if that misleads: the last time it worked, though it was let in meanwhile.
        """
        if self.rules.settings.settle_s == 0 or self.bytes_mislead:
            return False
        if self.bytes_since is None:
            self.bytes_since = now
        return now < self.bytes_since + self.rules.loop_s

    def _settles_again(self, now: float, verdict: Verdict) -> bool:
        """True if it must settle once more, because its reads had to wait for a free connection.

        Bytes of a failed transfer on the other connections land up to 0.5 s after the first one is free, on a slow link
        up to 12 s. So this goes on for half of INTERVAL at most, happens once if the reads only may have waited, and
        not at all if they always wait: the last time it worked, though they had.
        """
        may_be_late = verdict is Verdict.READABLE_UNSEEN and self.late_since is None
        # Over RDMA Mooncake gives a transfer up after nine attempts to connect again, 9.6 to 10.6 s. After a shorter
        # outage bytes landed up to 2.2 s after the heal, after longer ones none. Over TCP a transfer is not given up.
        can_land = not self.rules.over_rdma or now < self.failed_at + 12.0
        if not can_land or not (verdict is Verdict.READABLE_LATE or may_be_late):
            self.late_since = None
            return False
        if self.late_since is None:
            self.late_since = now
        longest_s = 0.0 if self.reads_mislead else self.rules.interval_s / 2.0
        return self.rules.settings.settle_s > 0 and now < self.late_since + longest_s

    def _pause_s(self, now: float) -> float:
        """From reads that failed to the next: more than the 1.0 s for which Mooncake does not use a failed connection.

        A peer whose process is new can be read only after it has registered, and reads just before that delay its first
        request by what is left of that second. So the pause grows with the time since it came back.
        """
        least_s, jitter, share_of_time_back = 1.1, 0.1, 0.5
        pause_s = max(least_s, self.rules.round_s) * (1.0 + jitter * self.rules.jitter())
        if self.was_gone and self.answered_since is not None:
            pause_s = max(pause_s, share_of_time_back * (now - self.answered_since))
        return min(pause_s, max(least_s, self.rules.interval_s))

    # Failing open: a peer that answers and cannot be verified is let in all the same, after a while.

    def _opens_at(self) -> float:
        assert self.answered_since is not None
        return self.answered_since + self.opens_after_s()

    def opens_after_s(self) -> float:
        """How long it must have answered to be let in unverified: INTERVAL, four times as long after each first
        use in a row that failed (``failed_first_uses``; ``relapses`` also counts failures after a moment of work).

        If it were twice as long, a peer with a broken data path would lose 17 requests in the first hour with an
        INTERVAL of 5. Over RDMA it takes two minutes at least: reads there show what writes will do, and an outage of a
        port has to fit in with the 30 s after it for which Mooncake does not use the device. Else a request is lost.
        """
        settings = self.rules.settings
        first_s = max(settings.interval_s, 120.0 if self.rules.over_rdma else 0.0)
        if self.reads_mislead:
            return settings.settle_s
        return backoff_s(first_s, 2 * self.failed_first_uses, settings.max_interval_s)

    def _why_unverified(self, now: float) -> str:
        """Why it cannot be verified; empty as long as no reads have failed or hung."""
        if self.unreadable:
            return self.unreadable
        if self.reads_since is not None and now >= self.reads_since + READ_HANGS_S:
            return _hang_for(now - self.reads_since)
        return ""

    # Probation and hold.

    def let_in(self, now: float, generation: int, registration: object, unverified: Optional[str]) -> None:
        """It was taken off the blacklist; ``unverified`` is the reason if it could not be verified. ``registration`` is
        what its peer has registered.
        """
        self.blacklisted = False
        self.requested_at = now  # so that its probation is as long as any, however long ago the last request was
        self.generation = generation
        self.registration = registration
        self.reads_since = None
        self.still_unreadable = False
        self.uses = 0
        self.unreadable = None if self.is_too_soon else unverified

    def requested(self, now: float) -> Decision:
        """A request looked it up: it is refused or, on probation, uses the session."""
        if self.blacklisted:
            self.requested_at = now
            self.refused += 1
            return None
        if now >= self.ends_at():
            return self.probation_ends(now)
        if not self.uses:
            self.used_at = now
        self.last_used_at = now
        self.uses += 1
        return None

    def ends_at(self) -> float:
        """When it is forgotten: IDLE_TIMEOUT after the last request or, once it is used on probation, PROBATION_S after
        its first use, more where a transfer may take longer.
        """
        if not self.blacklisted and self.uses:
            return self.used_at + PROBATION_S * max(1.0, self.rules.transfer_timeout_s / TRANSFER_TIMEOUT_S)
        return self.requested_at + self.rules.settings.idle_timeout_s

    def probation_ends(self, now: float) -> Decision:
        """It was in use and healthy for a whole probation. If it was let in unverified: can it still not be read?

        One use proves nothing: up to SGLang 0.5.21 a registration tests ``in`` too, and the request that ends a
        probation has not transferred yet.
        """
        if self.uses < 2 or not (self.unreadable and self.rules.verifying):
            return Forget()
        if self.reads_since is None:
            self.reads_since = now
            return ReadAt(now)
        if now < self.reads_since + self.rules.interval_s or self.read_at < self.reads_since:  # it waits for a place
            return None
        return self._read_on_probation(now, Verdict.UNREADABLE)

    def is_past(self, now: float, registration: object) -> bool:
        """True if its probation is over, and it is not being read at its end.

        Up to SGLang 0.5.21 a session that registers while it is not blacklisted is not reported: it is noticed here.
        """
        is_over = now >= self.ends_at() and self.reads_since is None
        return not self.blacklisted and (is_over or registration is not self.registration)

    def _read_on_probation(self, now: float, verdict: Verdict) -> Decision:
        """Healthy and unreadable for two whole probations proves that reads prove nothing; once may be an accident."""
        if verdict is not Verdict.UNREADABLE or not self.rules.verifying:
            return Forget()
        if self.still_unreadable:
            return SwitchVerificationOff()
        self.still_unreadable = self.reads_mislead = True
        self.relapses = self.failed_first_uses = 0
        self.reads_since = None
        self.requested_at = now
        self.uses = 0
        return None

    def _hold_after_probation_s(self) -> float:
        """How long it is held after a failure on probation: 1, 2, 4, ... s if its first use failed.

        SGLang transfers the chunks for one session in order, so if there was a second use, the first one went through.
        A peer that has worked for a second starts over. One that has worked for less is held for half of INTERVAL at
        most: then it is in use more than with a loop that lets every session in once an INTERVAL.
        """
        first_s, settings = 1.0, self.rules.settings
        worked = self.uses > 1
        if worked or self.failed_first_uses > 1:  # a peer that has a bad moment is let in twice within it
            self.reads_mislead = worked and (self.unreadable is not None or self.late_since is not None)
            self.bytes_mislead = worked and self.is_too_soon
        if worked and self.last_used_at - self.used_at >= first_s:
            self.relapses = self.failed_first_uses = 0
            return 0.0
        self.relapses += 1
        if worked:
            self.failed_first_uses = 0
            return backoff_s(first_s, self.relapses - 1, settings.interval_s / 2.0)
        self.failed_first_uses += 1
        return backoff_s(first_s, self.failed_first_uses - 1, settings.max_interval_s)

    def hold_ends_at(self) -> float:
        """When it may be let in at the earliest."""
        return self.blacklisted_at + self.hold_s

    def _begin_outage(self, now: float, hold_s: float) -> None:
        self.blacklisted = True
        self.blacklisted_at = now
        self.hold_s = hold_s
        self.refused = 0
        self.listen_at = self.read_again_at = self.turn_at = 0.0
        self.unreadable = self.machine_read_at = None
        self.is_too_soon = self.was_gone = False


def _hang_for(seconds: float) -> str:
    return f"reads of its memory have not ended for {seconds:.0f} s"
