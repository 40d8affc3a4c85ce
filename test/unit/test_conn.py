"""Does the daemon thread of a prefill manager ask, let in and stop as promised? On engines that are Python objects."""

from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import enum
import gc
import itertools
import logging
import os
import queue
import re
import socket
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from kit.fake_engine import PENDING, REFUSED, Engine, raises, waits_for_a_reply_of
from kit.managers import (
    ENABLE,
    INTERVAL,
    NO_MEMORY,
    OTHER,
    SOME_MEMORY,
    D,
    MakeManager,
    blacklist,
    blacklisted,
    full_peer,
    many,
    send,
    stopped_peers,
    threads,
    watch_of,
)
from kit.waiting import wait_until
from prometheus_client import REGISTRY
from sglang.srt.disaggregation.mooncake import (
    conn,
    late_bytes,
    probe_schedule,
    probe_workers,
    rdma_waits,
    session_probe,
    session_states,
    session_watch,
)
from sglang.srt.disaggregation.mooncake.conn import KVTransferError, MooncakeKVManager
from sglang.srt.disaggregation.mooncake.failed_sessions import FailedSessions
from sglang.srt.disaggregation.mooncake.session_probe import MemoryReader
from sglang.srt.disaggregation.mooncake.session_states import Verdict
from sglang.srt.disaggregation.mooncake.session_watch import SessionWatch
from sglang.srt.observability import failed_session_file, failed_session_log, failed_session_metrics
from sglang_failed_session_probe import harmless_logger


def recoveries() -> float:
    return REGISTRY.get_sample_value("sglang:failed_session_recoveries_total") or 0.0


def shown_as_blacklisted() -> float:
    return REGISTRY.get_sample_value("sglang:failed_sessions_blacklisted") or 0.0


# One pass over an object that has only what the native probe uses.


def bare(engine: Any, *sessions: Any, failures: Any = None) -> Any:
    manager = types.SimpleNamespace(
        engine=engine,
        failed_sessions=set(sessions),
        session_failures=dict.fromkeys(sessions, 1) if failures is None else failures,
        session_lock=threading.Lock(),
    )
    engine.manager = manager
    return manager


run_pass = MooncakeKVManager._run_one_probe_pass


def test_a_pass_takes_a_session_that_answers_off_the_blacklist_counts_and_logs_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    manager, before = bare(Engine(), D), recoveries()
    run_pass(manager)
    assert manager.failed_sessions == set()
    assert manager.session_failures == {}
    assert recoveries() == before + 1
    assert caplog.messages == [f"Session {D} recovered via probe; un-blacklisted"], "operators grep for this"


@pytest.mark.parametrize("rc", [-1, -101, REFUSED, 1, True, False, None, "0", 0.0], ids=repr)
def test_a_pass_keeps_a_session_whose_probe_gives_anything_but_zero(rc: Any) -> None:
    manager, before = bare(Engine(probe=rc), D), recoveries()
    run_pass(manager)
    assert manager.failed_sessions == {D}
    assert manager.session_failures == {D: 1}
    assert recoveries() == before


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_a_pass_logs_a_probe_that_raises_and_goes_on_with_the_next(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    engine.probe[D] = raises(error)
    manager = bare(engine, D, OTHER)
    run_pass(manager)
    assert manager.failed_sessions == {D}
    (line,) = caplog.messages
    assert D in line
    assert repr(error) in line


def test_a_pass_on_an_engine_that_cannot_probe_changes_nothing() -> None:
    manager = bare(types.SimpleNamespace(), D)
    run_pass(manager)
    assert manager.failed_sessions == {D}


@pytest.mark.parametrize("failures", [dict, collections.Counter, lambda: collections.defaultdict(int)])
@pytest.mark.parametrize("counted_before", [0, 1, 7])
@pytest.mark.parametrize("registered", [False, True])
def test_a_pass_ignores_an_answer_if_the_session_failed_again_meanwhile(
    failures: Callable[[], Any], counted_before: int, registered: bool
) -> None:
    """After a registration the count may be what it was, and yet the failure is a newer one."""
    engine = Engine()
    manager = bare(engine, D, failures=failures())
    if counted_before:
        manager.session_failures[D] = counted_before

    def fails_again() -> int:
        with manager.session_lock:
            if registered:
                manager.failed_sessions.discard(D)
                manager.session_failures.pop(D, None)
            manager.session_failures[D] = manager.session_failures.get(D, 0) + 1
            manager.failed_sessions.add(D)
        return 0

    engine.probe[D] = fails_again
    before = recoveries()
    run_pass(manager)
    assert manager.failed_sessions == {D}, "let in on an answer older than the newest failure"
    assert manager.session_failures[D] == (1 if registered else counted_before + 1)
    assert recoveries() == before


@pytest.mark.parametrize("failures", [{}, {D: 1}])
def test_a_pass_counts_no_recovery_for_a_session_that_registered_meanwhile(failures: dict[str, int]) -> None:
    engine = Engine()
    manager = bare(engine, D, failures=dict(failures))

    def registers() -> int:
        with manager.session_lock:
            manager.failed_sessions.discard(D)
            manager.session_failures.pop(D, None)
        return 0

    engine.probe[D] = registers
    before = recoveries()
    run_pass(manager)
    assert recoveries() == before


def test_a_pass_does_not_ask_one_peer_after_another() -> None:
    together = threading.Barrier(8)

    def answers_when_all_are_asked() -> int:
        together.wait(timeout=5)
        return 0

    manager = bare(Engine(probe=answers_when_all_are_asked), *many(8))
    run_pass(manager)
    assert manager.failed_sessions == set(), "a hung peer holds up everybody else for a minute"


def test_a_pass_asks_more_sessions_than_fit_into_its_places_at_a_time() -> None:
    manager = bare(Engine(), *many(150))
    run_pass(manager)
    assert manager.failed_sessions == set()
    assert sorted(manager.engine.asked) == sorted(many(150))


def test_a_pass_never_hands_the_engine_what_is_no_session_id() -> None:
    manager = bare(Engine(), "host", "host:0", "", None, 7, D)
    run_pass(manager)
    assert manager.engine.asked == [D]
    assert manager.failed_sessions == {"host", "host:0", "", None, 7}


def test_a_pass_asks_without_session_lock_and_leaves_no_thread() -> None:
    before = threads("MooncakeSessionWorker")
    manager = bare(Engine(), *many(20))
    run_pass(manager)
    assert manager.engine.asked_under_lock == [], "every transfer waits while a peer is asked"
    assert wait_until(lambda: set(threads("MooncakeSessionWorker")) <= set(before))


def test_a_pass_over_an_empty_blacklist_asks_nobody() -> None:
    manager = bare(Engine())
    run_pass(manager)
    assert manager.engine.asked == []


# A manager with its daemon thread.


def test_a_healed_session_is_used_again_after_about_settle_time(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = Engine(transfer=-1, probe=REFUSED)
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    before = recoveries()
    with pytest.raises(KVTransferError, match=r"Failed to send 1 blocks to decode:7001 \(rc -1\)"):
        send(manager, D)
    with pytest.raises(KVTransferError, match="remote mooncake session decode:7001 is not alive"):
        send(manager, D)
    healed_at = time.monotonic()
    engine.transfer = engine.probe[D] = 0
    assert wait_until(lambda: not blacklisted(manager)), "dead for good"
    assert time.monotonic() - healed_at >= 0.1
    send(manager, D)
    assert dict(manager.session_failures) == {}
    assert wait_until(lambda: recoveries() == before + 1)
    assert "Starting failed-session probe loop (interval=30.0s)" in caplog.messages
    recovered = rf"Session {D} recovered via probe; un-blacklisted \(out for \d\.\d s, 1 requests refused\)"
    assert wait_until(lambda: [line for line in caplog.messages if re.fullmatch(recovered, line)]), caplog.messages
    assert engine.asked_under_lock == [], "every transfer waits while a peer is asked"
    assert [read[0::2] for read in engine.reads] == [(D, 8192)] * 4
    assert not engine.batches


def test_a_peer_is_let_in_when_the_kernel_sends_it_no_bytes_again_but_messages_and_handshakes(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_ports: list[Any] = []
    probes_before: list[int] = []
    engine = Engine()

    def may_land(kernel: Any, session: str) -> bool:
        other_ports.append(kernel._other_ports())
        probes_before.append(len(engine.asked))
        return len(other_ports) < 3

    monkeypatch.setattr(late_bytes.LateBytes, "may_land", may_land)
    manager = make_manager(engine)
    manager.register_decode(D, types.SimpleNamespace(dst_kv_ptrs=[8192], dst_port=8998))
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager))
    assert other_ports == [{8998, 7001}] * 3, "let in though bytes of the failed transfer would land"
    assert probes_before == [1, 2, 3], "the time that a look takes makes reads seem to wait"


@pytest.mark.parametrize("kind", ["over RDMA", "without SETTLE"])
def test_the_kernel_is_not_asked_where_that_is_of_no_use(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(late_bytes.LateBytes, "may_land", lambda kernel, session: bool(asked.append(session)))
    if kind == "over RDMA":
        monkeypatch.setattr(session_probe, "is_over_rdma", lambda: True)
    else:
        monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "0")
    manager = make_manager(Engine())
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager))
    assert asked == []


def test_the_start_is_told_in_one_line_with_versions_and_settings(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(session_probe, "mooncake_version", lambda: "mooncake 0.3.13")
    make_manager(Engine())
    assert [line for line in caplog.messages if "is active" in line] == [
        "Failed-session probe is active: SGLang not there, Mooncake mooncake 0.3.13, "
        "interval=30s max_interval=300s idle_timeout=600s settle=0.1s verify=on concurrency=16"
    ]


def test_the_daemon_thread_finds_out_whether_it_is_rdma(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_probe, "is_over_rdma", lambda: True)
    engine = Engine()
    manager = make_manager(engine)
    assert wait_until(lambda: watch_of(manager).rules.over_rdma)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager))
    assert len(engine.reads) == 1, "reads that fail hold up transfers to others"


@pytest.mark.parametrize("waits", [True, False])
def test_over_rdma_the_rules_are_told_whether_a_read_held_up_others(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr(session_probe, "is_over_rdma", lambda: True)
    monkeypatch.setattr(rdma_waits, "a_thread_waits", lambda sessions: waits)
    manager = make_manager(Engine(read=-1))
    told: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    monkeypatch.setattr(watch_of(manager), "read", lambda *arguments: told.put(arguments))
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert told.get(timeout=10)[1:] == (Verdict.UNREADABLE, "reading its memory gave -1", float(waits))


def test_a_failure_wakes_the_sleeping_daemon_thread(make_manager: MakeManager) -> None:
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    time.sleep(0.1)
    assert engine.asked == []
    blacklist(manager, D)
    assert engine.asked_something.wait(5), "it sleeps for good while nothing is blacklisted"


def test_a_registration_clears_the_blacklist_without_a_recovery(make_manager: MakeManager) -> None:
    engine = Engine(probe=REFUSED)
    manager, before = make_manager(engine), recoveries()
    blacklist(manager, D)
    assert engine.asked_something.wait(5)
    manager.register_decode(D, SOME_MEMORY)
    send(manager, D)
    assert dict(manager.session_failures) == {}
    assert recoveries() == before


def test_an_answer_from_before_the_newest_failure_changes_nothing(make_manager: MakeManager) -> None:
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    asked, answer = threading.Event(), threading.Event()

    def answers_late() -> int:
        engine.probe[D] = REFUSED
        asked.set()
        answer.wait(5)
        return 0

    engine.probe[D] = answers_late
    blacklist(manager, D)
    assert asked.wait(5)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    answer.set()
    assert wait_until(lambda: len(engine.asked) >= 2), "the newer failure is not asked about"
    time.sleep(0.2)
    assert blacklisted(manager) == {D}


def test_hung_peers_do_not_hold_up_a_healed_one(make_manager: MakeManager) -> None:
    engine = Engine()
    hung = many(12)
    for session in hung:
        engine.probe[session] = engine.hang
    manager = make_manager(engine)
    blacklist(manager, *hung, D)
    assert wait_until(lambda: D not in blacklisted(manager))
    assert blacklisted(manager) == set(hung)


def test_a_healed_peer_beside_many_that_hang_is_asked_within_a_second_on_few_threads(
    make_manager: MakeManager,
) -> None:
    engine = Engine()
    with stopped_peers(200) as hung:
        engine.probe.update({session: waits_for_a_reply_of(session) for session in hung})
        manager = make_manager(engine)
        blacklist(manager, *hung)
        assert wait_until(lambda: set(engine.asked) == set(hung)), "who hangs keeps others from being asked"
        waited_s = []
        for _ in range(3):  # a machine that does much else stands still for a moment
            asked, failed_at = engine.asked.count(D), time.monotonic()
            blacklist(manager, D)
            assert wait_until(lambda asked=asked: engine.asked.count(D) > asked)
            waited_s.append(time.monotonic() - failed_at)
            assert wait_until(lambda: D not in blacklisted(manager))
        assert min(waited_s) <= 1.0, "it waits until those that hang come back"
        assert len(threads("MooncakeSessionWorker")) <= 64, "a pod's threads are gone"
        assert blacklisted(manager) == set(hung)
        assert engine.asked_under_lock == []
        manager.teardown()


def test_a_probe_that_hangs_is_not_ended_while_nobody_wants_its_place(make_manager: MakeManager) -> None:
    """It is answered at once when its peer goes on."""
    engine = Engine()
    with stopped_peers(8) as hung:
        engine.probe.update({session: waits_for_a_reply_of(session) for session in hung})
        manager = make_manager(engine)
        blacklist(manager, *hung)
        time.sleep(0.5)
        assert sorted(engine.asked) == sorted(hung), "peers that hang are asked again and again"
        assert watch_of(manager).in_flight() == 8
        manager.teardown()


def test_with_more_due_than_one_batch_lines_up_the_next_batch_begins_at_once(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_CONCURRENCY", "64")
    monkeypatch.setattr(probe_schedule.Allowance, "batch_s", lambda allowance: 30.0)
    # The loop wakes for a probe that has not connected, and to write the file of sessions once a second.
    monkeypatch.setattr(session_states.Session, "connects_by", lambda session, now: float("inf"))
    monkeypatch.setattr(failed_session_file.SessionsFile, "write_if_due", lambda file, watch: None)
    engine = Engine()
    engine.probe.default_factory = lambda: engine.hang
    manager = make_manager(engine)
    blacklist(manager, D)
    assert wait_until(lambda: engine.asked == [D])  # and now the loop sleeps
    some, watch = many(session_watch.BATCH + 8), watch_of(manager)
    wake, watch._wake = watch._wake, lambda: None
    blacklist(manager, *some)
    wake()  # once, and no answer wakes the loop either
    assert wait_until(lambda: len(engine.asked) == len(some) + 1), "what one batch leaves waits for a whole batch more"


# Stopping.


STOPS_WITHIN_S = 0.5


def seconds_of_teardown(manager: Any) -> float:
    began = time.monotonic()
    manager.teardown()
    return time.monotonic() - began


@pytest.mark.parametrize("hung", [8, 100])
def test_teardown_ends_the_probes_that_hang_and_has_them_all_back(hung: int, make_manager: MakeManager) -> None:
    took_s = []
    for _ in range(3):  # a machine that does much else stands still for a moment
        engine = Engine(probe=REFUSED)
        with stopped_peers(hung) as sessions:
            engine.probe.update({session: waits_for_a_reply_of(session) for session in sessions})
            manager = make_manager(engine)
            blacklist(manager, *sessions)
            assert wait_until(lambda manager=manager: watch_of(manager).in_flight() >= min(hung, 32))
            time.sleep(0.05)
            took_s.append(seconds_of_teardown(manager))
            assert watch_of(manager).in_flight() == 0, "a thread that returns later may abort the process"
            assert not threads("MooncakeFailedSessionProbe")
            assert wait_until(lambda: not threads("MooncakeSessionWorker"))
    assert min(took_s) <= STOPS_WITHIN_S, "a hung peer holds up a role switch, or an exit"


def test_teardown_is_in_time_though_nothing_can_end_the_calls_that_hang(make_manager: MakeManager) -> None:
    took_s = []
    for _ in range(3):
        engine = Engine()
        engine.probe.default_factory = lambda engine=engine: engine.hang
        manager = make_manager(engine)
        blacklist(manager, *many(16))
        assert wait_until(lambda engine=engine: len(engine.asked) == 16)
        took_s.append(seconds_of_teardown(manager))
        assert not threads("MooncakeFailedSessionProbe")
        engine.goes_on.set()
    assert min(took_s) <= STOPS_WITHIN_S, "a hung peer holds up an exit until the thread is waited for no more"


def test_no_thread_is_left_once_hung_probes_have_returned_after_teardown(make_manager: MakeManager) -> None:
    before = threads("MooncakeSessionWorker")
    engine = Engine()
    engine.probe.default_factory = lambda: engine.hang
    manager = make_manager(engine)
    blacklist(manager, *many(16))
    assert wait_until(lambda: len(engine.asked) == 16)
    manager.teardown()
    engine.goes_on.set()
    assert wait_until(lambda: set(threads("MooncakeSessionWorker")) <= set(before)), "each role switch leaks threads"


def test_no_worker_thread_is_left_while_nothing_is_blacklisted(make_manager: MakeManager) -> None:
    before = threads("MooncakeSessionWorker")
    manager = make_manager(Engine())
    blacklist(manager, *many(10))
    assert wait_until(lambda: not blacklisted(manager))
    assert wait_until(lambda: set(threads("MooncakeSessionWorker")) <= set(before))


def test_threads_of_a_burst_go_though_one_peer_stays_away(make_manager: MakeManager) -> None:
    engine = Engine(probe=REFUSED)
    burst = many(100)
    engine.probe.update(dict.fromkeys(burst, engine.hang))
    manager = make_manager(engine)
    blacklist(manager, OTHER, *burst)
    assert wait_until(lambda: len(threads("MooncakeSessionWorker")) > 20)
    with manager.session_lock:
        manager.failed_sessions.difference_update(burst)
    engine.goes_on.set()
    assert wait_until(lambda: len(threads("MooncakeSessionWorker")) <= 16), "a pod's threads are gone for one dead peer"
    assert blacklisted(manager) == {OTHER}


def test_teardown_waits_for_a_probe_that_is_about_to_return(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that returns from Mooncake while the interpreter shuts down aborts the process."""
    monkeypatch.setattr(conn, "_STOP_GRACE_S", 2.5)  # in place of 0.1 s: however slow the machine
    monkeypatch.setattr(conn, "_STOP_WITHIN_S", 2.5)
    engine = Engine()
    returned = threading.Event()

    def returns_soon() -> int:
        time.sleep(0.02)
        returned.set()
        return REFUSED

    engine.probe[D] = returns_soon
    manager = make_manager(engine)
    blacklist(manager, D)
    assert engine.asked_something.wait(5)
    manager.teardown()
    assert returned.is_set()


def test_a_session_that_is_let_in_while_the_manager_stops_is_told(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "0")
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_VERIFY", "0")
    monkeypatch.setattr(conn, "_STOP_WITHIN_S", 2.5)  # in place of 0.4 s: however slow the machine
    caplog.set_level(logging.INFO)
    engine = Engine()
    manager = make_manager(engine)

    def answers_as_the_manager_stops() -> int:
        manager._failed_session_probe_shutdown.set()
        return 0

    engine.probe[D] = answers_as_the_manager_stops
    before = recoveries()
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager))
    manager.teardown()
    assert recoveries() == before + 1, "the metrics do not add up"
    assert f"Session {D} recovered via probe; un-blacklisted" in caplog.text


def test_nobody_is_asked_after_teardown(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL, "0.01")
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    blacklist(manager, D)
    assert wait_until(lambda: len(engine.asked) > 3)
    manager.teardown()
    asked = len(engine.asked)
    blacklist(manager, OTHER)
    time.sleep(0.1)
    assert len(engine.asked) == asked


def test_a_pass_starts_no_more_probes_once_the_manager_is_being_torn_down() -> None:
    engine = Engine()
    engine.probe.default_factory = lambda: engine.hang
    manager = bare(engine, failures=collections.defaultdict(int))
    conn._prober_of(manager)
    blacklist(manager, *many(40))
    one_pass = threading.Thread(target=run_pass, args=(manager,), daemon=True)
    one_pass.start()
    assert wait_until(lambda: len(engine.asked) == 32)
    manager._failed_session_probe_shutdown.set()
    engine.goes_on.set()
    one_pass.join(10)
    assert not one_pass.is_alive()
    assert len(engine.asked) == 32, "probes go on while the engine is being torn down"


def test_a_pass_over_a_manager_asks_what_is_due_and_returns() -> None:
    engine = Engine(probe=REFUSED)
    manager = bare(engine, failures=collections.defaultdict(int))
    conn._prober_of(manager)
    blacklist(manager, *many(200))
    run_pass(manager)
    assert sorted(engine.asked) == sorted(many(200)), "some are left for a later pass, or asked twice"
    assert engine.asked_under_lock == []


def test_a_second_manager_in_the_same_process_heals_too(make_manager: MakeManager) -> None:
    for _ in range(2):
        manager = make_manager(Engine())
        assert len(threads("MooncakeFailedSessionProbe")) == 1
        blacklist(manager, D)
        assert wait_until(lambda manager=manager: not blacklisted(manager))
        manager.teardown()
        assert not threads("MooncakeFailedSessionProbe")


def switch_roles(
    engine: Any, monkeypatch: pytest.MonkeyPatch, until: Callable[[Any], Any] = lambda manager: not blacklisted(manager)
) -> weakref.ref[Any]:
    """A manager that has healed a session, and is torn down and forgotten. Gives what is left of its prober."""
    monkeypatch.setattr(MooncakeKVManager, "init_engine", lambda self: setattr(self, "engine", engine))
    manager: Any = MooncakeKVManager(NO_MEMORY, "prefill")
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: until(manager))
    prober = weakref.ref(manager._failed_session_prober)
    manager.teardown()
    return prober


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is let in on its first answer."""
    monkeypatch.setenv(ENABLE, "1")
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "0")


@pytest.mark.usefixtures("at_once")
def test_a_hundred_role_switches_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    hooks: list[Any] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **hook: hooks.append(hook))
    switch_roles(engine, monkeypatch)
    hooks.clear()  # of the first manager in this process
    exits, running = atexit._ncallbacks(), set(threading.enumerate())
    probers = [switch_roles(engine, monkeypatch) for _ in range(100)]
    assert engine.deregistered == [address for address, _ in engine.registered], "a page stays registered"
    assert atexit._ncallbacks() == exits
    assert hooks == []
    assert wait_until(lambda: set(threading.enumerate()) <= running)
    gc.collect()
    assert [prober() for prober in probers] == [None] * 100


@pytest.mark.usefixtures("at_once")
def test_a_prober_whose_call_hung_at_its_teardown_is_gone_when_that_has_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    engine.probe[D] = engine.hang
    prober = switch_roles(engine, monkeypatch, until=lambda _: engine.asked)
    gc.collect()
    assert prober() is not None, "an exit would not see to it"
    engine.goes_on.set()
    assert wait_until(lambda: gc.collect() >= 0 and prober() is None)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("reads_are", [["async"], ["sync"]], ids="".join)
def test_a_page_that_a_pending_read_may_still_write_to_stays_registered(
    reads_are: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(read=PENDING, reads_are=reads_are)
    switch_roles(engine, monkeypatch, until=lambda _: engine.reads)
    engine.goes_on.set()
    engine.read = 0
    switch_roles(engine, monkeypatch)
    assert (len(engine.registered), engine.deregistered) == (1, [])


@pytest.mark.parametrize("reads_are", [["async"], ["sync"]], ids="".join)
def test_a_page_that_another_manager_reads_into_stays_registered(
    reads_are: list[str], make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, manager = with_pending_reads(make_manager, reads_are)
    assert wait_until(manager._failed_session_prober._is_reading)
    wrapper = Engine()
    wrapper.engine = engine  # type: ignore[attr-defined]  # another wrapper of the same engine of Mooncake's
    switch_roles(wrapper, monkeypatch, until=lambda _: True)
    assert engine.deregistered == []
    engine.read = 0
    engine.goes_on.set()
    assert wait_until(lambda: not manager._failed_session_prober._is_reading())
    manager.teardown()
    assert len(engine.registered) == len(engine.deregistered) == 1, "the last manager leaves it registered"


def test_at_an_exit_all_managers_stop_side_by_side(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes up to half a second where a call cannot be ended."""
    managers = [make_manager(Engine()) for _ in range(3)]
    told: list[bool] = []

    def stop_at_exit(self: Any) -> None:
        told.append(all(manager._failed_session_prober.shutdown.is_set() for manager in managers))

    monkeypatch.setattr(conn._FailedSessionProber, "stop_at_exit", stop_at_exit)
    conn._stop_probers()
    assert len(told) >= 3
    assert all(told)


def test_nothing_is_read_after_a_teardown(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would look at those reads, and the page would be registered again."""
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "0")
    engine, before = Engine(), set(threading.enumerate())
    engine.probe[D] = lambda: 0 if len(engine.asked) == 1 or engine.goes_on.wait(10) else REFUSED
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: len(engine.asked) == 2), "the second probe is the one that reads follow"
    manager.teardown()
    engine.goes_on.set()
    assert wait_until(lambda: set(threading.enumerate()) <= before)
    assert (engine.reads, engine.registered) == ([], [])


def test_nobody_is_probed_after_a_teardown(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it was still being looked whether bytes of a failed transfer may land."""
    monkeypatch.setattr(conn, "_STOP_GRACE_S", 2.5)  # in place of 0.1 s: however slow the machine
    monkeypatch.setattr(conn, "_STOP_WITHIN_S", 2.5)
    looks, goes_on = threading.Event(), threading.Event()
    monkeypatch.setattr(late_bytes.LateBytes, "may_land", lambda *_: looks.set() or not goes_on.wait(10))
    engine = Engine()
    manager = make_manager(engine)
    counted: list[Any] = []
    monkeypatch.setattr(manager._failed_session_prober.metrics, "probed", counted.extend)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert looks.wait(10)
    asked = len(engine.asked)
    threading.Timer(0.05, goes_on.set).start()
    manager.teardown()
    assert watch_of(manager).in_flight() == 0
    assert len(engine.asked) == asked
    assert "unanswered" not in dict(counted), "a probe that was not made is counted"


def test_reads_that_are_about_to_end_are_waited_for_at_a_teardown(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conn, "_STOP_GRACE_S", 2.5)  # in place of 0.1 s: however slow the machine
    monkeypatch.setattr(conn, "_STOP_WITHIN_S", 2.5)
    engine, manager = with_pending_reads(make_manager)
    end = threading.Timer(0.05, setattr, (engine, "read", 0))
    end.start()
    manager.teardown()
    end.join()
    assert not engine.batches, "Mooncake keeps what nobody looks at for good"


# How a process ends is in test_exit.py.


# Peers and engines that are not as they should be.


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(3)], ids=repr)
def test_a_probe_that_raises_is_logged_once_for_each_session_and_asked_again(
    error: BaseException, make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.01")
    engine = Engine(probe=raises(error))
    manager = make_manager(engine)
    blacklist(manager, D, OTHER)
    assert wait_until(lambda: min(engine.asked.count(D), engine.asked.count(OTHER)) > 3)
    lines = [line for line in caplog.messages if repr(error) in line]
    assert [sum(session in line for line in lines) for session in (D, OTHER)] == [1, 1]
    engine.probe[D] = 0
    assert wait_until(lambda: blacklisted(manager) == {OTHER})


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (0, "answered"),
        (REFUSED, "refused"),
        (-101, "host not known"),
        (-7, "failed (rc -7)"),
        (raises(RuntimeError("broken")), "raised, see the log"),
        (lambda: time.sleep(1.1) or REFUSED, "no answer within 1."),
    ],
    ids=["answered", "refused", "host", "failed", "raised", "late"],
)
def test_what_the_last_probe_has_shown_is_kept_for_the_operator(
    probe: Any, said: str, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "20")
    manager = make_manager(Engine(probe=probe))
    blacklist(manager, D)
    assert wait_until(lambda: watch_of(manager).known[D].probe_said)
    assert watch_of(manager).known[D].probe_said.startswith(said)


def test_a_pass_over_a_plain_object_waits_for_a_connection_and_sleeps_after_a_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It probes each session once, so nothing is gained by giving that probe up."""
    received, waits = conn._received, []
    monkeypatch.setattr(conn, "_received", lambda *arguments: waits.append(arguments) or received(*arguments))
    with full_peer() as (host, port):

        def connect() -> int:
            with contextlib.suppress(OSError):
                socket.create_connection((host, port), timeout=1.0).close()
            return 0

        manager = bare(Engine(probe=connect), f"{host}:{port}")
        manager._failed_session_probe_shutdown = threading.Event()
        threading.Timer(0.1, manager._failed_session_probe_shutdown.set).start()
        began = time.monotonic()
        run_pass(manager)
        assert time.monotonic() - began >= 0.9
        assert manager.failed_sessions == set()
        assert len(waits) < 20


def test_a_probe_that_has_not_connected_soon_is_ended_and_made_again(make_manager: MakeManager) -> None:
    """The kernel would try again after a second or more, and a heal would be noticed as much later."""
    with full_peer() as (host, port):

        def connect() -> int:
            with contextlib.suppress(OSError):
                socket.create_connection((host, port), timeout=30.0).close()
            return REFUSED

        engine, session = Engine(probe=connect), f"{host}:{port}"
        manager = make_manager(engine)
        blacklist(manager, session)
        assert wait_until(lambda: len(engine.asked) >= 3)
        assert watch_of(manager).known[session].probe_said.startswith("no connection within 0.")
        assert not watch_of(manager).known[session].was_gone


def test_a_mooncake_that_cannot_probe_is_told_at_the_start_and_once_a_session(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.01")
    monkeypatch.setattr(session_probe, "mooncake_version", lambda: "mooncake-transfer-engine 0.3.10.post2")
    engine = Engine()
    engine.engine = types.SimpleNamespace()  # Mooncake's own, behind the wrapper
    engine.probe[D] = lambda: session_probe.probe(engine.engine, D)
    manager = make_manager(engine)
    blacklist(manager, D)
    assert wait_until(lambda: len(engine.asked) > 5)
    start, blacklisting = [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]
    assert "mooncake-transfer-engine 0.3.10.post2" in start
    assert "0.3.11" in start
    assert f"Session {D} is blacklisted" in blacklisting
    assert "it stays out until it registers again" in blacklisting
    assert blacklisted(manager) == {D}


@pytest.mark.parametrize(("can_probe", "times"), [(True, 1), (False, 0)])
def test_a_peer_that_is_there_and_knows_no_probes_is_told_once_by_who_can_probe(
    make_manager: MakeManager,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    can_probe: bool,
    times: int,
) -> None:
    monkeypatch.setenv(INTERVAL, "0.01")
    monkeypatch.setattr(session_states, "LISTEN_AFTER_S", 0.05)
    monkeypatch.setattr(session_watch, "LISTEN_AFTER_S", 0.05)
    monkeypatch.setattr(session_probe, "can_probe", lambda engine: can_probe)
    monkeypatch.setattr(session_probe, "_takes_connections", lambda session: True)
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    blacklist(manager, D)
    began = time.monotonic()

    def told() -> int:
        return [line.startswith(f"Session {D} takes connections") for line in caplog.messages].count(True)

    assert wait_until(lambda: told() >= times and time.monotonic() > began + 0.5 and len(engine.asked) > 5)
    assert told() == times
    assert blacklisted(manager) == {D}


BOTH_WAYS = pytest.mark.parametrize("reads_are", [["async"], ["sync"]], ids=["async", "sync"])


@BOTH_WAYS
def test_a_session_heals_on_an_engine_that_can_read_in_one_way_only(
    reads_are: list[str], make_manager: MakeManager
) -> None:
    engine = Engine(read=-1, reads_are=reads_are)
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: engine.reads)
    assert blacklisted(manager) == {D}, "let in though its memory cannot be read"
    engine.read = 0
    assert wait_until(lambda: not blacklisted(manager)), "dead for good"
    send(manager, D)
    assert engine.asked_under_lock == [], "every transfer waits while a peer is read"
    assert not engine.batches


@BOTH_WAYS
def test_a_session_whose_memory_cannot_be_read_is_let_in_after_interval_with_a_warning(
    reads_are: list[str], make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.5")
    engine = Engine(read=-1, reads_are=reads_are)
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    failed_at = time.monotonic()
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager))
    assert time.monotonic() - failed_at >= 0.5
    assert wait_until(lambda: any("without proof" in line for line in caplog.messages))
    assert [line for line in caplog.messages if D in line and "reading its memory gave -1" in line]
    assert len(engine.reads) == (12 if reads_are == ["async"] else 1), "reads again in Mooncake's cooldown"


@BOTH_WAYS
def test_the_memory_of_a_peer_that_has_fallen_silent_is_not_read(
    reads_are: list[str], make_manager: MakeManager
) -> None:
    """First contact with one that is stopped holds up transfers to live ones for a minute."""
    engine = Engine(reads_are=reads_are)
    rcs = iter([0])
    engine.probe[D] = lambda: next(rcs, REFUSED)
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: len(engine.asked) >= 3)
    assert engine.reads == []
    assert blacklisted(manager) == {D}


# Reads that never end.


@pytest.fixture
def hangs_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads are taken to hang after 0.2 s in place of 1 s, and INTERVAL is half a second."""
    monkeypatch.setenv(INTERVAL, "0.5")
    monkeypatch.setattr(session_states, "READ_HANGS_S", 0.2)
    monkeypatch.setattr(session_watch, "READ_HANGS_S", 0.2)


def with_pending_reads(make_manager: MakeManager, reads_are: Iterable[str] = ("async",)) -> tuple[Any, Any]:
    """An engine and a manager with a blacklisted session, whose reads are pending."""
    engine = Engine(read=PENDING, reads_are=reads_are)
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: len(engine.reads) == (4 if "async" in reads_are else 1))
    return engine, manager


@pytest.mark.usefixtures("hangs_soon")
@BOTH_WAYS
def test_a_session_whose_reads_never_end_is_let_in_after_interval_and_the_reason_is_said(
    reads_are: list[str], make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    _, manager = with_pending_reads(make_manager, reads_are)
    assert wait_until(lambda: not blacklisted(manager)), "it is kept out for as long as a read hangs"
    assert time.monotonic() - began >= 0.5
    reason = rf"Session {D} was let in on probation without proof .* reads of its memory have not ended for \d s"
    assert wait_until(lambda: re.search(reason, caplog.text)), caplog.messages


@pytest.mark.usefixtures("hangs_soon")
def test_a_call_that_hangs_where_it_is_to_read_is_ended_and_its_session_let_in_after_interval(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    """As Mooncake before 0.3.13, which connects to a data port whose packets are dropped before it reads."""
    came_back: list[float] = []

    def connects(address: tuple[str, int]) -> int:
        began = time.monotonic()
        try:
            socket.create_connection(address).close()
        except OSError:
            return -1
        finally:
            came_back.append(time.monotonic() - began)
        return 0

    engine = Engine(reads_are=["sync"])
    with full_peer() as data_port:
        engine.read = lambda: connects(data_port)
        manager = make_manager(engine)
        manager.register_decode(D, SOME_MEMORY)
        blacklist(manager, D)
        assert wait_until(lambda: came_back), "its thread waits for minutes"
        assert wait_until(lambda: not blacklisted(manager))
        manager.teardown()
    assert max(came_back) < 2.0
    assert wait_until(lambda: f"Session {D} was let in on probation without proof" in caplog.text)


def never_registers(manager: Any) -> None:
    assert wait_until(lambda: not blacklisted(manager))


def registers(manager: Any) -> None:
    manager.register_decode(D, SOME_MEMORY)


def registers_and_fails_again(manager: Any) -> None:
    registers(manager)
    manager.engine.probe[D] = REFUSED
    blacklist(manager, D)


@pytest.mark.usefixtures("hangs_soon")
@pytest.mark.parametrize("session", [never_registers, registers, registers_and_fails_again])
@pytest.mark.parametrize("ends_with", [0, -1], ids=["done", "failed"])
def test_reads_are_looked_at_until_they_end_whatever_became_of_their_session(
    session: Callable[[Any], None], ends_with: int, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_probe.PendingReads, "_UNWANTED_LATEST_S", 0.2)  # in place of 10 s
    engine, manager = with_pending_reads(make_manager)
    session(manager)
    was = blacklisted(manager)
    time.sleep(0.3)
    assert len(engine.batches) >= 4
    engine.read = ends_with
    assert wait_until(lambda: not engine.batches), "Mooncake keeps what nobody looks at for good"
    assert blacklisted(manager) == was, "reads that were begun before its registration say something of it"


def test_reads_that_are_pending_when_the_data_path_heals_let_the_session_in_when_they_are_done(
    make_manager: MakeManager,
) -> None:
    engine, manager = with_pending_reads(make_manager)
    time.sleep(0.2)
    assert blacklisted(manager) == {D}
    healed_at = time.monotonic()
    engine.read = 0
    assert wait_until(lambda: not blacklisted(manager))
    assert time.monotonic() - healed_at < 0.9, "waits for reads that were begun after the heal"
    assert len(engine.reads) == 4


def test_many_peers_are_verified_side_by_side_though_others_cannot_be_read(make_manager: MakeManager) -> None:
    engine = Engine(read=PENDING, reads_are=["async"])
    manager = make_manager(engine)
    hung = many(60)
    for session in (*hung, D):
        manager.register_decode(session, SOME_MEMORY)
    blacklist(manager, *hung)
    assert wait_until(lambda: len(engine.batches) == 4 * len(hung)), "some wait until others are through"
    begin = engine.batch_transfer_async_read
    check, healthy = engine.transfer_check_status, set()

    def begins(session: str, *read: Any) -> int:
        batch = begin(session, *read)
        if session == D:
            healthy.add(batch)
        return int(batch)

    def looks(batch: int) -> int:
        if batch in healthy:
            engine.batches.discard(batch)
            return 1
        return int(check(batch))

    engine.batch_transfer_async_read, engine.transfer_check_status = begins, looks  # type: ignore[method-assign]
    blacklist(manager, D)
    assert wait_until(lambda: D not in blacklisted(manager)), "a healthy peer waits for those that hang"
    assert blacklisted(manager) == set(hung)
    assert len(threads("MooncakeSessionWorker")) <= 32, "a thread waits for each read"


def move_clock(manager: Any, seconds: float) -> None:
    """So much time passes for the blacklist: nothing waits, and a slow machine does not make it more."""
    with manager.session_lock:
        watch = watch_of(manager)
        clock = watch._clock
        watch._clock = lambda: clock() + seconds


def ends_probation(manager: Any) -> None:
    """The session is used, and once more when its probation is over."""
    send(manager, D)
    send(manager, D)
    move_clock(manager, session_states.PROBATION_S)
    send(manager, D)


def test_what_was_learnt_about_reads_holds_for_the_next_manager_in_the_process(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.2")
    for number in range(2):
        engine = Engine(read=-1)
        manager = make_manager(engine)
        manager.register_decode(D, SOME_MEMORY)
        blacklist(manager, D)
        assert wait_until(lambda manager=manager: not blacklisted(manager))
        for looks in (2, 3) if number == 0 else ():  # one before it was let in, one at the end of each probation
            ends_probation(manager)
            assert wait_until(lambda engine=engine, looks=looks: len(engine.reads) == 12 * looks)
            assert wait_until(lambda manager=manager: watch_of(manager).in_flight() == 0)
            assert wait_until(lambda engine=engine: not engine.batches)
        assert bool(engine.reads) == (number == 0)
        manager.teardown()
    assert conn._FailedSessionProber.reads_prove_nothing
    assert len([line for line in caplog.messages if "reads prove nothing on this transport" in line]) == 1


def test_where_the_engine_cannot_read_the_handshake_decides(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(reads_are=[])
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager)), "never let in on an engine that cannot read"
    assert "without proof" not in caplog.text


@pytest.mark.parametrize("refusal", [-1, raises(RuntimeError("GPU memory only"))], ids=["rc", "raises"])
def test_a_page_to_read_into_that_is_refused_once_is_said_once_and_tried_again(
    refusal: Any, make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryReader, "_REGISTER_AGAIN_S", 0.0)  # in place of 10 s
    engine = Engine()
    engine.registers = refusal
    manager = make_manager(engine)
    for session in (D, OTHER):
        manager.register_decode(session, SOME_MEMORY)
        blacklist(manager, session)
        assert wait_until(lambda: not blacklisted(manager)), "never let in where no page can be had"
        unproven = rf"Session {session} was let in on probation without proof .* when it was to register a page"
        assert wait_until(lambda unproven=unproven: re.search(unproven, caplog.text)), caplog.messages
    assert caplog.text.count("no peer's memory can be read for now") == 1
    assert engine.reads == []
    engine.registers, engine.read = 0, -1
    third = "decode:7003"
    manager.register_decode(third, SOME_MEMORY)
    blacklist(manager, third)
    assert wait_until(lambda: engine.reads), "one refusal switches verification off for good, in silence"
    assert blacklisted(manager) == {third}
    engine.read = 0
    assert wait_until(lambda: not blacklisted(manager))
    assert not re.search(f"Session {third} was let in on probation without proof", caplog.text)


# What is logged.


def test_held_dropped_and_malformed_sessions_are_named_in_the_log(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = Engine()
    engine.probe[OTHER] = REFUSED
    manager = make_manager(engine)
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager))
    send(manager, D)
    blacklist(manager, D, "nonsense", OTHER)
    texts = [
        f"Session {D} (relapse 1) failed again soon after its recovery; held for 1s",
        "Session id 'nonsense' is not host:port with a port from 1 to 65535: it is never probed",
    ]
    assert wait_until(lambda: set(texts) <= set(caplog.messages)), caplog.messages
    move_clock(manager, 600.0)
    forgot = rf"Forgot blacklisted session {OTHER}: no request for 60\ds \(out for 60\d\.\d s, 0 requests refused\)"
    assert wait_until(lambda: any(re.fullmatch(forgot, line) for line in caplog.messages)), caplog.messages
    assert OTHER not in blacklisted(manager)
    assert OTHER not in manager.session_failures


def test_of_a_rack_that_fails_and_heals_some_are_named_and_all_are_told_before_the_loop_sleeps(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manager = make_manager(Engine())
    blacklist(manager, *many(100))
    assert wait_until(lambda: not blacklisted(manager))
    left = failed_session_log.LINES_IN_A_SPELL
    for kind, text in (("sessions blacklisted", " is blacklisted"), ("sessions let in again", " recovered via probe")):
        assert wait_until(
            lambda kind=kind: sum(map(int, re.findall(rf"{kind}: (\d+) more", caplog.text))) == 100 - left
        ), "nobody hears how many there were until the next fault"
        assert sum(text in line for line in caplog.messages) == left


def test_a_fault_in_the_daemon_thread_is_logged_once_and_does_not_end_it(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.05")
    manager = make_manager(Engine())
    with monkeypatch.context() as fault:
        fault.setattr(SessionWatch, "take_due", lambda *_: raises(RuntimeError("a fault of our own"))())
        blacklist(manager, D)
        assert wait_until(lambda: "a fault of our own" in caplog.text)
        time.sleep(0.15)
    assert wait_until(lambda: not blacklisted(manager)), "one fault of ours, and nobody is healed any more"
    assert caplog.text.count("RuntimeError: a fault of our own") == 1


BreakLog = Callable[[str, BaseException], None]


@pytest.fixture
def break_log() -> Iterator[BreakLog]:
    """Has each line of ours raise in a filter or in a handler of the operator's."""
    logger, handler = logging.getLogger(conn.__name__), logging.NullHandler()

    def breaks(place: str, error: BaseException) -> None:
        handler.handle = lambda record: raises(error)()  # type: ignore[method-assign]
        logger.setLevel(logging.INFO)
        if place == "filter":
            logger.addFilter(handler.handle)
        else:
            logger.addHandler(handler)

    yield breaks
    logger.setLevel(logging.NOTSET)
    logger.filters.clear()
    logger.removeHandler(handler)


IN_LOG = pytest.mark.parametrize("place", ["filter", "handler"])
ERRORS = pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(3)], ids=repr)


@IN_LOG
@ERRORS
def test_a_log_that_raises_holds_up_no_session_and_no_stop(
    place: str,
    error: BaseException,
    break_log: BreakLog,
    make_manager: MakeManager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At each line: a session is blacklisted, its probe raises, no page can be had, a metric fails, it is let in."""
    monkeypatch.setattr(failed_session_metrics, "_fault_said", threading.Event())
    monkeypatch.setattr(conn, "_PAUSE_AFTER_FAULT_S", 0.01)
    engine, before = Engine(probe=raises(RuntimeError("broken"))), shown_as_blacklisted()
    engine.registers = -1
    manager = make_manager(engine)
    break_log(place, error)
    for session in (D, OTHER):
        manager.register_decode(session, SOME_MEMORY)
    with monkeypatch.context() as fault:
        fault.setattr(conn, "FAILED_SESSION_RECOVERIES", types.SimpleNamespace(inc=raises(OSError("gone"))))
        blacklist(manager, D, OTHER, "nonsense")
        assert wait_until(lambda: {D, OTHER} <= set(engine.asked))
        with fault.context() as another:
            another.setattr(SessionWatch, "take_due", lambda *_: raises(RuntimeError("a fault of our own"))())
            time.sleep(0.1)
        engine.probe.default_factory = lambda: 0
        engine.probe.clear()
        assert wait_until(lambda: blacklisted(manager) == {"nonsense"}), "nobody is healed any more"
    assert engine.registered
    blacklist(manager, D)
    assert wait_until(lambda: watch_of(manager).known[D].relapses and not watch_of(manager).events)
    manager.teardown()
    assert not threads("MooncakeFailedSessionProbe")
    assert shown_as_blacklisted() == before


@IN_LOG
@pytest.mark.parametrize("can_start", [True, False])
def test_a_log_that_raises_keeps_no_node_from_starting(
    place: str, can_start: bool, break_log: BreakLog, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_log(place, RuntimeError("broken"))
    if not can_start:
        monkeypatch.setattr(conn, "_start_failed_session_probe", lambda *_: raises(RuntimeError("of our own"))())
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    assert isinstance(manager.failed_sessions, FailedSessions) is can_start
    blacklist(manager, D)
    assert engine.asked_something.wait(5 if can_start else 0) is can_start


@IN_LOG
@ERRORS
def test_a_log_that_raises_ends_no_pass(place: str, error: BaseException, break_log: BreakLog) -> None:
    engine = Engine()
    engine.probe[OTHER] = raises(RuntimeError("broken"))
    manager = bare(engine, D, OTHER)
    break_log(place, error)
    one_pass = threading.Thread(target=run_pass, args=(manager,))
    one_pass.start()
    one_pass.join(10)
    assert manager.failed_sessions == {OTHER}
    assert not one_pass.is_alive()


def test_a_signal_that_ends_the_process_while_a_line_is_logged_is_heard(break_log: BreakLog) -> None:
    break_log("filter", SystemExit(3))
    with pytest.raises(SystemExit):
        harmless_logger.logger.info("Its handler runs in the main thread, at any line")


def test_a_fault_while_the_loop_stops_is_logged_and_leaves_nothing_in_the_gauges(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, before = make_manager(Engine(probe=REFUSED)), shown_as_blacklisted()
    blacklist(manager, D)
    assert wait_until(lambda: shown_as_blacklisted() == before + 1)
    monkeypatch.setattr(conn._FailedSessionProber, "_report", lambda *_: raises(RuntimeError("a fault of our own"))())
    manager.teardown()
    assert caplog.text.count("RuntimeError: a fault of our own") == 1
    assert shown_as_blacklisted() == before


def test_a_fault_in_what_sglang_calls_is_logged_once_and_sglang_goes_on(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(Engine())
    with monkeypatch.context() as fault:
        fault.setattr(SessionWatch, "failed", lambda self, session: raises(RuntimeError("a fault of our own"))())
        blacklist(manager, D, OTHER)
        assert wait_until(lambda: "a fault of our own" in caplog.text)
    assert caplog.text.count("RuntimeError: a fault of our own") == 1
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.ERROR]
    with pytest.raises(KVTransferError, match="is not alive"):
        send(manager, D)


def test_an_answer_that_cannot_be_taken_in_costs_the_others_nothing_and_is_asked_for_again(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, faults = SessionWatch.answered, iter([MemoryError("none left"), MemoryError("none left")])

    def fails_twice(self: SessionWatch, call: Any, **answer: Any) -> None:
        for fault in faults:
            raise fault
        answered(self, call, **answer)

    monkeypatch.setattr(SessionWatch, "answered", fails_twice)
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "0")  # the first answer lets in
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_VERIFY", "off")
    engine = Engine()
    manager = make_manager(engine)
    blacklist(manager, *many(16))
    assert wait_until(lambda: not blacklisted(manager)), "sessions whose answer was lost are never asked again"
    assert watch_of(manager).in_flight() == 0
    assert caplog.text.count("MemoryError: none left") == 1
    assert len(engine.asked) == 16 + 2, "answers that came with the lost ones are lost, too"


@pytest.mark.parametrize("ours", [(late_bytes.LateBytes, "may_land"), (MemoryReader, "begin")], ids=["look", "read"])
def test_a_fault_before_reads_or_in_them_leaves_the_answer_to_the_probe(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, ours: tuple[type, str]
) -> None:
    monkeypatch.setattr(*ours, lambda *_: raises(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a fault of our own"))())
    manager = make_manager(Engine())
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager)), "it answers, and stays out for good"
    assert caplog.text.count("UnicodeDecodeError: ") == 1


@pytest.mark.parametrize("ours", [(probe_workers.Workers, "start"), (SessionWatch, "next_due_in")], ids=str)
def test_calls_that_a_fault_kept_from_being_made_are_made_when_it_is_over(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, ours: tuple[type, str]
) -> None:
    monkeypatch.setattr(conn, "_PAUSE_AFTER_FAULT_S", 0.1)
    manager = make_manager(Engine())
    with monkeypatch.context() as fault:
        fault.setattr(*ours, lambda *_: raises(RuntimeError("a fault of our own"))())
        blacklist(manager, *many(12))
        assert wait_until(lambda: "a fault of our own" in caplog.text)
    assert wait_until(lambda: not blacklisted(manager)), "sessions whose call was never made are never asked again"
    assert watch_of(manager).in_flight() == 0


def test_session_lock_is_taken_anew_for_each_of_many_reads_that_end_at_once(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over RDMA each looks whether other machines have registered, and there may be thousands."""
    taken = itertools.count()
    told: list[int] = []
    read = SessionWatch.read

    class Lock(type(threading.RLock())):  # type: ignore[misc]
        def __enter__(self) -> bool:
            next(taken)
            return bool(super().__enter__())

    engine = Engine(read=PENDING)
    manager = make_manager(engine)
    manager._failed_session_prober._lock = manager.session_lock = Lock()
    monkeypatch.setattr(SessionWatch, "read", lambda *of: (told.append(copy.copy(taken).__next__()), read(*of))[1])
    sessions = many(10)
    for session in sessions:
        manager.register_decode(session, SOME_MEMORY)
    blacklist(manager, *sessions)
    assert wait_until(lambda: len(engine.batches) == 4 * len(sessions))
    engine.read = 0
    assert wait_until(lambda: len(told) >= len(sessions))
    assert len(set(told)) == len(told), "requests wait until all of them are told"


def test_a_metric_that_cannot_be_counted_holds_up_nobody_and_is_said_once(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where PROMETHEUS_MULTIPROC_DIR is no directory."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(conn, "FAILED_SESSION_RECOVERIES", types.SimpleNamespace(inc=raises(FileNotFoundError("gone"))))
    monkeypatch.setattr(failed_session_metrics, "_fault_said", threading.Event())
    manager = make_manager(Engine())
    for session in (D, OTHER):
        blacklist(manager, session)
        assert wait_until(lambda: not blacklisted(manager)), "nobody recovers because of a metric"
        assert wait_until(lambda session=session: f"Session {session} recovered via probe" in caplog.text)
    assert caplog.text.count("cannot be counted, said once") == 1
    assert "could not start" not in caplog.text


@pytest.mark.parametrize(("timeout", "factor"), [(None, 1.0), ("5", 1.0), ("30", 1.0), ("120", 4.0), ("nonsense", 1.0)])
def test_a_probation_is_longer_where_a_transfer_takes_longer_to_fail(
    timeout: str | None, factor: float, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MC_TRANSFER_TIMEOUT", raising=False)
    if timeout is not None:
        monkeypatch.setenv("MC_TRANSFER_TIMEOUT", timeout)
    manager = make_manager(Engine())
    blacklist(manager, D)
    assert wait_until(lambda: not blacklisted(manager))
    send(manager, D)
    move_clock(manager, factor * session_states.PROBATION_S - 5.0)
    send(manager, D)
    assert D in watch_of(manager).known, "a failure that is a consequence of the last one is taken for a new one"
    move_clock(manager, 5.0)
    send(manager, D)
    assert D not in watch_of(manager).known


# When nothing is to be started.


@pytest.mark.parametrize(("name", "value"), [(INTERVAL, "nan"), (INTERVAL, "400"), (ENABLE, "maybe")])
def test_a_wrong_setting_stops_a_prefill_node_before_anything_is_started(
    name: str, value: str, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(MooncakeKVManager, "register_buffer_to_engine", raises(AssertionError("started")))
    with pytest.raises(ValueError, match=f"{name}='?{value}'? is not allowed"):
        make_manager(Engine())


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@pytest.mark.parametrize("role", ["decode", Role.DECODE])
def test_a_decode_node_starts_nothing_and_its_settings_do_not_matter(
    role: Any, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "nan")
    manager = make_manager(Engine(), role)
    assert not hasattr(manager, "failed_sessions")
    assert not threads("MooncakeFailedSessionProbe")


def test_a_role_may_be_an_enumeration(make_manager: MakeManager) -> None:
    assert isinstance(make_manager(Engine(), Role.PREFILL).failed_sessions, FailedSessions)


@pytest.mark.parametrize("switch", ["0", "off", ""])
def test_switched_off_the_blacklist_is_a_plain_set_and_no_thread_runs(
    switch: str, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENABLE, switch)
    manager = make_manager(Engine())
    assert type(manager.failed_sessions) is set
    assert not threads("MooncakeFailedSessionProbe")


# On SGLang's own manager.


def test_who_refers_to_the_blacklist_is_counted_while_nobody_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer worker refers to it for a moment, under the lock: that is no second name."""
    manager = bare(Engine())
    held = []
    monkeypatch.setattr(conn.sys, "getrefcount", lambda blacklist: held.append(manager.session_lock.locked()) or 2)
    assert conn._missing_of(manager) == ""
    assert held == [True], "the patch may step aside because a request came at that moment"


class NativeManager:
    """SGLang's manager, from 0.5.13 on: its constructor starts a probe thread."""

    _failed_session_probe_loop = conn._failed_session_probe_loop
    supports_role_switch = True

    def __init__(self, engine: Any, disaggregation_mode: str, stopped: bool = False) -> None:
        self.engine = engine
        self._worker_threads: list[threading.Thread] = []
        if disaggregation_mode == "prefill":
            self.failed_sessions: Any = set()
            self.session_failures: Any = collections.defaultdict(int)
            self.session_lock = threading.Lock()
            self._failed_session_probe_shutdown = threading.Event()
            if stopped:
                self._failed_session_probe_shutdown.set()
            loop = self._failed_session_probe_loop
            thread = threading.Thread(target=loop, name="MooncakeFailedSessionProbe", daemon=True)
            thread.start()
            self._worker_threads.append(thread)

    def teardown(self) -> None:
        self._failed_session_probe_shutdown.set()
        for thread in self._worker_threads:
            thread.join(3)


class Patch:
    """What puts our file into SGLang, as far as a constructor uses it."""

    active = True

    def __init__(self, give_up: Callable[[str], None] = pytest.fail) -> None:
        self.give_up = give_up

    def replace(self, owner: Any, name: str, value: object) -> None:
        setattr(owner, name, value)

    def sglang_version(self) -> str:
        return "0.5.23"


def patched(manager: type[Any], give_up: Callable[[str], None] = pytest.fail) -> type[Any]:
    """The class as a subclass with our constructor."""
    init = conn._with_failed_session_probe(manager.__init__, Patch(give_up))
    return type(manager.__name__, (manager,), {"__init__": init})


def test_a_patch_that_was_given_up_while_the_manager_was_made_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENABLE, "1")
    patch = Patch()

    class Manager:
        def __init__(self, args: Any, disaggregation_mode: str = "prefill") -> None:
            self.engine, self.session_lock = args, threading.Lock()
            self.failed_sessions: set[str] = set()
            self.session_failures: dict[str, int] = {}
            patch.active = False

    Manager.__init__ = conn._with_failed_session_probe(Manager.__init__, patch)  # type: ignore[method-assign]
    assert type(Manager(Engine()).failed_sessions) is set
    assert not threads("MooncakeFailedSessionProbe")


def test_the_loop_stops_when_an_event_is_set_that_somebody_held_before_it_ran() -> None:
    manager = bare(Engine(), failures=collections.defaultdict(int))
    event = manager._failed_session_probe_shutdown = threading.Event()
    loop = threading.Thread(target=conn._failed_session_probe_loop, args=(manager,), daemon=True)
    loop.start()
    assert wait_until(lambda: hasattr(manager, "_failed_session_prober"))
    event.set()
    loop.join(10)
    assert not loop.is_alive()


def test_a_native_probe_thread_runs_our_loop_and_there_is_no_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENABLE, "1")
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "0.05")
    manager = patched(NativeManager)(Engine(), "prefill")
    try:
        assert len(threads("MooncakeFailedSessionProbe")) == 1
        blacklist(manager, D)
        assert wait_until(lambda: not blacklisted(manager))
    finally:
        manager.teardown()
    assert not threads("MooncakeFailedSessionProbe")


def test_a_manager_that_was_stopped_before_the_blacklist_is_swapped_stays_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENABLE, "1")
    manager = patched(NativeManager)(Engine(), "prefill", stopped=True)
    assert wait_until(lambda: not threads("MooncakeFailedSessionProbe"))
    manager.teardown()


def test_a_decode_node_that_may_become_prefill_is_stopped_by_a_wrong_setting_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(INTERVAL, "inf")
    with pytest.raises(ValueError, match=INTERVAL):
        patched(NativeManager)(Engine(), "decode")


def test_nothing_is_lost_when_the_blacklist_is_swapped_while_sglang_uses_it() -> None:
    manager = bare(Engine(probe=REFUSED), failures=collections.defaultdict(int))
    swapped = threading.Event()
    started = threading.Barrier(5)

    def transfers(host: str) -> None:
        started.wait(5)
        for port in range(1, 100_000):
            blacklist(manager, f"{host}:{port}", f"{host}-back:{port}")
            with manager.session_lock:
                manager.failed_sessions.discard(f"{host}-back:{port}")
            if swapped.is_set():
                last.append((host, port))
                return

    last: list[tuple[str, int]] = []
    workers = [threading.Thread(target=transfers, args=(host,)) for host in ("a", "b", "c", "d")]
    for worker in workers:
        worker.start()
    started.wait(5)
    time.sleep(0.02)
    conn._prober_of(manager)
    time.sleep(0.02)
    swapped.set()
    for worker in workers:
        worker.join(5)
    expected = {f"{host}:{port}" for host, until in last for port in range(1, until + 1)}
    assert len(last) == 4
    assert manager.failed_sessions == expected, "a failure or a registration was lost in the swap"
    assert isinstance(manager.failed_sessions, FailedSessions)


class LackingManager:
    """A manager of some release that is not as we know it: ``attributes`` are all it has."""

    def __init__(self, attributes: dict[str, Any], disaggregation_mode: str) -> None:
        vars(self).update(attributes)


COMPLETE = {"engine": Engine(), "failed_sessions": set(), "session_failures": {}, "session_lock": threading.Lock()}


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        *(
            ({name: COMPLETE[name] for name in COMPLETE if name != missing}, f"MooncakeKVManager.{missing}")
            for missing in COMPLETE
        ),
        ({**COMPLETE, "failed_sessions": {}}, "set MooncakeKVManager.failed_sessions (it is a dict)"),
        ({**COMPLETE, "failed_sessions": []}, "set MooncakeKVManager.failed_sessions (it is a list)"),
    ],
)
def test_a_manager_that_lacks_what_the_probe_needs_is_left_alone_and_what_it_lacks_is_said(
    attributes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENABLE, "1")
    missing: list[str] = []
    manager = patched(LackingManager, missing.append)(attributes, "prefill")
    assert missing == [said]
    assert vars(manager) == attributes
    assert not threads("MooncakeFailedSessionProbe")


def test_a_manager_that_cannot_be_looked_at_is_logged_and_starts_without_the_probe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENABLE, "1")
    complete = {**COMPLETE, "failed_sessions": set()}
    manager_class = patched(LackingManager)
    manager_class.session_lock = property(lambda self: raises(RuntimeError("torn down"))(), lambda self, lock: None)
    manager_class({name: complete[name] for name in complete if name != "session_lock"}, "prefill")
    assert "RuntimeError: torn down" in caplog.text
    assert not threads("MooncakeFailedSessionProbe")


def test_a_probe_that_cannot_be_started_is_logged_and_the_node_starts_without_it(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as fault:
        fault.setattr(threading.Thread, "start", lambda self: raises(RuntimeError("can't start new thread"))())
        manager = make_manager(Engine())
    send(manager, D)
    assert "it could not start; SGLang is not affected" in caplog.text
    assert not threads("MooncakeFailedSessionProbe")
    assert type(manager.failed_sessions) is set, "the blacklist keeps its changes for a thread that is not there"
