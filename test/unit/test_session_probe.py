"""Is a peer asked and its memory read as promised, and what is said of it? On engines that are Python objects."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import queue
import socket
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional

import pytest
from fake_engine import REFUSED, Engine, raises
from sglang.srt.disaggregation.mooncake import session_probe
from sglang.srt.disaggregation.mooncake.conn import PeerMemory
from sglang.srt.disaggregation.mooncake.failed_sessions import Verdict
from sglang.srt.disaggregation.mooncake.session_probe import LATE_S, MemoryReader, Workers
from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import MooncakeTransferEngine

D = "decode:7001"
SOME_MEMORY = PeerMemory(dst_kv_ptrs=[4096], dst_aux_ptrs=[8192])


def reader(engine: Any, registration: Any = SOME_MEMORY) -> MemoryReader:
    return MemoryReader(engine, {D: registration}.get)


def test_a_peer_is_readable_after_four_reads_into_memory_that_is_registered_once() -> None:
    engine = Engine()
    peer = reader(engine)
    assert peer.verify(D) == (Verdict.READABLE, "")
    assert peer.verify(D) == (Verdict.READABLE, "")
    (scratch,) = {read[1] for read in engine.reads}
    assert scratch
    assert engine.reads == [(D, scratch, 8192, 8)] * 8, "four lanes a peer, each can be dead for itself"


@pytest.mark.parametrize(("late", "verdict"), [("read", Verdict.READABLE_LATE), ("probe", Verdict.READABLE)])
def test_a_peer_of_which_one_read_has_to_wait_is_readable_late(
    late: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others return at once. A probe that waits says nothing of the connections that carry transfers."""
    waits_s = iter([LATE_S])
    now = 0.0

    def wait() -> int:
        nonlocal now
        now += next(waits_s, 0.0)
        return 0

    monkeypatch.setattr(session_probe.time, "monotonic", lambda: now)
    engine = Engine(**{late: wait})
    assert reader(engine).verify(D) == (verdict, "")
    assert reader(engine).verify(D) == (Verdict.READABLE, "")


def test_memory_is_only_read_right_after_an_answer() -> None:
    engine = Engine(probe=REFUSED)
    assert reader(engine).verify(D) == (Verdict.UNANSWERED, "")
    assert engine.reads == [], "a read of a stopped peer holds up transfers to live ones for a minute"


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (-1, "gave -1"),
        (3, "gave 3"),
        (None, "gave None"),
        (True, "gave True"),
        (raises(OSError(5)), "raised OSError(5)"),
    ],
)
def test_the_first_read_that_fails_makes_a_peer_unreadable_and_says_why(read: Any, why: str) -> None:
    engine = Engine(read=read)
    verdict, said = reader(engine).verify(D)
    assert verdict is Verdict.UNREADABLE
    assert why in said
    assert len(engine.reads) == 1


def test_a_read_that_fails_after_others_succeeded_makes_a_peer_unreadable() -> None:
    rcs = iter([0, 0, 0, -1])
    assert reader(Engine(read=lambda: next(rcs))).verify(D)[0] is Verdict.UNREADABLE


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
    assert reader(Engine(), registration).verify(D) == (Verdict.CANNOT_TELL, "")


def test_without_auxiliary_memory_the_kv_memory_is_read() -> None:
    engine = Engine()
    assert reader(engine, PeerMemory(dst_kv_ptrs=[4096])).verify(D)[0] is Verdict.READABLE
    assert {read[2] for read in engine.reads} == {4096}


@pytest.mark.parametrize(("mooncake", "rc"), [(Engine(), 0), (Engine(probe=REFUSED), REFUSED), (object(), -1)])
def test_the_wrapper_of_the_engine_gives_mooncakes_answer_or_minus_one_if_it_cannot_probe(
    mooncake: Any, rc: int
) -> None:
    wrapper = types.SimpleNamespace(engine=mooncake)
    assert MooncakeTransferEngine.send_probe(wrapper, D) == rc


def test_the_wheel_that_import_mooncake_finds_is_named_with_its_version(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = "Metadata-Version: 2.1\nName: mooncake-transfer-engine\nVersion: 0.3.10.post2\n"
    for name, text in {
        "mooncake/__init__.py": "",
        "mooncake_transfer_engine-0.3.10.dist-info/METADATA": metadata,
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert session_probe.mooncake_version() == "mooncake-transfer-engine 0.3.10.post2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert session_probe.mooncake_version() == "of unknown version"


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
    monkeypatch.setattr(session_probe, "_CUT_SHORT_WITHIN_S", 0.25)


@pytest.mark.usefixtures("soon")
def test_a_peer_that_takes_connections_and_cuts_probes_short_is_told_from_one_that_is_stopped_or_gone() -> None:
    with peer(reply=b"") as old, peer(reply=None) as stopped, peer(reply=b"{}") as healthy:
        assert session_probe.ask_and_listen(ProbesByTcp(), old) == session_probe.CUT_SHORT
        assert session_probe.ask_and_listen(ProbesByTcp(), stopped) == REFUSED
        assert session_probe.ask_and_listen(ProbesByTcp(), healthy) == 0
    assert session_probe.ask_and_listen(ProbesByTcp(), old) == REFUSED, "it is gone"


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("reply", "rc"), [(b"{}", 0), (None, REFUSED)])
def test_a_peer_that_starts_or_is_stopped_between_the_two_probes_does_not_cut_them_short(
    reply: Optional[bytes], rc: int
) -> None:
    with peer(reply) as session:
        assert session_probe.ask_and_listen(ProbesByTcp(REFUSED), session) == rc


# Lanes.


class Lanes:
    """Mooncake's four TCP lanes to a peer that refuses every read, as measured: a refused one costs its lane; with none
    left the next fails at once, and the one after that waits for a second, on fresh lanes.
    """

    def __init__(self, lost: int) -> None:
        self.lost = lost
        self.now = 0.0
        self.cools_until = 0.0
        self.waits = 0

    def __call__(self) -> int:
        if self.lost == session_probe.LANES:
            self.lost, self.cools_until = 0, self.now + 1.0
        else:
            self.lost += 1
            if self.now < self.cools_until:
                self.waits += 1
                self.now = self.cools_until
        return -1


@pytest.mark.parametrize("lost", range(5))
def test_a_look_in_vain_at_a_peer_that_was_gone_leaves_the_failure_that_connects_lanes_anew_to_no_request(
    lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = Lanes(lost)
    monkeypatch.setattr(session_probe.time, "monotonic", lambda: lanes.now)
    peer = reader(Engine(read=lanes))
    for _ in range(5):
        assert peer.verify(D, was_gone=True) == (Verdict.UNREADABLE, "reading its memory gave -1")
        assert lanes.lost == 0, "the first request after a registration fails"
        lanes.now += 1.1
    assert lanes.waits <= 1, "a core spins for a second each time"


def test_a_look_in_vain_at_a_peer_that_was_not_gone_is_one_read() -> None:
    engine = Engine(read=-1)
    reader(engine).verify(D)
    assert len(engine.reads) == 1, "a second of a core each, while its data port rejects"


def test_lanes_are_left_alone_where_every_read_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = Lanes(0)

    def slow() -> int:
        lanes.now += 2.0
        return -1

    monkeypatch.setattr(session_probe.time, "monotonic", lambda: lanes.now)
    engine = Engine(read=slow)
    reader(engine).verify(D, was_gone=True)
    assert len(engine.reads) == 1


# Threads.


class Crew:
    """Workers that are given jobs, and what comes back."""

    def __init__(self) -> None:
        self._workers = Workers("crew")
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def start(self, job: Callable[[Any], Any], subjects: Iterable[Any]) -> None:
        self._workers.start(job, subjects, self._results)

    def results(self, number: int) -> list[tuple[Any, Any, Any]]:
        return [self._results.get(timeout=10) for _ in range(number)]

    def close(self) -> None:
        self._workers.close()


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.close()


def test_jobs_that_return_at_once_are_done_by_one_thread_and_have_all_come_back_then(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_probe, "MOST_RETURN_WITHIN_S", 10.0)
    threads = set()
    began = time.monotonic()
    for _ in range(2):
        crew.start(lambda _: threading.get_ident(), range(16))
        assert crew._results.qsize() == 16, "the loop wakes for each answer, which costs more than the probe"
        threads |= {thread for _, thread, _ in crew.results(16)}
    assert len(threads) == 1, "a thread wakes for each probe, which costs as much as the probe"
    assert time.monotonic() - began < 5.0, "answers that have come are left lying"


@pytest.mark.parametrize("hung", [{0}, {3}, {0, 1, 15}, set(range(15))], ids=str)
def test_jobs_that_hang_hold_up_none_that_were_started_with_them(crew: Crew, hung: set[int]) -> None:
    goes_on = threading.Event()
    crew.start(lambda number: goes_on.wait(30) if number in hung else None, range(16))
    well = set(range(16)) - hung
    came = {subject for subject, _, _ in crew.results(len(well))}
    goes_on.set()
    assert came == well, "a peer that is well is not asked for a minute"
    crew.results(len(hung))


def test_where_no_thread_can_be_had_each_job_comes_back_with_the_reason(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: raises(RuntimeError("can't start new thread"))())
    crew.start(lambda _: None, range(16))
    came = crew.results(16)
    assert {subject for subject, _, _ in came} == set(range(16)), "a session is never asked again"
    assert all("can't start new thread" in repr(error) for _, _, error in came)
