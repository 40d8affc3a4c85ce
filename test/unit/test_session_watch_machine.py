"""Do the promises about the blacklist hold for any order of failures, registrations, requests, answers and reads?

SESSION_WATCH_MACHINE_MINUTES=10 tells longer stories, other ones each time, until ten minutes are over, instead of the
same 150.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
import types
from typing import Any, Optional

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.disaggregation.mooncake.probe_schedule import Call, Places
from sglang.srt.disaggregation.mooncake.session_states import PROBATION_S, READ_HANGS_S, Verdict
from sglang.srt.disaggregation.mooncake.session_watch import NO_PLACE_TO_READ, Event, SessionWatch
from sglang.srt.environ import FailedSessionProbeSettings
from virtual_prober import (
    DATA_PORT_DROPPED,
    DATA_PORT_REJECTED,
    HEALTHY,
    HUNG,
    READS_NEVER_END,
    REFUSING,
    Clock,
    Entry,
    Peer,
    VirtualProber,
)

MINUTES = float(os.environ.get("SESSION_WATCH_MACHINE_MINUTES", "0"))

# Small, so that a few sessions reach every limit.
INTERVAL_S, MAX_INTERVAL_S, IDLE_TIMEOUT_S, CONCURRENCY = 4.0, 16.0, 100.0, 2
A_MOMENT_S = 0.1
# The longest gap between two probes of a peer that does not answer, and the pauses after reads that failed.
GAP_S, LEAST_PAUSE_S, PAUSE_S = 0.55, 1.1, 1.21
# Beside six others, a peer that answers waits for so long in all, however many of them hang.
TURNS_S = 0.5
# Where calls cannot be ended, they hang for 60 s, and it needs a place up to four times.
TURNS_WHERE_NONE_IS_ENDED_S = 4 * 60.0

SESSIONS = [f"decode:{port}" for port in range(1, 8)]
MALFORMED = "no session id"
NO_PAGE = "Mooncake gave -1 when it was to register a page to read into"
BEGIN_HANGS = Peer(begin_takes=50.0)
TOO_SOON = "bytes of a failed transfer may still land"
WAITS = Peer(read_takes=0.2)  # for a connection to be free, whenever it is read
PEERS = [
    HEALTHY,
    REFUSING,
    HUNG,
    DATA_PORT_REJECTED,
    DATA_PORT_DROPPED,
    READS_NEVER_END,
    BEGIN_HANGS,
    WAITS,
    Peer(takes=1.5, read_takes=1.5),
    Peer(takes=2.5, falls_silent=True),
    Peer(memory=Verdict.CANNOT_TELL),
    Peer(memory=Verdict.CANNOT_TELL, why=NO_PAGE),
    Peer(memory=Verdict.READABLE_TOO_SOON),
    Peer(memory=Verdict.UNREADABLE, read_takes=0.3),
]


def some(sessions: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(sessions), min_size=1, unique=True)


@dataclasses.dataclass
class Known:
    """What an onlooker who takes notes knows of a session that was blacklisted and not registered since."""

    blacklisted: bool = True
    fresh: set[Call] = dataclasses.field(default_factory=set)  # made since its newest failure or re-admission
    failed_at: float = 0.0
    asked_for_at: float = 0.0
    heard_of_at: float = 0.0  # its last call was made or came back
    answered_since: Optional[float] = None
    late_since: Optional[float] = None
    reads_since: Optional[float] = None
    proof: Any = None  # when and how it was last proved that it can be used
    unreadable: bool = False  # in this outage
    told_unreadable: bool = False  # and that was told
    was_gone: bool = False
    no_read_before: float = 0.0
    read_by: float = 0.0
    is_new: bool = True  # this is its first outage
    relapses: int = 0
    failed_first_uses: int = 0
    hold_s: float = 0.0
    hold_until: float = 0.0
    let_in_at: float = 0.0
    used_at: Optional[float] = None
    last_used_at: float = 0.0
    uses: int = 0
    was_doubtful: bool = False  # let in unverified, or though its reads had waited to the last
    reads_mislead: bool = False  # it worked though it was let in unverified
    bytes_since: Optional[float] = None  # it first settled again since its failure, because bytes could land
    was_too_soon: bool = False  # let in though bytes of a failed transfer could land
    bytes_mislead: bool = False  # it worked though it was let in too soon
    may_be_over: bool = False
    to_be_read_again: bool = False  # let in unverified: it is read once or twice more before it is forgotten

    def is_over(self, now: float) -> bool:
        """True if it was let in and has been used long enough, or not at all for so long, that its past is past."""
        if self.blacklisted:
            return False
        if self.used_at is None:
            return now >= self.asked_for_at + IDLE_TIMEOUT_S
        return now >= self.used_at + PROBATION_S

    def fails_open_after(self) -> float:
        return min(INTERVAL_S * 4.0**self.failed_first_uses, MAX_INTERVAL_S)

    def fails_again(self) -> None:
        """A transfer failed on probation: how its hold follows from what it has done since it was let in."""
        if self.uses > 1 or self.failed_first_uses > 1:
            self.reads_mislead = self.uses > 1 and self.was_doubtful
        self.bytes_mislead = self.uses > 1 and self.was_too_soon
        self.relapses += 1
        if self.uses < 2:
            self.failed_first_uses += 1
            self.hold_s = min(2.0 ** (self.failed_first_uses - 1), MAX_INTERVAL_S)
            return
        assert self.used_at is not None
        self.failed_first_uses = 0
        self.hold_s = min(2.0 ** (self.relapses - 1), INTERVAL_S / 2)
        if self.last_used_at - self.used_at >= 1.0:
            self.relapses, self.hold_s = 0, 0.0


class Onlooker:
    """Reads the log of what happened and says where a promise was broken."""

    def __init__(self, verify: bool, settle_s: float) -> None:
        self.verifying = verify
        self.settle_s = settle_s
        self.shut_down = False
        self.known: dict[Any, Known] = {}
        self.in_flight: list[Call] = []
        self.put_on = self.recovered = self.dropped = self.registered = 0

    def blacklist(self) -> set[Any]:
        return {session for session, known in self.known.items() if known.blacklisted}

    def young(self, now: float) -> list[Call]:
        return [call for call in self.in_flight if now - call.made_at < Places.YOUNG_S - 0.001]

    def note(self, entry: Entry) -> None:
        name = entry.what.name if isinstance(entry.what, Event) else entry.what
        getattr(self, f"_note_{name.lower()}")(entry, self.known.get(entry.session))

    # What happens to the prefill node.

    def _note_failed(self, entry: Entry, known: Optional[Known]) -> None:
        if known is None or (known.is_over(entry.at) and not known.to_be_read_again):
            known = self.known[entry.session] = Known()
        elif not known.blacklisted:
            known.unreadable = known.told_unreadable = known.was_gone = False
            known.may_be_over = known.is_over(entry.at)
        known.failed_at = known.asked_for_at = known.heard_of_at = entry.at
        known.answered_since = known.late_since = known.reads_since = known.proof = None
        known.fresh = set()
        known.bytes_since = None
        known.no_read_before = known.read_by = 0.0

    def _note_registered(self, entry: Entry, known: Optional[Known]) -> None:
        self.registered += known is not None and known.blacklisted
        self.known.pop(entry.session, None)

    def _note_requested(self, entry: Entry, known: Optional[Known]) -> None:
        if known is None:
            return
        if known.blacklisted:
            known.asked_for_at = entry.at
        elif known.is_over(entry.at):
            if not known.to_be_read_again:
                del self.known[entry.session]
        else:
            known.used_at = entry.at if known.used_at is None else known.used_at
            known.last_used_at = entry.at
            known.uses += 1

    def _note_shutdown(self, entry: Entry, known: Optional[Known]) -> None:
        self.shut_down = True

    # Calls.

    def _note_probe(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, f"{entry.session} was probed, and is not blacklisted"
        was_to_be_read = known.to_be_read_again and not self.verifying  # and that has just been switched off
        assert known.blacklisted or was_to_be_read, f"{entry.session} was probed, and is not blacklisted"
        self._note_call(entry, known)

    def _note_read(self, entry: Entry, known: Optional[Known]) -> None:
        assert self.verifying, "read though reads prove nothing"
        assert known is not None, f"{entry.session} was read, and is not blacklisted"
        if known.blacklisted:
            assert known.answered_since is not None, f"{entry.session} was read, and has not just answered"
            assert entry.at >= known.answered_since + self.settle_s - 0.001, f"{entry.session} was read too early"
            assert entry.at >= known.hold_until - 0.001, f"{entry.session} was read in its hold"
            assert entry.at >= known.no_read_before - 0.001, f"{entry.session} was read in Mooncake's cooldown"
            assert known.reads_since is None, f"{entry.session} was read while reads of it were pending"
        else:
            assert known.is_over(entry.at), f"{entry.session} was read in its probation"
            assert known.to_be_read_again, f"{entry.session} was read though it was verified"
        self._note_call(entry, known)

    def _note_call(self, entry: Entry, known: Known) -> None:
        assert entry.session != MALFORMED, "Mooncake was asked for what is no session id"
        assert not self.shut_down, f"{entry.session} was probed while the engine is being torn down"
        for call in self.in_flight:
            if call.session == entry.session:
                assert call.answered, f"two probes to {entry.session} at a time"
                assert call not in known.fresh, f"{entry.session} was called while it was read"
                assert call.end_tried_at > call.made_at, f"{entry.session} was called while it could be read"
        self.in_flight.append(entry.detail)
        known.fresh.add(entry.detail)
        known.heard_of_at = entry.at
        assert len(self.young(entry.at)) <= CONCURRENCY, "more young calls than are allowed"

    def _note_ended(self, entry: Entry, known: Optional[Known]) -> None:
        call, now = entry.detail, entry.at
        assert call in self.in_flight
        a_place_was_wanted = len(self.in_flight) == 2 * CONCURRENCY and now >= call.made_at + Places.YOUNG_S - 0.001
        was_to_read = call.read and call.answered and now >= call.made_at + READ_HANGS_S - 0.001
        is_void = known and call not in known.fresh and now >= known.failed_at + INTERVAL_S - 0.001
        assert a_place_was_wanted or was_to_read or is_void, f"the call to {entry.session} was ended for nothing"

    def _note_answer(self, entry: Entry, known: Optional[Known]) -> None:
        call, answered = entry.detail
        self.in_flight.remove(call)
        if known is None:
            return
        known.heard_of_at = entry.at
        if call not in known.fresh:
            return
        if not known.blacklisted:
            if not answered:
                del self.known[entry.session]  # it cannot be told any more whether it can be read
        elif not answered:
            known.was_gone |= entry.at - call.made_at < 1.0 and not call.ended
            known.answered_since = known.late_since = known.reads_since = None
        else:
            if known.answered_since is None:
                known.answered_since = entry.at
            if call.read:
                known.reads_since = entry.at
            elif not self.verifying:
                known.proof = entry.at, True

    def _note_shown(self, entry: Entry, known: Optional[Known]) -> None:
        call, verdict = entry.detail
        if known is None or call not in known.fresh:
            return
        if not known.blacklisted or known.reads_since is None:  # else it has fallen silent since
            return
        known.reads_since = None
        waits = {Verdict.READABLE_TOO_SOON: self._waits_for_bytes, Verdict.READABLE_LATE: self._settles_again}
        settles_again = waits.get(verdict)
        if verdict is Verdict.UNREADABLE:
            known.unreadable = True
            known.no_read_before = entry.at + LEAST_PAUSE_S
            known.read_by = entry.at + (max(PAUSE_S, INTERVAL_S) if known.was_gone else PAUSE_S)
        elif settles_again and settles_again(known, entry.at):
            known.answered_since = entry.at
        else:
            if verdict not in (Verdict.READABLE_LATE, Verdict.READABLE_TOO_SOON):
                known.late_since = None
            known.proof = entry.at, verdict

    def _waits_for_bytes(self, known: Known, now: float) -> bool:
        if known.bytes_since is None:
            known.bytes_since = now
        return self.settle_s > 0 and not known.bytes_mislead and now < known.bytes_since + 30.0

    def _settles_again(self, known: Known, now: float) -> bool:
        if known.late_since is None:
            known.late_since = now
        return self.settle_s > 0 and not known.reads_mislead and now < known.late_since + INTERVAL_S / 2

    # Events.

    def _note_blacklisted(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None
        relapses = entry.detail["relapses"]
        if known.may_be_over:  # nothing tells whether its last reads have begun its probation anew
            assert relapses in (0, 1)
            known.relapses, known.hold_s = relapses, float(relapses)
            known.failed_first_uses = relapses if known.uses < 2 else 0
            known.bytes_mislead = known.uses > 1 and known.was_too_soon
            if known.uses > 1:
                known.reads_mislead = known.was_doubtful  # or it begins anew, and is let in later
        elif not known.is_new:
            known.fails_again()
        assert relapses == known.relapses, f"{entry.session} is not held as it should be"
        known.blacklisted, known.is_new = True, False
        known.hold_until = entry.at
        self.put_on += 1

    def _note_held(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, "held, and nothing is known of it"
        assert entry.detail["hold_s"] == known.hold_s
        known.hold_until = entry.at + entry.detail["hold_s"]
        assert entry.detail["relapses"] == known.relapses

    def _note_recovered(self, entry: Entry, known: Optional[Known]) -> None:
        session, reason = entry.session, entry.detail["unverified"]
        assert known is not None, f"{session} was let in, and was not blacklisted"
        assert known.blacklisted, f"{session} was let in, and was not blacklisted"
        assert known.answered_since is not None, f"{session} was let in on no answer since its newest failure"
        answered_for = entry.at - known.answered_since
        assert answered_for >= self.settle_s - 0.001, f"{session} was let in before it had settled"
        assert entry.at >= known.hold_until - 0.001, f"{session} was let in before its hold had passed"
        if reason is None:
            assert known.proof is not None, f"{session} was let in without proof"
            at, proof = known.proof
            assert at == entry.at, f"{session} was let in on what was proved {entry.at - at} s ago"
            readable = (Verdict.READABLE, Verdict.READABLE_LATE, Verdict.CANNOT_TELL)
            assert (proof in readable) if self.verifying else proof, f"{session} was let in after {proof}"
        elif reason == NO_PAGE:
            assert known.proof == (entry.at, Verdict.CANNOT_TELL)
        elif reason == TOO_SOON:
            assert known.proof == (entry.at, Verdict.READABLE_TOO_SOON)
        else:
            assert self.verifying
            opens_after_s = self.settle_s if known.reads_mislead else known.fails_open_after()
            assert answered_for >= opens_after_s - 0.001, f"{session} was let in too early unverified"
            if reason == NO_PLACE_TO_READ:
                hang = [call for call in self.in_flight if call.read and entry.at >= call.made_at + READ_HANGS_S]
                assert len(hang) >= min(CONCURRENCY, 2), f"{session} was not read, though there were places"
            else:
                assert known.unreadable or self._hangs_since(session, known) <= entry.at - READ_HANGS_S + 0.001
        known.blacklisted, known.used_at, known.let_in_at = False, None, entry.at
        known.uses, known.asked_for_at = 0, entry.at
        known.was_too_soon = reason == TOO_SOON
        known.was_doubtful = reason not in (None, TOO_SOON) or known.late_since is not None
        known.may_be_over = False
        known.to_be_read_again = reason not in (None, TOO_SOON) and self.verifying
        known.fresh, known.reads_since, known.proof = set(), None, None
        self.recovered += 1

    def _hangs_since(self, session: str, known: Known) -> float:
        """When its reads were begun, or the call that is to begin them."""
        if known.reads_since is not None:
            return known.reads_since
        began = [call.made_at for call in self.in_flight if call in known.fresh and call.read and call.answered]
        assert began, f"{session} was let in because its reads hang, and it is not read"
        return began[0]

    def _note_dropped(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, f"{entry.session} was forgotten, and was not blacklisted"
        assert entry.at - known.asked_for_at >= IDLE_TIMEOUT_S - 0.001, f"{entry.session} was forgotten too early"
        del self.known[entry.session]
        self.dropped += 1

    def _note_unreadable(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, f"{entry.session} is told to be unreadable, and nothing is known of it"
        assert known.unreadable
        assert not known.told_unreadable, "told more than once an outage"
        known.told_unreadable = True

    def _note_malformed(self, entry: Entry, known: Optional[Known]) -> None:
        assert entry.session == MALFORMED

    def _note_verification_off(self, entry: Entry, known: Optional[Known]) -> None:
        assert self.verifying, "told more than once"
        assert known is not None, "reads of a session that nobody knows were taken for a proof"
        assert known.to_be_read_again
        assert entry.at >= known.let_in_at + 2 * PROBATION_S, "one probation was taken for two"
        self.verifying = False


class BlacklistMachine(RuleBasedStateMachine):
    """Seven decode nodes and one prefill node."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = 0

    @initialize(
        jitter=st.sampled_from([0.0, 0.5, 1.0]),
        verify=st.sampled_from([True, True, False]),
        settle_s=st.sampled_from([1.0, 1.0, 0.0]),
        calls_can_be_ended=st.booleans(),
    )
    def start(self, jitter: float, verify: bool, settle_s: float, calls_can_be_ended: bool) -> None:
        self.calls_can_be_ended = calls_can_be_ended
        self.onlooker = Onlooker(verify, settle_s)
        self.prober = VirtualProber(
            jitter=jitter,
            calls_can_be_ended=calls_can_be_ended,
            interval_s=INTERVAL_S,
            max_interval_s=MAX_INTERVAL_S,
            idle_timeout_s=IDLE_TIMEOUT_S,
            settle_s=settle_s,
            concurrency=CONCURRENCY,
            verify=verify,
        )

    @rule(sessions=some([*SESSIONS, MALFORMED]), peer=st.sampled_from(PEERS))
    def fail(self, sessions: list[str], peer: Peer) -> None:
        self.prober.fail(*sessions, peer=peer)

    @rule(peer=st.sampled_from([HUNG, BEGIN_HANGS, WAITS]), seconds=st.sampled_from([0.0, 0.5, 3.0]))
    def all_fail(self, peer: Peer, seconds: float) -> None:
        self.prober.fail(*SESSIONS, peer=peer)
        self.prober.run(seconds)

    @rule(sessions=some(SESSIONS), peer=st.sampled_from(PEERS))
    def change_peers(self, sessions: list[str], peer: Peer) -> None:
        for session in sessions:
            self.prober.becomes(session, peer)

    @rule(session=st.sampled_from([*SESSIONS, MALFORMED]))
    def register(self, session: str) -> None:
        self.prober.register(session)

    @rule(session=st.sampled_from([*SESSIONS, MALFORMED]))
    def request(self, session: str) -> None:
        refused = self.prober.request(session)
        assert refused == (session in self.seen_blacklist())

    @rule(sessions=some(SESSIONS), seconds=st.sampled_from([2, 10, 70, 140]))
    def requests_go_on(self, sessions: list[str], seconds: int) -> None:
        for _ in range(seconds):
            for session in sessions:
                self.prober.request(session)
            self.prober.run(1.0)

    @rule(session=st.sampled_from(SESSIONS))
    def resume(self, session: str) -> None:
        self.prober.resume(session)

    @precondition(lambda self: self.prober.out)
    @rule(data=st.data())
    def some_answer_comes_now(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(sorted(self.prober.out, key=lambda call: call.session)))
        self.prober.answer(call, data.draw(st.booleans()))

    @precondition(lambda self: self.prober.reads)
    @rule(data=st.data())
    def some_reads_end_now(self, data: st.DataObject) -> None:
        reads = sorted(self.prober.reads, key=lambda call: (call.session, call.made_at))
        self.prober.show(data.draw(st.sampled_from(reads)), data.draw(st.sampled_from(list(Verdict))))

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.2, 3.0, 10.0, 61.0, 101.0]))
    def time_passes(self, seconds: float) -> None:
        self.prober.run(seconds)

    @precondition(lambda self: not self.onlooker.shut_down)
    @rule()
    def everybody_heals(self) -> None:
        """Whoever answers from now on, and can be read, is let in within the promised time."""
        self.prober.run(0)
        for session in SESSIONS:
            self.prober.request(session)
            self.prober.resume(session)
        promised = {s: self.prober.clock.now + self.promised_s(s) for s in self.seen_blacklist() - {MALFORMED}}
        self.prober.run(max([*promised.values(), self.prober.clock.now]) - self.prober.clock.now)
        for session, at in promised.items():
            moments = [moment for moment, _ in self.prober.let_in(session)]
            assert session not in self.seen_blacklist(), f"{session} healed and was not let in"
            assert moments[-1] <= at, f"{session} was let in {moments[-1] - at:.3f} s later than promised"

    @precondition(lambda self: not self.onlooker.shut_down)
    @rule(session=st.sampled_from(SESSIONS), peer=st.sampled_from([HEALTHY, DATA_PORT_REJECTED, READS_NEVER_END]))
    def one_answers_again(self, session: str, peer: Peer) -> None:
        """Beside others that hang, refuse and cannot be read, be it that it can be read itself or not."""
        self.prober.resume(session)
        self.prober.becomes(session, peer)
        if session not in self.seen_blacklist():
            self.prober.fail(session)
            self.seen_blacklist()
        promised_s = self.promised_s(session)
        promised_s += TURNS_S if self.calls_can_be_ended else TURNS_WHERE_NONE_IS_ENDED_S
        if peer is not HEALTHY:
            promised_s += MAX_INTERVAL_S
        until = self.prober.clock.now + promised_s
        while session in self.seen_blacklist():
            assert self.prober.clock.now < until, f"{session} answers, and is not used while others do not"
            self.prober.request(session)
            self.prober.run(0.5)

    @precondition(lambda self: not self.onlooker.shut_down)
    @rule()
    def all_register(self) -> None:
        """Nothing of the past remains, once the last call is back and the idle timeout is over."""
        for session in [*SESSIONS, MALFORMED]:
            self.prober.register(session)
        self.prober.run(61.0)
        self.prober.fail(SESSIONS[0], peer=REFUSING)  # no timer runs before
        self.prober.run(IDLE_TIMEOUT_S + 1.0)
        assert self.seen_blacklist() == set()
        of_the_last_one = 6
        assert reachable(self.prober.watch) <= EMPTY + of_the_last_one, "it keeps what is over"

    @precondition(lambda self: self.prober.clock.now > 300.0 and not self.onlooker.shut_down)
    @rule()
    def the_manager_is_torn_down(self) -> None:
        """SGLang's threads go on with what they do; nobody is probed, and late answers do no harm."""
        self.prober.shut_down()

    def promised_s(self, session: str) -> float:
        """Within so long a session is let in that is well from now on."""
        known, now = self.onlooker.known[session], self.prober.clock.now
        call = self.prober.watch._in_flight.get(session)
        read_by = now + PAUSE_S if call is not None and call.ended else known.read_by
        settled_s = GAP_S + self.onlooker.settle_s
        return max(settled_s, known.hold_until - now, read_by - now) + 2 * A_MOMENT_S

    def seen_blacklist(self) -> set[Any]:
        """The blacklist as an onlooker knows it, after all that has happened until now."""
        self.prober.seen(Event.FAULT)
        for entry in self.prober.log[self.noted :]:
            self.onlooker.note(entry)
        self.noted = len(self.prober.log)
        return self.onlooker.blacklist()

    @invariant()
    def the_blacklist_is_what_the_onlooker_says(self) -> None:
        assert self.prober.sessions == self.seen_blacklist()

    @invariant()
    def nothing_is_tracked_but_the_blacklisted_and_those_on_probation(self) -> None:
        tracked = set(self.prober.watch.known)
        assert self.seen_blacklist() <= tracked <= set(self.onlooker.known), "a record nobody needs stays for good"

    @invariant()
    def events_add_up(self) -> None:
        blacklisted = len(self.seen_blacklist())
        onlooker = self.onlooker
        gone = onlooker.recovered + onlooker.dropped + onlooker.registered
        assert onlooker.put_on == gone + blacklisted, "the metrics do not add up"

    @invariant()
    def limits_are_kept(self) -> None:
        watch = self.prober.watch
        assert len(self.prober.out) == watch.in_flight() or self.onlooker.shut_down
        assert watch.in_flight() <= 2 * CONCURRENCY, "more threads hang than are allowed"
        assert len(self.onlooker.young(self.prober.clock.now)) <= CONCURRENCY

    @invariant()
    def nobody_is_unprobed_for_longer_than_interval(self) -> None:
        blacklist = self.seen_blacklist() - {MALFORMED}
        if self.onlooker.shut_down or not self.calls_can_be_ended:
            return
        for session in blacklist - {call.session for call in self.onlooker.in_flight}:
            unprobed_s = self.prober.clock.now - self.onlooker.known[session].heard_of_at
            assert unprobed_s <= INTERVAL_S + A_MOMENT_S, f"{session} may have healed, and nobody looks"


def reachable(watch: SessionWatch) -> int:
    """How many objects it keeps, its surroundings apart."""
    surroundings = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinMethodType, Clock)
    seen, found = set(), [watch]
    while found:
        thing = found.pop()
        if id(thing) not in seen and not isinstance(thing, (str, int, float, *surroundings)):
            seen.add(id(thing))
            found += gc.get_referents(thing)
    return len(seen)


EMPTY = reachable(SessionWatch(FailedSessionProbeSettings(), clock=Clock()))


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_every_promise_is_kept_in_every_story() -> None:
    until = time.monotonic() + MINUTES * 60
    while True:
        run_state_machine_as_test(
            BlacklistMachine,
            settings=settings(
                max_examples=150,
                stateful_step_count=60 if MINUTES else 40,
                derandomize=not MINUTES,  # the same stories each time, so that a run does not fail by chance
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
        if time.monotonic() >= until:
            return
