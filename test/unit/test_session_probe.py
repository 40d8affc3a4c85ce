"""Is a peer asked and its memory read as promised, and what is said of it? On engines that are Python objects."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import pathlib
import socket
import threading
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, Optional

import pytest
from kit.fake_engine import PENDING, REFUSED, Engine, raises, result_of
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake import session_probe
from sglang.srt.disaggregation.mooncake.conn import PeerMemory
from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.session_probe import MemoryReader, PendingReads, Reads
from sglang.srt.disaggregation.mooncake.session_states import Verdict
from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import MooncakeTransferEngine

D = "decode:7001"
SOME_MEMORY = PeerMemory(dst_kv_ptrs=[4096], dst_aux_ptrs=[8192])
WAITING, DONE, FAILED, TIMED_OUT = 0, 1, -1, -2


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Unspeakable(Exception):
    """What not even its own ``repr`` can say."""

    def __repr__(self) -> str:
        raise RuntimeError("broken")


# Four reads that were begun together.


class Batches:
    """Reads of one peer whose batches have the status that a test gives them."""

    def __init__(self, clock: Clock, number: int = 4) -> None:
        self.status: dict[int, Any] = dict.fromkeys(range(1, number + 1), WAITING)
        self.looks: list[int] = []
        self.reads = Reads(self._check_status, clock)
        for batch in self.status:
            self.reads.add(batch)

    def become(self, status: Any, *batches: int) -> None:
        self.status.update(dict.fromkeys(batches or self.status, status))

    def looked_at(self) -> list[int]:
        """Which batches the next look asks about."""
        self.looks.clear()
        self.reads.look()
        return self.looks

    def _check_status(self, batch: int) -> Any:
        self.looks.append(batch)
        return result_of(self.status[batch])


@pytest.fixture
def batches(clock: Clock) -> Batches:
    return Batches(clock)


def test_a_peer_is_readable_when_all_four_reads_are_done_and_not_before(batches: Batches) -> None:
    for batch in batches.status:
        assert batches.reads.look() is None, "let in though one of its connections may be dead"
        assert not batches.reads.have_ended()
        batches.become(DONE, batch)
    assert batches.reads.look() is Verdict.READABLE
    assert batches.reads.have_ended()


def test_a_batch_that_has_ended_is_never_looked_at_again(batches: Batches) -> None:
    """Mooncake has let go of it."""
    batches.become(DONE, 2)
    batches.become(FAILED, 4)
    assert batches.looked_at() == [1, 2, 3, 4]
    assert batches.looked_at() == [1, 3]


def test_a_read_that_is_seen_pending_after_a_tenth_of_a_second_makes_a_peer_readable_late(
    batches: Batches, clock: Clock
) -> None:
    batches.become(DONE, 1, 2, 3)
    clock.now += Reads.LATE_S
    assert batches.reads.look() is None
    batches.become(DONE)
    assert batches.reads.look() is Verdict.READABLE_LATE, "bytes of a failed transfer may still land"


@pytest.mark.parametrize("looks_before", [0, 1])
def test_reads_that_nobody_looked_at_in_time_may_have_waited_or_not(
    looks_before: int, batches: Batches, clock: Clock
) -> None:
    """In a busy interpreter the loop gets its turn after seconds; how long reads take is Mooncake's matter."""
    clock.now += 0.9 * Reads.LATE_S
    for _ in range(looks_before):
        assert batches.reads.look() is None
    batches.become(DONE)
    clock.now += 5.0
    assert batches.reads.look() is Verdict.READABLE_UNSEEN, "bytes of a failed transfer may still land"


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (FAILED, "gave -1"),
        (3, "gave 3"),
        (None, "gave None"),
        (True, "gave True"),
        (1.0, "gave 1.0"),
        ("done", "gave 'done'"),
        (raises(OSError(5)), "raised OSError(5)"),
        (raises(SystemExit(3)), "raised SystemExit(3)"),
        (raises(Unspeakable()), "raised a Unspeakable"),
    ],
)
def test_the_first_read_that_fails_decides_and_the_others_are_looked_at_until_they_end(
    status: Any, why: str, batches: Batches
) -> None:
    batches.become(status, 3)
    assert batches.reads.look() is Verdict.UNREADABLE
    assert batches.reads.why == f"reading its memory {why}"
    assert not batches.reads.have_ended()
    assert batches.looked_at() == [1, 2, 4], "Mooncake keeps what nobody looks at for good"
    batches.become(DONE, 1, 2)
    batches.become(raises(OSError(7)), 4)
    assert batches.reads.look() is Verdict.UNREADABLE
    assert batches.reads.have_ended()
    assert batches.reads.why == f"reading its memory {why}", "the first failure is the news"


def test_a_batch_that_mooncake_has_given_up_has_failed_and_is_looked_at_until_it_lets_go_of_it(
    batches: Batches,
) -> None:
    batches.become(DONE, 1, 2, 3)
    batches.become(TIMED_OUT, 4)
    assert batches.reads.look() is Verdict.UNREADABLE
    assert batches.reads.why == "reading its memory gave -2"
    assert batches.looked_at() == [4]
    batches.become(FAILED, 4)
    assert batches.looked_at() == [4]
    assert batches.reads.have_ended()


def test_reads_that_are_done_beside_one_that_could_not_be_begun_make_no_peer_readable(clock: Clock) -> None:
    batches = Batches(clock, number=2)
    batches.reads.failed("reading its memory was refused")
    batches.become(DONE)
    assert batches.reads.look() is Verdict.UNREADABLE
    assert batches.reads.have_ended()


# How they are begun.


def reader(engine: Any, registration: Any = SOME_MEMORY, **options: Any) -> MemoryReader:
    return MemoryReader(engine, {D: registration}.get, **options)


def found(reads: Reads) -> tuple[Optional[Verdict], str]:
    return reads.look(), reads.why


BOTH_WAYS = pytest.mark.parametrize("reads_are", [["async"], ["sync"], ["async", "sync"]], ids="+".join)


@BOTH_WAYS
def test_a_peer_is_readable_after_four_reads_into_memory_that_is_registered_once(reads_are: list[str]) -> None:
    engine = Engine(reads_are=reads_are)
    peer = reader(engine)
    assert found(peer.begin(D)) == (Verdict.READABLE, "")
    assert found(peer.begin(D)) == (Verdict.READABLE, "")
    ((scratch, _),) = engine.registered
    assert scratch
    assert engine.reads == [(D, scratch, 8192, 8)] * 8, "four lanes a peer, each can be dead for itself"
    assert not engine.batches


@BOTH_WAYS
@pytest.mark.parametrize(
    ("read", "verdict", "why"),
    [
        (0, Verdict.READABLE_TOO_SOON, "bytes of a failed transfer may still land"),
        (-1, Verdict.UNREADABLE, "reading its memory gave -1"),
    ],
)
def test_reads_that_work_while_the_kernel_sends_bytes_again_come_too_soon(
    reads_are: list[str], read: int, verdict: Verdict, why: str
) -> None:
    engine = Engine(reads_are=reads_are, read=read)
    peer = reader(engine)
    reads = peer.begin(D, too_soon=True)
    assert found(reads) == (verdict, why)
    assert found(reads) == (verdict, why), "each look says the same"
    engine.read = 0
    assert found(peer.begin(D)) == (Verdict.READABLE, "")


def test_an_engine_that_can_do_both_is_never_read_while_a_thread_waits() -> None:
    engine = Engine(read=PENDING)
    reads = reader(engine).begin(D)
    assert reads.look() is None
    assert len(engine.batches) == 4
    engine.read = 0
    assert found(reads) == (Verdict.READABLE, "")
    assert not engine.batches


@pytest.mark.parametrize("lacks", ["batch_transfer_async_read", "transfer_check_status"])
def test_half_of_the_asynchronous_calls_is_none(lacks: str) -> None:
    engine = Engine()
    setattr(engine, lacks, None)
    assert found(reader(engine).begin(D)) == (Verdict.READABLE, "")
    assert not engine.batches
    engine.transfer_sync_read = None  # type: ignore[assignment]
    assert found(reader(engine).begin(D)) == (Verdict.CANNOT_TELL, "")


def test_where_the_engine_cannot_read_the_handshake_decides_and_no_memory_is_registered() -> None:
    engine = Engine(reads_are=[])
    assert found(reader(engine).begin(D)) == (Verdict.CANNOT_TELL, "")
    assert engine.registered == []


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (0, "was refused"),
        (None, "gave None"),
        ("7", "gave '7'"),
        (raises(OSError(5)), "raised OSError(5)"),
        (raises(SystemExit(3)), "raised SystemExit(3)"),
        (raises(Unspeakable()), "raised a Unspeakable"),
    ],
)
@pytest.mark.parametrize("begun_before", [0, 2])
def test_a_read_that_cannot_be_begun_makes_a_peer_unreadable_and_those_before_it_are_looked_at(
    batch: Any, why: str, begun_before: int
) -> None:
    engine = Engine(read=PENDING)
    begin, left = engine.batch_transfer_async_read, [None] * begun_before

    def refuses(*read: Any) -> Any:
        return begin(*read) if left and not left.pop() else result_of(batch)

    engine.batch_transfer_async_read = refuses  # type: ignore[method-assign]
    reads = reader(engine).begin(D)
    assert found(reads) == (Verdict.UNREADABLE, f"reading its memory {why}")
    assert len(engine.batches) == begun_before, "goes on to begin reads of a peer that takes none"
    engine.read = 0
    reads.look()
    assert reads.have_ended()
    assert not engine.batches


@pytest.mark.parametrize(
    ("statuses", "reads"),
    [([0], 4), ([-1, 0], 4), ([-1, -1, -1, -1, 0], 5), ([-1], 12)],
    ids=["none fails", "some wait", "the fifth waits", "none waits"],
)
def test_after_reads_that_failed_one_more_is_begun_until_one_waits(statuses: list[int], reads: int) -> None:
    """Or Mooncake would fail the next transfer unsent, be it the first request after a registration."""
    engine = Engine()
    engine.transfer_check_status = lambda batch: statuses[min(batch, len(statuses)) - 1]  # type: ignore[method-assign]
    peer = reader(engine).begin(D)
    assert len(engine.reads) == reads
    assert peer.look() is (None if statuses == [0] else Verdict.UNREADABLE)
    assert peer.have_ended() == (0 not in statuses)


def test_over_rdma_there_are_no_connections_to_fail_and_one_read_is_enough() -> None:
    engine = Engine(read=-1)
    peer = reader(engine)
    peer.reads_at_a_time = 1
    assert peer.begin(D).look() is Verdict.UNREADABLE
    assert len(engine.reads) == 1


def test_where_to_begin_a_read_waits_for_a_connection_one_is_enough_and_the_peer_is_readable_late(
    clock: Clock,
) -> None:
    """As Mooncake before 0.3.13, which connects before it reads: four would keep a thread for as long as four do."""
    engine, waits_s = Engine(), iter([0.001, 2.0, 0.001])
    begin = engine.batch_transfer_async_read

    def connects_first(*read: Any) -> Any:
        clock.now += next(waits_s)
        return begin(*read)

    engine.batch_transfer_async_read = connects_first  # type: ignore[method-assign]
    reads = reader(engine, clock=clock).begin(D)
    assert len(engine.reads) == 2
    assert found(reads) == (Verdict.READABLE_LATE, "")
    assert not engine.batches


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (-1, "gave -1"),
        (3, "gave 3"),
        (None, "gave None"),
        (True, "gave True"),
        (raises(OSError(5)), "raised OSError(5)"),
        (raises(Unspeakable()), "raised a Unspeakable"),
    ],
)
def test_the_first_synchronous_read_that_fails_makes_a_peer_unreadable_and_says_why(read: Any, why: str) -> None:
    engine = Engine(read=read, reads_are=["sync"])
    reads = reader(engine).begin(D)
    assert found(reads) == (Verdict.UNREADABLE, f"reading its memory {why}")
    assert reads.have_ended()
    assert len(engine.reads) == 1


def test_a_synchronous_read_that_fails_after_others_succeeded_makes_a_peer_unreadable() -> None:
    rcs = iter([0, 0, 0, -1])
    engine = Engine(read=lambda: next(rcs), reads_are=["sync"])
    assert reader(engine).begin(D).look() is Verdict.UNREADABLE


def test_a_peer_of_which_one_synchronous_read_has_to_wait_is_readable_late(monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s = iter([Reads.LATE_S])
    now = 0.0

    def wait() -> int:
        nonlocal now
        now += next(waits_s, 0.0)
        return 0

    monkeypatch.setattr(session_probe.time, "monotonic", lambda: now)
    peer = reader(Engine(read=wait, reads_are=["sync"]))
    assert found(peer.begin(D)) == (Verdict.READABLE_LATE, "")
    assert found(peer.begin(D)) == (Verdict.READABLE, "")


@pytest.mark.parametrize(
    "registration",
    [
        None,
        PeerMemory([], []),
        PeerMemory([0], [0]),
        types.SimpleNamespace(),
        types.SimpleNamespace(dst_aux_ptrs=None),
        types.SimpleNamespace(dst_aux_ptrs=["of a kind we do not know"]),
        types.SimpleNamespace(dst_aux_ptrs=7),
    ],
    ids=repr,
)
def test_without_an_address_the_handshake_decides(registration: Any) -> None:
    engine = Engine(read=-1)
    assert found(reader(engine, registration).begin(D)) == (Verdict.CANNOT_TELL, "")
    assert engine.reads == []


def test_without_auxiliary_memory_the_kv_memory_is_read() -> None:
    engine = Engine()
    assert reader(engine, PeerMemory(dst_kv_ptrs=[4096])).begin(D).look() is Verdict.READABLE
    assert {read[2] for read in engine.reads} == {4096}


@pytest.mark.parametrize(
    ("registers", "why"),
    [
        (-1, "Mooncake gave -1 when it was to register a page to read into"),
        (None, "Mooncake gave None when it was to register a page to read into"),
        (
            raises(RuntimeError("GPU memory only")),
            "Mooncake raised RuntimeError('GPU memory only') when it was to register a page to read into",
        ),
        (raises(Unspeakable()), "Mooncake raised a Unspeakable when it was to register a page to read into"),
    ],
)
def test_a_page_that_mooncake_refuses_is_said_once_and_tried_again_after_ten_seconds(
    registers: Any, why: str, clock: Clock
) -> None:
    """One refusal must not switch verification off for good, and each attempt costs milliseconds."""
    said: list[str] = []
    engine = Engine(read=-1)
    peer = reader(engine, page_refused=said.append, clock=clock)
    engine.registers = registers
    for seconds in (0.0, 9.9, 0.2, 9.7, 0.2):
        clock.now += seconds
        assert found(peer.begin(D)) == (Verdict.CANNOT_TELL, why)
    assert said == [why]
    assert len(engine.registered) == 2, "tried again at each look, or never"
    engine.registers = 0
    clock.now += 10.0
    assert found(peer.begin(D)) == (Verdict.UNREADABLE, "reading its memory gave -1")
    assert {read[1] for read in engine.reads} == {engine.registered[-1][0]}, "reads into a page that was refused"


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in pathlib.Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_one_page_stays_registered_for_one_reader_after_another_and_for_each_engine() -> None:
    engine, other = Engine(), Engine()
    for one in (engine, other, engine, other):
        assert reader(one).begin(D).look() is Verdict.READABLE
    assert len(engine.registered) == 1, "Mooncake refuses memory that is registered already"
    assert other.registered == engine.registered
    gc.collect()
    ((page, _),) = engine.registered
    assert is_mapped(page), "a read that was taken for over writes into what others have got since"


def test_an_engine_of_a_kind_that_nothing_can_refer_to_weakly_is_read_too() -> None:
    """As classes of some extension modules are."""
    engine = Engine()
    methods = ("register_memory", "unregister_memory", "batch_transfer_async_read", "transfer_check_status")
    plain = types.SimpleNamespace(**{name: getattr(engine, name) for name in methods})
    for _ in range(2):
        assert found(reader(plain).begin(D)) == (Verdict.READABLE, "")
    assert len(engine.registered) == 1
    reader(plain).close(still_read=False)
    assert engine.deregistered == [engine.registered[0][0]]


@pytest.mark.parametrize("deregister", [lambda page: -1, raises(OSError(5)), None], ids=["refused", "raises", "none"])
def test_a_page_that_mooncake_does_not_deregister_serves_the_next_reader(deregister: Any) -> None:
    engine = Engine()
    engine.unregister_memory = deregister  # type: ignore[method-assign]
    for _ in range(2):
        peer = reader(engine)
        assert peer.begin(D).look() is Verdict.READABLE
        peer.close(still_read=False)
    assert len(engine.registered) == 1, "Mooncake refuses memory that is registered already"


def test_a_page_that_was_read_into_when_a_reader_was_closed_stays_registered() -> None:
    engine = Engine()
    for still_read in (True, False):
        peer = reader(engine)
        assert peer.begin(D).look() is Verdict.READABLE
        peer.close(still_read)
    assert (len(engine.registered), engine.deregistered) == (1, [])


def test_no_reader_waits_to_be_closed_while_another_registers_the_page() -> None:
    """Which can take long, and a teardown may not."""
    engine, goes_on = Engine(), threading.Event()
    engine.registers = lambda: 0 if goes_on.wait(10) else -1
    other = threading.Thread(target=reader(engine).begin, args=(D,))
    other.start()
    assert wait_until(lambda: engine.registered)
    idle = threading.Thread(target=reader(Engine()).close, args=(False,))
    idle.start()
    idle.join(5)
    assert not idle.is_alive()
    goes_on.set()
    other.join(10)


# When they are looked at.


def call(session: str = D) -> Call:
    return Call(session, generation=1, made_at=0.0, read=True)


class Watched:
    """PendingReads that are looked at whenever they want to be, as the daemon thread does, in virtual time."""

    def __init__(
        self, clock: Clock, a_thread_waits: Callable[[Collection[str]], Optional[bool]] = lambda sessions: None
    ) -> None:
        self.pending = PendingReads(clock, a_thread_waits)
        self.unwanted: set[str] = set()
        self.held_up: list[float] = []
        self.told: list[tuple[str, Verdict, str]] = []
        self._clock = clock

    def begin(self, session: str = D) -> Batches:
        batches = Batches(self._clock)
        self.pending.add(call(session), batches.reads)
        return batches

    def run(self, seconds: float) -> list[float]:
        """Lets time pass; gives the gaps between looks."""
        end, gaps = self._clock.now + seconds, []
        while (gap := self.pending.next_look_in()) is not None and self._clock.now + gap <= end:
            self._clock.now += gap
            gaps.append(round(gap, 6))
            found = self.pending.look(lambda call: call.session not in self.unwanted)
            self.held_up += [reads.held_up() for _, _, reads in found]
            self.told += [(call.session, verdict, reads.why) for call, verdict, reads in found]
        self._clock.now = end
        return gaps


@pytest.fixture
def watched(clock: Clock) -> Watched:
    return Watched(clock)


def test_reads_are_looked_at_at_once_soon_again_and_then_at_gaps_that_grow_to_fifty_milliseconds(
    watched: Watched,
) -> None:
    watched.begin()
    at_once, *gaps = watched.run(30.0)
    assert at_once == 0.0
    assert gaps == sorted(gaps)
    assert gaps[0] == 0.001, "a live peer is done after a few milliseconds"
    assert gaps[-1] == 0.05, "a data path that heals is seen late"
    assert watched.told == []
    assert len(gaps) < 30.0 / 0.05 + 60, "pending reads keep a core busy"


def test_what_reads_have_shown_is_told_once_and_then_nothing_is_left_to_look_at(watched: Watched, clock: Clock) -> None:
    batches = watched.begin()
    watched.run(0.01)
    batches.become(DONE)
    watched.run(0.05)
    assert watched.told == [(D, Verdict.READABLE, "")]
    assert watched.pending.next_look_in() is None
    assert watched.pending.look(lambda call: True) == []


def test_the_failure_of_one_read_is_told_at_once_and_once_though_others_are_pending(watched: Watched) -> None:
    batches = watched.begin()
    batches.become(FAILED, 2)
    watched.run(0.01)
    told = [(D, Verdict.UNREADABLE, "reading its memory gave -1")]
    assert watched.told == told
    watched.run(60.0)
    batches.become(FAILED)
    watched.run(60.0)
    assert watched.told == told
    assert batches.reads.have_ended(), "Mooncake keeps what nobody looks at for good"
    assert watched.pending.next_look_in() is None


def test_reads_that_nobody_waits_for_are_looked_at_seldom_but_until_they_end(watched: Watched) -> None:
    batches = watched.begin()
    watched.unwanted.add(D)
    gaps = watched.run(600.0)
    assert gaps[-1] == 10.0
    assert len(gaps) < 600.0 / 10.0 + 110
    batches.become(DONE)
    watched.run(10.0)
    assert batches.reads.have_ended()
    assert watched.pending.next_look_in() is None


def held_up_of_reads_that_failed_after_10_s(
    clock: Clock, over_rdma: bool, is_told: bool = True
) -> tuple[float, list[float]]:
    """What is told of them, and when the threads were looked at; meanwhile one waits, from 2 to 6 s."""
    looked_at: list[float] = []

    def a_thread_waits(sessions: Collection[str]) -> Optional[bool]:
        assert list(sessions) == [D]
        looked_at.append(clock.now)
        return 2.0 < clock.now < 6.0 if is_told else None

    watched = Watched(clock, a_thread_waits)
    watched.pending.over_rdma = over_rdma
    watched.run(60.0)
    clock.now = 0.0
    batches = watched.begin()
    watched.run(10.0)
    batches.become(FAILED)
    watched.run(60.0)
    watched.pending.look(lambda call: True)  # as with each answer to a probe
    return watched.held_up[0], looked_at


def test_over_rdma_it_is_told_for_which_share_of_its_time_a_read_held_up_others(clock: Clock) -> None:
    share, looked_at = held_up_of_reads_that_failed_after_10_s(clock, over_rdma=True)
    assert share == pytest.approx(0.4, abs=0.1)
    assert max(looked_at) < 10.1, "threads are looked at though nothing is read"
    assert len(looked_at) <= 21, "with five hundred threads, one look takes five milliseconds"


def test_where_the_kernel_does_not_tell_a_read_counts_as_one_that_held_up_others(clock: Clock) -> None:
    share, looked_at = held_up_of_reads_that_failed_after_10_s(clock, over_rdma=True, is_told=False)
    assert share == 1.0
    assert looked_at


def test_over_tcp_no_thread_is_looked_at(clock: Clock) -> None:
    assert held_up_of_reads_that_failed_after_10_s(clock, over_rdma=False) == (1.0, [])


def test_reads_that_are_pending_hold_up_no_others(watched: Watched) -> None:
    for number in range(100):
        watched.begin(f"hangs:{number + 1}")
    watched.run(20.0)
    batches = watched.begin()
    batches.become(DONE)
    gaps = watched.run(0.01)
    assert watched.told == [(D, Verdict.READABLE, "")]
    assert gaps[0] == 0.0


@pytest.mark.slow
def test_looks_at_thousands_of_pending_reads_cost_a_few_hundredths_of_a_core(watched: Watched, clock: Clock) -> None:
    peers = [watched.begin(f"hangs:{number + 1}") for number in range(2000)]
    watched.run(10.0)
    for batches in peers:
        batches.looks.clear()
    watched.run(10.0)
    a_second = sum(len(batches.looks) for batches in peers) / 10.0
    assert a_second < 25_000, "1 us each"
    assert all(batches.looks for batches in peers)


# A probe.


@pytest.mark.parametrize(("mooncake", "rc"), [(Engine(), 0), (Engine(probe=REFUSED), REFUSED), (object(), -1)])
def test_the_wrapper_of_the_engine_gives_mooncakes_answer_or_minus_one_if_it_cannot_probe(
    mooncake: Any, rc: int
) -> None:
    wrapper = types.SimpleNamespace(engine=mooncake)
    assert MooncakeTransferEngine.send_probe(wrapper, D) == rc


def test_the_wheel_that_import_mooncake_finds_is_named_with_its_version(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mooncake/__init__.py", "mooncake_transfer_engine-0.3.10.post2.dist-info/METADATA"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"\xff")
    monkeypatch.syspath_prepend(tmp_path)
    assert session_probe.mooncake_version() == "mooncake-transfer-engine 0.3.10.post2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert session_probe.mooncake_version() == "of unknown version"


QUEUE = "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER"


@pytest.mark.parametrize(
    ("variables", "version", "is_short"),
    [
        ({"MOONCAKE_PROTOCOL": "tcp"}, "0.3.13.post1", True),
        ({"MC_FORCE_TCP": "0"}, "0.3.13", True),
        ({"MOONCAKE_PROTOCOL": "rdma"}, "0.3.13", False),
        ({"MC_FORCE_TCP": "1"}, "0.3.12", False),
        ({"MC_FORCE_TCP": "1"}, "0.3.14", False),
        ({"MC_FORCE_TCP": "1"}, "0.3.13.post20261027", False),
        ({"MC_FORCE_TCP": "1", QUEUE: "65535"}, "0.3.13", False),
        ({"MC_FORCE_TCP": "1", QUEUE: "8192"}, "0.3.13", False),
        ({"MC_FORCE_TCP": "1", QUEUE: "2048"}, "0.3.13", True),
        ({"MC_FORCE_TCP": "1", QUEUE: "65536"}, "0.3.13", True),
        ({"MC_FORCE_TCP": "1", QUEUE: "many"}, "0.3.13", True),
    ],
)
def test_a_queue_that_a_burst_overflows_is_known(
    variables: dict[str, str], version: str, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOONCAKE_PROTOCOL", "MC_FORCE_TCP", QUEUE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(session_probe, "mooncake_version", lambda: f"mooncake-transfer-engine {version}")
    assert session_probe.has_short_queue() == is_short


# Peers that are there and know no probes, as Mooncake before 0.3.10.post2.


class ProbesByTcp:
    """An engine that connects for a probe and waits for a reply; ``rcs`` come instead, as long as there are some."""

    def __init__(self, *rcs: int) -> None:
        self.rcs = list(rcs)

    def send_probe(self, session: str) -> int:
        if self.rcs:
            return self.rcs.pop(0)
        try:
            with socket.create_connection(("127.0.0.1", int(session.rpartition(":")[2])), 5) as probe:
                probe.settimeout(0.5)  # Mooncake waits for a minute
                return 0 if probe.recv(1) else REFUSED
        except OSError:
            return REFUSED


@contextlib.contextmanager
def peer(reply: Optional[bytes]) -> Iterator[str]:
    """A process that replies with this and hangs up; None: one that is stopped."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed: the test is through
                while True:
                    connection, _ = listener.accept()
                    connection.sendall(reply or b"")
                    connection.close()

        if reply is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_probe, "REFUSED_WITHIN_S", 0.25)


@pytest.mark.usefixtures("soon")
def test_a_peer_that_takes_connections_and_cuts_probes_short_is_told_from_one_that_is_stopped_or_gone() -> None:
    with peer(reply=b"") as old, peer(reply=None) as stopped, peer(reply=b"{}") as healthy:
        assert session_probe.probe_and_listen(ProbesByTcp(), old) == session_probe.CUT_SHORT
        assert session_probe.probe_and_listen(ProbesByTcp(), stopped) == REFUSED
        assert session_probe.probe_and_listen(ProbesByTcp(), healthy) == 0
    assert session_probe.probe_and_listen(ProbesByTcp(), old) == REFUSED, "it is gone"


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("reply", "rc"), [(b"{}", 0), (None, REFUSED)])
def test_a_peer_that_starts_or_is_stopped_between_the_two_probes_does_not_cut_them_short(
    reply: Optional[bytes], rc: int
) -> None:
    with peer(reply) as session:
        assert session_probe.probe_and_listen(ProbesByTcp(REFUSED), session) == rc


def test_one_look_is_at_so_many_peers_and_the_others_come_next(watched: Watched) -> None:
    """Who looks at a thousand at a time hands over no answer meanwhile."""
    for number in range(80):
        watched.begin(f"decode:{number + 1}").become(DONE)
    told = [len(watched.pending.look(lambda call: True, most=32)) for _ in range(4)]
    assert told == [32, 32, 16, 0]


# Is it RDMA?


@pytest.mark.parametrize(
    ("open_file", "variables", "is_rdma"),
    [
        ("/dev/infiniband/uverbs0", {}, True),
        ("/dev/infiniband/uverbs0", {"MOONCAKE_PROTOCOL": "rdma"}, True),
        ("/dev/infiniband/uverbs0", {"MOONCAKE_PROTOCOL": "tcp"}, False),
        ("/dev/infiniband/uverbs0", {"MC_FORCE_TCP": "0"}, False),
        ("/dev/null", {}, False),
    ],
)
def test_with_an_rdma_device_open_it_is_taken_for_rdma_unless_mooncake_was_told_to_use_tcp(
    open_file: str, variables: dict[str, str], is_rdma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOONCAKE_PROTOCOL", "MC_FORCE_TCP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(session_probe.os, "readlink", lambda path: open_file)
    assert session_probe.is_over_rdma() is is_rdma


def test_without_a_proc_folder_it_is_taken_for_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder(path: str) -> list[str]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(session_probe.os, "listdir", no_folder)
    assert not session_probe.is_over_rdma()
