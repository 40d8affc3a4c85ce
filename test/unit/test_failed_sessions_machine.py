"""Do the promises about the blacklist hold for any order of failures, registrations, requests and answers?

FAILED_SESSIONS_MACHINE_MINUTES=10 tells longer stories, other ones each time, until ten minutes are over, instead of
the same 60.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
import types
from typing import Any, Optional
from unittest import mock

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
from sglang.srt.disaggregation.mooncake import failed_sessions
from sglang.srt.disaggregation.mooncake.failed_sessions import (
    MIN_VERIFY_PAUSE_S,
    PROBATION_S,
    SLOW_VERIFICATION_S,
    STUCK_AFTER_S,
    VERIFICATION_LIMIT,
    Event,
    FailedSessions,
    Question,
    Verdict,
)
from sglang.srt.environ import FailedSessionProbeSettings
from virtual_prober import (
    DATA_PORT_DROPPED,
    DATA_PORT_REJECTED,
    HEALTHY,
    HUNG,
    REFUSING,
    Clock,
    Entry,
    Peer,
    VirtualProber,
)

MINUTES = float(os.environ.get("FAILED_SESSIONS_MACHINE_MINUTES", "0"))

# Small, so that a few sessions reach every limit.
INTERVAL_S, MAX_INTERVAL_S, IDLE_TIMEOUT_S = 4.0, 16.0, 100.0
CONCURRENCY, STUCK_LIMIT, STUCK_RESERVE = 2, 4, 1
A_MOMENT_S = 0.1
# Once three quarters of the places for probes are stuck, peers that hang are many, and a probe is stuck after this.
STUCK_IN_A_CROWD_AFTER_S = 0.1
# Beside six others a peer that has healed waits for three turns of those that hang, 60 s each, then for the longest
# hold and as long as an unreadable one must have answered.
BESIDE_OTHERS_S = 3 * 60.0 + INTERVAL_S + 2 * MAX_INTERVAL_S

SESSIONS = [f"decode:{port}" for port in range(1, 8)]
MALFORMED = "no session id"
PEERS = [
    HEALTHY,
    REFUSING,
    HUNG,
    DATA_PORT_REJECTED,
    DATA_PORT_DROPPED,
    Peer(takes=1.5, read_takes=3.0),  # answers, but late
    Peer(takes=2.5, memory=Verdict.UNANSWERED),
    Peer(memory=Verdict.CANNOT_TELL),
    Peer(memory=Verdict.UNREADABLE, read_takes=0.3),
]

ANSWERED = (True, Verdict.READABLE, Verdict.READABLE_LATE, Verdict.CANNOT_TELL, Verdict.UNREADABLE)


def some(sessions: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(sessions), min_size=1, unique=True)


@dataclasses.dataclass
class Known:
    """What an onlooker who takes notes knows of a session that was blacklisted and not registered since."""

    blacklisted: bool = True
    fresh: set[Question] = dataclasses.field(default_factory=set)  # asked since the newest failure
    failed_at: float = 0.0
    asked_for_at: float = 0.0
    answered_since: Optional[float] = None
    last_answer: Any = None
    relapses: int = 0
    hold_until: float = 0.0
    no_read_before: float = 0.0
    looks_in_vain: int = 0  # since it was last verified
    told_unreadable: bool = False  # in this outage
    used_at: Optional[float] = None
    still_unreadable: bool = False  # and that had the same outcome: a second quiet spell is to tell
    to_be_read_again: bool = False  # let in unverified: read once more before it is forgotten

    def quiet_since(self, now: float) -> bool:
        """True if it was let in and has been used long enough, or not at all for so long, that its past is past."""
        if self.blacklisted:
            return False
        if self.used_at is None:
            return now - self.asked_for_at >= IDLE_TIMEOUT_S
        return now - self.used_at >= PROBATION_S

    def fails_open_after(self) -> float:
        return min(INTERVAL_S * 2.0**self.relapses, MAX_INTERVAL_S)


class Onlooker:
    """Reads the log of what happened and says where a promise was broken."""

    def __init__(self, verify: bool, settle_s: float) -> None:
        self.verifying = verify
        self.settle_s = settle_s
        self.shut_down = False
        self.stuck: set[Question] = set()
        self.known: dict[Any, Known] = {}
        self.in_flight: dict[Any, Question] = {}
        self.put_on = self.recovered = self.dropped = self.registered = 0

    def blacklist(self) -> set[Any]:
        return {session for session, known in self.known.items() if known.blacklisted}

    def read(self, entry: Entry) -> None:
        self._note_stuck(entry.at)
        name = entry.what.name if isinstance(entry.what, Event) else entry.what
        getattr(self, f"_read_{name.lower()}")(entry, self.known.get(entry.session))

    def _note_stuck(self, now: float) -> None:
        for limit_s in [STUCK_AFTER_S, STUCK_IN_A_CROWD_AFTER_S]:
            if limit_s == STUCK_AFTER_S or len(self.stuck) >= 0.75 * CONCURRENCY:
                self.stuck.update(probe for probe in self._probes() if now - probe.asked_at >= limit_s - 0.001)

    def _probes(self) -> list[Question]:
        return [question for question in self.in_flight.values() if not question.verify]

    def _read_failed(self, entry: Entry, known: Optional[Known]) -> None:
        if known is None or known.quiet_since(entry.at):
            known = self.known[entry.session] = Known()
        elif not known.blacklisted:
            known.relapses += 1
            known.hold_until = entry.at + min(2.0 ** (known.relapses - 1), MAX_INTERVAL_S)
            known.told_unreadable = False
        known.blacklisted = True
        known.failed_at = known.asked_for_at = entry.at
        known.answered_since = known.last_answer = None
        known.fresh = set()

    def _read_registered(self, entry: Entry, known: Optional[Known]) -> None:
        self.registered += known is not None and known.blacklisted
        self.known.pop(entry.session, None)

    def _read_requested(self, entry: Entry, known: Optional[Known]) -> None:
        if known is None:
            return
        if known.quiet_since(entry.at):
            if not known.to_be_read_again:
                del self.known[entry.session]
        elif known.blacklisted:
            known.asked_for_at = entry.at
        elif known.used_at is None:
            known.used_at = entry.at

    def _read_probe(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, f"{entry.session} was asked, and is not blacklisted"
        assert known.blacklisted, f"{entry.session} was asked, and is not blacklisted"
        self._read_question(entry, known)
        young = [probe for probe in self._probes() if probe not in self.stuck]
        assert len(young) <= CONCURRENCY, f"{len(young)} probes are out that are not stuck"

    def _read_verification(self, entry: Entry, known: Optional[Known]) -> None:
        if known is not None:  # else its probation ends with this
            assert not known.blacklisted or entry.at >= known.no_read_before, (
                "read in Mooncake's cooldown: a core spins"
            )
            self._read_question(entry, known)

    def _read_question(self, entry: Entry, known: Known) -> None:
        assert entry.session != MALFORMED, "Mooncake was asked for what is no session id"
        assert not self.shut_down, f"{entry.session} was asked while the engine is being torn down"
        assert entry.session not in self.in_flight, f"two questions to {entry.session} at a time"
        self.in_flight[entry.session] = entry.detail
        known.fresh.add(entry.detail)

    def _read_answer(self, entry: Entry, known: Optional[Known]) -> None:
        question, answer = entry.detail
        self.in_flight.pop(entry.session, None)
        self.stuck.discard(question)
        if known is None or question not in known.fresh:
            return
        if not known.blacklisted:
            if answer is Verdict.UNREADABLE and self.verifying and not known.still_unreadable:
                known.still_unreadable, known.used_at = True, entry.at
            else:
                del self.known[entry.session]  # its quiet spell is over, and this was the last look at it
            return
        known.last_answer = answer
        if answer not in ANSWERED:
            known.answered_since = None
        elif known.answered_since is None:
            known.answered_since = entry.at
        if answer is Verdict.UNREADABLE:
            pause_s = max(MIN_VERIFY_PAUSE_S, min(10.0, 2.0**known.looks_in_vain) * (entry.at - question.asked_at))
            known.looks_in_vain += 1
            known.no_read_before = entry.at + pause_s - A_MOMENT_S

    def _read_recovered(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, f"{entry.session} was let in, and was not blacklisted"
        assert known.blacklisted, f"{entry.session} was let in, and was not blacklisted"
        assert known.answered_since is not None, f"{entry.session} was let in on no answer since its newest failure"
        answered_for = entry.at - known.answered_since
        assert answered_for >= self.settle_s - 0.001, f"{entry.session} was let in before it had settled"
        assert entry.at >= known.hold_until, f"{entry.session} was let in before its hold had passed"
        if entry.detail["unverified"] is not None:
            assert answered_for >= known.fails_open_after() - 0.001, f"{entry.session} was let in too early unverified"
        else:
            proofs = [Verdict.READABLE, Verdict.CANNOT_TELL] + [True] * (not self.verifying)
            assert known.last_answer in proofs, f"{entry.session} was let in after {known.last_answer}"
        known.blacklisted, known.used_at, known.still_unreadable = False, None, False
        known.to_be_read_again = entry.detail["unverified"] is not None
        known.looks_in_vain = known.looks_in_vain if known.to_be_read_again else 0
        self.recovered += 1

    def _read_dropped(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, f"{entry.session} was forgotten, and was not blacklisted"
        assert entry.at - known.asked_for_at >= IDLE_TIMEOUT_S - 0.001, f"{entry.session} was forgotten too early"
        del self.known[entry.session]
        self.dropped += 1

    def _read_blacklisted(self, entry: Entry, known: Optional[Known]) -> None:
        self.put_on += 1

    def _read_held(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, "held, and nothing is known of it"
        assert entry.at + entry.detail["hold_s"] == known.hold_until
        assert entry.detail["relapses"] == known.relapses

    def _read_unreadable(self, entry: Entry, known: Optional[Known]) -> None:
        assert known is not None, f"{entry.session} is told to be unreadable, and nothing is known of it"
        assert known.last_answer is Verdict.UNREADABLE
        assert not known.told_unreadable, "told more than once an outage"
        known.told_unreadable = True

    def _read_malformed(self, entry: Entry, known: Optional[Known]) -> None:
        assert entry.session == MALFORMED

    def _read_verification_off(self, entry: Entry, known: Optional[Known]) -> None:
        self.verifying = False

    def _read_shutdown(self, entry: Entry, known: Optional[Known]) -> None:
        self.shut_down = True


class BlacklistMachine(RuleBasedStateMachine):
    """Seven decode nodes and one prefill node."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = mock.patch.multiple(failed_sessions, STUCK_LIMIT=STUCK_LIMIT, STUCK_RESERVE=STUCK_RESERVE)
        self.limits.start()
        self.read = 0

    def teardown(self) -> None:
        self.limits.stop()

    @initialize(
        jitter=st.sampled_from([0.0, 0.5, 1.0]), verify=st.booleans(), settle_s=st.sampled_from([1.0, 1.0, 0.0])
    )
    def start(self, jitter: float, verify: bool, settle_s: float) -> None:
        self.onlooker = Onlooker(verify, settle_s)
        self.prober = VirtualProber(
            jitter=jitter,
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

    @rule(session=st.sampled_from(SESSIONS))
    def resume(self, session: str) -> None:
        self.prober.resume(session)

    @precondition(lambda self: self.prober.out)
    @rule(data=st.data())
    def some_answer_comes_now(self, data: st.DataObject) -> None:
        question = data.draw(st.sampled_from(sorted(self.prober.out, key=lambda question: question.session)))
        answer = st.sampled_from(list(Verdict)) if question.verify else st.booleans()
        self.prober.answer(question, data.draw(answer))

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
        blacklist = self.seen_blacklist()
        promised = {s: self.prober.clock.now + self.promised_s(self.onlooker.known[s]) for s in blacklist - {MALFORMED}}
        self.prober.run(max([*promised.values(), self.prober.clock.now]) - self.prober.clock.now)
        for session, at in promised.items():
            moments = [moment for moment, _ in self.prober.let_in(session)]
            assert moments, f"{session} healed and was not let in"
            assert moments[-1] <= at, f"{session} was let in {moments[-1] - at:.3f} s later than promised"

    @precondition(lambda self: not self.onlooker.shut_down)
    @rule(session=st.sampled_from(SESSIONS), peer=st.sampled_from([HEALTHY, DATA_PORT_REJECTED]))
    def one_answers_again(self, session: str, peer: Peer) -> None:
        """Beside others that hang, refuse and cannot be read it takes longer, but it takes turns with them."""
        self.prober.resume(session)
        self.prober.becomes(session, peer)
        if session not in self.seen_blacklist():
            self.prober.fail(session)
        until = self.prober.clock.now + BESIDE_OTHERS_S
        while session in self.seen_blacklist():
            self.prober.request(session)
            self.prober.run(5.0)
            assert self.prober.clock.now < until, f"{session} answers, and is not used while others hang"

    @precondition(lambda self: not self.onlooker.shut_down)
    @rule()
    def all_register(self) -> None:
        """Nothing of the past remains, once the last probe is back and the idle timeout is over."""
        for session in [*SESSIONS, MALFORMED]:
            self.prober.register(session)
        self.prober.run(61.0)
        self.prober.fail(SESSIONS[0], peer=REFUSING)  # no timer runs before
        self.prober.run(IDLE_TIMEOUT_S + 1.0)
        assert self.seen_blacklist() == set()
        of_the_last_one = 6
        assert reachable(self.prober.sessions) <= EMPTY + of_the_last_one, "it keeps what is over"

    @precondition(lambda self: self.prober.clock.now > 300.0 and not self.onlooker.shut_down)
    @rule()
    def the_manager_is_torn_down(self) -> None:
        """SGLang's threads go on with what they do; nobody is asked, and late answers do no harm."""
        self.prober.shut_down()

    def promised_s(self, known: Known) -> float:
        now = self.prober.clock.now
        gap_s = min(INTERVAL_S, 1.1 * min(0.5, max(0.25, 0.1 * (now - known.failed_at))))
        pause_s = min(known.no_read_before - now, gap_s + known.fails_open_after())
        settled_s = gap_s + self.onlooker.settle_s
        return max(settled_s, known.hold_until - now, pause_s) + A_MOMENT_S + A_MOMENT_S

    def seen_blacklist(self) -> set[Any]:
        """The blacklist as an onlooker knows it, after all that has happened until now."""
        self.prober.seen(Event.FAULT)
        for entry in self.prober.log[self.read :]:
            self.onlooker.read(entry)
        self.read = len(self.prober.log)
        return self.onlooker.blacklist()

    @invariant()
    def the_blacklist_is_what_the_onlooker_says(self) -> None:
        assert self.prober.sessions == self.seen_blacklist()

    @invariant()
    def nothing_is_tracked_but_the_blacklisted_and_those_on_probation(self) -> None:
        tracked = set(self.prober.sessions._tracked)
        assert self.seen_blacklist() <= tracked <= set(self.onlooker.known), "a record nobody needs stays for good"

    @invariant()
    def events_add_up(self) -> None:
        blacklisted = len(self.seen_blacklist())
        onlooker = self.onlooker
        gone = onlooker.recovered + onlooker.dropped + onlooker.registered
        assert onlooker.put_on == gone + blacklisted, "the metrics do not add up"

    @invariant()
    def limits_are_kept(self) -> None:
        out = self.prober.out
        assert len(out) == self.prober.sessions.in_flight() or self.onlooker.shut_down
        ages = [self.prober.clock.now - question.asked_at for question in out if not question.verify]
        assert len(ages) <= STUCK_LIMIT + CONCURRENCY, "more threads hang than are allowed"
        verifications = [self.prober.clock.now - question.asked_at for question in out if question.verify]
        assert len(verifications) <= VERIFICATION_LIMIT
        slow_after_s = SLOW_VERIFICATION_S - 0.001
        assert sum(age < slow_after_s for age in verifications) <= 1, "two peers are verified at a time"


def reachable(sessions: FailedSessions) -> int:
    """How many objects it keeps, its surroundings apart."""
    surroundings = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinMethodType, Clock)
    seen, found = set(), [sessions]
    while found:
        thing = found.pop()
        if id(thing) not in seen and not isinstance(thing, (str, int, float, *surroundings)):
            seen.add(id(thing))
            found += gc.get_referents(thing)
    return len(seen)


EMPTY = reachable(FailedSessions(FailedSessionProbeSettings(), clock=Clock()))


@pytest.mark.timeout(MINUTES * 60 + 600)
def test_every_promise_is_kept_in_every_story() -> None:
    until = time.monotonic() + MINUTES * 60
    while True:
        run_state_machine_as_test(
            BlacklistMachine,
            settings=settings(
                max_examples=60,
                stateful_step_count=60 if MINUTES else 40,
                derandomize=not MINUTES,  # the same stories each time, so that a run does not fail by chance
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
        if time.monotonic() >= until:
            return
