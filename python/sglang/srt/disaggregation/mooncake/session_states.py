"""Which states does one session go through, and what is to be done with it next?

    (not tracked) --a transfer fails--> BLACKLISTED --answered, settled, verified--> PROBATION --quiet--> (not tracked)
                                          ^   |                                          |
                                          |   +--registered again / nobody asked for it--+--> (not tracked)
                                          +---------------- fails again -----------------+

A method is told what happened and returns a decision, which the watch over all sessions carries out. No clock, no lock,
no heap, no I/O: ``now`` is seconds of a monotonic clock.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from sglang.srt.environ import FailedSessionProbeSettings

# A live peer's reads end after some milliseconds, refused ones within a second.
READ_HANGS_S = 1.0
# A transfer may take 30 s to fail (Mooncake's default), so twice that without a failure is a quiet spell.
PROBATION_S = 60.0
TRANSFER_TIMEOUT_S = 30.0
# A peer whose probes fail for so long may be there and know no probes: that is looked at then, and again after as long.
LISTEN_AFTER_S = 10.0


class ProbeAt(NamedTuple):
    """Probe the session then."""

    at: float


class ReadAt(NamedTuple):
    """Probe the session then, and read its memory if it answers."""

    at: float


class LetIn(NamedTuple):
    """Take the session off the blacklist, on probation; ``unverified`` is the reason if that is without proof."""

    unverified: Optional[str]


class Forget(NamedTuple):
    """Nothing that is known of the session counts any more."""


class SwitchVerificationOff(NamedTuple):
    """Reads prove nothing on this transport. Forget the session, too."""


Decision = ProbeAt | ReadAt | LetIn | Forget | SwitchVerificationOff | None  # None: what is under way decides


class Verdict(enum.Enum):
    """What reads of a peer's memory, begun right after it answered, have shown."""

    READABLE = "readable"
    READABLE_LATE = "readable after a wait"  # until a connection to it was free again
    READABLE_UNSEEN = "readable, perhaps after a wait"  # nobody looked in time: this process was starved
    CANNOT_TELL = "cannot tell"  # no way to read, or no address: the answered handshake decides
    UNREADABLE = "unreadable"


def backoff_s(first_s: float, doublings: int, longest_s: float) -> float:
    """``first_s`` doubled so many times, ``longest_s`` at most."""
    return min(first_s * 2.0 ** min(doublings, 64), longest_s)


@dataclasses.dataclass
class Rules:
    """What all sessions share: the settings, and what was learnt about reads on this transport."""

    settings: FailedSessionProbeSettings
    jitter: Callable[[], float]  # uniform in [0, 1)
    transfer_timeout_s: float
    verifying: bool
    round_s: float = 0.0  # in so many seconds all sessions can be probed once
    over_rdma: bool = False
    has_others: Callable[[], bool] = lambda: False  # some that have registered are not blacklisted
    next_turn_at: float = 0.0  # of those whose reads have failed

    @property
    def interval_s(self) -> float:
        """INTERVAL, which may be set so short that the daemon thread would spin."""
        return max(0.01, self.settings.interval_s)

    def turn_to_read_at(self, now: float, took_s: float) -> float:
        """When a peer may be read again whose reads have failed after so long: in INTERVAL at the latest.

        Over RDMA Mooncake has then tried to connect nine times, and each time a thread of its own stood still for a
        second, which others' transfers wait for. So beside others such peers take turns, and rest twice as long as they
        took: a request in every INTERVAL, as without us, would cost as much.
        """
        if not (self.over_rdma and self.has_others()):
            return now
        takes_s = min(took_s, 10.0)  # alone; longer if others' reads failed beside it
        turn_at = min(max(self.next_turn_at, now + 2.0 * takes_s), now + self.interval_s)
        self.next_turn_at = turn_at + 3.0 * takes_s
        return turn_at


class Session:
    """What is known of a session that is blacklisted or on probation."""

    __slots__ = (
        "answered_since",  # first of the unbroken answers in this generation, or None
        "blacklisted",  # False: on probation
        "blacklisted_at",
        "due_at",  # for the schedule: the only heap entry of this session that counts
        "failed_at",
        "failed_first_uses",  # how often in a row its first use has failed
        "generation",  # of its newest failure or re-admission: an answer asked for in another one does not count
        "has_end_check",  # for the schedule: an entry of its heap is for the end of this session
        "hold_s",  # how long it is held in this outage, or was in the last one
        "id",
        "last_used_at",  # on probation
        "late_since",  # first of the reads since it answers that had to wait, or None
        "listen_at",  # the first probe from then on looks whether the peer cuts probes short
        "probe_said",  # what the last probe since it failed has shown, in words; empty before it
        "probed_at",
        "read_again_at",  # since its last reads failed: when the next may come
        "read_next",  # the next probe is followed by reads
        "reads_mislead",  # it worked, though reads of its memory had failed or waited when it was let in
        "reads_said",  # as probe_said, of the last reads
        "reads_since",  # when the reads that are pending were begun, or None
        "refused",  # how often a request looked it up in vain
        "registration",  # on probation: what the peer had registered when it was let in
        "relapses",  # how often it has failed soon since it last worked for a second
        "requested_at",
        "rules",
        "still_unreadable",  # on probation: its memory could not be read at the end of a whole one
        "unreadable",  # why its memory could not be read in this outage, None if that was not found
        "used_at",  # on probation: when a request first used it
        "uses",
        "was_gone",  # a probe in this outage was refused: its process may be another one now
    )

    def __init__(self, session: object, rules: Rules, now: float) -> None:
        self.id: Any = session
        self.rules = rules
        self.relapses = self.failed_first_uses = 0
        self.reads_mislead = False
        self.has_end_check = False
        self.probed_at = self.due_at = 0.0
        self.read_next = False
        self.unreadable: Optional[str] = None
        self._begin_outage(now, hold_s=0.0)

    # Blacklisted: when is it probed?

    def failed(self, now: float, generation: int) -> Decision:
        """A transfer failed. What was answered before counts no more. On probation it may be a relapse."""
        if not self.blacklisted:
            self._begin_outage(now, self._hold_after_probation_s())
        self.generation = generation
        self.failed_at = self.requested_at = now
        self.answered_since: Optional[float] = None
        self.late_since: Optional[float] = None
        self.reads_since: Optional[float] = None
        self.probe_said = self.reads_said = ""
        return ProbeAt(now)

    def not_answered(self, now: float, refused: bool) -> Decision:
        """A probe was not answered; ``refused`` if the peer's machine said so at once."""
        self.was_gone |= refused
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
        gap_s = max(gap_s, self.rules.round_s)  # else what is due waits in a queue, and a fresh failure behind it
        gap_s = max(least_s, self.probed_at + gap_s - now)
        gap_s *= 1.0 + jitter * (2.0 * self.rules.jitter() - 1.0)
        return min(gap_s, self.rules.interval_s)

    def _probed_in_hold_at(self, now: float) -> float:
        """No answer before its hold ends can let it in: it is probed SETTLE before that, and once an INTERVAL."""
        return min(self.hold_ends_at() - self.rules.settings.settle_s, now + self.rules.interval_s)

    # Re-admission: answered, settled, held long enough, verified.

    def answered(self, now: float) -> Decision:
        """The peer answered a probe."""
        if self.answered_since is None:
            self.answered_since = now
        return self._next(now)

    def reading(self, now: float) -> Decision:
        """The peer answered a probe, and reads of its memory are pending."""
        if self.answered_since is None:
            self.answered_since = now
        self.reads_since = now
        return self._next(now)

    def read(self, now: float, verdict: Verdict, why: str) -> Decision:
        """Reads have ended; ``why`` says what was wrong with them, or why none could be made."""
        if not self.blacklisted and verdict is not Verdict.UNREADABLE:
            return Forget()  # it can be read, however late
        if self.reads_since is None:
            return None  # it has fallen silent since, or they have hung for too long
        took_s = now - self.reads_since
        self.reads_since = None
        if not self.blacklisted:
            return self._read_on_probation(now, verdict)
        if verdict is Verdict.UNREADABLE:
            self.unreadable = why
            if now >= self._opens_at():
                return LetIn(unverified=why)
            self.read_again_at = max(now + self._pause_s(now), self.rules.turn_to_read_at(now, took_s))
            return self._read_again(now)
        if self._settles_again(now, verdict):
            self.answered_since = now
            return self._next(now)
        return LetIn(unverified=why or None)

    def waits_for_turn(self, now: float) -> bool:
        """True if it answers and is to be read later."""
        return self.blacklisted and self.answered_since is not None and now < self.read_again_at

    def neighbour_is_readable(self, now: float) -> Decision:
        """Reads of another session of its machine have worked."""
        self.read_again_at = now
        return self._next(now)

    def _read_again(self, now: float) -> Decision:
        """Its next reads, or a probe where it is let in unverified before them or has INTERVAL to wait."""
        at = max(now, self.read_again_at)
        sooner = max(now, min(self._opens_at(), self.probed_at + self.rules.interval_s))
        return ReadAt(at) if at <= sooner else ProbeAt(sooner)

    def read_hangs(self, now: float) -> Decision:
        """The call that is to read its memory has not come back, a second after it was made and each second after."""
        if not self.blacklisted:
            return None
        if self.answered_since is not None and now >= self._opens_at():
            return LetIn(unverified=_hang_for(now - self.probed_at))
        return ReadAt(now + READ_HANGS_S)

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
        return ProbeAt(min(hangs_at, now + self.rules.interval_s))

    def _settles_again(self, now: float, verdict: Verdict) -> bool:
        """True for half of INTERVAL from its first read that waited for a connection: what a failed transfer has left
        on the others lands up to 0.5 s after the first is free, and up to 12 s on a slow link. Once if it only may have
        waited, and not where its reads are always slow: it worked though they had waited to the last.
        """
        may_be_late = verdict is Verdict.READABLE_UNSEEN and self.late_since is None
        # Over RDMA Mooncake gives a transfer up after nine attempts to connect anew, 9.6 to 10.6 s. Bytes landed up to
        # 2.2 s after the heal of an outage of less than that, and none after longer ones. Over TCP nobody gives up.
        can_land = not self.rules.over_rdma or now < self.failed_at + 12.0
        if not can_land or not (verdict is Verdict.READABLE_LATE or may_be_late):
            self.late_since = None
            return False
        if self.late_since is None:
            self.late_since = now
        longest_s = 0.0 if self.reads_mislead else self.rules.interval_s / 2.0
        return self.rules.settings.settle_s > 0 and now < self.late_since + longest_s

    def _pause_s(self, now: float) -> float:
        """From reads that failed to the next: longer than the 1.0 s for which Mooncake leaves a connection alone then.

        A peer whose process was gone can be read only after it has registered, and each look at it delays its first
        request by what is left of that second: so the pause grows with the time since it came back.
        """
        least_s, jitter, share_of_time_back = 1.1, 0.1, 0.5
        pause_s = max(least_s, self.rules.round_s) * (1.0 + jitter * self.rules.jitter())
        if self.was_gone and self.answered_since is not None:
            pause_s = max(pause_s, share_of_time_back * (now - self.answered_since))
        return min(pause_s, max(least_s, self.rules.interval_s))

    # Failing open: a peer that answers and cannot be verified is let in all the same, slowly.

    def _opens_at(self) -> float:
        """From then on it is let in unverified."""
        assert self.answered_since is not None
        return self.answered_since + self.opens_after_s()

    def opens_after_s(self) -> float:
        """So long must it have answered to be let in unverified: INTERVAL, after a relapse four times as long.

        Twice as long would let one whose data path is broken lose 17 requests in the first hour if INTERVAL is 5. Over
        RDMA what can be written can be read, and Mooncake leaves a device alone for 30 s after its port is back, to
        which an outage of some length is to be added: else a request is lost in that time.
        """
        settings = self.rules.settings
        first_s = max(settings.interval_s, 120.0 if self.rules.over_rdma else 0.0)
        if self.reads_mislead:
            return settings.settle_s
        return backoff_s(first_s, 2 * self.failed_first_uses, settings.max_interval_s)

    def _why_unverified(self, now: float) -> str:
        """Why it cannot be verified; empty if no reads have failed or hung yet."""
        if self.unreadable:
            return self.unreadable
        if self.reads_since is not None and now >= self.reads_since + READ_HANGS_S:
            return _hang_for(now - self.reads_since)
        return ""

    # Probation and hold.

    def let_in(self, now: float, generation: int, registration: object, unverified: Optional[str]) -> None:
        """It was taken off the blacklist, ``unverified`` for that reason. ``registration`` is what its peer has
        registered.
        """
        self.blacklisted = False
        self.requested_at = now  # nobody need have asked for it lately: its probation is as long as any
        self.generation = generation
        self.registration = registration
        self.reads_since = None
        self.still_unreadable = False
        self.uses = 0
        self.unreadable = unverified

    def requested(self, now: float) -> Decision:
        """A request looked it up: it was refused or, on probation, uses it."""
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
        """When it is forgotten if nothing happens: when nobody asks for it or, once it is used, at its probation's end,
        which is later where a transfer may take longer.
        """
        if not self.blacklisted and self.uses:
            return self.used_at + PROBATION_S * max(1.0, self.rules.transfer_timeout_s / TRANSFER_TIMEOUT_S)
        return self.requested_at + self.rules.settings.idle_timeout_s

    def probation_ends(self, now: float) -> Decision:
        """It was in use and healthy for a whole probation. If it is let in unverified: can it still not be read?

        One use proves nothing: up to SGLang 0.5.21 a registration tests ``in`` too, and the request that ends a
        probation has not transferred yet.
        """
        if self.uses < 2 or not (self.unreadable and self.rules.verifying):
            return Forget()
        if self.reads_since is None:
            self.reads_since = now
            return ReadAt(now)
        if now < self.reads_since + self.rules.interval_s:
            return None
        return self._read_on_probation(now, Verdict.UNREADABLE)

    def is_past(self, now: float, registration: object) -> bool:
        """True if it is on probation and that counts no more.

        Up to SGLang 0.5.21 a registration of a session that is not blacklisted is not heard: it is seen here.
        """
        return not self.blacklisted and (now >= self.ends_at() or registration is not self.registration)

    def _read_on_probation(self, now: float, verdict: Verdict) -> Decision:
        """Healthy and unreadable for two whole probations is a proof that reads prove nothing; once may be a blip."""
        if verdict is not Verdict.UNREADABLE or not self.rules.verifying:
            return Forget()
        if self.still_unreadable:
            return SwitchVerificationOff()
        self.still_unreadable = True
        self.relapses = self.failed_first_uses = 0
        self.reads_since = None
        self.requested_at = now
        self.uses = 0
        return None

    def _hold_after_probation_s(self) -> float:
        """For how long it is held after a failure on probation: 1, 2, 4, ... s if its first use has failed.

        SGLang works off the chunks for one session in order, so a second use says that the first went through: the
        failed one is the last. A peer that has worked for a second starts over. One that has worked for less is held
        for half of INTERVAL at most: then it is used more than with a loop that lets everybody in each INTERVAL.
        """
        first_s, settings = 1.0, self.rules.settings
        worked = self.uses > 1
        self.reads_mislead = worked and (self.unreadable is not None or self.late_since is not None)
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
        """Until then it is not let in, whatever it answers."""
        return self.blacklisted_at + self.hold_s

    def _begin_outage(self, now: float, hold_s: float) -> None:
        self.blacklisted = True
        self.blacklisted_at = now
        self.hold_s = hold_s
        self.listen_at = now + LISTEN_AFTER_S
        self.refused = 0
        self.read_again_at = 0.0
        self.unreadable = None
        self.was_gone: bool = False


def _hang_for(seconds: float) -> str:
    return f"reads of its memory have not ended for {seconds:.0f} s"
