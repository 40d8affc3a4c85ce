"""What does an operator read of a session, at each moment of its outage? In virtual time."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.session_states import Session, Verdict
from sglang.srt.observability.failed_session_rows import Row, is_over, rows_of, why
from virtual_prober import (
    CUTS_SHORT,
    DATA_PORT_DROPPED,
    DATA_PORT_REJECTED,
    HEALTHY,
    HUNG,
    REFUSING,
    Peer,
    VirtualProber,
    many,
)

D = "decode:7001"


def row(prober: VirtualProber, session: Any = D) -> Row:
    found = {row.session: row for row in rows_of(prober.watch, prober.clock.now)}
    return found[session if isinstance(session, str) and session in found else repr(session)]


def reason(prober: VirtualProber, session: Any = D, can_probe: bool = True) -> str:
    return why(row(prober, session), can_probe, prober.clock.now)


def failed(peer: Peer, after_s: float, **settings: Any) -> VirtualProber:
    """A prober whose only session has failed so long ago."""
    prober = VirtualProber(**settings)
    prober.run(100)
    prober.fail(D, peer=peer)
    prober.run(after_s)
    return prober


@pytest.mark.parametrize(
    ("peer", "said"), [(REFUSING, "refused"), (CUTS_SHORT, "refused"), (Peer(answers=False, takes=5.0), "no answer")]
)
def test_one_that_does_not_answer(peer: Peer, said: str) -> None:
    prober = failed(peer, 5.1)
    assert reason(prober) == "it does not answer"
    seen = row(prober)
    assert (seen.since, seen.probe_said, seen.reads_said, seen.settled_at) == (100, said, "", None)
    assert seen.probed_at < prober.clock.now


def test_one_that_cuts_probes_short_is_told_from_one_that_is_gone() -> None:
    prober = failed(CUTS_SHORT, 9.9)
    seen = set()
    for _ in range(10):
        prober.run(0.1)
        seen.add(row(prober).probe_said)
    assert seen == {"refused", "cut short"}


def test_one_whose_probe_hangs() -> None:
    prober = failed(HUNG, 12)
    assert reason(prober) == "its probe hangs, for 12.0 s by now"
    prober.resume(D)
    prober.run(0.1)
    assert reason(prober).startswith("it answers and settles, for 0.9 s more"), "a resume is not seen"


def test_a_probe_that_is_under_way_for_less_than_that_of_a_live_peer_does_not_hang() -> None:
    prober = failed(HUNG, 0.02)
    assert row(prober).hangs_since is None
    assert reason(prober) == "it has not been probed yet"


def test_one_that_settles() -> None:
    prober = failed(HEALTHY, 0.4)
    assert reason(prober) == "it answers and settles, for 0.6 s more"
    assert row(prober).probe_said == "answered"


def test_one_whose_reads_fail() -> None:
    prober = failed(DATA_PORT_REJECTED, 10)
    words = "it answers, but reading its memory gave -1; let in unverified in 20.0 s if it answers until then"
    assert reason(prober) == words
    assert row(prober).reads_said == "reading its memory gave -1"


def test_one_whose_reads_do_not_end() -> None:
    prober = failed(DATA_PORT_DROPPED, 10)
    assert reason(prober).startswith("it answers, and reads of its memory have not ended for 9.0 s; let in unverified")


def test_one_that_cannot_be_read_any_more_since_its_call_has_not_come_back() -> None:
    prober = failed(Peer(begin_takes=1000.0), 5, calls_can_be_ended=False)
    assert reason(prober).startswith("it answers, and reads of its memory have not ended for 4.0 s")
    assert row(prober).hangs_since is None


def relapsed(peer: Peer, times: int = 5) -> VirtualProber:
    """A prober whose session has failed so many times more, each time at its first use."""
    prober = failed(HEALTHY, 0)
    for _ in range(times):
        while prober.request(D):
            prober.run(0.1)
        prober.fail(D)
    prober.becomes(D, peer)
    return prober


def test_one_that_is_read_after_another_session_of_its_machine_says_so() -> None:
    prober = VirtualProber()
    prober.watch.rules.over_rdma = True
    prober.registrations = {"well:1": object()}
    prober.fail("decode:1", "decode:2", peer=Peer(read_takes=10.0))
    prober.run(6)
    words = "it answers, and is read in 25.0 s or when another session of its machine can be"
    assert words in {reason(prober, "decode:1"), reason(prober, "decode:2")}


def test_one_that_is_held_says_for_how_long() -> None:
    prober = relapsed(HEALTHY)
    prober.run(4)
    assert reason(prober) == "it answers; held for 12.0 s more, because it failed again"
    prober.run(12.1)
    assert not row(prober).blacklisted


def test_one_that_is_held_and_does_not_answer_says_both() -> None:
    prober = relapsed(REFUSING)
    prober.run(4)
    assert reason(prober) == "it does not answer; held for 12.0 s more, because it failed again"


def test_requests_that_were_refused_are_counted() -> None:
    prober = failed(REFUSING, 1)
    for _ in range(7):
        assert prober.request(D)
    assert row(prober).refused == 7


def test_the_next_probe_is_the_one_that_is_made() -> None:
    prober = failed(REFUSING, 10)
    at = row(prober).next_at
    assert at is not None
    prober.run(1)
    assert round(at, 3) in prober.moments("probe"), "the table promises a probe that never comes"


@pytest.mark.parametrize(
    "session", ["abc", "decode:0", 7, "de\ncode:1", "a" * 10_000], ids=["", "0", "7", "LF", "long"]
)
def test_one_whose_id_is_malformed_is_never_probed(session: Any) -> None:
    prober = VirtualProber(session)
    prober.run(5)
    (seen,) = rows_of(prober.watch, prober.clock.now)
    assert why(seen, True, prober.clock.now) == "its id is not host:port, so it is never probed"
    assert seen.next_at is None
    assert seen.session.isprintable()
    assert len(seen.session) < 400, "somebody else's id fills the node's memory"


def test_where_mooncake_cannot_probe_that_is_the_reason() -> None:
    assert reason(failed(REFUSING, 5), can_probe=False).startswith("Mooncake cannot probe on this node")


def test_a_newer_failure_makes_what_was_said_before_void() -> None:
    prober = failed(DATA_PORT_REJECTED, 5)
    prober.becomes(D, HUNG)
    prober.fail(D)
    seen = row(prober)
    assert (seen.probe_said, seen.reads_said, seen.settled_at) == ("", "", None), "an old answer looks like a new one"


def test_on_probation_it_says_for_how_long_and_the_scheduler_need_not_say_when_that_is_over() -> None:
    prober = failed(HEALTHY, 2)
    assert not prober.request(D)
    prober.run(20)
    seen = row(prober)
    assert reason(prober) == "let in again, on probation for 40.0 s more at most"
    assert not is_over(seen, prober.clock.now + 39)
    assert is_over(seen, prober.clock.now + 41)
    assert not is_over(row(failed(REFUSING, 1)), 1e9), "a blacklisted session vanishes"


def test_one_that_was_let_in_unverified_says_why_it_could_not_be_read() -> None:
    prober = failed(DATA_PORT_REJECTED, 40)
    assert reason(prober).endswith("more at most; let in unverified: reading its memory gave -1")


def test_one_that_is_let_in_is_told_what_its_last_reads_have_shown() -> None:
    prober = failed(HEALTHY, 2)
    assert row(prober).reads_said == Verdict.READABLE.value


def test_a_session_that_is_being_blacklisted_is_not_seen_before_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    prober = VirtualProber()
    seen = []
    failed = Session.failed

    def failed_while_somebody_looks(known: Session, now: float, generation: int) -> Any:
        seen.append(list(rows_of(prober.watch, now)))
        return failed(known, now, generation)

    monkeypatch.setattr(Session, "failed", failed_while_somebody_looks)
    prober.fail(D, peer=REFUSING)
    assert seen == [[]]


def test_a_row_is_whole_whatever_becomes_of_its_session_meanwhile() -> None:
    """It is looked at without the lock, while other threads have sessions fail, let in and used."""
    switch_interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    prober = VirtualProber(*many("decode", 50))
    watch, sessions, over = prober.watch, many("decode", 50), threading.Event()

    def others() -> None:
        while not over.is_set():
            for session in sessions:
                watch.sessions.discard(session)
                watch.sessions.add(session)
                known = watch.known[session]
                known.answered(0.0)
                watch._let_in(known, 0.0, None)
                assert session not in watch.sessions
                watch.sessions.add(session)
                known.answered(0.0, reading=True)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(300):
            for seen in rows_of(watch, 1.0):
                assert why(seen, True, 1.0)
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(switch_interval_s)


def test_calls_under_way_for_an_older_failure_say_nothing_of_the_newer_one() -> None:
    prober = failed(HUNG, 5)
    (call,) = prober.watch.places
    assert isinstance(call, Call)
    prober.fail(D)
    prober.run(0.1)
    assert reason(prober).startswith("its probe hangs"), "no other can be made before it has come back"
