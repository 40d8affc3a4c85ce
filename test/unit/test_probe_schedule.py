"""Who is probed next where many are blacklisted? Stories of places, of the allowance of a second, and of fairness."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sglang.srt.disaggregation.mooncake import probe_schedule
from sglang.srt.disaggregation.mooncake.probe_schedule import Allowance, Places
from sglang.srt.disaggregation.mooncake.session_states import Verdict
from sglang.srt.disaggregation.mooncake.session_watch import BATCH, SessionWatch
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
    many,
)

D = "decode:7001"
CONCURRENCY = FailedSessionProbeSettings().concurrency
LONGEST_BATCH_S = 0.3
READ_IN_10_MS = Peer(memory=Verdict.UNREADABLE, read_takes=0.01)


def about(seconds: Any) -> Any:
    return pytest.approx(seconds, abs=0.01)


def calls(prober: VirtualProber, *sessions: str) -> list[Entry]:
    """Probes, with reads and without, of these sessions or of all."""
    wanted = set(sessions)
    return [
        entry for entry in prober.log if entry.what in ("probe", "read") and (not wanted or entry.session in wanted)
    ]


def most_under_way(prober: VirtualProber, younger_than_s: float = float("inf")) -> int:
    """The most calls that were under way at one moment, none of them older than that."""
    came_at = {entry.detail[0]: entry.at for entry in prober.seen("answer")}
    changes = []
    for call in calls(prober):
        end = min(came_at.get(call.detail, prober.clock.now), call.at + younger_than_s)
        changes += [(call.at, 1), (end, -1)]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def longest_unprobed_s(prober: VirtualProber, sessions: list[str], since: float = 0.0) -> float:
    """The longest that one of them was on the blacklist with no call under way."""
    free_since = dict.fromkeys(sessions, since)
    longest = 0.0
    for entry in prober.log:
        if entry.what in ("probe", "read"):
            longest = max(longest, entry.at - max(since, free_since.pop(entry.session, entry.at)))
        elif entry.what == "answer" and entry.session in prober.sessions:
            free_since[entry.session] = entry.at
    return max([longest, *(prober.clock.now - at for session, at in free_since.items() if session in prober.sessions)])


def answers_and_cannot_be_read(prober: VirtualProber, peers: list[str]) -> None:
    prober.fail(*peers, peer=READ_IN_10_MS)


def hang(prober: VirtualProber, peers: list[str]) -> None:
    prober.fail(*peers, peer=HUNG)


def refuse(prober: VirtualProber, peers: list[str]) -> None:
    prober.fail(*peers, peer=REFUSING)


def are_held(prober: VirtualProber, peers: list[str]) -> None:
    """They are well, and their every first use fails."""
    prober.fail(*peers, peer=HEALTHY)


def get_ready(prober: VirtualProber, kind: Any, peers: list[str]) -> None:
    """Beforehand: those that are held have failed, have been let in, and have failed again, three times."""
    for _ in range(3 if kind is are_held else 0):
        prober.fail(*peers, peer=HEALTHY)
        while prober.sessions:
            prober.run(1)


KINDS = [hang, refuse, are_held, answers_and_cannot_be_read]
BESIDE = [(300, 1.0), (1000, 3.0)]


# Places.


def test_no_more_young_calls_than_concurrency_are_under_way_and_twice_as_many_in_all() -> None:
    prober = VirtualProber(concurrency=8)
    prober.fail(*many("hung", 40), peer=HUNG)
    prober.run(20)
    assert len({entry.session for entry in prober.seen("probe")}) == 40
    assert most_under_way(prober, younger_than_s=Places.YOUNG_S) == 8
    assert most_under_way(prober) == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [300, 1000])
def test_at_most_twice_concurrency_are_under_way_whatever_the_peers_are_like(
    number: int, kind: Callable[[VirtualProber, list[str]], None]
) -> None:
    prober = VirtualProber()
    peers = many("peer", number)
    get_ready(prober, kind, peers)
    kind(prober, peers)
    prober.run(20)
    prober.fail(*many("hung", 100), peer=HUNG)
    prober.run(10)
    assert most_under_way(prober) <= 2 * CONCURRENCY, "a thread each, on a prefill node"
    assert most_under_way(prober, younger_than_s=Places.YOUNG_S) <= CONCURRENCY


@pytest.mark.parametrize("per_half_second", [10, 200])
def test_calls_under_way_are_bounded_also_when_new_peers_hang_all_the_time(per_half_second: int) -> None:
    prober = VirtualProber(concurrency=8)
    for moment in range(60):
        prober.fail(*many(f"hung-{moment}", per_half_second), peer=HUNG)
        prober.run(0.5)
        assert prober.watch.in_flight() == len(prober.out) <= prober.watch.places.most == 16


def test_calls_under_way_are_bounded_also_when_the_peers_used_to_answer_promptly() -> None:
    prober = VirtualProber()
    rack = many("rack", 500)
    prober.fail(*rack, peer=REFUSING)
    prober.run(2)
    for session in rack:
        prober.becomes(session, HUNG)
    prober.run(65)
    assert most_under_way(prober) <= 2 * CONCURRENCY, "a thread each, on a prefill node"


def test_nothing_is_ended_as_long_as_there_are_places() -> None:
    """A probe that hangs is answered within half a millisecond of its peer's resume."""
    prober = VirtualProber()
    prober.fail(*many("hung", 2 * CONCURRENCY), peer=HUNG)
    prober.run(50)
    assert prober.seen("ended") == []
    prober.resume("hung:7")
    prober.run(0.001)
    assert prober.seen("answer", "hung:7")


def test_nothing_is_ended_for_what_waits_only_for_young_ones_to_come_back() -> None:
    prober = VirtualProber()
    prober.fail(*many("hung", 10), peer=HUNG)
    prober.run(5)
    prober.fail(*many("slow", 30), peer=Peer(answers=False, takes=0.02))
    prober.run(1)
    assert {entry.session for entry in prober.seen("probe")} >= set(many("slow", 30))
    assert prober.seen("ended") == []


def test_places_that_nobody_wants_are_not_made() -> None:
    prober = VirtualProber()
    prober.fail(*many("hung", 2 * CONCURRENCY), peer=HUNG)
    prober.run(10)
    prober.fail(D, peer=HUNG)
    prober.run(0.1)
    assert len(prober.seen("probe", D)) == 1
    assert len(prober.seen("ended")) == 1, "a peer that hangs is heard of later when it resumes, for nothing"


def test_the_call_that_hangs_longest_is_ended_first() -> None:
    prober = VirtualProber(concurrency=4)
    hung = many("hung", 8)
    for session in hung:
        prober.fail(session, peer=HUNG)
        prober.run(0.1)
    for number in range(1, 4):
        prober.fail(f"other:{number}", peer=Peer(answers=False, takes=50.0))
        prober.run(0.1)
    assert [entry.session for entry in prober.seen("ended")][:3] == hung[:3]


def test_a_call_that_was_not_ended_at_the_first_attempt_is_tried_again_and_not_all_the_time() -> None:
    prober = VirtualProber(concurrency=2, calls_can_be_ended=False)
    prober.fail(*many("hung", 5), peer=HUNG)
    attempts: list[float] = []
    to_end = prober.watch.to_end

    def counted() -> list[Any]:
        ending = to_end()
        attempts.extend(prober.clock.now for call in ending if call.session == "hung:1")
        return ending

    prober.watch.to_end = counted  # type: ignore[method-assign]
    for number in range(100):  # each failure wakes the daemon thread
        prober.fail(f"fresh:{number + 1}", peer=HUNG)
        prober.run(0.1)
    gaps = [b - a for a, b in itertools.pairwise(attempts)]
    assert len(gaps) > 10
    assert min(gaps) >= Places.TRY_AGAIN_S
    assert max(gaps) < 2 * Places.TRY_AGAIN_S


def test_concurrency_one_is_enough_for_some() -> None:
    prober = VirtualProber(concurrency=1)
    prober.fail(*many("hung", 20), peer=HUNG)
    prober.run(10)
    prober.fail(D, peer=HEALTHY)
    prober.run(5)
    assert prober.let_in(D)
    assert most_under_way(prober) <= 2


# The allowance of a second.


@pytest.mark.parametrize(
    ("number", "per_s", "at_once"), [(100, 350, 64), (1000, 350, 70), (10_000, 350, 200), (30_000, 1050, 600)]
)
def test_many_that_refuse_share_350_probes_a_second_and_more_only_for_interval(
    number: int, per_s: float, at_once: float
) -> None:
    """A probe costs 0.1 ms of CPU, and the prefill node needs its cores."""
    prober = VirtualProber()
    refusing = many("refusing", number)
    prober.fail(*refusing, peer=REFUSING)
    prober.run(100)
    moments = prober.moments("probe")
    in_one_second = max(Counter(int(moment) for moment in moments).values())
    assert in_one_second <= per_s + at_once + 1
    assert len(moments) <= 100 * per_s + Allowance.AT_ONCE


def test_reads_are_paid_from_the_same_allowance() -> None:
    prober = VirtualProber()
    prober.fail(*many("rejected", 1000), peer=DATA_PORT_REJECTED)
    prober.run(20)
    assert len(prober.seen("read")) > 4000
    assert len(calls(prober)) <= 20 * Allowance.PER_S + Allowance.AT_ONCE


@pytest.mark.parametrize("interval_s", [30.0, 15.0, 5.0])
def test_what_may_be_probed_while_the_daemon_thread_sleeps_and_is_late_is_probed_after_it(interval_s: float) -> None:
    clock, late_s = Clock(), 0.09
    watch = SessionWatch(FailedSessionProbeSettings(interval_s=interval_s), many("refusing", 10_000), clock=clock)
    probed = 0
    while clock.now < interval_s:
        while some := watch.take_due():
            probed += len(some)
            for call in some:
                watch.answered(call, False)
        clock.now += late_s + (watch.next_due_in() or 0.0)
    assert probed >= 10_000, "many go unprobed for longer than INTERVAL"


def test_with_ten_thousand_blacklisted_the_daemon_thread_wakes_four_times_a_second_at_most() -> None:
    """Probes that are made sixteen at a time cost 10 to 30 % more."""
    clock = Clock()
    watch = SessionWatch(FailedSessionProbeSettings(), many("refusing", 10_000), clock=clock)
    sleeps = probed = 0
    while clock.now < 60.0:
        while some := watch.take_due():
            probed += len(some)
            for call in some:
                watch.answered(call, False)
        clock.now += watch.next_due_in() or 0.0
        sleeps += 1
    assert sleeps <= 60 * 4, "watching costs the prefill node's cores"
    assert probed >= 20_000


def test_a_rack_of_64_is_probed_at_once_and_one_that_fails_then_too() -> None:
    prober = VirtualProber(concurrency=100)
    prober.fail(*many("refusing", 64), peer=REFUSING)
    prober.run(0.01)
    assert len(prober.seen("probe")) == 64
    prober.run(10)
    prober.fail(D, peer=HEALTHY)
    prober.run(0.1)
    assert prober.seen("probe", D)


@pytest.mark.parametrize(("number", "per_s"), [(1, 0.1), (10, 1), (1000, 10 / 3)])
def test_a_probe_listens_every_ten_seconds_but_no_more_than_three_do_in_a_second(number: int, per_s: float) -> None:
    """Each costs as much as three, and the prefill node needs its cores."""
    prober = VirtualProber()
    prober.fail(*many("refusing", number), peer=REFUSING)
    prober.run(110)
    listened = [entry.at for entry in prober.seen("probe") if entry.detail.listen]
    assert listened[0] >= 10
    assert 0.85 * 100 * per_s <= len(listened) <= 100 * per_s + 1


def test_one_call_of_the_watch_gives_a_bounded_number_of_calls_however_many_are_due() -> None:
    watch = SessionWatch(FailedSessionProbeSettings(concurrency=1000), many("decode", 64), clock=Clock())
    batches = []
    while some := watch.take_due():
        batches.append(len(some))
    assert sum(batches) == 64
    assert max(batches) == BATCH


def register_all(watch: SessionWatch, sessions: list[str]) -> None:
    for session in sessions:
        watch.sessions.discard(session)


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(lambda watch, _: None, id="forgotten"),
        pytest.param(register_all, id="registered"),
        pytest.param(lambda watch, _: watch.sessions.clear(), id="cleared"),
    ],
)
def test_one_call_of_the_watch_looks_at_a_bounded_number_of_sessions_however_many_there_are(
    happens: Callable[[SessionWatch, list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    sessions = many("decode", 10_000)
    watch = SessionWatch(FailedSessionProbeSettings(idle_timeout_s=10.0, concurrency=1000), sessions, clock=clock)
    taken: list[Any] = []
    heappop = probe_schedule.heapq.heappop
    monkeypatch.setattr(probe_schedule.heapq, "heappop", lambda heap: taken.append(heap) or heappop(heap))
    while calls_made := watch.take_due():
        for call in calls_made:
            watch.answered(call, False)
    happens(watch, sessions)
    for seconds in range(1000):
        clock.now = 0.1 * seconds
        taken.clear()
        for call in watch.take_due():
            watch.answered(call, False)
        watch.to_end()
        watch.next_due_in()
        assert len(taken) <= 2 * BATCH, "session_lock is held for as long as the blacklist is"
    assert watch.sessions == set()


# Fairness: what is due is probed in the order in which it fell due.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("number", "within_s"), BESIDE)
@pytest.mark.parametrize("place", ["first", "in the middle", "last"])
def test_one_that_is_well_in_a_burst_of_others_is_probed_soon_and_let_in(
    place: str, number: int, within_s: float, kind: Callable[[VirtualProber, list[str]], None]
) -> None:
    prober = VirtualProber()
    peers = many("peer", number)
    get_ready(prober, kind, peers)
    began = prober.clock.now
    before = {"first": 0, "in the middle": number // 2, "last": number}[place]
    kind(prober, peers[:before])
    prober.fail(D, peer=HEALTHY)
    kind(prober, peers[before:])
    prober.run(within_s)
    assert calls(prober, D), "a decode node that is well waits for others that are not"
    prober.run(1.0 + within_s)
    (let_in_at, unverified), *_ = prober.let_in(D)
    assert unverified is None
    assert let_in_at - began <= 2 * within_s + 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("number", "within_s"), BESIDE)
@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_one_that_fails_while_others_have_been_probed_for_long_is_probed_soon_and_let_in(
    jitter: float, number: int, within_s: float, kind: Callable[[VirtualProber, list[str]], None]
) -> None:
    prober = VirtualProber(jitter=jitter)
    peers = many("peer", number)
    get_ready(prober, kind, peers)
    kind(prober, peers)
    for number_of_it in range(10):
        prober.run(1.7)
        session = f"decode:{number_of_it + 1}"
        prober.fail(session, peer=HEALTHY)
        failed_at = prober.clock.now
        prober.run(within_s)
        assert calls(prober, session), "a decode node that is well waits for others that are not"
        prober.run(1.0 + within_s)
        (let_in_at, unverified), *_ = prober.let_in(session)
        assert unverified is None
        assert let_in_at - failed_at <= 2 * within_s + 1.0


@pytest.mark.parametrize("were", [REFUSING, HUNG, DATA_PORT_REJECTED], ids=["gone", "stopped", "rejected"])
@pytest.mark.parametrize("after_s", [5.0, 12.3, 20.0])
def test_five_that_heal_beside_300_that_answer_and_cannot_be_read_are_let_in_within_3_s(
    after_s: float, were: Peer
) -> None:
    prober = VirtualProber()
    five = many("five", 5)
    prober.fail(*many("unreadable", 150), peer=READ_IN_10_MS)
    prober.fail(*five, peer=were)
    prober.fail(*many("unreadable", 300)[150:], peer=READ_IN_10_MS)
    prober.run(after_s)
    for session in five:
        prober.resume(session)
    prober.run(3)
    assert {entry.session for entry in prober.seen("read")} >= set(many("unreadable", 300))
    assert [prober.let_in(session) for session in five if session in prober.sessions] == []
    assert all(prober.let_in(session)[0][1] is None for session in five)


@pytest.mark.parametrize("number", [300, 1000])
def test_five_that_heal_beside_reads_that_never_end_are_let_in_within_3_s(number: int) -> None:
    """No thread waits for reads, so any number of them is pending side by side."""
    prober = VirtualProber()
    five = many("five", 5)
    prober.fail(*many("dropped", number), peer=READS_NEVER_END)
    prober.fail(*five, peer=READS_NEVER_END)
    prober.run(20)
    assert len(prober.reads) == number + 5
    for session in five:
        prober.resume(session)
    prober.run(3)
    assert [session for session in five if session in prober.sessions] == []


def test_any_number_of_peers_is_read_side_by_side() -> None:
    prober = VirtualProber()
    prober.fail(*many("rack", 64), peer=Peer(read_takes=0.09))
    prober.run(1.3)
    assert prober.sessions == set(), "peers that are well wait for the reads of others"


@pytest.mark.parametrize("number", [64, 300, 1000])
@pytest.mark.parametrize("stopped_s", [1, 6, 30])
def test_a_hung_peer_is_let_in_soon_after_it_resumes_beside_hung_ones(number: int, stopped_s: int) -> None:
    prober = VirtualProber(jitter=1.0)
    prober.fail(*many("hung", number), peer=HUNG)
    prober.run(100)
    prober.fail(D, peer=HUNG)
    prober.run(stopped_s)
    prober.resume(D)
    prober.run(10)
    ((let_in_at, unverified),) = prober.let_in(D)
    assert unverified is None
    in_one_round_s = max(0.6, 1.1 * number / Allowance.PER_S + 0.1)
    assert let_in_at - (100 + stopped_s) <= in_one_round_s + 1.0 + 0.1, "healed, and not used for long"


@pytest.mark.slow
def test_one_of_1000_hung_ones_that_resumes_is_let_in_soon() -> None:
    prober = VirtualProber(jitter=1.0)
    prober.fail(*many("hung", 1001), peer=HUNG)
    for number in range(1, 1001, 100):
        resumed_at = prober.clock.now
        prober.resume(f"hung:{number}")
        prober.run(5)
        assert prober.let_in(f"hung:{number}"), f"healed {prober.clock.now - resumed_at:.0f} s ago, and not used"


def test_a_peer_that_refuses_is_probed_again_and_again_beside_hung_ones() -> None:
    prober = VirtualProber()
    prober.fail(D, peer=REFUSING)
    prober.run(1)
    prober.fail(*many("hung", 200), peer=HUNG)
    prober.run(10)
    probes = prober.moments("probe", D)
    assert max(b - a for a, b in itertools.pairwise([*probes, 11.0])) < 1.0, "it may be back, and nobody looks"


def test_a_refusing_peer_is_not_forgotten_over_a_stream_of_fresh_failures() -> None:
    prober = VirtualProber(concurrency=4)
    prober.fail(D, peer=REFUSING)
    for session in many("hung", 600):
        prober.fail(session, peer=HUNG)
        prober.run(0.05)
    waits = [b - a for a, b in itertools.pairwise(prober.moments("probe", D))]
    assert max(waits) < 600 / Allowance.PER_S * 1.1 + 4.0, "a peer that may be back is not probed"


def test_a_healed_session_does_not_wait_for_peers_that_refuse_slowly_all_the_time() -> None:
    prober = VirtualProber(concurrency=4)
    prober.fail(*many("refusing", 1000), peer=Peer(answers=False, takes=0.01))
    prober.run(5)
    prober.fail(D, peer=HEALTHY)
    prober.run(4)
    assert prober.let_in(D), "a session that has healed waits for peers that are gone"


def test_prefill_nodes_that_lose_the_same_thousand_peers_do_not_probe_them_in_step() -> None:
    """A thousand prefill ranks in step would probe each decode rank a thousand times in one moment."""
    peers = many("refusing", 1000)
    last_probed: list[list[float]] = []
    for seed in (1, 2):
        prober = VirtualProber()
        prober.watch.rules.jitter = random.Random(seed).random
        prober.fail(*peers, peer=REFUSING)
        prober.run(60)
        moments = {entry.session: entry.at for entry in prober.seen("probe")}
        last_probed.append([moments[peer] for peer in peers])
    apart_s = statistics.mean(abs(one - other) for one, other in zip(*last_probed, strict=True))
    assert apart_s > 0.5, f"{apart_s:.3f} s apart in the mean, in rounds of 2.9 s"


# INTERVAL is the longest that a session goes unprobed.


@pytest.mark.parametrize(
    ("number", "peer", "interval_s"),
    [
        (10_000, REFUSING, 30.0),
        (1000, HUNG, 30.0),
        (1000, HUNG, 5.0),
        (1000, DATA_PORT_REJECTED, 30.0),
        (1000, READS_NEVER_END, 30.0),
        (1000, DATA_PORT_DROPPED, 30.0),
        (1000, REFUSING, 2.0),
        (100, Peer(answers=False, takes=5.0), 5.0),
    ],
)
@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_interval_holds_for_every_session_however_many_others_there_are(
    jitter: float, number: int, peer: Peer, interval_s: float
) -> None:
    prober = VirtualProber(jitter=jitter, interval_s=interval_s)
    peers = many("peer", number)
    prober.fail(*peers, peer=peer)
    prober.run(4 * interval_s)
    assert longest_unprobed_s(prober, peers) <= interval_s + LONGEST_BATCH_S, "it may have healed, nobody looks"


def test_what_is_kept_of_a_peer_that_cannot_be_read_does_not_grow_with_interval() -> None:
    prober = VirtualProber(interval_s=3600.0, max_interval_s=3600.0)
    prober.fail(D, peer=DATA_PORT_REJECTED)
    for _ in range(600):
        prober.run(1)
        assert len(prober.watch._due._heap) < 20
        assert prober.request(D)


@pytest.mark.slow
def test_interval_holds_for_1000_that_are_held() -> None:
    prober = VirtualProber(interval_s=5.0)
    peers = many("peer", 1000)
    for _ in range(6):
        prober.fail(*peers, peer=HEALTHY)
        while prober.sessions:
            prober.run(1)
    prober.fail(*peers, peer=HEALTHY)
    since = prober.clock.now
    prober.run(30)
    assert len(prober.sessions) == 1000
    assert longest_unprobed_s(prober, peers, since) <= 5.0 + LONGEST_BATCH_S


def test_interval_holds_beside_a_stream_of_fresh_failures() -> None:
    prober = VirtualProber(interval_s=5.0)
    old = many("old", 500)
    prober.fail(*old, peer=HUNG)
    for moment in range(40):
        prober.fail(*many(f"fresh-{moment}", 50), peer=HUNG)
        prober.run(0.5)
    assert longest_unprobed_s(prober, old) <= 5.0 + LONGEST_BATCH_S, "those that failed last go first"


# Where calls cannot be ended (gVisor), those that hang keep their places until they come back.


def test_where_calls_cannot_be_ended_the_places_are_held_and_nothing_spins() -> None:
    prober = VirtualProber(calls_can_be_ended=False)
    prober.fail(*many("hung", 300), peer=HUNG)
    rounds = 0
    take_due = prober.watch.take_due

    def counted() -> list[Any]:
        nonlocal rounds
        rounds += 1
        return take_due()

    prober.watch.take_due = counted  # type: ignore[method-assign,assignment]
    prober.run(59)
    assert len(prober.out) == 2 * CONCURRENCY
    assert prober.seen("ended") == []
    assert rounds <= 59 * 10, "the daemon thread keeps a core of the prefill node busy"


def test_where_calls_cannot_be_ended_a_place_that_comes_free_is_for_who_waits_longest() -> None:
    prober = VirtualProber(calls_can_be_ended=False)
    hung = many("hung", 2 * CONCURRENCY)
    prober.fail(*hung, peer=HUNG)
    prober.run(1)
    prober.fail(D, peer=HEALTHY)
    prober.run(10)
    assert calls(prober, D) == []
    prober.resume(hung[0])
    prober.run(1.2)
    assert prober.let_in(D), "a place is free, and it is not probed"
    assert prober.let_in(hung[0])


def test_where_calls_cannot_be_ended_everybody_is_probed_in_turn_as_they_come_back() -> None:
    prober = VirtualProber(calls_can_be_ended=False)
    hung = many("hung", 100)
    prober.fail(*hung, peer=HUNG)
    prober.run(100 / (2 * CONCURRENCY) * 60 + 61)
    assert {entry.session for entry in prober.seen("probe")} == set(hung)
    assert most_under_way(prober) <= 2 * CONCURRENCY
    for session in hung:
        prober.resume(session)
    prober.run(5)
    assert prober.sessions == set(), "they are well, and the prober works no more"


@pytest.mark.parametrize("calls_can_be_ended", [True, False])
def test_few_that_hang_are_heard_of_at_once_when_they_resume(calls_can_be_ended: bool) -> None:
    prober = VirtualProber(calls_can_be_ended=calls_can_be_ended)
    prober.fail(*many("hung", 20), peer=HUNG)
    prober.run(30)
    for session in many("hung", 20):
        prober.resume(session)
    prober.run(1.1)
    assert prober.sessions == set()


# What logs and metrics are told.


@pytest.mark.slow
def test_how_many_hang_and_how_many_may_be_under_way_is_told() -> None:
    prober = VirtualProber()
    prober.fail(*many("hung", 200), peer=HUNG)
    for _ in range(100):
        prober.run(2.9)
        most = prober.watch.places.most
        assert most / 2 <= prober.watch.in_flight() <= most, "an alert on it never fires"
