"""When is a session probed, let in again, forgotten? Stories of one session, in the order of session_states.py."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from sglang.srt.disaggregation.mooncake.failed_sessions import FailedSessions
from sglang.srt.disaggregation.mooncake.session_states import PROBATION_S, READ_HANGS_S, Verdict
from sglang.srt.disaggregation.mooncake.session_watch import SAID_LIMIT, Event
from virtual_prober import (
    CUTS_SHORT,
    DATA_PORT_DROPPED,
    DATA_PORT_REJECTED,
    DROPPED,
    HEALTHY,
    HUNG,
    READS_NEVER_END,
    REFUSING,
    Peer,
    VirtualProber,
    many,
)

D = "decode:7001"
OTHER = "other:7002"
UNREADABLE = "reading its memory gave -1"
BEGIN_HANGS = Peer(begin_takes=1000.0)  # answers, and the call that begins to read does not come back


def about(seconds: Any) -> Any:
    return pytest.approx(seconds, abs=0.01)


def hang_for(seconds: float) -> str:
    return f"reads of its memory have not ended for {seconds:.0f} s"


def use_until(prober: VirtualProber, moment: float, session: str = D) -> None:
    """Requests go through, one a second."""
    while prober.clock.now < moment:
        assert not prober.request(session)
        prober.run(1)


def wait_until_let_in(prober: VirtualProber, every_s: float = 0.1) -> float:
    """Requests are refused until one goes through. Gives the seconds that it took."""
    began = prober.clock.now
    while prober.request(D):
        prober.run(every_s)
    return prober.clock.now - began


# Probed.


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
        assert following - at == about(gap_s), f"probed {following - at} s after the probe at {at}"
    assert max(b - a for a, b in itertools.pairwise(probes)) == about(min(0.5 * factor, interval_s))


def test_a_probe_that_took_long_to_fail_is_followed_by_the_next_after_a_quarter_second() -> None:
    """Where packets are dropped each takes 5 s, and a heal between two is heard of the later the longer the gap is."""
    prober = VirtualProber()
    prober.fail(D, peer=Peer(answers=False, takes=5.0))
    prober.run(60)
    assert prober.moments("probe", D)[1:4] == about([5.25, 10.5, 15.75])


def test_a_new_failure_starts_the_quick_probes_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(400)
    prober.fail(D)
    prober.run(0.9)
    assert [at for at in prober.moments("probe", D) if at >= 400] == about([400.0, 400.25, 400.5, 400.75])


def test_a_tiny_interval_does_not_make_the_prober_spin() -> None:
    prober = VirtualProber(interval_s=1e-6)
    prober.fail(D, peer=REFUSING)
    prober.run(1)
    assert len(prober.seen("probe")) <= 101


def test_that_a_peer_cuts_probes_short_is_told_once_an_outage() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=CUTS_SHORT)
    prober.run(9)
    assert prober.moments(Event.CUTS_SHORT) == []
    prober.run(100)
    prober.fail(D)  # a request that was under way has failed in the same outage
    prober.run(100)
    assert len(prober.moments(Event.CUTS_SHORT, D)) == 1
    prober.register(D)
    prober.fail(D)
    prober.run(100)
    assert len(prober.moments(Event.CUTS_SHORT, D)) == 2, "the second outage is not explained to the operator"


def test_no_timer_runs_while_nothing_is_blacklisted() -> None:
    prober = VirtualProber()
    assert prober.watch.next_due_in() is None
    prober.fail(D, peer=HEALTHY)
    prober.run(0.5)
    assert not prober.sleeps_for_good()
    prober.run(1)
    assert prober.let_in(D)
    assert prober.sleeps_for_good()
    assert prober.watch.next_due_in() is None


# Settled.


def test_a_healed_peer_is_let_in_once_it_has_answered_settle_apart() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(0.999)
    assert prober.request(D), "let in while bytes of the failed transfer may still land"
    prober.run(0.01)
    assert not prober.request(D)
    assert (prober.moments("probe", D), prober.moments("read", D)) == ([0.0], [1.0])
    assert prober.removed == [D]


def test_after_an_answer_the_next_probe_comes_after_settle_however_long_the_gap_was() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(400)
    prober.becomes(D, HEALTHY)
    prober.run(31)
    first_answer = prober.moments("probe", D)[-1]
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
    prober.run(0.4)
    assert prober.let_in(D)


def test_one_answer_is_enough_without_settle() -> None:
    prober = VirtualProber(settle_s=0.0)
    prober.fail(D, peer=HEALTHY)
    prober.run(0.01)
    assert (prober.moments("probe", D), prober.moments("read", D)) == ([0.0], [0.0])
    assert prober.let_in(D)


@pytest.mark.parametrize("dropped_s", [1.1, 4.9, 7.3, 12.8, 20.2, 28.9, 52.0])
def test_a_peer_whose_packets_were_dropped_is_let_in_soon_after_the_heal(dropped_s: float) -> None:
    """A probe that cannot connect takes 5 s, and may notice the heal only when its packets are sent again."""
    prober = VirtualProber()
    prober.fail(D, peer=DROPPED)
    prober.run(dropped_s)
    prober.becomes(D, HEALTHY)
    prober.run(3)
    ((at, unverified),) = prober.let_in(D)
    assert at - dropped_s <= 1.0 + 0.3 + 0.25 + 0.02
    assert unverified is None


@pytest.mark.parametrize("heals_at", [10, 31, 100])
def test_a_peer_to_which_connecting_takes_long_is_let_in_all_the_same(heals_at: float) -> None:
    """Once in 30 s a probe may take its time, and the one after it, which lets the peer in."""
    prober = VirtualProber()
    prober.fail(D, peer=DROPPED)
    prober.run(heals_at)
    prober.becomes(D, Peer(takes=0.5, connect_takes=0.5))
    prober.run(40)
    ((at, _),) = prober.let_in(D)
    assert at - heals_at <= 30 + 0.3 + 0.25 + 0.5 + 1.0 + 0.5 + 0.02


def test_beside_so_many_that_the_next_probe_is_far_off_a_probe_may_take_its_time_to_connect() -> None:
    """Else a peer is tried for a third of a second in each round, and not for five with a try a second."""
    prober = VirtualProber(concurrency=512)
    prober.fail(*many("gone", 300), peer=REFUSING)
    prober.run(3)
    prober.fail(D, peer=DROPPED)
    prober.run(10)
    assert not [entry for entry in prober.seen("ended", D) if entry.detail.not_connected]
    assert len(prober.seen("probe", D)) >= 2


@pytest.mark.parametrize("interval_s", [0.5, 5])
def test_with_a_short_interval_probes_connect_anew_just_as_well(interval_s: float) -> None:
    prober = VirtualProber(interval_s=interval_s)
    prober.fail(D, peer=DROPPED)
    prober.run(29)
    assert len(prober.seen("probe", D)) >= 29 / (0.3 + 0.25 + 0.02)


def test_where_no_call_can_be_ended_a_peer_whose_packets_were_dropped_is_let_in_when_that_has_failed() -> None:
    prober = VirtualProber(calls_can_be_ended=False)
    prober.fail(D, peer=DROPPED)
    prober.run(6)
    prober.becomes(D, HEALTHY)
    prober.run(6)
    ((at, _),) = prober.let_in(D)
    assert at == about(5 + 0.25 + 5 + 0.25 + 1.0)


def test_it_is_looked_whether_a_peer_cuts_probes_short_only_if_probes_fail_at_once() -> None:
    """That takes a second where packets are dropped, and a heal would be noticed as much later."""
    prober = VirtualProber()
    prober.fail(D, peer=DROPPED)
    prober.run(29)
    prober.becomes(D, REFUSING)
    prober.run(9)
    assert not any(entry.detail.listen for entry in prober.seen("probe"))
    prober.run(2)
    assert any(entry.detail.listen for entry in prober.seen("probe"))


def test_a_hung_probe_that_is_answered_when_the_peer_resumes_counts_as_its_first_answer() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HUNG)
    prober.run(6)
    prober.resume(D)
    prober.run(2)
    assert prober.let_in(D) == [(about(7.0), None)]


def test_a_peer_that_is_to_settle_for_long_is_probed_meanwhile() -> None:
    prober = VirtualProber(settle_s=60.0, interval_s=10.0)
    prober.fail(D, peer=HEALTHY)
    prober.run(15)
    prober.becomes(D, REFUSING)
    prober.run(20)
    prober.becomes(D, HEALTHY)
    prober.run(30)
    assert prober.let_in(D) == [], "let in though it was away between two answers"


# Generations: what is older than the newest failure does not count.


def test_an_answer_does_not_count_if_the_session_failed_again_while_it_was_out() -> None:
    prober = VirtualProber(settle_s=0.0, verify=False)
    prober.fail(D, peer=Peer(takes=1.0))
    prober.run(0.5)
    prober.fail(D, peer=REFUSING)
    prober.run(2)
    assert prober.request(D), "let in on an answer from before the newest failure"


def test_an_answer_does_not_count_if_the_session_registered_and_failed_again_while_it_was_out() -> None:
    prober = VirtualProber(settle_s=0.0, verify=False)
    prober.fail(D, peer=Peer(takes=1.0))
    prober.run(0.3)
    prober.register(D)
    prober.run(0.3)
    prober.fail(D, peer=REFUSING)
    prober.run(2)
    assert prober.request(D), "let in on an answer from before the newest failure"


@pytest.mark.parametrize("peer", [HUNG, HEALTHY], ids=["first probe", "probe that reads were to follow"])
def test_a_probe_from_before_a_failure_that_hangs_is_ended_in_interval_and_made_again(peer: Peer) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=peer)
    prober.run(0.5)
    prober.becomes(D, HUNG)
    prober.run(5.5)
    prober.becomes(D, HEALTHY)  # a new process behind a connection that is dead and says nothing
    prober.fail(D)
    prober.run(31.1)
    assert prober.moments("ended", D) == [36.0]
    assert not prober.request(D), "it waits until Mooncake gives up a probe whose answer does not count, a minute"


def test_a_session_whose_stale_answer_came_is_probed_anew_at_once() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HUNG)
    prober.run(6)
    prober.fail(D)
    prober.run(1)
    assert prober.moments("probe", D) == [0.0], "two probes to one peer at a time"
    prober.resume(D)
    prober.run(0.1)
    assert prober.moments("probe", D) == [0.0, 7.0]


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


def test_reads_do_not_count_if_the_session_failed_again_while_they_were_pending() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(read_takes=1.0))
    prober.run(1.5)
    assert prober.moments("read", D) == about([1.0])
    prober.fail(D, peer=REFUSING)
    prober.run(5)
    assert prober.moments("shown", D) == about([2.0])
    assert prober.request(D), "let in on reads from before the newest failure"


@pytest.mark.parametrize("verdict", list(Verdict))
def test_reads_from_before_a_failure_change_nothing_while_newer_ones_are_pending(verdict: Verdict) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=READS_NEVER_END)
    prober.run(2)
    (old,) = prober.reads
    prober.fail(D)
    prober.run(2)
    assert prober.moments("read", D) == about([1.0, 3.0])
    prober.show(old, verdict)
    prober.run(20)
    assert prober.request(D), "let in on reads from before the newest failure"
    assert prober.moments("read", D) == about([1.0, 3.0])
    assert prober.seen(Event.UNREADABLE) == []


@pytest.mark.parametrize("verdict", list(Verdict))
@pytest.mark.parametrize("register", [VirtualProber.register, VirtualProber.register_as_up_to_0_5_21])
def test_reads_of_a_session_that_registered_meanwhile_change_nothing(
    register: Callable[[VirtualProber, Any], None], verdict: Verdict
) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=READS_NEVER_END)
    prober.run(2)
    register(prober, D)
    for reads in prober.reads:
        prober.show(reads, verdict)
    prober.run(5)
    assert (prober.let_in(D), prober.seen(Event.UNREADABLE)) == ([], [])
    assert prober.sleeps_for_good()
    prober.fail(D)
    assert prober.seen(Event.HELD) == [], "held for a relapse that is none"


@pytest.mark.parametrize("verdict", list(Verdict))
def test_reads_of_a_session_that_was_let_in_meanwhile_change_nothing(verdict: Verdict) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=READS_NEVER_END)
    prober.run(31)
    assert len(prober.let_in(D)) == 1
    for reads in prober.reads:
        prober.show(reads, verdict)
    prober.run(1)
    assert len(prober.let_in(D)) == 1
    assert prober.seen(Event.UNREADABLE) == []
    prober.fail(D)
    assert len(prober.seen(Event.HELD)) == 1, "its probation ended by what was read before it"


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


def test_while_nothing_can_be_read_into_a_peer_is_let_in_on_its_answers_and_counted_unverified() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(memory=Verdict.CANNOT_TELL, why="Mooncake gave -1"))
    prober.run(1.1)
    assert prober.let_in(D) == [(about(1.0), "Mooncake gave -1")]
    use_until(prober, 300)
    assert prober.watch.rules.verifying, "one refused page cost everybody the verification"


def test_nobody_is_read_when_verification_is_switched_off() -> None:
    prober = VirtualProber(verify=False)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(1.1)
    assert prober.let_in(D) == [(about(1.0), None)]
    assert prober.moments("probe", D) == [0.0, 1.0]
    assert prober.moments("read", D) == []


def test_a_peer_that_falls_silent_when_it_is_to_be_read_must_settle_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(falls_silent=True))
    prober.run(1.1)
    prober.becomes(D, HEALTHY)
    prober.run(5)
    (silent_at, read_at) = prober.moments("read", D)
    assert read_at == about(silent_at + 0.25 + 1.0)
    assert prober.let_in(D) == [(about(read_at), None)]


def test_no_more_reads_are_begun_while_some_are_pending_and_the_peer_is_probed_in_interval() -> None:
    prober = VirtualProber(interval_s=10.0)
    for _ in range(3):
        prober.fail(D, peer=READS_NEVER_END)
        wait_until_let_in(prober)
    failed_at = prober.seen("failed")[-1].at
    assert len([at for at in prober.moments("read", D) if at >= failed_at]) == 1, "reads are begun again and again"
    probes = [failed_at, *(at for at in prober.moments("probe", D) if at >= failed_at), prober.let_in(D)[-1][0]]
    assert max(b - a for a, b in itertools.pairwise(probes)) < 10 + 3.0


def test_reads_that_are_pending_when_the_data_path_heals_count_as_soon_as_they_are_done() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=READS_NEVER_END)
    prober.run(12.3)
    prober.resume(D)
    prober.run(0.99)
    assert prober.request(D), "let in while other connections still carry bytes of the failed transfer"
    prober.run(0.02)
    assert prober.let_in(D) == [(about(12.3 + 1.0), None)], "healed, and not used"


def test_a_peer_whose_data_path_comes_back_while_it_is_read_settles_and_is_read_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(read_takes=3.0))
    prober.run(1.5)
    prober.becomes(D, HEALTHY)
    prober.run(3.4)
    assert prober.request(D), "let in while other connections still carry bytes of the failed transfer"
    prober.run(1)
    assert prober.let_in(D) == [(about(1.0 + 3.0 + 1.0), None)]
    assert prober.moments("read", D) == about([1.0, 5.0])


def test_a_peer_whose_reads_always_wait_is_let_in_after_half_of_interval() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(read_takes=0.2))
    prober.run(40)
    ((let_in_at, unverified),) = prober.let_in(D)
    assert unverified is None
    assert 1.2 + 15.0 <= let_in_at < 1.2 + 15.0 + 1.5


def test_reads_that_waited_let_it_in_once_no_bytes_of_the_failed_transfer_can_land_any_more() -> None:
    """Over RDMA, where Mooncake gives a transfer up after 10 s."""
    prober = VirtualProber()
    prober.watch.rules.over_rdma = True
    prober.fail(D, peer=Peer(read_takes=0.2))
    prober.run(20)
    assert prober.let_in(D) == [(pytest.approx(12.0, abs=1.3), None)]
    prober.fail(OTHER, peer=Peer(read_takes=15.0))
    prober.run(20)
    assert prober.let_in(OTHER) == [(about(20.0 + 1.0 + 15.0), None)], "its reads were pending when the path healed"


def test_reads_that_nobody_looked_at_in_time_make_it_settle_once_more_and_no_longer() -> None:
    """A prefill process that is always starved would else keep every peer out for INTERVAL."""
    prober = VirtualProber()
    prober.fail(D, peer=Peer(memory=Verdict.READABLE_UNSEEN))
    prober.run(1.5)
    assert prober.request(D), "let in though the reads may have waited, and bytes of the failed transfer may land"
    prober.run(1)
    assert prober.let_in(D) == [(about(2.0), None)]


BYTES_MAY_LAND = Peer(memory=Verdict.READABLE_TOO_SOON)


def test_a_peer_stays_out_until_the_bytes_that_the_kernel_sends_again_have_landed() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(20.5)
    assert prober.request(D), "let in though bytes of the failed transfer would land on those of the next request"
    prober.becomes(D, HEALTHY)
    prober.run(2)
    assert prober.let_in(D) == [(pytest.approx(20.5, abs=1.1), None)]


@pytest.mark.parametrize(("interval_s", "let_in_at"), [(5.0, 31.0), (30.0, 31.0), (60.0, 61.0)])
def test_a_peer_to_which_the_kernel_always_sends_bytes_again_is_let_in_as_by_a_loop_and_that_is_said(
    interval_s: float, let_in_at: float
) -> None:
    """As on a connection that a firewall has forgotten."""
    prober = VirtualProber(interval_s=interval_s)
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(let_in_at - 1.5)
    assert prober.request(D)
    prober.run(3)
    assert prober.let_in(D) == [(pytest.approx(let_in_at, abs=1.1), "bytes of a failed transfer may still land")]


@pytest.mark.parametrize("settle_s", [0.01, 20.0])
def test_bytes_are_waited_for_as_long_as_a_loop_takes_whatever_settle_is(settle_s: float) -> None:
    prober = VirtualProber(settle_s=settle_s)
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(29)
    assert prober.request(D)
    prober.run(3 if settle_s < 1 else 32)  # settled once, and then the first time after 30 s
    assert prober.let_in(D)


def test_bytes_are_waited_for_as_long_as_a_loop_takes_beside_many_others() -> None:
    prober = VirtualProber()
    prober.fail(*many("decode", 1000), peer=BYTES_MAY_LAND)
    prober.run(40)
    assert len(prober.seen(Event.RECOVERED)) == 1000, "each of many settles takes longer, and all of them are counted"


def test_a_peer_that_cannot_be_read_now_and_then_is_let_in_though_the_kernel_sends_bytes_again_in_between() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    for _ in range(3):
        prober.run(27.5)
        prober.becomes(D, BYTES_MAY_LAND)
        prober.run(1.5)
        prober.becomes(D, DATA_PORT_REJECTED)
    assert prober.let_in(D), "each time that it settles its time begins anew"


def test_a_peer_that_worked_though_its_reads_had_waited_stays_out_while_the_kernel_sends_bytes_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=Peer(read_takes=0.2))
    prober.run(20)
    use_until(prober, 30)
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(20)
    assert prober.request(D), "let in though bytes of the failed transfer would land on those of the next request"


def test_reads_that_wait_after_the_bytes_have_landed_make_it_settle_for_half_of_interval_all_the_same() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(16)
    prober.becomes(D, Peer(read_takes=0.2))
    prober.run(10)
    assert prober.request(D), "let in though bytes on other connections may land"
    prober.run(8)
    assert prober.let_in(D)


def test_a_peer_that_falls_silent_now_and_then_is_let_in_all_the_same_though_the_kernel_sends_bytes_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    for _ in range(12):
        prober.run(9)
        prober.becomes(D, REFUSING)
        prober.run(1)
        prober.becomes(D, BYTES_MAY_LAND)
    assert prober.let_in(D), "its time begins anew with each silence"


def test_a_peer_that_works_though_the_kernel_sends_bytes_again_is_not_kept_out_for_them_a_second_time() -> None:
    """They are another peer's, on the same host."""
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(33)
    for _ in range(3):
        use_until(prober, prober.clock.now + 12)
        prober.fail(D)
        took_s = wait_until_let_in(prober)
        assert took_s < 2.0, "a healthy peer is in use less than with a loop of 30 s"
    assert prober.watch.rules.verifying
    prober.becomes(D, HEALTHY)
    use_until(prober, prober.clock.now + 12)
    prober.fail(D)
    prober.run(2)
    use_until(prober, prober.clock.now + 12)
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(20)
    assert prober.request(D), "the sign is trusted again once it was gone"


def test_that_bytes_may_land_says_nothing_about_reads() -> None:
    """Let in meanwhile and in use, a peer whose data port is closed next is kept out as any other."""
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(33)
    use_until(prober, 45)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(25)
    assert prober.request(D), "let in to a closed data port"


def test_that_bytes_could_land_in_one_outage_says_nothing_about_the_next_one() -> None:
    """One that was let in unverified in that is read at the end of its probations, as any other."""
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(33)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    wait_until_let_in(prober)
    use_until(prober, prober.clock.now + 125)
    assert not prober.watch.rules.verifying, "verification costs each peer of this transport its time for good"


def test_without_settle_nobody_waits_for_bytes() -> None:
    prober = VirtualProber(settle_s=0.0)
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(1)
    assert prober.let_in(D)


def test_without_settle_a_read_that_waited_is_enough() -> None:
    prober = VirtualProber(settle_s=0.0)
    prober.fail(D, peer=Peer(read_takes=3.0))
    prober.run(4)
    assert prober.let_in(D) == [(about(3.0), None)]


def test_after_a_silence_the_time_of_a_peer_whose_reads_wait_begins_anew() -> None:
    prober = VirtualProber()
    waits = Peer(read_takes=0.2)
    prober.fail(D, peer=waits)
    prober.run(12)
    prober.becomes(D, REFUSING)
    prober.run(2)
    prober.becomes(D, waits)
    prober.run(8)
    assert prober.request(D), "let in on the time that it waited before its silence"


def test_reads_from_before_a_silence_do_not_let_it_in() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=READS_NEVER_END)
    prober.run(2)
    prober.becomes(D, REFUSING)
    prober.run(28.5)
    (reads,) = prober.reads
    assert prober.seen("answer", D)[-1].detail[1] is False
    prober.show(reads, Verdict.READABLE)
    prober.run(1)
    assert prober.request(D), "it was read before it fell silent, and is gone now"


@pytest.mark.parametrize("took_s", [0.001, 0.5, 1.5])
@pytest.mark.parametrize(("jitter", "pause_s"), [(0.0, 1.1), (0.5, 1.155), (1.0, 1.21)])
def test_reads_that_failed_are_followed_by_a_pause_that_does_not_grow(
    jitter: float, pause_s: float, took_s: float
) -> None:
    """Longer than the 1.0 s for which Mooncake leaves a connection alone, and so short that a heal is heard of soon."""
    prober = VirtualProber(interval_s=60.0, jitter=jitter)
    for _ in range(3):
        prober.fail(D, peer=Peer(memory=Verdict.UNREADABLE, read_takes=took_s))
        begun = len(prober.seen("read", D))
        prober.run(50)
        moments = [entry.at for entry in prober.seen("read", D)[begun:]]
        pauses = [following - (at + took_s) for at, following in itertools.pairwise(moments)]
        assert len(pauses) > 10
        assert pauses == about([pause_s] * len(pauses))
        wait_until_let_in(prober)


def test_a_peer_whose_data_port_opens_is_let_in_at_the_end_of_the_pause() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(10)
    failed_at = prober.moments("shown", D)[-1]
    prober.becomes(D, HEALTHY)
    prober.run(2)
    assert prober.let_in(D) == [(about(failed_at + 1.155), None)]


def test_a_peer_that_was_gone_and_cannot_be_read_is_looked_at_less_and_less_often_until_it_registers() -> None:
    """Each look leaves Mooncake's connections in a cooldown, which would delay the first request after that."""
    prober = VirtualProber(interval_s=300.0)
    prober.fail(D, peer=REFUSING)
    prober.run(5)
    prober.becomes(D, DATA_PORT_REJECTED)
    prober.run(95)
    looks = prober.moments("read", D)
    assert len(looks) <= 12
    pauses = [b - a for a, b in itertools.pairwise(looks)]
    assert pauses[-1] > 25
    assert pauses == sorted(pauses)
    prober.register(D)
    prober.fail(D)
    prober.run(10)
    assert len(prober.seen("read", D)) >= len(looks) + 7, "what was known of its old process counts for the new one"


def test_that_a_peer_was_gone_in_an_outage_counts_no_more_in_the_next() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(5)
    prober.becomes(D, DATA_PORT_REJECTED)
    wait_until_let_in(prober)
    prober.fail(D)
    looks = len(prober.moments("read", D))
    prober.run(50)
    pauses = [b - a for a, b in itertools.pairwise(prober.moments("read", D)[looks:])]
    assert max(pauses) < 1.2, "it has not been away, and waits as if its process were another one"


def test_the_pauses_of_a_peer_that_was_gone_are_no_longer_than_interval() -> None:
    prober = VirtualProber(interval_s=10.0)
    relapse_waits(prober, 5)
    prober.fail(D, peer=REFUSING)
    prober.run(5)
    prober.becomes(D, DATA_PORT_REJECTED)
    prober.run(250)
    pauses = [b - a for a, b in itertools.pairwise(prober.moments("read", D)) if a > prober.clock.now - 150]
    assert max(pauses) == about(10.0)


def test_a_call_whose_reads_hang_is_ended_after_a_second_and_made_again() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=BEGIN_HANGS)
    prober.run(2.5)
    assert prober.moments("read", D) == about([1.0])
    assert prober.moments("ended", D) == about([1.0 + READ_HANGS_S])
    prober.becomes(D, HEALTHY)
    prober.run(1.5)
    assert prober.let_in(D), "it is well, and waits for reads that hung when it was not"


def test_a_call_whose_reads_hang_is_ended_also_when_the_session_failed_again_meanwhile() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=BEGIN_HANGS)
    prober.run(1.5)
    prober.fail(D, peer=HEALTHY)
    prober.run(3)
    assert prober.let_in(D), "kept out for as long as a call hangs that counts no more"


def test_a_call_that_cannot_be_ended_does_not_keep_its_session_out_of_the_next_outage() -> None:
    prober = VirtualProber(calls_can_be_ended=False)
    prober.fail(D, peer=BEGIN_HANGS)
    prober.run(31)
    assert not prober.request(D)
    prober.becomes(D, HEALTHY)
    prober.fail(D)
    prober.run(6)
    assert len(prober.let_in(D)) == 2, "nobody probes it until a call of the outage before comes back"
    assert len(prober.out) == prober.watch.in_flight() == 1
    prober.answer(next(iter(prober.out)), True)
    prober.run(1)
    assert prober.watch.in_flight() == 0
    assert not prober.request(D)


FOR_GOOD = pytest.mark.parametrize(
    "kernel", [{"calls_can_be_ended": False}, {"ending_takes_s": math.inf}], ids=["not ended", "ended in vain"]
)


@FOR_GOOD
def test_calls_whose_reads_hang_for_good_do_not_pile_up(kernel: dict[str, Any]) -> None:
    prober = VirtualProber(**kernel)
    prober.fail(D, peer=BEGIN_HANGS)
    for _ in range(40):
        assert wait_until_let_in(prober) < 35, "a healthy peer is in use less than with a loop of 30 s"
        prober.run(0.5)
        prober.request(D)
        prober.run(12)
        prober.request(D)
        prober.fail(D)
        assert prober.watch.in_flight() <= 3, "one session takes the places of all others"
    prober.fail("well:1", peer=HEALTHY)
    prober.run(1.1)
    assert not prober.request("well:1")


@FOR_GOOD
@pytest.mark.parametrize("hang", [16, 40, 100])
def test_beside_calls_whose_reads_hang_for_good_one_is_let_in_as_a_loop_would(
    hang: int, kernel: dict[str, Any]
) -> None:
    prober = VirtualProber(**kernel)
    prober.fail(*many("hangs", hang), peer=BEGIN_HANGS)
    prober.run(5)
    prober.fail("well:1", peer=HEALTHY)
    prober.run(30.5)
    assert not prober.request("well:1"), "calls that never return have all places"
    assert prober.watch.in_flight() < 32
    prober.run(60)
    assert prober.moments("probe", "hangs:1") or prober.moments("read", "hangs:1")


@pytest.mark.parametrize("hang", [16, 100, 300])
def test_beside_calls_whose_reads_hang_and_can_be_ended_one_is_let_in_soon(hang: int) -> None:
    prober = VirtualProber()
    prober.fail(*many("hangs", hang), peer=BEGIN_HANGS)
    prober.run(5)
    prober.fail("well:1", peer=HEALTHY)
    prober.run(2.5)
    assert prober.let_in("well:1") == [(pytest.approx(6.5, abs=1.0), None)], "calls that hang have all places"
    ended_after_s = [entry.at - entry.detail.made_at for entry in prober.seen("ended")]
    assert hang == 16 or min(ended_after_s) < 0.5, "others wait a second for their places"


def test_after_28_peers_have_stopped_before_they_were_read_another_one_is_read_as_soon_as_one_is_ended() -> None:
    prober = VirtualProber(ending_takes_s=0.05)
    prober.fail(*many("stopped", 28), peer=HEALTHY)
    prober.run(0.9)
    for session in many("stopped", 28):
        prober.becomes(session, HUNG)
    prober.run(5)
    prober.fail("well:1", peer=HEALTHY)
    prober.run(1.5)
    assert not prober.request("well:1"), "a call that has just been ended counts as one that was ended in vain"


def test_a_call_that_is_to_read_and_whose_probe_hangs_is_answered_when_the_peer_resumes() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    prober.run(0.5)
    prober.becomes(D, HUNG)
    prober.run(9.5)
    assert prober.moments("read", D) == about([1.0])
    assert prober.seen("ended", D) == [], "nobody hears of its resume at once"
    prober.resume(D)
    prober.run(1.1)
    assert prober.let_in(D), "it is well, and not used"


def test_a_peer_that_has_stopped_is_not_let_in_because_its_probe_hangs() -> None:
    prober = VirtualProber(interval_s=5.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(2.0)
    prober.becomes(D, HUNG)
    prober.run(50)
    assert prober.request(D), "let in though it answers no more"


def test_a_peer_that_answers_and_cannot_be_read_is_told_once_an_outage() -> None:
    prober = VirtualProber(interval_s=5.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(4.9)
    assert len(prober.seen("read", D)) > 2
    (told,) = prober.seen(Event.UNREADABLE, D)
    assert told.detail == {"why": UNREADABLE, "outage_s": about(1.0)}
    prober.run(1)
    assert prober.let_in(D) == [(about(5.0), UNREADABLE)]
    prober.fail(D)
    prober.run(4)
    assert len(prober.seen(Event.UNREADABLE, D)) == 2, "the reason of the second outage is not told"
    assert [entry.detail for entry in prober.seen(Event.HELD, D)] == [{"hold_s": 1.0, "relapses": 1}]


# Failing open.


def test_a_peer_that_cannot_be_verified_is_let_in_after_interval_with_the_reason() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(10)
    prober.becomes(D, DATA_PORT_REJECTED)
    prober.run(50)
    first_answer = next(entry.at for entry in prober.seen("answer", D) if entry.detail[1] is True)
    assert prober.let_in(D) == [(about(first_answer + 30), UNREADABLE)]


def test_over_rdma_no_request_is_lost_while_mooncake_leaves_a_device_alone_whose_cable_was_out() -> None:
    """For 30 s after its port is back. What can be written over RDMA can be read, so reads that fail mean more."""
    prober = VirtualProber()
    prober.watch.rules.over_rdma = True
    prober.fail(D, OTHER, peer=DATA_PORT_REJECTED)
    prober.run(80 + 30)
    prober.becomes(D, HEALTHY)
    prober.run(30)
    assert prober.let_in(D) == [(pytest.approx(110.0, abs=1.3), None)]
    assert prober.let_in(OTHER) == [(about(120.0), UNREADABLE)], "one that cannot be verified is kept out for good"


# Over RDMA reads that fail hold up transfers to others.

UNREACHABLE = Peer(memory=Verdict.UNREADABLE, read_takes=10.0)  # Mooncake tries nine times to connect


def over_rdma(*others: str) -> VirtualProber:
    """``others`` have registered, and nothing is wrong with them."""
    prober = VirtualProber()
    prober.watch.rules.over_rdma = True
    prober.registrations.update({other: object() for other in others})
    return prober


def test_over_rdma_an_unreachable_peer_is_read_without_a_rest_while_there_is_nobody_else() -> None:
    prober = over_rdma(D)
    prober.fail(D, peer=UNREACHABLE)
    prober.run(60)
    assert prober.moments("read", D) == pytest.approx([1.0, 12.1, 23.3, 34.4, 45.6, 56.7], abs=0.3)


@pytest.mark.parametrize("held_up", [0.4, 1.0])
def test_over_rdma_an_unreachable_peer_is_read_a_third_of_the_time_beside_others(held_up: float) -> None:
    prober = over_rdma(D, OTHER)
    prober.fail(D, peer=dataclasses.replace(UNREACHABLE, held_up=held_up))
    prober.run(100)
    assert prober.moments("read", D) == pytest.approx([1.0, 31.0, 61.0, 91.0], abs=0.3)


def test_over_rdma_a_peer_whose_reads_hold_up_nobody_is_read_without_a_rest_beside_others() -> None:
    """As behind a router: there a heal is noticed at once, however many others are in use."""
    prober = over_rdma(D, OTHER)
    prober.fail(D, peer=dataclasses.replace(UNREACHABLE, held_up=0.3))
    prober.run(60)
    assert prober.moments("read", D) == pytest.approx([1.0, 12.1, 23.3, 34.4, 45.6, 56.7], abs=0.3)


def test_over_rdma_reads_that_fail_at_once_are_repeated_soon_beside_others() -> None:
    prober = over_rdma(D, OTHER)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(10)
    assert len(prober.moments("read", D)) == 8


def test_over_tcp_nobody_rests_because_no_thread_stands_still() -> None:
    prober = over_rdma(D, OTHER)
    prober.watch.rules.over_rdma = False
    prober.fail(D, peer=UNREACHABLE)
    prober.run(30)
    assert len(prober.moments("read", D)) == 3


def test_over_rdma_two_unreachable_peers_are_not_read_at_the_same_time_beside_others() -> None:
    prober = over_rdma(D, OTHER, "well:1")
    prober.fail(D, OTHER, peer=UNREACHABLE)
    prober.run(119)
    (_, *first), (_, *second) = (prober.moments("read", session) for session in (D, OTHER))
    assert len(first) >= 2
    assert all(abs(at - other_at) >= 9.9 for at in first for other_at in second), (first, second)


def test_over_rdma_a_machine_with_many_unreachable_sessions_is_read_no_more_than_one_but_each_is_probed() -> None:
    sessions = many("decode", 8)
    prober = over_rdma("well:1", *sessions)
    prober.fail(*sessions, peer=UNREACHABLE)
    prober.run(119)
    reads = sorted(at for session in sessions for at in prober.moments("read", session))
    assert reads == pytest.approx([1.0, 31.0, 61.0, 91.0], abs=0.3)
    assert max(len(prober.moments("read", session)) for session in sessions) == 1, "one is read for all, and by turns"
    asked = [sorted(prober.moments("probe", session) + prober.moments("read", session)) for session in sessions]
    gaps = [later - before for times in asked for before, later in itertools.pairwise(times)]
    assert max(gaps) <= 30.0 + 0.1


def test_over_rdma_one_session_of_an_unreachable_machine_is_read_at_a_time_also_while_nobody_else_is_in_use() -> None:
    """Reads of eight take a minute over a flat network. Who is well and was blacklisted, too, would wait as long."""
    sessions = many("decode", 8)
    prober = over_rdma("other:1", *sessions)
    prober.fail("other:1", peer=REFUSING)
    prober.fail(*sessions, peer=UNREACHABLE)
    prober.run(60)
    reads = sorted(at for session in sessions for at in prober.moments("read", session))
    assert reads == pytest.approx([1.0, 12.1, 23.3, 34.4, 45.6, 56.7], abs=0.3)


def test_over_rdma_the_sessions_of_the_only_machine_are_read_side_by_side() -> None:
    """They hold up nobody else, and after the heal it is quicker."""
    sessions = many("decode", 8)
    prober = over_rdma(*sessions)
    prober.fail(*sessions, peer=UNREACHABLE)
    prober.run(13)
    reads = [prober.moments("read", session) for session in sessions]
    assert [first for first, _ in reads] == [1.0] * 8
    assert all(second < 12.2 for _, second in reads), "one waits for its turn"


def test_over_rdma_one_that_has_not_been_read_when_others_are_let_in_unverified_is_probed_no_more_often() -> None:
    sessions = many("decode", 8)
    prober = over_rdma("well:1", *sessions)
    prober.fail(*sessions, peer=UNREACHABLE)
    prober.run(200)
    assert max(len(prober.moments("probe", session)) for session in sessions) < 20


def test_over_rdma_reads_that_never_end_hold_up_others_of_the_machine_for_interval_at_most() -> None:
    prober = over_rdma("well:1", *many("decode", 3))
    prober.fail("decode:1", peer=READS_NEVER_END)
    prober.run(2)
    prober.fail("decode:2", "decode:3", peer=HEALTHY)
    prober.run(30)
    assert prober.sessions == {"decode:1"}, "a loop of 30 s would have let the others in"


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("every_s", [15, 28])
def test_over_rdma_one_that_fails_again_and_again_does_not_take_the_turns_of_others_of_its_machine(
    registers: bool, every_s: int
) -> None:
    prober = over_rdma("well:1", *many("decode", 2))
    prober.fail("decode:1", peer=UNREACHABLE)
    prober.run(2)
    prober.fail("decode:2", peer=HEALTHY)
    for _ in range(60 // every_s):
        prober.run(every_s - 1)
        if registers:
            prober.register("decode:1")
        prober.run(1)
        prober.fail("decode:1", peer=UNREACHABLE)
    assert prober.let_in("decode:2"), "it is not let in within INTERVAL for each session of its machine"


def test_over_rdma_a_session_on_probation_is_read_though_another_of_its_machine_is_blacklisted() -> None:
    prober = over_rdma("well:1", *many("decode", 2))
    prober.fail("decode:1", peer=DATA_PORT_REJECTED)
    prober.run(125)
    assert len(prober.let_in("decode:1")) == 1
    prober.fail("decode:2", peer=UNREACHABLE)
    for _ in range(140):
        prober.request("decode:1")
        prober.run(1)
    assert prober.seen(Event.VERIFICATION_OFF), "its memory cannot be read though it works, twice, and nobody learns it"


def test_over_rdma_ten_machines_that_heal_are_let_in_without_more_probes_than_over_tcp() -> None:
    sessions = [session for host in range(10) for session in many(f"decode-{host}", 8)]
    prober = over_rdma(*sessions)
    prober.fail(*sessions, peer=Peer(read_takes=0.002))
    prober.run(10)
    assert not prober.sessions
    assert len(prober.seen("probe")) + len(prober.seen("read")) <= 3 * len(sessions)


def test_over_rdma_nothing_is_kept_of_a_session_whose_probation_has_passed() -> None:
    prober = over_rdma("well:1", D)
    for _ in range(5):
        prober.fail(D, peer=HEALTHY)
        prober.run(2)
        prober.register_as_up_to_0_5_21(D)
    prober.register(D)
    assert not prober.watch._neighbours


def test_over_rdma_sessions_of_a_machine_that_fail_one_after_another_are_read_by_turns_a_third_of_the_time() -> None:
    sessions = many("decode", 4)
    prober = over_rdma("well:1", *sessions)
    for session in sessions:
        prober.fail(session, peer=UNREACHABLE)
        prober.run(4)
    prober.run(134)
    reads = sorted(at for session in sessions for at in prober.moments("read", session))
    assert reads == pytest.approx([1.0, 31.0, 61.0, 91.0, 121.0], abs=2.0)
    assert all(prober.moments("read", session) for session in sessions), "one never has its turn"


def test_over_rdma_the_turn_of_a_session_that_has_fallen_silent_is_another_sessions() -> None:
    prober = over_rdma("well:1", *many("decode", 2))
    prober.fail(*many("decode", 2), peer=UNREACHABLE)
    prober.run(12)
    prober.becomes("decode:2", REFUSING)
    prober.run(22)
    assert prober.moments("read", "decode:1") == pytest.approx([1.0, 32.0], abs=0.3)


def test_over_rdma_reads_of_a_session_on_probation_say_nothing_of_its_machines_turns() -> None:
    prober = over_rdma("well:1", *many("decode", 2))
    prober.fail("decode:1", peer=UNREACHABLE)
    prober.run(122)
    for _ in range(6):
        prober.request("decode:1")
        prober.run(10)
    prober.request("decode:1")
    prober.run(5)
    prober.fail("decode:2", peer=DATA_PORT_REJECTED)
    prober.run(10)
    assert prober.moments("shown", "decode:1")[-1] > 190, "its probation has not ended with reads"
    assert len(prober.let_in("decode:1")) == 1, "it is said to have recovered once more"


def test_over_rdma_a_peer_has_its_turn_in_interval_however_many_others_are_unreachable() -> None:
    """With a fixed loop it would be let in then."""
    hosts = [f"host-{number}:1" for number in range(8)]
    gone = many("gone", 64)
    prober = over_rdma("well:1", D, *hosts, *gone)
    prober.fail(*hosts, *gone, peer=UNREACHABLE)
    prober.run(50)
    prober.fail(D, peer=UNREACHABLE)
    prober.run(12)
    prober.becomes(D, HEALTHY)
    prober.run(30)
    assert prober.let_in(D)[0][1] is None


def test_over_rdma_a_machine_that_is_well_again_has_all_its_sessions_let_in_at_once() -> None:
    sessions = many("decode", 8)
    prober = over_rdma("well:1", *sessions)
    prober.fail(*sessions, peer=Peer(read_takes=0.02))
    prober.run(1.2)
    assert all(prober.let_in(session) for session in sessions)


@pytest.mark.parametrize("forget", [lambda prober: prober.register("decode:1"), lambda prober: prober.sessions.clear()])
def test_over_rdma_a_session_that_is_forgotten_while_it_is_read_holds_up_none_of_its_machine(
    forget: Callable[[VirtualProber], None],
) -> None:
    prober = over_rdma("well:1", *many("decode", 2))
    prober.fail("decode:1", peer=READS_NEVER_END)
    prober.run(2)
    forget(prober)
    prober.fail("decode:2", peer=HEALTHY)
    prober.run(1.2)
    assert prober.let_in("decode:2")


def test_over_tcp_a_readable_session_says_nothing_of_others_on_its_machine() -> None:
    """Each has a data port of its own, and a read that fails delays the next transfer to it."""
    first, second = many("decode", 2)
    prober = VirtualProber()
    prober.fail(first, peer=DATA_PORT_REJECTED)
    prober.run(0.5)
    prober.fail(second, peer=DATA_PORT_REJECTED)
    prober.run(1)
    prober.becomes(first, HEALTHY)
    prober.run(5)
    assert prober.let_in(first)
    reads = prober.moments("read", second)
    assert min(later - before for before, later in itertools.pairwise(reads)) >= 1.1


def test_over_rdma_a_peer_that_was_silent_meanwhile_does_not_wait_for_its_turn() -> None:
    prober = over_rdma("well:1", D, "other:1")
    prober.fail(D, "other:1", peer=UNREACHABLE)
    prober.run(20)
    for session in (D, "other:1"):
        prober.becomes(session, REFUSING)
    prober.run(16)
    for session in (D, "other:1"):
        prober.becomes(session, HEALTHY)
    prober.run(3)
    assert prober.let_in(D)
    assert prober.let_in("other:1"), "it waits for the turn that it had before"


def test_over_rdma_all_sessions_of_a_machine_are_let_in_as_soon_as_one_is_readable() -> None:
    prober = over_rdma("decode:1", "decode:2", "decode:3", "well:1")
    sessions = many("decode", 3)
    prober.fail(*sessions, peer=UNREACHABLE)
    prober.run(15)
    for session in sessions:
        prober.becomes(session, HEALTHY)
    prober.run(30)
    times = [prober.let_in(session)[0][0] for session in sessions]
    assert min(times) < 32.0
    assert max(times) - min(times) < 0.1, "one has to wait for its turn though its machine has healed"


@pytest.mark.parametrize("others", [(), ("well:1",)], ids=["of the only machine", "beside another machine"])
def test_over_rdma_reads_that_fail_just_after_another_session_of_the_machine_was_readable_are_repeated_soon(
    others: tuple[str, ...],
) -> None:
    """Two devices had lost the machine, and one finds it again a second before the other. Else it waits for 20 s."""
    first, second = many("decode", 2)
    prober = over_rdma(first, second)
    prober.fail(first, second, peer=UNREACHABLE)
    prober.run(15)
    calls = {call.session: call for call in prober.reads}
    prober.registrations.update(dict.fromkeys(others, object()))
    for session in (first, second):
        prober.becomes(session, HEALTHY)
    prober.show(calls[second], Verdict.READABLE)
    prober.run(1)
    prober.show(calls[first], Verdict.UNREADABLE)
    prober.run(1)
    assert prober.let_in(second)
    assert not prober.let_in(first)
    prober.run(1.2)
    assert prober.let_in(first)


def test_over_rdma_one_of_the_only_machine_that_registers_again_and_again_ends_no_pauses_of_others_there() -> None:
    first, second = many("decode", 2)
    prober = over_rdma(first, second)
    prober.fail(first, peer=UNREACHABLE)
    for _ in range(16):
        prober.fail(second, peer=REFUSING)
        prober.run(0.2)
        prober.register(second)
        prober.run(5)
    pauses = [later - at for at, later in itertools.pairwise(prober.moments("read", first))]
    assert pauses
    assert min(pauses) >= 29.0, "its reads hold up the transfers to the other one"


@pytest.mark.parametrize("fails_again", [False, True], ids=["is used", "fails again and again"])
def test_over_rdma_a_session_that_still_cannot_be_read_takes_turns_again_after_another_of_its_machine_was(
    fails_again: bool,
) -> None:
    first, second, in_use = many("decode", 3)
    prober = over_rdma(first, second)
    prober.fail(first, second, peer=UNREACHABLE)
    prober.run(15)
    (call,) = (call for call in prober.reads if call.session == second)
    prober.becomes(second, HEALTHY)
    prober.show(call, Verdict.READABLE)
    prober.registrations[in_use] = object()
    for _ in range(16):
        prober.run(5)
        if fails_again:
            prober.fail(second)
    assert not prober.let_in(first)
    once, *pauses = (later - at for at, later in itertools.pairwise(prober.moments("read", first)[1:]))
    assert once < 12.0
    assert pauses
    assert min(pauses) >= 29.0, "its reads hold up the transfers to the other one"


def test_reads_that_fail_after_interval_let_their_peer_in_at_once() -> None:
    prober = VirtualProber(interval_s=1.5)
    prober.fail(D, peer=Peer(memory=Verdict.UNREADABLE, read_takes=0.9))
    prober.run(3)
    assert prober.let_in(D) == [(about(1.9), UNREADABLE)]
    assert prober.moments("probe", D) == [0.0], "it is probed once more, for nothing"


@pytest.mark.parametrize("peer", [READS_NEVER_END, DATA_PORT_DROPPED], ids=["for ever", "for 30 s"])
def test_a_peer_whose_reads_hang_is_let_in_after_interval_with_the_reason(peer: Peer) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=peer)
    prober.run(31)
    assert prober.let_in(D) == [(about(30.0), hang_for(29))]


def test_a_peer_that_falls_silent_while_its_reads_hang_is_not_let_in() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_DROPPED)
    prober.run(25)
    prober.becomes(D, HUNG)
    prober.run(100)
    assert prober.request(D), "let in though its probe hangs"


def test_a_probe_that_hangs_when_a_peer_could_be_let_in_unverified_is_ended_and_made_again() -> None:
    """Its connection may be dead, and the peer well."""
    prober = VirtualProber()
    prober.fail(D, peer=dataclasses.replace(DATA_PORT_DROPPED, read_takes=32.0))
    prober.run(25)
    prober.becomes(D, HUNG)
    prober.run(7)
    assert prober.request(D)
    prober.becomes(D, HEALTHY)
    prober.run(3)
    assert prober.let_in(D) == [(pytest.approx(34.3, abs=0.5), None)]


def test_what_was_learnt_of_bytes_does_not_outlast_reads_that_failed() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    prober.run(28)
    prober.becomes(D, dataclasses.replace(BYTES_MAY_LAND, read_takes=15.0))
    prober.run(2)
    prober.becomes(D, HUNG)  # so it is not let in when those reads end
    prober.run(18)
    prober.becomes(D, DATA_PORT_REJECTED)
    wait_until_let_in(prober)
    use_for(prober, 2)
    prober.fail(D, peer=BYTES_MAY_LAND)
    assert wait_until_let_in(prober) > 25, "it was taken for one that had worked while bytes could land"


@pytest.mark.parametrize("can_be_ended", [True, False])
def test_a_peer_whose_reading_calls_hang_is_let_in_after_interval_with_the_reason(can_be_ended: bool) -> None:
    prober = VirtualProber(calls_can_be_ended=can_be_ended)
    prober.fail(D, peer=BEGIN_HANGS)
    prober.run(31.1)
    ((let_in_at, reason),) = prober.let_in(D)
    assert let_in_at == pytest.approx(30.0, abs=1.02)
    assert reason in ([UNREADABLE, hang_for(1)] if can_be_ended else [hang_for(29)])
    assert (len(prober.seen("read", D)) > 10) == can_be_ended


@pytest.mark.parametrize(
    "peer", [DATA_PORT_REJECTED, READS_NEVER_END, BEGIN_HANGS], ids=["reads fail", "reads hang", "calls hang"]
)
def test_a_peer_that_cannot_be_verified_waits_four_times_as_long_after_each_relapse_up_to_max_interval(
    peer: Peer,
) -> None:
    prober = VirtualProber(interval_s=10.0, max_interval_s=250.0)
    waits = []
    for _ in range(5):
        prober.fail(D, peer=peer)
        waits.append(wait_until_let_in(prober))
    room_s = READ_HANGS_S + 0.2 if peer is BEGIN_HANGS else 0.2
    assert waits == pytest.approx([10, 40, 160, 250, 250], abs=room_s), "each of these costs an operator a request"


def test_a_data_path_that_is_broken_for_hours_is_read_in_each_outage() -> None:
    """The hold is then as long as the wait to be let in unverified, and what was seen before proves nothing."""
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    looks = 0
    for _ in range(20):
        wait_until_let_in(prober, every_s=10)
        assert len(prober.moments("read", D)) > looks, "let in unverified without a look"
        looks = len(prober.moments("read", D))
        prober.fail(D)
    prober.becomes(D, HEALTHY)
    wait_until_let_in(prober, every_s=10)
    assert prober.let_in(D)[-1][1] is None, "it can be read, and is let in with a warning"


# Learning that reads prove nothing.


def test_an_unverified_peer_that_is_used_and_healthy_for_two_probations_switches_verification_off() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    use_until(prober, 160)
    (off,) = prober.moments(Event.VERIFICATION_OFF)
    assert off == pytest.approx(31 + 2 * PROBATION_S, abs=2.1)
    assert not prober.watch.rules.verifying
    prober.fail(OTHER, peer=DATA_PORT_REJECTED)
    prober.run(1.1)
    assert prober.let_in(OTHER) == [(pytest.approx(161.0, abs=1.1), None)], "kept out by reads that prove nothing"


def test_reads_that_hang_at_the_end_of_a_probation_count_as_unreadable_after_interval() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.becomes(D, READS_NEVER_END)
    use_until(prober, 230)
    (off,) = prober.moments(Event.VERIFICATION_OFF)
    assert off == pytest.approx(31 + 2 * (PROBATION_S + 30), abs=4.1)


def test_where_reads_never_end_two_probations_switch_verification_off_too() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=READS_NEVER_END)
    prober.run(31)
    use_until(prober, 230)
    assert not prober.watch.rules.verifying, "everybody waits for INTERVAL, for good, for reads that prove nothing"


@pytest.mark.parametrize("between", [1.0, 0.005])
def test_a_second_request_while_it_is_read_at_the_end_of_its_probation_does_not_make_one_of_two(between: float) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.becomes(D, Peer(takes=0.01, memory=Verdict.UNREADABLE, read_takes=5.0))
    use_until(prober, 91)
    reads = len(prober.seen("read", D))
    for _ in range(4):
        prober.request(D)
        prober.run(between)
    use_until(prober, 140)
    assert len(prober.seen("read", D)) == reads + 1
    assert prober.seen("ended", D) == []
    assert prober.watch.rules.verifying, "switched off by one probation"
    use_until(prober, 170)
    assert not prober.watch.rules.verifying


def test_reads_that_hung_at_the_end_of_a_probation_and_then_end_well_leave_verification_on() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.becomes(D, READS_NEVER_END)
    use_until(prober, 150)
    (reads,) = prober.reads
    prober.show(reads, Verdict.READABLE_LATE)
    use_until(prober, 400)
    assert prober.watch.rules.verifying, "switched off though reads have shown that it can be read"


def test_a_blip_at_the_end_of_a_probation_does_not_switch_verification_off() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.becomes(D, HEALTHY)
    use_until(prober, 90)
    prober.becomes(D, DATA_PORT_REJECTED)
    use_until(prober, 95)
    assert prober.moments("read", D)[-1] > 90, "it was not read at the end of its probation"
    prober.becomes(D, HEALTHY)
    use_until(prober, 300)
    assert prober.watch.rules.verifying, "reads at one wrong moment cost everybody the verification"


def test_a_failure_between_two_probations_begins_the_proof_anew() -> None:
    prober = VirtualProber(max_interval_s=30.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    for _ in range(3):
        use_until(prober, prober.clock.now + PROBATION_S + 10)
        prober.fail(D)
        wait_until_let_in(prober, every_s=1)
    assert prober.watch.rules.verifying


def test_verification_is_switched_off_once_however_many_probations_end_at_that_moment() -> None:
    prober = VirtualProber()
    sessions = many("decode", 5)
    prober.fail(*sessions, peer=DATA_PORT_REJECTED)
    for _ in range(200):
        prober.run(1)
        for session in sessions:
            prober.request(session)
    assert len(prober.moments(Event.VERIFICATION_OFF)) == 1, "an operator is told more than once"


def test_verification_stays_on_as_long_as_no_place_was_free_to_read_the_peer_again() -> None:
    prober = VirtualProber(calls_can_be_ended=False)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    prober.becomes(D, HEALTHY)
    prober.fail(*many("hung", 100), peer=Peer(answers=False, takes=1000.0))
    looks = prober.moments("read", D)
    use_until(prober, 400)
    assert prober.moments("read", D) == looks, "there was a place"
    assert prober.watch.rules.verifying, "switched off, though nobody has tried to read"


@pytest.mark.parametrize(
    "peer",
    [HEALTHY, Peer(read_takes=0.2), Peer(memory=Verdict.CANNOT_TELL), Peer(falls_silent=True)],
    ids=["readable", "readable late", "cannot tell", "falls silent"],
)
def test_a_peer_that_is_not_unreadable_at_the_end_of_its_probation_leaves_verification_on(peer: Peer) -> None:
    """It just took long to heal."""
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(31)
    use_until(prober, 91)
    looks = prober.moments("read", D)
    prober.becomes(D, peer)
    use_until(prober, 93)
    assert prober.moments("read", D) == [*looks, about(91.0)]
    prober.becomes(D, DATA_PORT_REJECTED)
    use_until(prober, 300)
    assert prober.watch.rules.verifying, "a peer that just took long to heal cost everybody the verification"


@pytest.mark.parametrize("beside", [[], ["stopped:1"]])
def test_an_unverified_peer_that_nobody_used_teaches_nothing(beside: list[str]) -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.fail(*beside, peer=HUNG)
    for _ in range(30):
        prober.run(10)
        for session in beside:
            prober.request(session)
    assert prober.let_in(D)
    assert prober.watch.rules.verifying


def test_a_registration_on_probation_is_no_use_that_teaches() -> None:
    """Up to 0.5.21 a registration looks the session up and finds it gone: it may be no request at all."""
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.run(40)
    looks = prober.moments("read", D)
    prober.request(D)  # the look-up of a registration
    prober.run(80)
    prober.request(D)
    prober.run(1)
    assert prober.moments("read", D) == looks
    use_until(prober, 200)
    assert prober.watch.rules.verifying, "verification was switched off though no transfer was done"


def test_an_unverified_peer_that_is_used_only_for_a_while_teaches_nothing() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.fail("stopped:1", peer=HUNG)
    prober.run(31)
    use_until(prober, 33)
    for _ in range(20):
        prober.request("stopped:1")
        prober.run(60)
    assert prober.watch.rules.verifying


# Probation and hold.


def relapse_waits(prober: VirtualProber, relapses: int) -> list[float]:
    """How long a healthy peer that fails at its first use, again and again, is kept out each time."""
    waits = []
    for _ in range(relapses + 1):
        prober.fail(D, peer=HEALTHY)
        waits.append(wait_until_let_in(prober, every_s=0.01))
    return waits[1:]


def test_a_session_that_fails_soon_after_it_was_let_in_is_held_twice_as_long_each_time() -> None:
    prober = VirtualProber(interval_s=10.0, max_interval_s=20.0)
    assert relapse_waits(prober, 7) == pytest.approx([1, 2, 4, 8, 16, 20, 20], abs=0.05)
    assert [entry.detail["hold_s"] for entry in prober.seen(Event.HELD)] == [1, 2, 4, 8, 16, 20, 20]


def test_a_held_session_is_let_in_when_the_hold_ends_and_is_probed_seldom_before() -> None:
    prober = VirtualProber()
    relapse_waits(prober, 6)
    prober.fail(D)
    assert prober.seen(Event.HELD)[-1].detail["hold_s"] == 64
    failed_at = prober.clock.now
    prober.run(65)
    assert [at - failed_at for at in prober.moments("probe", D) if at >= failed_at - 0.001] == about([0, 30, 60, 63])
    assert prober.moments("read", D)[-1] == about(failed_at + 64)
    assert prober.let_in(D)[-1] == (about(failed_at + 64), None)


def test_a_peer_that_falls_silent_in_its_hold_must_settle_again() -> None:
    prober = VirtualProber()
    relapse_waits(prober, 3)
    prober.fail(D)
    assert prober.seen(Event.HELD)[-1].detail["hold_s"] == 8
    failed_at = prober.clock.now
    prober.run(6.9)
    prober.becomes(D, REFUSING)
    prober.run(0.95)
    prober.becomes(D, HEALTHY)
    prober.run(0.9)
    assert prober.request(D), "settled on an answer from before its silence"
    prober.run(0.6)
    assert failed_at + 8.5 < prober.let_in(D)[-1][0] < failed_at + 9.5


def use_for(prober: VirtualProber, seconds: float, every_s: float = 0.25) -> None:
    """The session is let in and used for so long; then a transfer to it fails."""
    wait_until_let_in(prober, every_s=0.01)
    until = prober.clock.now + seconds
    while prober.clock.now < until:
        prober.run(min(every_s, until - prober.clock.now))
        assert not prober.request(D)
    prober.fail(D)


def test_a_peer_that_has_worked_for_a_second_is_not_held_whatever_it_did_before() -> None:
    prober = VirtualProber()
    relapse_waits(prober, 8)
    held = len(prober.seen(Event.HELD))
    for _ in range(20):
        use_for(prober, 1.0)
    assert len(prober.seen(Event.HELD)) == held, "out for longer than it needs to heal, for a failure of the prefill's"


def test_a_peer_that_has_worked_for_less_than_a_second_is_held_for_half_of_interval_at_most() -> None:
    prober = VirtualProber(interval_s=10.0)
    prober.fail(D, peer=HEALTHY)
    for _ in range(5):
        use_for(prober, 0.2, every_s=0.1)
    assert [entry.detail["hold_s"] for entry in prober.seen(Event.HELD)] == [1, 2, 4, 5, 5]
    relapse_waits(prober, 1)
    assert [entry.detail["hold_s"] for entry in prober.seen(Event.HELD)][5:] == [1], "its first use failed only once"


def test_one_long_transfer_that_fails_is_no_work() -> None:
    """It fails after 30 s, and SGLang looks the session up before the next transfer begins."""
    prober = VirtualProber()
    prober.fail(D, peer=HEALTHY)
    for _ in range(4):
        wait_until_let_in(prober, every_s=0.01)
        prober.run(30)
        prober.fail(D)
    assert [entry.detail["hold_s"] for entry in prober.seen(Event.HELD)] == [1, 2, 4, 8]


@pytest.mark.parametrize("peer", [DATA_PORT_REJECTED, READS_NEVER_END], ids=["reads fail", "reads hang"])
def test_a_peer_that_worked_though_it_cannot_be_read_is_let_in_soon_until_three_first_uses_fail(peer: Peer) -> None:
    prober = VirtualProber()
    prober.fail(D, peer=peer)
    use_for(prober, 2)
    use_for(prober, 2)
    wait_until_let_in(prober)
    first, second, third = (at for at, _ in prober.let_in(D))
    assert first == pytest.approx(30, abs=1.2), "nobody knows it yet"
    assert second < first + 2 + 3.5, "reads that prove nothing keep a healthy peer out"
    assert third < second + 2 + 3.5, "reads that prove nothing keep a healthy peer out"
    for _ in range(2):  # it has a bad moment
        prober.fail(D)
        assert wait_until_let_in(prober) < 6, "one failed use takes back what was learnt"
    prober.fail(D)
    assert wait_until_let_in(prober) > 100, "it is let in unverified again and again, and each costs a request"


def test_a_peer_that_worked_unread_for_a_whole_probation_is_let_in_soon_if_its_next_use_fails() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=DATA_PORT_REJECTED)
    wait_until_let_in(prober)
    use_until(prober, prober.clock.now + 61)
    prober.request(D)
    prober.fail(D)
    assert wait_until_let_in(prober) < 3, "nobody noted that it had worked"


def test_a_peer_that_worked_though_bytes_may_land_is_let_in_soon_in_a_bad_moment() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=BYTES_MAY_LAND)
    wait_until_let_in(prober)
    use_for(prober, 2)
    for _ in range(3):
        prober.fail(D)
        assert wait_until_let_in(prober) < 6, "one failed use takes back what was learnt"
    prober.fail(D)
    assert wait_until_let_in(prober) > 25, "the bytes of three failed transfers in a row are not waited for"


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


@pytest.mark.parametrize(("transfer_timeout_s", "probation_s"), [(5.0, 60), (30.0, 60), (120.0, 240)])
def test_probation_ends_a_minute_after_the_first_use_or_later_where_a_transfer_may_take_longer(
    transfer_timeout_s: float, probation_s: float
) -> None:
    prober = VirtualProber(transfer_timeout_s=transfer_timeout_s)
    prober.fail(D, peer=HEALTHY)
    prober.run(300)
    prober.request(D)
    prober.run(probation_s - 1)
    prober.fail(D)
    assert len(prober.seen(Event.HELD)) == 1, "a relapse went unpunished: probation begins with the first use"
    prober.run(2)
    prober.request(D)
    prober.run(probation_s)
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


def test_a_peer_let_in_shortly_before_idle_timeout_has_a_probation_as_long_as_any() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=REFUSING)
    prober.run(97)
    prober.becomes(D, HEALTHY)
    prober.run(50)
    assert prober.let_in(D)
    prober.request(D)
    prober.fail(D)
    assert prober.seen(Event.HELD), "forgotten some seconds after it was let in, and so not held"


# Idle.


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


def test_what_comes_of_a_call_to_a_session_that_was_forgotten_changes_nothing() -> None:
    prober = VirtualProber(idle_timeout_s=30.0, settle_s=0.0, verify=False)
    prober.fail(D, peer=HUNG)
    prober.run(31)
    assert prober.seen(Event.DROPPED, D)
    prober.resume(D)
    prober.run(2)
    assert prober.let_in(D) == [], "counted as a recovery"
    assert prober.sleeps_for_good()


def test_sessions_that_came_and_went_are_not_kept_however_long_the_idle_timeout_is() -> None:
    prober = VirtualProber(idle_timeout_s=1e9)
    prober.fail("gone:1", peer=REFUSING)
    for session in many("decode", 500):
        prober.fail(session, peer=REFUSING)
        prober.register(session)
    prober.run(1200)
    assert set(prober.watch.known) == {"gone:1"}
    assert len(prober.watch._due._heap) == 2, "one to probe it, one for its end"


def test_an_unverified_peer_that_is_never_used_again_is_forgotten() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    prober.fail("stopped:1", peer=HUNG)
    prober.run(31)
    use_until(prober, 50)
    for _ in range(100):
        prober.request("stopped:1")
        prober.run(10)
    assert set(prober.watch.known) == {"stopped:1"}, "what nobody needs stays for good"


# Malformed.

NO_SESSION_IDS = [
    *["", "abc", "host", "host:", ":7001", "host:0", "host:-1", "host:080", "host:65536", "host:100000", "host:0x1b"],
    *["host:7001 ", "host:7001\n", "ho st:7001", "host:7001:7002", "host:\u0661\u0662"],
    *["::1:7001", "[::1]", "[::1]7001", "[host]:7001", None, 7001, b"host:7001", ("host", 7001)],
]


@pytest.mark.parametrize("session", NO_SESSION_IDS, ids=repr)
def test_what_is_no_session_id_is_never_probed_and_said_once(session: Any) -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    for _ in range(3):
        prober.fail(session, peer=HEALTHY)
        prober.run(10)
        assert prober.request(session)
    prober.run(101)
    assert prober.seen("probe") == prober.seen("read") == [], "Mooncake would ask some other process"
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


def test_a_malformed_id_is_said_once_and_in_a_stream_of_them_again_when_it_is_not_one_of_the_latest() -> None:
    prober = VirtualProber(idle_timeout_s=100.0)
    stream = [f"no session {number}" for number in range(SAID_LIMIT)]
    prober.fail("again and again", *stream[1:], "again and again", *stream[1:], peer=HEALTHY)
    assert [len(prober.seen(Event.MALFORMED, session)) for session in ("again and again", *stream[1:])] == [
        1
    ] * SAID_LIMIT
    prober.fail("the last straw", *stream[1:], peer=HEALTHY)
    prober.fail("again and again", stream[1], peer=HEALTHY)
    assert len(prober.seen(Event.MALFORMED, "again and again")) == 2, "silent for good"
    assert len(prober.seen(Event.MALFORMED, "the last straw")) == 1
    prober.run(101)
    assert prober.sessions == set()


def test_nothing_is_kept_of_what_was_said_long_ago() -> None:
    prober = VirtualProber()
    for number in range(3 * SAID_LIMIT):
        prober.fail(f"no session {number}", peer=HEALTHY)
        prober.register(f"no session {number}")
    assert len(prober.watch._malformed_said._latest) == SAID_LIMIT


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
