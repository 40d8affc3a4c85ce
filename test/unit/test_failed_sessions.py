"""Which sessions are asked when, and which are let in again? Stories of ticks, one for each rule of DESIGN 4 and 5."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.disaggregation.mooncake import failed_sessions
from sglang.srt.disaggregation.mooncake.failed_sessions import (
    BATCH,
    PROBATION_S,
    VERIFICATION_LIMIT,
    Event,
    FailedSessions,
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
    Peer,
    VirtualProber,
)

D = "decode:7001"
OTHER = "other:7002"
UNREADABLE = "reading its memory gave -1"


def about(seconds: Any) -> Any:
    return pytest.approx(seconds, abs=0.01)


def many(host: str, number: int) -> list[str]:
    return [f"{host}:{port}" for port in range(1, number + 1)]


def out_at_once(prober: VirtualProber, kind: str, younger_than_s: float = float("inf")) -> int:
    """The most questions of a kind that were under way at one moment, none of them older than that."""
    answered_at = {entry.detail[0]: entry.at for entry in prober.seen("answer")}
    changes = []
    for asked in prober.seen(kind):
        end = min(answered_at.get(asked.detail, prober.clock.now), asked.at + younger_than_s)
        changes += [(asked.at, 1), (end, -1)]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


# When a peer is asked.


def test_a_session_is_probed_the_moment_it_fails() -> None:
    prober = VirtualProber()
    prober.run(5)
    prober.fail(D, peer=REFUSING)
    prober.run(0)
    assert prober.moments("probe", D) == [5.0]


def test_a_session_that_was_blacklisted_before_the_prober_came_is_probed_at_once() -> None:
    prober = VirtualProber(D)
    prober.becomes(D, HEALTHY)
    prober.run(2)
    assert prober.moments("probe", D)[0] == 0.0
    assert prober.let_in(D)


@pytest.mark.parametrize("interval_s", [30.0, 0.5])
@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.9), (0.5, 1.0), (1.0, 1.1)])
def test_the_gap_is_a_tenth_of_the_outage_but_a_quarter_second_at_least_and_half_a_second_at_most(
    jitter: float, factor: float, interval_s: float
) -> None:
    prober = VirtualProber(jitter=jitter, interval_s=interval_s)
    prober.fail(D, peer=REFUSING)
    prober.run(100)
    probes = prober.moments("probe", D)
    for at, following in itertools.pairwise(probes):
        gap_s = min(min(max(0.25, 0.1 * at), 0.5) * factor, interval_s)
        assert following - at == about(gap_s), f"asked {following - at} s after the probe at {at}"
    assert max(b - a for a, b in itertools.pairwise(probes)) == about(min(0.5 * factor, interval_s))


def test_a_probe_that_took_long_to_fail_is_followed_by_the_next_after_a_quarter_second() -> None:
    """Where packets are dropped each takes 5 s, and a heal between two is heard of the later the longer the gap is."""
    prober = VirtualProber()
    prober.fail(D, peer=Peer(answers=False, takes=5.0))
    prober.run(60)
    assert prober.moments("probe", D)[1:4] == about([5.25, 10.5, 15.75])


@pytest.mark.parametrize(("number", "per_s"), [(1, 0.1), (10, 1), (1000, 10)])
def test_a_probe_listens_every_ten_seconds_but_no_more_than_ten_do_in_a_second(number: int, per_s: float) -> None:
    """Each costs as much as three, and the prefill node needs its cores."""
    prober = VirtualProber()
    prober.fail(*many("refusing", number), peer=REFUSING)
    prober.run(110)
    listened = [entry.at for entry in prober.seen("probe") if entry.detail.listen]
    assert listened[0] >= 10
    assert 0.85 * 100 * per_s <= len(listened) <= 100 * per_s + 1


def test_that_a_peer_cuts_probes_short_is_told_once_an_outage() -> None:
    clock = Clock()
    sessions = FailedSessions(FailedSessionProbeSettings(), [D], clock=clock)

    def told_while_cut_short(seconds: float) -> list[Any]:
        end = clock.now + seconds
        while clock.now < end:
            for question in sessions.take_due():
                sessions.answered(question, False, cut_short=question.listen)
            clock.now += 0.25
        told = [event for event, _, _ in sessions.events if event is Event.CUTS_SHORT]
        sessions.events.clear()
        return told

    assert told_while_cut_short(9) == []
    assert told_while_cut_short(100) == [Event.CUTS_SHORT]
    sessions.add(D)
    assert told_while_cut_short(100) == [], "a request that was under way has failed in the same outage"
    sessions.discard(D)
    sessions.add(D)
    assert told_while_cut_short(100) == [Event.CUTS_SHORT]


@pytest.mark.parametrize(("number", "per_s"), [(100, 350), (1000, 350), (10_000, 367), (30_000, 1100)])
def test_many_that_refuse_share_350_probes_a_second_and_more_only_for_interval(number: int, per_s: float) -> None:
    """A probe costs 0.1 ms of CPU, and the prefill node needs its cores."""
    prober = VirtualProber()
    refusing = many("refusing", number)
    prober.fail(*refusing, peer=REFUSING)
    prober.run(100)
    moments = prober.moments("probe")
    for second in range(100):
        in_it = sum(second <= moment < second + 1 for moment in moments)
        assert in_it <= per_s + failed_sessions.PROBES_AT_ONCE + 1
    last_asked = {entry.session: entry.at for entry in prober.seen("probe")}
    assert min(last_asked[session] for session in refusing) >= 100 - 30 - 3, "longer than INTERVAL unprobed"


@pytest.mark.parametrize("interval_s", [30.0, 15.0, 5.0])
def test_what_may_be_asked_while_the_daemon_thread_sleeps_a_round_is_asked_after_it(interval_s: float) -> None:
    settings = FailedSessionProbeSettings(interval_s=interval_s)
    clock = Clock()
    sessions = FailedSessions(settings, many("refusing", 10_000), clock=clock)
    asked = 0
    while clock.now < interval_s:
        while questions := sessions.take_due():
            asked += len(questions)
            for question in questions:
                sessions.answered(question, False)
        clock.now += failed_sessions.LONGEST_ROUND_S
    assert asked >= 10_000, "many go unprobed for longer than INTERVAL"


def test_a_rack_of_64_is_asked_at_once_and_one_that_fails_then_too() -> None:
    prober = VirtualProber(concurrency=100)
    prober.fail(*many("refusing", 64), peer=REFUSING)
    prober.run(0.01)
    assert len(prober.seen("probe")) == 64
    prober.run(10)
    prober.fail(D, peer=HEALTHY)
    prober.run(0.1)
    assert prober.seen("probe", D)


def test_a_tiny_interval_does_not_make_the_prober_spin() -> None:
    prober = VirtualProber(interval_s=1e-6)
    prober.fail(D, peer=REFUSING)
    prober.run(1)
    assert len(prober.seen("probe")) <= 101


def test_a_new_failure_starts_the_quick_probes_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(400)
    prober.fail(D)
    prober.run(0.9)
    assert [at for at in prober.moments("probe", D) if at >= 400] == about([400.0, 400.25, 400.5, 400.75])


def test_no_timer_runs_while_nothing_is_blacklisted() -> None:
    prober = VirtualProber()
    assert prober.sessions.next_due_in() is None
    prober.fail(D, peer=HEALTHY)
    prober.run(0.5)
    assert not prober.sleeps_for_good()
    prober.run(1)
    assert prober.let_in(D)
    assert prober.sleeps_for_good()
    assert prober.sessions.next_due_in() is None


# Settled.


def test_a_healed_peer_is_let_in_once_it_has_answered_settle_apart() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(0.999)
    assert prober.request(D), "let in while bytes of the failed transfer may still land"
    prober.run(0.01)
    assert not prober.request(D)
    assert prober.moments("probe", D) == [0.0, 1.0]
    assert prober.removed == [D]


def test_after_an_answer_the_next_probe_comes_after_settle_however_long_the_gap_was() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(400)
    prober.becomes(D, HEALTHY)
    prober.run(31)
    first_answer = prober.moments("probe", D)[-2]
    assert prober.let_in(D) == [(about(first_answer + 1.0), None)]


def test_a_silence_between_two_answers_starts_the_settling_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(0.5)
    prober.becomes(D, REFUSING)
    prober.run(1)
    prober.becomes(D, HEALTHY)
    prober.run(0.9)
    assert prober.let_in(D) == [], "let in on answers with a silence between them"
    prober.run(0.2)
    assert prober.let_in(D)


def test_one_answer_is_enough_without_settle() -> None:
    prober = VirtualProber(settle_s=0.0)
    prober.fail(D, peer=HEALTHY)
    prober.run(0.01)
    assert prober.moments("probe", D) == [0.0]
    assert prober.let_in(D)


def test_a_hung_probe_that_is_answered_when_the_peer_resumes_counts_as_its_first_answer() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HUNG)
    prober.run(6)
    prober.resume(D)
    prober.run(2)
    assert prober.let_in(D) == [(about(7.0), None)]


# Generations: an answer that is older than the newest failure.


def test_an_answer_does_not_count_if_the_session_failed_again_while_it_was_out() -> None:
    prober = VirtualProber(settle_s=0.0)
    prober.fail(D, peer=Peer(takes=1.0))
    prober.run(0.5)
    prober.fail(D, peer=REFUSING)
    prober.run(2)
    assert prober.request(D), "let in on an answer from before the newest failure"


def test_an_answer_does_not_count_if_the_session_registered_and_failed_again_while_it_was_out() -> None:
    prober = VirtualProber(settle_s=0.0)
    prober.fail(D, peer=Peer(takes=1.0))
    prober.run(0.3)
    prober.register(D)
    prober.run(0.3)
    prober.fail(D, peer=REFUSING)
    prober.run(2)
    assert prober.request(D), "let in on an answer from before the newest failure"


def test_a_session_whose_stale_answer_came_is_asked_anew_at_once() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HUNG)
    prober.run(6)
    prober.fail(D)
    prober.run(1)
    assert prober.moments("probe", D) == [0.0], "two probes to one peer at a time"
    prober.resume(D)
    prober.run(0.1)
    assert prober.moments("probe", D) == [0.0, 7.0]


def test_a_verification_does_not_count_if_the_session_failed_again_while_it_was_out() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(read_takes=1.0))
    prober.run(1.5)
    assert prober.moments("verification", D) == about([1.0])
    prober.fail(D, peer=REFUSING)
    prober.run(5)
    assert prober.request(D), "let in on a read from before the newest failure"


def test_answers_from_before_a_failure_do_not_settle_it() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(0.9)
    prober.fail(D)
    prober.run(0.9)
    assert prober.request(D), "settled on an answer from before the newest failure"
    prober.run(0.2)
    assert not prober.request(D)


@pytest.mark.parametrize("forget", [FailedSessions.discard, FailedSessions.remove, lambda some, _: some.clear()])
def test_an_answer_to_a_session_that_registered_meanwhile_changes_nothing(forget: Any) -> None:
    prober = VirtualProber(settle_s=0.0, verify=False)
    prober.fail(D, peer=Peer(takes=1.0))
    prober.run(0.5)
    forget(prober.sessions, D)
    prober.run(2)
    assert prober.let_in(D) == [], "a recovery was counted that the registration had done"
    assert prober.sleeps_for_good()


# Verified.


def test_a_peer_that_answers_but_cannot_transfer_stays_out() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(29.9)
    assert prober.request(D), "let in though no transfer can work"


def test_a_peer_whose_memory_cannot_be_looked_at_is_let_in_on_its_answers() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(memory=Verdict.CANNOT_TELL))
    prober.run(1.1)
    assert prober.let_in(D) == [(about(1.0), None)]


def test_nobody_is_verified_when_verification_is_switched_off() -> None:
    prober = VirtualProber(verify=False)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(1.1)
    assert prober.let_in(D) == [(about(1.0), None)]
    assert prober.moments("verification") == []


def test_a_peer_that_falls_silent_at_its_verification_must_settle_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(memory=Verdict.UNANSWERED))
    prober.run(1.1)
    prober.becomes(D, HEALTHY)
    prober.run(5)
    silent_at = prober.moments("verification", D)[0]
    assert prober.let_in(D) == [(about(silent_at + 0.25 + 1.0), None)]


def test_a_peer_whose_data_path_comes_back_during_its_verification_settles_and_is_read_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(read_takes=3.0))
    prober.run(1.5)
    prober.becomes(D, HEALTHY)
    prober.run(3.4)
    assert prober.request(D), "let in while other lanes still carry bytes of the failed transfer"
    prober.run(1)
    assert prober.let_in(D) == [(about(1.0 + 3.0 + 1.0), None)]
    assert prober.moments("verification", D) == about([1.0, 5.0])


def test_a_peer_whose_reads_always_wait_is_let_in_after_interval() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(read_takes=0.2))
    prober.run(40)
    ((let_in_at, unverified),) = prober.let_in(D)
    assert unverified is None
    assert 1.2 + 30.0 <= let_in_at < 1.2 + 30.0 + 1.5


def test_without_settle_a_read_that_waited_is_enough() -> None:
    prober = VirtualProber(settle_s=0.0)
    prober.fail(D, peer=Peer(read_takes=3.0))
    prober.run(4)
    assert prober.let_in(D) == [(about(3.0), None)]


def test_after_a_silence_the_interval_of_a_peer_whose_reads_wait_begins_anew() -> None:
    prober = VirtualProber()
    waits = Peer(read_takes=0.2)
    prober.fail(D, peer=waits)
    prober.run(25)
    prober.becomes(D, REFUSING)
    prober.run(2)
    prober.becomes(D, waits)
    prober.run(15)
    assert prober.request(D), "let in on the time that it waited before its silence"


@pytest.mark.parametrize(
    ("took_s", "pauses_s"),
    [
        (0.001, [1.1, 1.1, 1.1, 1.1, 1.1, 1.1]),
        (0.5, [1.1, 1.1, 2.0, 4.0, 5.0, 5.0]),
        (1.5, [1.5, 3.0, 6.0, 12.0, 15.0, 15.0]),
    ],
)
def test_a_failed_verification_is_followed_by_a_pause_of_its_length_that_grows_tenfold(
    took_s: float, pauses_s: list[float]
) -> None:
    """And of 1.1 s at least: in the 1.0 s that Mooncake cools a peer down, a read would spin a core."""
    prober = VirtualProber(interval_s=300.0)
    prober.fail(D, peer=Peer(memory=Verdict.UNREADABLE, read_takes=took_s))
    prober.run(90)
    moments = prober.moments("verification", D)[:7]
    pauses = [following - (at + took_s) for at, following in itertools.pairwise(moments)]
    assert pauses == about(pauses_s)


def test_the_pause_after_a_failed_verification_goes_on_to_grow_in_the_next_outage() -> None:
    """Where packets to the data port are dropped a read spins a core for 30 s, outage after outage."""
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_DROPPED)
    for _ in range(8):
        while prober.request(D):
            prober.run(5)
        prober.fail(D)
    begins = len(prober.moments("verification", D))
    now = prober.clock.now
    prober.run(300)
    looks = len(prober.moments("verification", D)) - begins
    assert looks <= 1, f"{looks} reads of 30 s each in {prober.clock.now - now:.0f} s"


def test_a_peer_that_was_gone_and_cannot_be_read_is_looked_at_less_and_less_often_until_it_registers() -> None:
    """Each look leaves Mooncake's lanes in a cooldown, which would delay the first request after a registration."""
    prober = VirtualProber(interval_s=300.0)
    prober.fail(D, peer=REFUSING)
    prober.run(5)
    prober.becomes(D, DATA_PORT_REJECTED)
    prober.run(95)
    looks = prober.seen("verification", D)
    assert all(look.detail.was_gone for look in looks)
    assert len(looks) <= 12
    pauses = [b.at - a.at for a, b in itertools.pairwise(looks)]
    assert pauses[-1] > 15
    prober.register(D)
    prober.fail(D)
    prober.run(3)
    assert not prober.seen("verification", D)[-1].detail.was_gone


def test_a_peer_whose_data_port_opens_is_let_in_at_the_end_of_the_pause() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(10)
    failed_at = prober.moments("verification", D)[-1]
    prober.becomes(D, HEALTHY)
    prober.run(2)
    assert prober.let_in(D) == [(about(failed_at + 1.1), None)]


def test_verifications_of_peers_that_are_well_go_one_at_a_time() -> None:
    prober = VirtualProber()
    sessions = many("decode", 5)
    prober.fail(*sessions, peer=Peer(read_takes=0.04))
    prober.run(20)
    moments = prober.moments("verification")
    assert len(moments) == 5
    assert all(b - a >= 0.0399 for a, b in itertools.pairwise(moments)), f"two reads at a time: {moments}"
    assert [session for session in sessions if session in prober.sessions] == []


def test_a_slow_verification_lets_another_go_beside_it() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_DROPPED)
    prober.run(0.1)
    prober.fail(OTHER, peer=HEALTHY)
    prober.run(10)
    assert prober.moments("verification", D) == about([1.0])
    assert prober.let_in(OTHER) == [(about(1.1), None)], "nobody is healed while one peer's packets are dropped"


def test_a_rack_whose_first_read_waits_for_lanes_is_let_in_a_few_at_a_time() -> None:
    prober = VirtualProber()
    prober.fail(*many("rack", 24), peer=Peer(read_takes=1.0))
    while prober.clock.now < 12:
        prober.run(0.1)
        for session in {entry.session for entry in prober.log if entry.what == "verification"}:
            prober.becomes(session, HEALTHY)
    moments = prober.moments(Event.RECOVERED)
    assert len(moments) == 24
    assert moments[-1] <= 1.0 + 24 / VERIFICATION_LIMIT * 1.2 + 1.2


def test_while_no_more_verifications_may_hang_the_rest_wait_asleep_and_are_let_in_after_interval() -> None:
    prober = VirtualProber()
    prober.fail(*many("dropped", 8), peer=DATA_PORT_DROPPED)
    prober.fail(D, peer=HEALTHY)
    prober.run(40)
    assert out_at_once(prober, "verification") == VERIFICATION_LIMIT
    assert prober.moments("verification", D) == []
    assert prober.let_in(D) == [(pytest.approx(30.6, abs=0.7), "other verifications took all the time")]


# Failing open, and learning.


def test_a_peer_that_cannot_be_verified_is_let_in_after_interval_with_the_reason() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(10)
    prober.becomes(D, DATA_PORT_REJECTED)
    prober.run(50)
    first_answer = next(entry.at for entry in prober.seen("answer", D) if entry.detail[1] is True)
    assert prober.let_in(D) == [(about(first_answer + 30), UNREADABLE)]


def test_a_data_path_that_is_broken_for_hours_is_looked_at_in_each_outage() -> None:
    """The hold is then as long as the wait to be let in unverified, and what was seen before proves nothing."""
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    looks = 0
    for _ in range(20):
        while prober.request(D):
            prober.run(10)
        assert len(prober.moments("verification", D)) > looks, "let in unverified without a look"
        looks = len(prober.moments("verification", D))
        prober.fail(D)
    prober.becomes(D, HEALTHY)
    while prober.request(D):
        prober.run(10)
    assert prober.let_in(D)[-1][1] is None, "it can be read, and is let in with a warning"


def test_a_peer_that_cannot_be_verified_waits_twice_as_long_after_each_relapse_up_to_max_interval() -> None:
    prober = VirtualProber(interval_s=10.0, max_interval_s=60.0)
    waits = []
    for _ in range(5):
        prober.fail(D, peer=DATA_PORT_REJECTED)
        failed_at = prober.clock.now
        while prober.request(D):
            prober.run(0.1)
        waits.append(prober.clock.now - failed_at)
    assert waits == pytest.approx([10, 20, 40, 60, 60], abs=0.2), "each of these costs an operator a request"


def test_an_unverified_peer_that_is_used_and_healthy_for_two_probations_switches_verification_off() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    use_until(prober, 160)
    (off,) = prober.moments(Event.VERIFICATION_OFF)
    assert off == pytest.approx(31 + 2 * PROBATION_S, abs=2.1)
    assert not prober.sessions.verifying
    prober.fail(OTHER, peer=DATA_PORT_REJECTED)
    prober.run(1.1)
    assert prober.let_in(OTHER) == [(pytest.approx(161.0, abs=1.1), None)], "kept out by reads that prove nothing"


def use_until(prober: VirtualProber, moment: float) -> None:
    """Requests go through, one a second."""
    while prober.clock.now < moment:
        assert not prober.request(D)
        prober.run(1)


def test_a_blip_at_the_end_of_a_probation_does_not_switch_verification_off() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.becomes(D, HEALTHY)
    use_until(prober, 90)
    prober.becomes(D, DATA_PORT_REJECTED)
    use_until(prober, 95)
    assert prober.moments("verification", D)[-1] > 90, "it was not read at the end of its probation"
    prober.becomes(D, HEALTHY)
    use_until(prober, 300)
    assert prober.sessions.verifying, "one read at the wrong moment cost everybody the verification"


def test_a_failure_between_two_probations_begins_the_proof_anew() -> None:
    prober = VirtualProber(max_interval_s=30.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    for _ in range(3):
        use_until(prober, prober.clock.now + PROBATION_S + 10)
        prober.fail(D)
        while prober.request(D):
            prober.run(1)
    assert prober.sessions.verifying


def test_verification_is_switched_off_once_however_many_probations_end_at_that_moment() -> None:
    prober = VirtualProber()
    sessions = many("decode", 5)
    prober.fail(*sessions, peer=DATA_PORT_REJECTED)
    for _ in range(200):
        prober.run(1)
        for session in sessions:
            prober.request(session)
    assert len(prober.moments(Event.VERIFICATION_OFF)) == 1, "an operator is told more than once"


def test_a_peer_whose_memory_can_be_read_at_the_end_of_its_probation_leaves_verification_on() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.request(D)
    prober.request(D)
    prober.becomes(D, HEALTHY)
    prober.run(60)
    prober.request(D)
    prober.run(1)
    assert prober.moments("verification", D)[-1] == 91.0
    assert prober.sessions.verifying, "a peer that just took long to heal cost everybody the verification"


def test_a_peer_that_does_not_answer_at_the_end_of_its_probation_leaves_verification_on() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.request(D)
    prober.request(D)
    prober.becomes(D, Peer(memory=Verdict.UNANSWERED))
    prober.run(60)
    prober.request(D)
    prober.run(1)
    assert prober.sessions.verifying


def test_an_unverified_peer_that_nobody_used_teaches_nothing() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.fail("stopped:1", peer=HUNG)
    for _ in range(30):
        prober.run(10)
        prober.request("stopped:1")
    assert prober.let_in(D)
    assert prober.sessions.verifying


def test_a_registration_on_probation_is_no_use_that_teaches() -> None:
    """Up to 0.5.21 a registration looks the session up and finds it gone: it may be no request at all."""
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(40)
    prober.request(D)  # the look-up of a registration
    prober.run(80)
    prober.request(D)
    prober.run(1)
    assert prober.sessions.verifying, "verification was switched off though no transfer was done"


def test_a_peer_that_is_to_settle_for_long_is_asked_meanwhile() -> None:
    prober = VirtualProber(settle_s=60.0, interval_s=10.0)
    prober.fail(D, peer=HEALTHY)
    prober.run(15)
    prober.becomes(D, REFUSING)
    prober.run(20)
    prober.becomes(D, HEALTHY)
    prober.run(30)
    assert prober.let_in(D) == [], "let in though it was away between two answers"


def test_sessions_that_came_and_went_are_not_kept_however_long_the_idle_timeout_is() -> None:
    prober = VirtualProber(idle_timeout_s=1e9)
    prober.fail("gone:1", peer=REFUSING)
    for session in many("decode", 500):
        prober.fail(session, peer=REFUSING)
        prober.register(session)
    prober.run(2 * failed_sessions.LONGEST_END_CHECK_S)
    assert len(prober.sessions._end_checks) == 1


def test_an_unverified_peer_that_is_used_only_for_a_while_teaches_nothing() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.fail("stopped:1", peer=HUNG)
    prober.run(31)
    prober.request(D)
    prober.request(D)
    prober.request("stopped:1")
    prober.run(600)
    assert prober.sessions.verifying


def test_a_peer_let_in_only_because_others_were_verified_all_the_time_teaches_nothing() -> None:
    prober = VirtualProber()
    prober.fail(*many("dropped", 8), peer=DATA_PORT_DROPPED)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(32)
    assert prober.let_in(D)[0][1] == "other verifications took all the time"
    prober.request(D)
    prober.run(61)
    prober.request(D)
    prober.run(60)
    assert prober.sessions.verifying, "switched off by a peer that was found unreadable while it was little used"
    assert prober.moments("verification", D) == []


# Probation and hold.


def relapse_waits(prober: VirtualProber, relapses: int) -> list[float]:
    """How long a healthy peer that fails at its first use, again and again, is kept out each time."""
    waits = []
    for _ in range(relapses + 1):
        prober.fail(D, peer=HEALTHY)
        failed_at = prober.clock.now
        while prober.request(D):
            prober.run(0.01)
        waits.append(prober.clock.now - failed_at)
    return waits[1:]


def test_a_session_that_fails_soon_after_it_was_let_in_is_held_twice_as_long_each_time() -> None:
    prober = VirtualProber(interval_s=10.0, max_interval_s=20.0)
    assert relapse_waits(prober, 7) == pytest.approx([1, 2, 4, 8, 16, 20, 20], abs=0.05)
    assert [entry.detail["hold_s"] for entry in prober.seen(Event.HELD)] == [1, 2, 4, 8, 16, 20, 20]


def test_a_held_session_is_let_in_when_the_hold_ends_and_not_a_gap_later() -> None:
    prober = VirtualProber()
    relapse_waits(prober, 6)
    prober.fail(D)
    assert prober.seen(Event.HELD)[-1].detail["hold_s"] == 64
    failed_at = prober.clock.now
    prober.run(65)
    assert prober.let_in(D)[-1][0] == about(failed_at + 64)


def test_another_failure_while_it_is_blacklisted_is_no_relapse() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(0.5)
    prober.fail(D)
    prober.run(0.5)
    prober.fail(D)
    prober.run(2)
    assert prober.seen(Event.HELD) == []
    assert prober.let_in(D) == [(about(2.0), None)]


def test_probation_ends_a_minute_after_the_first_use() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(2)
    prober.run(300)
    prober.request(D)
    prober.run(59)
    prober.fail(D)
    assert len(prober.seen(Event.HELD)) == 1, "a relapse went unpunished: probation begins with the first use"
    prober.run(2)
    prober.request(D)
    prober.run(60)
    prober.fail(D)
    assert len(prober.seen(Event.HELD)) == 1, "held for a relapse that is none"


def test_a_peer_that_was_used_for_a_minute_starts_from_nothing() -> None:
    prober = VirtualProber()
    relapse_waits(prober, 4)
    prober.run(60.1)
    prober.request(D)
    prober.fail(D)
    prober.run(1.1)
    assert not prober.request(D), "relapses that were lived down still count"


@pytest.mark.parametrize("beside", [[], ["stopped:1"]])
def test_a_session_that_nobody_used_for_idle_timeout_after_it_was_let_in_is_forgotten(beside: list[str]) -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=HEALTHY)
    prober.fail(*beside, peer=HUNG)
    for _ in range(21):
        prober.run(5)
        for session in beside:
            prober.request(session)
    prober.request(D)
    prober.fail(D)
    assert prober.seen(Event.HELD) == [], "held for a relapse, as long after its recovery as anybody remembers"


@pytest.mark.parametrize("register", [VirtualProber.register, VirtualProber.register_as_up_to_0_5_21])
def test_a_registration_ends_probation(register: Callable[[VirtualProber, Any], None]) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(2)
    prober.request(D)
    register(prober, D)
    prober.fail(D)
    assert prober.seen(Event.HELD) == []


# Forgotten.


def test_a_session_that_no_request_asks_for_is_forgotten_after_idle_timeout_and_is_no_recovery() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=REFUSING)
    prober.run(99.9)
    assert set(prober.sessions) == {D}
    prober.run(0.2)
    assert set(prober.sessions) == set()
    assert prober.removed == [D], "its count of failures is left behind"
    assert [entry.detail for entry in prober.seen(Event.DROPPED, D)] == [
        {"idle_s": about(100), "outage_s": about(100), "refused": 0}
    ]
    assert prober.let_in(D) == []
    assert prober.sleeps_for_good()


def test_a_session_is_kept_while_requests_ask_for_it() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=REFUSING)
    for _ in range(10):
        prober.run(99)
        assert prober.request(D), "forgotten while requests ask for it: each of them would now fail slowly"
    prober.run(101)
    assert not prober.request(D)


def test_another_failure_starts_idle_timeout_again() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=REFUSING)
    prober.run(60)
    prober.fail(D)
    prober.run(99)
    assert set(prober.sessions) == {D}


NO_SESSION_IDS = [
    *["", "abc", "host", "host:", ":7001", "host:0", "host:-1", "host:080", "host:65536", "host:100000", "host:0x1b"],
    *["host:7001 ", "host:7001\n", "ho st:7001", "host:7001:7002", "host:\u0661\u0662"],
    *["::1:7001", "[::1]", "[::1]7001", "[host]:7001", None, 7001, b"host:7001", ("host", 7001)],
]


@pytest.mark.parametrize("session", NO_SESSION_IDS, ids=repr)
def test_what_is_no_session_id_is_never_asked_and_said_once(session: Any) -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    for _ in range(3):
        prober.fail(session, peer=HEALTHY)
        prober.run(10)
        assert prober.request(session)
    prober.run(101)
    assert prober.seen("probe") == prober.seen("verification") == [], "Mooncake would ask some other process"
    assert len(prober.seen(Event.MALFORMED, session)) == 1
    assert len(prober.seen(Event.DROPPED, session)) == 1


@pytest.mark.parametrize(
    "session", ["127.0.0.1:1", "decode-0.decode.svc:12001", "my_host:65535", "[::1]:7001", "[fe80::1%eth0]:7001"]
)
def test_host_and_port_are_a_session_id(session: str) -> None:
    prober = VirtualProber()
    prober.fail(session, peer=HEALTHY)
    prober.run(1.1)
    assert prober.let_in(session)


# Places: many peers at a time.


def test_no_more_young_probes_than_concurrency_are_out() -> None:
    prober = VirtualProber(concurrency=8)
    prober.fail(*many("slow", 40), peer=Peer(answers=False, takes=1.9))
    prober.run(20)
    assert len({entry.session for entry in prober.seen("probe")}) == 40
    assert out_at_once(prober, "probe") <= 8


@pytest.mark.parametrize(("concurrency", "limit_s"), [(8, 1.2), (2, 2.5)])
def test_a_peer_that_refuses_promptly_is_asked_again_and_again_beside_hung_ones(
    concurrency: int, limit_s: float
) -> None:
    prober = VirtualProber(concurrency=concurrency)
    prober.fail(D, peer=REFUSING)
    prober.run(1)
    prober.fail(*many("hung", 200), peer=HUNG)
    prober.run(10)
    probes = prober.moments("probe", D)
    assert max(b - a for a, b in itertools.pairwise([*probes, 11.0])) < limit_s, "it may be back, and nobody looks"


def test_a_probe_older_than_two_seconds_no_longer_counts_against_concurrency() -> None:
    prober = VirtualProber()
    prober.fail(*many("hung", 16), peer=HUNG)
    prober.run(1)
    prober.fail(D, peer=HEALTHY)
    prober.run(1.1)
    assert prober.moments("probe", D) == about([2.0])


def test_stuck_probes_have_a_bound_and_a_fresh_failure_is_still_asked_at_once() -> None:
    prober = VirtualProber()
    prober.fail(*many("hung", 2000), peer=HUNG)
    prober.run(59)
    assert len(prober.out) < failed_sessions.STUCK_LIMIT, "a thread each, and none is left for a fresh failure"
    prober.fail(D, peer=HEALTHY)
    prober.run(1.1)
    assert prober.let_in(D), "a session that failed a second ago waits for peers that hang"


@pytest.mark.parametrize(("hung", "asked_within_s"), [(64, 2.6), (300, 5.0), (900, 10.0)])
@pytest.mark.parametrize("place", ["first", "in the middle", "last"])
def test_one_that_is_well_in_a_burst_of_hung_ones_is_asked_soon(hung: int, asked_within_s: float, place: str) -> None:
    prober = VirtualProber()
    burst = many("hung", hung)
    burst.insert({"first": 0, "in the middle": hung // 2, "last": hung}[place], D)
    for session in burst:
        prober.fail(session, peer=HEALTHY if session == D else HUNG)
    prober.run(asked_within_s)
    assert prober.moments("probe", D), "a healthy decode node waits for peers that hang"
    prober.run(1.5)
    assert prober.let_in(D)


def test_not_more_than_concurrency_are_asked_in_the_first_two_seconds_of_a_burst() -> None:
    prober = VirtualProber(concurrency=4)
    prober.fail(*many("hung", 100), peer=HUNG)
    prober.run(1.99)
    assert len(prober.out) <= 4


def test_a_prefill_node_with_few_threads_has_fewer_stuck_probes() -> None:
    prober = VirtualProber(stuck_limit=64)
    prober.fail(*many("hung", 300), peer=HUNG)
    prober.run(59)
    assert len(prober.out) < 64
    prober.fail(D, peer=HEALTHY)
    prober.run(1.1)
    assert prober.let_in(D)


def test_stuck_probes_are_bounded_also_when_new_peers_hang_all_the_time() -> None:
    prober = VirtualProber(stuck_limit=64)
    for moment in range(118):
        prober.fail(*many(f"hung-{moment}", 10), peer=HUNG)
        prober.run(0.5)
        assert len(prober.out) <= 64, "a thread each, on a prefill node"


def test_stuck_probes_are_bounded_also_when_the_peers_used_to_answer_promptly() -> None:
    prober = VirtualProber()
    rack = many("rack", 500)
    prober.fail(*rack, peer=REFUSING)
    prober.run(2)
    for session in rack:
        prober.becomes(session, HUNG)
    prober.run(65)
    assert out_at_once(prober, "probe") <= failed_sessions.STUCK_LIMIT + 16, "a thread each, on a prefill node"


def test_hung_peers_take_turns_when_stuck_probes_have_no_place_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_sessions, "STUCK_LIMIT", 8)
    monkeypatch.setattr(failed_sessions, "STUCK_RESERVE", 2)
    prober = VirtualProber(concurrency=4, idle_timeout_s=10_000.0)
    hung = many("hung", 40)
    prober.fail(*hung, peer=HUNG)
    prober.run(3000)
    for session in hung:
        waits = [b - a for a, b in itertools.pairwise([0.0, *prober.moments("probe", session), 3000.0])]
        assert max(waits) < 1500, f"{session} would not have been found if it had healed"


@pytest.mark.parametrize(("number", "limit_s"), [(300, 75.0), (1000, 260.0)])
def test_in_the_middle_of_more_hung_ones_than_there_are_places_a_healthy_session_is_asked_as_they_return(
    number: int, limit_s: float
) -> None:
    prober = VirtualProber(stuck_limit=256)
    hung = many("hung", number)
    prober.fail(*hung[: number // 2], peer=HUNG)
    prober.fail(D, peer=HEALTHY)
    prober.fail(*hung[number // 2 :], peer=HUNG)
    prober.run(limit_s)
    assert prober.let_in(D), f"healthy, and not used for {limit_s} s"


@pytest.mark.parametrize("number", [64, 300, 1000])
@pytest.mark.parametrize("stopped_s", [1, 6, 30])
def test_a_stopped_session_is_let_in_right_after_it_resumes_beside_hung_ones(number: int, stopped_s: int) -> None:
    prober = VirtualProber()
    prober.fail(*many("hung", number), peer=HUNG)
    prober.run(100)
    prober.fail(D, peer=HUNG)
    prober.run(stopped_s)
    prober.resume(D)
    prober.run(10)
    assert prober.let_in(D) == [(pytest.approx(100 + stopped_s + 1, abs=0.05), None)], "healed, and not used for long"


def test_a_healed_session_does_not_wait_for_peers_that_refuse_all_the_time() -> None:
    prober = VirtualProber(concurrency=4)
    prober.fail(*many("refusing", 1000), peer=Peer(answers=False, takes=0.01))
    prober.run(5)
    prober.fail(D, peer=HEALTHY)
    prober.run(1.2)
    assert prober.let_in(D), "a session that has healed waits for peers that are gone"


def test_a_refusing_peer_is_not_forgotten_over_a_stream_of_fresh_failures() -> None:
    prober = VirtualProber(concurrency=4)
    prober.fail(D, peer=REFUSING)
    for session in many("hung", 600):
        prober.fail(session, peer=HUNG)
        prober.run(0.05)
    waits = [b - a for a, b in itertools.pairwise(prober.moments("probe", D))]
    assert max(waits) < 3.5, "a peer that may be back is not asked"


def test_one_call_gives_a_bounded_number_of_questions_however_many_are_due() -> None:
    sessions = FailedSessions(FailedSessionProbeSettings(concurrency=1000), many("decode", 64), clock=Clock())
    batches = []
    while questions := sessions.take_due():
        batches.append(len(questions))
    assert sum(batches) == 64
    assert max(batches) == BATCH


def test_one_call_looks_at_a_bounded_number_of_sessions_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    prober = VirtualProber(idle_timeout_s=10.0)
    prober.fail(*many("hung", 10_000), peer=HUNG)
    taken: list[Any] = []
    heappop = failed_sessions.heapq.heappop
    monkeypatch.setattr(failed_sessions.heapq, "heappop", lambda heap: taken.append(heap) or heappop(heap))
    for now in [0.0, 11.0]:
        prober.clock.now = now
        for _ in range(10):
            taken.clear()
            prober.sessions.take_due()
            assert 0 < len(taken) <= 2 * BATCH, "session_lock is held for as long as the blacklist is"


# A set, as SGLang knows it.

SESSIONS = many("decode", 5)


def change(blacklist: set[Any], way: str, some: list[Any]) -> Any:
    """Changes a set in one of the ways SGLang or a fork of it may."""
    if way == "|=":
        blacklist |= set(some)
    elif way == "-=":
        blacklist -= set(some)
    elif way == "&=":
        blacklist &= set(some)
    elif way == "^=":
        blacklist ^= set(some)
    elif way in ("update", "difference_update", "intersection_update"):
        getattr(blacklist, way)(some[:1], set(some[1:]))
    elif way == "clear":
        blacklist.clear()
    elif way == "symmetric_difference_update":
        blacklist.symmetric_difference_update(iter(some))
    elif some:
        return getattr(blacklist, way)(some[0])
    return None


@given(
    adopted=st.sets(st.sampled_from(SESSIONS)),
    changes=st.lists(
        st.tuples(
            st.sampled_from(["add", "discard", "remove", "__contains__", "clear", "update", "difference_update"])
            | st.sampled_from(["|=", "-=", "&=", "^=", "pop", "intersection_update", "symmetric_difference_update"]),
            st.lists(st.sampled_from(SESSIONS), max_size=3),
        )
    ),
)
def test_the_blacklist_is_a_set_and_exactly_what_is_in_it_is_asked(
    adopted: set[str], changes: list[tuple[str, list[str]]]
) -> None:
    prober, plain = VirtualProber(*adopted), set(adopted)
    for session in SESSIONS:
        prober.becomes(session, REFUSING)
    for way, some in changes:
        if way == "pop":
            if plain:
                plain.remove(prober.sessions.pop())
        elif way == "remove" and some and some[0] not in plain:
            with pytest.raises(KeyError):
                change(prober.sessions, way, some)
        else:
            assert change(prober.sessions, way, some) == change(plain, way, some)
        assert prober.sessions == plain
        assert (len(prober.sessions), bool(prober.sessions)) == (len(plain), bool(plain))
        assert sorted(prober.sessions) == sorted(plain)
    prober.run(0.1)
    assert {entry.session for entry in prober.seen("probe")} == plain


def test_pop_of_an_empty_blacklist_raises_as_a_set_does() -> None:
    with pytest.raises(KeyError):
        VirtualProber().sessions.pop()


def test_the_swap_in_place_operators_give_the_same_object() -> None:
    prober = VirtualProber()
    same = prober.sessions
    prober.sessions |= {D}
    prober.sessions -= {OTHER}
    prober.sessions &= {D, OTHER}
    prober.sessions ^= {OTHER}
    assert prober.sessions is same
    assert same == {D, OTHER}


@pytest.mark.parametrize(
    "copied",
    [
        set,
        copy.copy,
        copy.deepcopy,
        lambda some: some.copy(),
        lambda some: some | {OTHER},
        lambda some: some.union([OTHER]),
        lambda some: some & {D},
        lambda some: some - {OTHER},
        lambda some: some ^ {OTHER},
        lambda some: {OTHER} | some,
        lambda some: pickle.loads(pickle.dumps(some)),
    ],
)
def test_a_copy_is_a_set_that_nobody_listens_to(copied: Callable[[Any], set[Any]]) -> None:
    prober = VirtualProber(D)
    prober.becomes(D, REFUSING)
    its_copy = copied(prober.sessions)
    assert D in its_copy
    its_copy.discard(D)
    its_copy.add("not:1")
    prober.run(0.1)
    assert [entry.session for entry in prober.seen("probe")] == [D]
    assert prober.sessions == {D}


# Faults of our own.


def broken_clock(clock: Clock) -> float:
    raise RuntimeError("a fault of our own")


def test_a_fault_of_ours_leaves_sglang_with_a_plain_set_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prober = VirtualProber(OTHER)
    monkeypatch.setattr(Clock, "__call__", broken_clock)
    for _ in range(3):
        prober.sessions.add(D)
        assert D in prober.sessions
        assert OTHER in prober.sessions
        prober.sessions.discard(D)
        assert D not in prober.sessions
    prober.sessions |= {D}
    prober.sessions.remove(D)
    assert prober.sessions == {OTHER}
    faults = prober.seen(Event.FAULT)
    assert len(faults) == 1
    assert "RuntimeError: a fault of our own" in faults[0].detail["error"]


def test_after_a_fault_of_ours_the_daemon_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    prober = VirtualProber()
    with monkeypatch.context() as fault:
        fault.setattr(Clock, "__call__", broken_clock)
        prober.sessions.add("unheard:1")
    prober.run(10)
    prober.fail(D, peer=HEALTHY)
    prober.run(1.1)
    assert prober.let_in(D), "one fault of ours, and nobody is healed any more"


# What logs and metrics are told.


def test_a_story_is_told_in_events_that_add_up() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=HEALTHY)
    prober.request(D)
    prober.request(D)
    prober.run(2)
    prober.request(D)
    prober.fail(D)
    prober.fail(OTHER, peer=REFUSING)
    prober.run(101)
    assert [(round(entry.at), entry.what, entry.session) for entry in prober.log if isinstance(entry.what, Event)] == [
        (0, Event.BLACKLISTED, D),
        (1, Event.RECOVERED, D),
        (2, Event.BLACKLISTED, D),
        (2, Event.HELD, D),
        (2, Event.BLACKLISTED, OTHER),
        (3, Event.RECOVERED, D),
        (102, Event.DROPPED, OTHER),
    ]
    recovery, second = prober.seen(Event.RECOVERED, D)
    assert recovery.detail == {"outage_s": about(1.0), "refused": 2, "unverified": None}
    assert second.detail["refused"] == 0


def test_a_peer_that_answers_and_cannot_be_read_is_told_once_an_outage() -> None:
    prober = VirtualProber(interval_s=5.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(4.9)
    assert len(prober.seen("verification", D)) > 2
    (told,) = prober.seen(Event.UNREADABLE, D)
    assert told.detail == {"why": "reading its memory gave -1", "outage_s": about(1.0)}
    prober.run(1)
    assert prober.let_in(D) == [(about(5.0), "reading its memory gave -1")]
    prober.fail(D)
    prober.run(4)
    assert len(prober.seen(Event.UNREADABLE, D)) == 2, "the reason of the second outage is not told"
    assert [entry.detail for entry in prober.seen(Event.HELD, D)] == [{"hold_s": 1.0, "relapses": 1}]


def test_hung_peers_take_turns_from_the_number_on_that_is_told() -> None:
    prober = VirtualProber(stuck_limit=64)
    prober.fail(*(f"decode:{port}" for port in range(1, 201)), peer=HUNG)
    for _ in range(10):
        prober.run(30)
        assert 32 == prober.sessions.most_stuck() <= prober.sessions.in_flight() <= 64, "an alert on it never fires"


def test_the_daemon_thread_hears_of_a_registration_and_can_tell_how_many_are_left() -> None:
    prober = VirtualProber()
    prober.fail(D, OTHER, peer=HUNG)
    prober.run(10)
    assert not prober.is_awake()
    prober.register(D)
    assert prober.is_awake(), "the gauge is wrong until the probe of a hung peer returns"
    prober.run(1)
    prober.sessions.clear()
    assert prober.is_awake()
