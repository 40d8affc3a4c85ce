"""Does the blacklist stay whole, and session_lock short, while many threads use both at once?

FAULTS_STRESS_S says how many seconds the stress lasts, 10 if unset; FAULTS_SEED repeats the chances of an earlier run.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import gc
import itertools
import logging
import os
import random
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit import waiting
from prometheus_client import REGISTRY
from sglang.srt.disaggregation.mooncake import conn, probe_workers, session_probe, standalone_manager
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, PeerMemory
from sglang.srt.observability import failed_session_log

STRESS_S = float(os.environ.get("FAULTS_STRESS_S", "10"))
SEED = int(os.environ.get("FAULTS_SEED", time.time_ns() % 1_000_000))
SESSIONS = [f"decode-{number}:{7000 + number}" for number in range(500)]
# Nobody asks for these, and they refuse: they are forgotten.
ORPHANS = [f"orphan-{number}:{7000 + number}" for number in range(20)]
CROWD = [f"crowd-{number}:{1 + number}" for number in range(10_000)]
LAST = "last:7000"
THREADS = 16
LONGEST_HOLD_S = 0.001
ROUNDS = 8
REFUSED = session_probe.NO_ANSWER
NO_MEMORY = types.SimpleNamespace(kv_data_ptrs=[], kv_data_lens=[], aux_data_ptrs=[], aux_data_lens=[])
SOME_MEMORY = PeerMemory(dst_kv_ptrs=[4096], dst_aux_ptrs=[8192])
QUICK = {
    "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
    "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
    "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "1",
    "SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S": "4",
    "SGLANG_FAILED_SESSION_PROBE_SETTLE_S": "0.05",
}


# Locks that are watched.


class Holds:
    """How long a lock was held, by which function, in spells of time.

    A hold's length is its holder's CPU time: the wall's clock tells how often a holder was interrupted. But a machine
    that lends its processors out books some of that as CPU time too, at any function by chance. So a function's
    longest hold is taken from the spell in which it is shortest: what our code needs, it needs in each of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.wall_s = 0.0
        self._spells: list[dict[str, float]] = [{}]

    def note(self, cpu_s: float, wall_s: float) -> None:
        """The hold that ends now. The caller still has the lock."""
        self.count += 1
        self.wall_s = max(self.wall_s, wall_s)
        spell, function = self._spells[-1], holder()
        spell[function] = max(spell.get(function, 0.0), min(cpu_s, wall_s))

    def next_spell(self) -> None:
        """Another spell begins."""
        self._spells.append({})

    def longest(self, choose: Callable[[list[float]], float]) -> tuple[float, str]:
        """The longest hold and whose it was, if ``choose`` picks one of the longest holds of each spell."""
        functions = {function for spell in self._spells for function in spell}
        picked = {name: choose([spell[name] for spell in self._spells if name in spell]) for name in functions}
        return max((seconds, name) for name, seconds in picked.items())

    def __str__(self) -> str:
        (best_s, best), (worst_s, worst) = self.longest(min), self.longest(max)
        return (
            f"session_lock was held {self.count} times, at most {best_s * 1e6:.0f} us of CPU time by {best}; in the "
            f"worst spell {worst_s * 1e6:.0f} us by {worst}, on the wall's clock {self.wall_s * 1e6:.0f} us"
        )


def holder() -> str:
    """The function whose `with` block ends now."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_name in ("note", "release", "__exit__"):
        frame = frame.f_back
    return str(frame.f_code.co_name)


class Watch:
    """Makes locks and knows which of them each thread holds, and in which order any thread took two of them."""

    def __init__(self) -> None:
        self.orders: set[tuple[str, str]] = set()
        self._of_thread = threading.local()

    def lock(self) -> WatchedLock:
        """Stands for ``threading.Lock``."""
        maker = sys._getframe(1)
        return WatchedLock(self, f"{os.path.basename(maker.f_code.co_filename)}:{maker.f_lineno}")

    def held(self) -> list[WatchedLock]:
        """The locks that this thread holds, the oldest first."""
        if not hasattr(self._of_thread, "held"):
            self._of_thread.held = []
        return self._of_thread.held  # type: ignore[no-any-return]


class WatchedLock:
    """A ``threading.Lock`` that notes how long it is held, and what its holder holds besides."""

    def __init__(self, watch: Watch, made_at: str) -> None:
        self.made_at = made_at
        self.holds = Holds()
        self.unwatched = threading.Lock()
        self._watch = watch
        self._since_ns = (0, 0)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        held = self._watch.held()
        if blocking:
            self._watch.orders.update((other.made_at, self.made_at) for other in held)
        if not self.unwatched.acquire(blocking, timeout):
            return False
        held.append(self)
        self._since_ns = time.thread_time_ns(), time.monotonic_ns()
        return True

    def release(self) -> None:
        cpu_ns, wall_ns = time.thread_time_ns(), time.monotonic_ns()
        self._watch.held().remove(self)
        self.holds.note((cpu_ns - self._since_ns[0]) / 1e9, (wall_ns - self._since_ns[1]) / 1e9)
        self.unwatched.release()

    def locked(self) -> bool:
        return self.unwatched.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def assert_locks_were_taken_well(watch: Watch, session_lock: WatchedLock) -> None:
    beneath = {inner for outer, inner in watch.orders if outer == session_lock.made_at}
    assert not beneath, f"with session_lock held, a thread waited for the locks of {beneath}: transfers wait too"
    crossed = [pair for pair in watch.orders if pair[::-1] in watch.orders]
    assert not crossed, f"two locks are taken in either order, so two threads can wait for each other: {crossed}"
    assert_short(session_lock.holds)


def assert_short(holds: Holds) -> None:
    assert holds.longest(min)[0] <= LONGEST_HOLD_S, f"every transfer of the prefill node waits meanwhile: {holds}"


# An engine whose calls are watched.


class WatchedEngine:
    """A Mooncake engine whose peers do what ``behave(call, session)`` says, until ``heal``."""

    def __init__(self, watch: Watch, behave: Callable[[str, str], int]) -> None:
        self.session_lock: Any = None
        self.healthy = False
        self.goes_on = threading.Event()  # what a peer that hangs waits for
        self.order = itertools.count()  # of failures and questions: its `next` cannot be interrupted
        self.probes = 0
        self.answered: dict[str, int] = {}  # when the newest probe was asked that gave 0
        self.pending: dict[int, str] = {}  # reads that have not ended, and from whom
        self.wrong: list[str] = []
        self._watch = watch
        self._behave = behave
        self._out: collections.Counter[str] = collections.Counter()
        self._batches = itertools.count(1)
        self._lock = threading.Lock()

    def heal(self) -> None:
        """From now on every peer is well, and what hangs returns."""
        self.healthy = True
        self.goes_on.set()

    def send_probe(self, session: str) -> int:
        asked_at = next(self.order)
        self.probes += 1
        rc = self._call("send_probe", session)
        if rc == 0:
            self.answered[session] = asked_at
        return rc

    def batch_transfer_async_read(self, session: str, *_: list[int]) -> int:
        if self._call("batch_transfer_async_read", session) != 0:
            return 0
        batch = next(self._batches)
        self.pending[batch] = session
        return batch

    def transfer_check_status(self, batch: int) -> int:
        self._look_at_session_lock("transfer_check_status")
        session = self.pending.pop(batch, None)
        if session is None:
            self.wrong.append("a read was looked at after it had ended, or twice at a time: its memory is freed then")
            return -1
        status = 1 if self.healthy else self._behave("transfer_check_status", session)
        if status == 0:
            self.pending[batch] = session
        return status

    def register_memory(self, address: int, length: int) -> int:
        self._look_at_session_lock("register_memory")
        return 0

    def batch_register(self, addresses: list[int], lengths: list[int]) -> int:
        return 0

    def batch_deregister(self, addresses: list[int]) -> int:
        return 0

    def _call(self, call: str, session: str) -> int:
        self._look_at_session_lock(call)
        with self._only_one_to(session) if call == "send_probe" else contextlib.nullcontext():
            return 0 if self.healthy else self._behave(call, session)

    def _look_at_session_lock(self, call: str) -> None:
        if self.session_lock in self._watch.held():
            self.wrong.append(f"{call} was called with session_lock held: every transfer waits for one peer")

    @contextlib.contextmanager
    def _only_one_to(self, session: str) -> Iterator[None]:
        with self._lock:
            self._out[session] += 1
            if self._out[session] > 1:
                self.wrong.append(f"{session} was probed twice at a time")
        try:
            yield
        finally:
            with self._lock:
                self._out[session] -= 1


class Whims:
    """Peers that answer at once or late, refuse, hang or raise, by chance."""

    def __init__(self) -> None:
        self.engine: Any = None
        self._chance = random.Random(SEED)

    def __call__(self, call: str, session: str) -> int:
        chance = self._chance.random()
        if call == "transfer_check_status":
            return self._status(chance)
        rare = 0.1 if call == "batch_transfer_async_read" else 1.0
        if session in ORPHANS:
            return REFUSED
        if chance < 0.02 * rare:
            self.engine.goes_on.wait(self._chance.uniform(0.2, 4.0))
            return REFUSED
        if chance < 0.06 * rare:
            raise RuntimeError("an engine that raises")
        if chance < 0.15 * rare:
            return REFUSED
        if chance > 0.7:
            self.engine.goes_on.wait(self._chance.uniform(0.0, 0.005))
        return 0

    def _status(self, chance: float) -> int:
        """Of a read: failed, done, or pending."""
        if chance < 0.005:
            raise RuntimeError("an engine that raises")
        return -1 if chance < 0.01 else 1 if chance < 0.4 else 0


# What the threads do, and write down.


class Record:
    """What happened to the blacklist, as those know it who changed it. Each line is written under session_lock."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.on: dict[str, int] = {}  # blacklisted, and when its newest failure was
        self.blacklisted = self.registered = self.taken_off = 0
        self.wrong: list[str] = []

    def fail(self, session: str) -> None:
        """A transfer failed, as transfer_worker notes it."""
        with self.manager.session_lock:
            self._look(session)
            self.manager.session_failures[session] += 1
            self.manager.failed_sessions.add(session)
            self.blacklisted += session not in self.on
            self.on[session] = next(self.manager.engine.order)

    def request(self, session: str) -> None:
        """A request looks the session up, as transfer_worker does before each chunk."""
        with self.manager.session_lock:
            refused = session in self.manager.failed_sessions
            self._look(session)
            if refused != (session in self.on):
                self.wrong.append(f"a request for {session} was {'refused' if refused else 'let through'}")

    def register(self, session: str) -> None:
        """The decode side registers, as _unblacklist_session notes it."""
        with self.manager.session_lock:
            self._leave(session)
            self.manager.decode_kv_args_table[session] = SOME_MEMORY

    def discard(self, session: str) -> None:
        """The session is taken off, and what is known of its memory stays as it is."""
        with self.manager.session_lock:
            self._leave(session)

    def _leave(self, session: str) -> None:
        self._look(session)
        self.manager.failed_sessions.discard(session)
        self.manager.session_failures.pop(session, None)
        self.registered += self.on.pop(session, None) is not None

    def _look(self, session: str) -> None:
        blacklisted = set.__contains__(self.manager.failed_sessions, session)  # `in` would be a request
        if blacklisted and session not in self.on:
            self.wrong.append(f"{session} is blacklisted though it registered: a registration was lost")
        if not blacklisted and session in self.on:
            failed_at = self.on.pop(session)
            self.taken_off += 1
            if self.manager.engine.answered.get(session, -1) < failed_at and session not in ORPHANS:
                self.wrong.append(f"{session} was let in on an answer older than its newest failure")

    def assert_right(self) -> None:
        """The blacklist is what this record says."""
        with self.manager.session_lock.unwatched:  # all in one hold, which is long
            for session in [*SESSIONS, *ORPHANS]:
                self._look(session)
            assert set(self.manager.failed_sessions) == set(self.on), (
                f"seed {SEED}: a session was lost, or one too many"
            )
            assert set(self.manager.session_failures) == set(self.on), (
                f"seed {SEED}: counts of failures are left behind"
            )
        assert self.wrong + self.manager.engine.wrong == [], f"seed {SEED}"


class Told(logging.Handler):
    """What was logged, counted by what operators grep for."""

    def __init__(self) -> None:
        super().__init__()
        self.recoveries = self.drops = 0
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.recoveries += "recovered via probe; un-blacklisted" in line
        self.drops += "Forgot blacklisted session" in line
        if record.levelno >= logging.ERROR:
            self.faults.append(line)


class Traffic:
    """Threads that do what SGLang's threads do to the blacklist, until told to stop."""

    def __init__(self, *jobs: Callable[[], None]) -> None:
        self._over = threading.Event()
        bodies = [lambda job=job: self._repeat(job) for job in jobs]  # type: ignore[misc]
        self._threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in self._threads:
            thread.start()

    def _repeat(self, job: Callable[[], None]) -> None:
        chance = random.Random(SEED)
        while not self._over.wait(chance.uniform(0.0, 0.005)):
            job()

    def stop(self, within_s: float) -> None:
        """Ends every thread, or says where each of them hangs."""
        self._over.set()
        deadline = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in self._threads)
        assert not stuck, f"deadlock: {stuck} threads did not end in {within_s:.0f} s\n{stacks()}"


def whatever_happens_to(record: Record, number: int) -> Callable[[], None]:
    """Requests, failures and registrations by chance, 50 at a go."""
    chance = random.Random(f"{SEED} {number}")
    deeds = [record.request, record.fail, record.register, record.discard]

    def job() -> None:
        for _ in range(50):
            (deed,) = chance.choices(deeds, [96.0, 2.5, 1.0, 0.5])
            deed(chance.choice(SESSIONS))

    return job


def recoveries() -> float:
    return REGISTRY.get_sample_value("sglang:failed_session_recoveries_total") or 0.0


def wait_until(condition: Callable[[], Any], within_s: float, what_is_lost: str) -> None:
    assert waiting.wait_until(condition, within_s), f"{what_is_lost} (seed {SEED}, waited {within_s:.0f} s)\n{stacks()}"


def stacks() -> str:
    """Where every thread is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


# Fixtures.


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Every lock that our modules make while the test runs is watched."""
    watch = Watch()
    watching = types.SimpleNamespace(**{**vars(threading), "Lock": watch.lock})
    for module in (conn, session_probe, probe_workers, standalone_manager):
        monkeypatch.setattr(module, "threading", watching)
    return watch


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What is logged, all of it, and nobody else hears of it: it is too much for a report."""
    told = Told()
    logger = logging.Logger("told", logging.INFO)
    logger.addHandler(told)
    monkeypatch.setattr(conn, "_probe_logger", logger)
    monkeypatch.setattr(failed_session_log, "logger", logger)
    monkeypatch.setattr(failed_session_log, "LINES_IN_A_SPELL", sys.maxsize)
    return told


MakeManager = Callable[[WatchedEngine], Any]


@pytest.fixture
def make_manager(watch: Watch, told: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeManager]:
    """Makes prefill managers. Garbage is collected afterwards: else the time for that is in some hold by chance."""
    managers = []
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(conn._FailedSessionProber, "reads_prove_nothing", False)
    monkeypatch.setattr(session_probe, "mooncake_version", lambda: "none")

    def make(engine: WatchedEngine) -> Any:
        monkeypatch.setattr(MooncakeKVManager, "init_engine", lambda self: setattr(self, "engine", engine))
        managers.append(MooncakeKVManager(NO_MEMORY, "prefill"))
        engine.session_lock = managers[-1].session_lock
        assert isinstance(engine.session_lock, WatchedLock)
        return managers[-1]

    gc.collect()
    gc.disable()
    yield make
    for manager in managers:
        manager.engine.heal()
        manager.teardown()
    gc.enable()


@pytest.fixture
def interrupted_all_the_time() -> Iterator[None]:
    """A thread may lose the interpreter after any microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def restless(make_manager: MakeManager, watch: Watch) -> Any:
    """A manager whose peers do as they like."""
    whims = Whims()
    whims.engine = WatchedEngine(watch, whims)
    return make_manager(whims.engine)


# The stories.


@pytest.mark.timeout(STRESS_S + 120)
def test_no_session_is_lost_while_many_threads_use_the_blacklist(
    restless: Any, watch: Watch, told: Told, interrupted_all_the_time: None
) -> None:
    manager, record, before = restless, Record(restless), recoveries()
    for session in SESSIONS[::2]:
        record.register(session)
    for orphan in ORPHANS:
        record.fail(orphan)
    passes = Traffic(manager._run_one_probe_pass)
    traffic = Traffic(*(whatever_happens_to(record, number) for number in range(THREADS)))
    until = time.monotonic() + STRESS_S
    while time.monotonic() < until:
        time.sleep(1)
        manager.session_lock.holds.next_spell()
    traffic.stop(within_s=20)
    record.assert_right()
    under_stress = f"{manager.engine.probes} probes, {told.recoveries} recoveries; then {len(record.on)} left"

    manager.engine.heal()
    passes.stop(within_s=20)
    wait_until(lambda: all_let_in(record), 30, "sessions whose peers are well stay out for good")
    record.assert_right()
    wait_until(lambda: told.recoveries + told.drops == record.taken_off, 20, "what was let in is not told")
    wait_until(
        lambda: not manager.engine.pending, 20, "reads were given up while pending: Mooncake keeps them for good"
    )
    record.assert_right()
    print(
        f"\nseed {SEED}: {under_stress}. {record.blacklisted} blacklistings = {record.registered} registrations "
        f"+ {told.recoveries} recoveries + {told.drops} drops. {manager.session_lock.holds}"
    )
    assert told.recoveries + told.drops + record.registered == record.blacklisted, "the metrics do not add up"
    assert recoveries() - before == told.recoveries
    assert told.faults == []
    assert told.drops >= 1, "the story has no drop"
    assert told.recoveries >= len(SESSIONS) / 2, "the story has few recoveries"
    assert_locks_were_taken_well(watch, manager.session_lock)


def all_let_in(record: Record) -> bool:
    for session in SESSIONS:
        record.request(session)
    return not len(record.manager.failed_sessions)


def test_a_teardown_amid_the_traffic_ends_the_questions_and_late_answers_change_nothing(
    restless: Any, told: Told
) -> None:
    manager, record = restless, Record(restless)
    workers_before = workers()
    traffic = Traffic(*(whatever_happens_to(record, number) for number in range(4)))
    wait_until(lambda: told.recoveries >= 5 and manager.engine.probes >= 500, 30, "nobody is healed")
    manager.teardown()
    record.assert_right()
    taken_off = record.taken_off
    most_probes = (
        manager.engine.probes + manager._failed_session_prober.watch.in_flight()
    )  # some may only be about to begin
    time.sleep(0.5)
    assert manager.engine.probes <= most_probes, "peers are asked while the engine is being torn down"
    manager.engine.heal()
    wait_until(lambda: workers() <= workers_before, 10, "threads are left behind")
    traffic.stop(within_s=20)
    record.assert_right()
    assert record.taken_off == taken_off, "an answer that came after the teardown changed the blacklist"
    assert told.faults == []


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "MooncakeSessionWorker"}


def never_in_time(engine: WatchedEngine, session: str) -> int:
    engine.goes_on.wait(30)
    return REFUSED


PEERS: dict[str, Callable[[WatchedEngine, str], int]] = {
    "hang": never_in_time,
    "refuse": lambda engine, session: REFUSED,
    "answer": lambda engine, session: 0,  # and their reads never end
}


def one_by_one(manager: Any) -> None:
    for session in CROWD:
        with manager.session_lock:
            manager.failed_sessions.discard(session)
            manager.session_failures.pop(session, None)


@pytest.mark.parametrize("peers", PEERS)
def test_ten_thousand_sessions_that_come_and_go_at_once_never_hold_session_lock_for_long(
    peers: str, make_manager: MakeManager, watch: Watch
) -> None:
    """Each round has a manager of its own, so that whatever grows or shrinks with the blacklist does so in each."""
    holds = Holds()
    for _ in range(ROUNDS):
        engine = WatchedEngine(watch, lambda _, session: PEERS[peers](engine, session))  # noqa: B023
        manager = make_manager(engine)
        manager.session_lock.holds = holds
        come_and_go(manager)
        assert engine.wrong == []
        if holds.longest(min)[0] <= LONGEST_HOLD_S:
            break
        holds.next_spell()
    print(f"\n{holds}")
    assert_short(holds)


def come_and_go(manager: Any) -> None:
    for session in CROWD:
        with manager.session_lock:
            manager.session_failures[session] += 1
            manager.failed_sessions.add(session)
    wait_until(lambda: manager.engine.probes >= 12, 20, "nobody is asked")
    one_by_one(manager)
    assert not len(manager.failed_sessions)
    manager.engine.heal()
    with manager.session_lock:
        manager.failed_sessions.add(LAST)
    wait_until(lambda: not len(manager.failed_sessions), 30, "a session fails after 10,000 others and stays out")
    manager.teardown()
