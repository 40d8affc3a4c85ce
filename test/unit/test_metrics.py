"""Do the metrics tell what the probe does: each event, over several processes, and after one of them has died?"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit.fake_engine import PENDING, REFUSED, Engine, raises, waits_for_a_reply_of
from kit.managers import (
    ENABLE,
    INTERVAL,
    OTHER,
    SOME_MEMORY,
    D,
    MakeManager,
    blacklist,
    blacklisted,
    many,
    send,
    stopped_peers,
    watch_of,
)
from kit.paths import PYTHONPATH
from kit.waiting import wait_until
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from sglang.srt.disaggregation.mooncake import conn, session_states, session_watch
from sglang.srt.observability import failed_session_metrics

RECOVERIES = "sglang:failed_session_recoveries_total"
BLACKLISTINGS = "sglang:failed_session_blacklistings_total"
DROPS = "sglang:failed_session_drops_total"
RELAPSES = "sglang:failed_session_relapses_total"
UNPROVEN = "sglang:failed_session_unproven_recoveries_total"
PROBES = "sglang:failed_session_probes_total"
BLACKLISTED = "sglang:failed_sessions_blacklisted"
IN_FLIGHT = "sglang:failed_session_probes_in_flight"
LIMIT = "sglang:failed_session_probes_limit"
PROBE_DURATION = "sglang:failed_session_probe_duration_seconds"
OUTAGE_DURATION = "sglang:failed_session_outage_duration_seconds"
RESULTS = ("answered", "unanswered", "error", "unavailable", "unverified")


class Metrics:
    """What counters and histograms have gone up by since this was made, and what gauges read."""

    def __init__(self) -> None:
        self._before = self._all()

    @staticmethod
    def _all() -> dict[str, float]:
        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
        return {name_of(sample): sample.value for sample in samples if sample.name.startswith("sglang:failed_session")}

    def grown(self, name: str) -> float:
        return self._all()[name] - self._before.get(name, 0.0)

    def reads(self, name: str, value: float) -> bool:
        """Whether that is so now or within a moment: the daemon thread writes when it has let go of the lock."""
        return wait_until(lambda: self.grown(name) == value)

    def probes(self) -> dict[str, float]:
        grown = {result: self.grown(f"{PROBES}({result})") for result in RESULTS}
        return {result: count for result, count in grown.items() if count}


def name_of(sample: Any) -> str:
    labels = ",".join(sample.labels.values())
    return f"{sample.name}({labels})" if labels else str(sample.name)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


# Each metric, through its event.


def test_a_blacklisting_and_a_recovery_are_counted_with_the_length_of_the_outage(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    blacklist(manager, D, OTHER)
    assert metrics.reads(BLACKLISTINGS, 2)
    assert metrics.reads(BLACKLISTED, 2)
    engine.probe.default_factory = lambda: 0
    engine.probe.clear()
    assert metrics.reads(RECOVERIES, 2)
    assert metrics.reads(BLACKLISTED, 0)
    assert metrics.reads(f"{OUTAGE_DURATION}_count", 2)
    assert 0.2 < metrics.grown(f"{OUTAGE_DURATION}_sum") < 10
    assert metrics.grown(DROPS) == 0


def test_a_failure_of_a_session_that_is_blacklisted_already_is_no_blacklisting(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    manager = make_manager(Engine(probe=REFUSED))
    blacklist(manager, D, D, D)
    assert metrics.reads(BLACKLISTED, 1)
    assert metrics.grown(BLACKLISTINGS) == 1


def test_a_session_that_is_forgotten_is_a_drop_and_no_recovery(
    make_manager: MakeManager, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S", "0.2")
    blacklist(make_manager(Engine(probe=REFUSED)), D)
    assert metrics.reads(DROPS, 1)
    assert metrics.reads(BLACKLISTED, 0)
    assert metrics.grown(RECOVERIES) == metrics.grown(f"{OUTAGE_DURATION}_count") == 0


def test_a_session_that_is_let_in_without_proof_and_fails_again_is_counted_as_both(
    make_manager: MakeManager, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.3")
    manager = make_manager(Engine(read=-1))
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert metrics.reads(UNPROVEN, 1)
    assert metrics.reads(RECOVERIES, 1)
    assert metrics.grown(RELAPSES) == 0
    blacklist(manager, D)
    assert metrics.reads(RELAPSES, 1)
    assert metrics.reads(BLACKLISTINGS, 2)


def test_a_registration_shows_in_the_gauge_though_the_peers_probe_hangs(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    engine = Engine()
    engine.probe[D] = engine.hang
    manager = make_manager(engine)
    blacklist(manager, D)
    assert metrics.reads(IN_FLIGHT, 1)
    assert wait_until(lambda: watch_of(manager).next_due_in() > 1)  # so the daemon thread sleeps
    manager.register_decode(D, SOME_MEMORY)
    assert metrics.reads(BLACKLISTED, 0), "an alert on the blacklist goes on for a minute after a restart"
    assert metrics.grown(RECOVERIES) == 0


def test_probes_that_hang_are_in_flight_beside_the_number_that_may(make_manager: MakeManager, metrics: Metrics) -> None:
    engine = Engine()
    engine.probe.default_factory = lambda: engine.hang
    manager = make_manager(engine)
    blacklist(manager, *many(5))
    assert metrics.reads(IN_FLIGHT, 5)
    assert metrics.grown(LIMIT) == watch_of(manager).places.most
    engine.probe.default_factory = lambda: REFUSED
    engine.probe.clear()
    engine.goes_on.set()
    assert wait_until(lambda: metrics.probes().get("unanswered", 0) >= 5)


def results(make_manager: MakeManager, metrics: Metrics, engine: Engine, result: str) -> set[str]:
    """How the probes of a session were counted when there were some of that kind."""
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert wait_until(lambda: metrics.probes().get(result, 0) >= 2)
    return set(metrics.probes())


def test_each_result_of_a_probe_is_counted_and_how_long_probes_take(
    make_manager: MakeManager, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.01")
    assert results(make_manager, metrics, Engine(probe=REFUSED), "unanswered") == {"unanswered"}
    probes = metrics.probes()["unanswered"]
    assert wait_until(lambda: metrics.grown(f"{PROBE_DURATION}_count") >= probes)
    assert metrics.grown(f"{PROBE_DURATION}_sum") < 0.1 * probes


def test_probes_that_end_together_are_counted_one_by_one(
    make_manager: MakeManager, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conn, "_STOP_WITHIN_S", 2.5)  # in place of 0.4 s: all of them are heard
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    blacklist(manager, *many(40))
    assert wait_until(lambda: len(engine.asked) >= 40)
    manager.teardown()
    assert metrics.probes() == {"unanswered": len(engine.asked)}
    assert metrics.grown(f"{PROBE_DURATION}_count") == len(engine.asked)


def test_answers_and_good_verifications_are_answered(make_manager: MakeManager, metrics: Metrics) -> None:
    assert results(make_manager, metrics, Engine(), "answered") == {"answered"}
    assert metrics.reads(RECOVERIES, 1)
    assert metrics.probes() == {"answered": 3}, "two probes, and the reads after the second"
    assert metrics.grown(f"{PROBE_DURATION}_count") == 2


def test_probes_that_raise_are_errors(
    make_manager: MakeManager, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.01")
    assert results(make_manager, metrics, Engine(probe=raises(RuntimeError("broken"))), "error") == {"error"}


def test_each_attempt_without_send_probe_is_unavailable(
    make_manager: MakeManager, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.01")
    engine = Engine(probe=-1)
    engine.engine = types.SimpleNamespace()  # Mooncake's own, behind the wrapper
    assert results(make_manager, metrics, engine, "unavailable") == {"unavailable"}
    assert metrics.grown(f"{PROBE_DURATION}_count") == 0


def test_a_peer_whose_memory_cannot_be_read_is_unverified(make_manager: MakeManager, metrics: Metrics) -> None:
    assert results(make_manager, metrics, Engine(read=-1), "unverified") == {"answered", "unverified"}


def test_probes_that_were_ended_for_others_are_unanswered_with_the_time_that_they_took(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    engine = Engine()
    with stopped_peers(40) as hung:
        engine.probe.update({session: waits_for_a_reply_of(session) for session in hung})
        manager = make_manager(engine)
        blacklist(manager, *hung)
        assert wait_until(lambda: metrics.probes().get("unanswered", 0) >= 8)
        assert metrics.grown(f"{PROBE_DURATION}_sum") > 0.02 * 8  # from 30 ms after they were handed out on
        assert set(metrics.probes()) == {"unanswered"}
        manager.teardown()


@pytest.mark.parametrize("why", ["reads hang", "no page"])
def test_a_session_that_is_let_in_because_it_could_not_be_verified_is_counted_as_unproven(
    why: str, make_manager: MakeManager, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.3")
    for module in (session_states, session_watch):
        monkeypatch.setattr(module, "READ_HANGS_S", 0.1)
    engine = Engine(read=PENDING if why == "reads hang" else 0)
    engine.registers = -1 if why == "no page" else 0
    manager = make_manager(engine)
    manager.register_decode(D, SOME_MEMORY)
    blacklist(manager, D)
    assert metrics.reads(UNPROVEN, 1)
    assert metrics.reads(RECOVERIES, 1)
    engine.read = 0


def test_each_duration_falls_into_a_bucket_that_tells_what_the_peer_does() -> None:
    buckets = failed_session_metrics._PROBE_SECONDS
    kinds = {"answers": 0.00022, "drops": 5.0, "hangs": 60.0}
    fallen = {kind: sum(took > bucket for bucket in buckets) for kind, took in kinds.items()}
    assert len(set(fallen.values())) == 3
    assert max(fallen.values()) < len(buckets), "in the bucket without an end"


# Managers come and go.


def test_a_manager_that_is_torn_down_leaves_nothing_in_the_gauges_and_the_next_one_counts_on(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    for number in (1, 2, 3):
        engine = Engine()
        engine.probe.default_factory = lambda engine=engine: engine.hang
        manager = make_manager(engine)
        blacklist(manager, D, OTHER)
        assert metrics.reads(BLACKLISTED, 2)
        assert metrics.reads(IN_FLIGHT, 2)
        assert metrics.grown(LIMIT) == watch_of(manager).places.most
        manager.teardown()
        assert metrics.grown(BLACKLISTED) == metrics.grown(IN_FLIGHT) == metrics.grown(LIMIT) == 0
        assert metrics.grown(BLACKLISTINGS) == 2 * number


def test_a_metric_that_fails_is_said_once_and_holds_up_nobody(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where PROMETHEUS_MULTIPROC_DIR is no directory."""
    monkeypatch.setattr(failed_session_metrics, "_fault_said", threading.Event())
    monkeypatch.setattr(failed_session_metrics._LazyMetric, "register", raises(FileNotFoundError("gone")))
    manager = make_manager(Engine())
    for session in (D, OTHER):
        blacklist(manager, session)
        assert wait_until(lambda: not blacklisted(manager)), "nobody recovers because of a metric"
        send(manager, session)
    assert caplog.text.count("cannot be counted, said once") == 1
    assert "could not start" not in caplog.text
    assert "a fault of its own" not in caplog.text


# Several processes of a node, in one PROMETHEUS_MULTIPROC_DIR.

MEMBER = """
import fcntl, json, os, sys, time
from kit.fake_engine import Engine, raises
from kit.managers import NO_MEMORY, blacklist
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
def new_manager(probe, role):
    global manager
    MooncakeKVManager.init_engine = lambda self: setattr(self, "engine", Engine(probe=probe))
    manager = MooncakeKVManager(NO_MEMORY, role)
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Member:
    """A process with one prefill manager after another, and the whole of its standard error."""

    def __init__(
        self, folder: pathlib.Path, log: pathlib.Path, inside: tuple[str, ...] = (), **environment: str
    ) -> None:
        variables = {
            "PROMETHEUS_MULTIPROC_DIR": str(folder),
            "PYTHONPATH": PYTHONPATH,
            ENABLE: "1",
        }
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-c", MEMBER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **variables, **environment},
            )

    def do(self, expression: str) -> Any:
        """Evaluates it there; gives what it is."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process has ended: {self.log.read_text()[-3000:]}"
        return json.loads(answer)

    def start(self, probe: int = REFUSED, role: str = "prefill") -> None:
        """Makes a manager whose peers all answer like that."""
        self.do(f"new_manager({probe}, {role!r})")

    def blacklist(self, *sessions: str) -> None:
        self.do(f"blacklist(manager, *{sessions})")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """The directory of PROMETHEUS_MULTIPROC_DIR."""
    folder = tmp_path / "prometheus"
    folder.mkdir()
    return folder


@pytest.fixture
def member(folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Callable[..., Member]]:
    members: list[Member] = []

    def start(inside: tuple[str, ...] = (), **environment: str) -> Member:
        members.append(Member(folder, tmp_path / "log", inside, **environment))
        return members[-1]

    yield start
    for one in members:
        one.kill()


def scraped(folder: pathlib.Path) -> dict[str, float]:
    """What /metrics of the node shows."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return {name_of(sample): sample.value for metric in registry.collect() for sample in metric.samples}


def shows(folder: pathlib.Path, name: str, value: float) -> bool:
    return wait_until(lambda: scraped(folder).get(name) == value, within_s=15.0)


def test_every_series_is_there_at_zero_from_the_start(folder: pathlib.Path, member: Callable[..., Member]) -> None:
    member().start()
    found = scraped(folder)
    plain = [RECOVERIES, BLACKLISTINGS, DROPS, BLACKLISTED, IN_FLIGHT, *(f"{PROBES}({result})" for result in RESULTS)]
    histograms = [f"{name}_{what}" for name in (PROBE_DURATION, OUTAGE_DURATION) for what in ("count", "sum")]
    assert {name: found.get(name) for name in [*plain, *histograms]} == dict.fromkeys([*plain, *histograms], 0.0)
    assert found[LIMIT] > 0
    assert {value for name, value in found.items() if name != LIMIT} == {0.0}
    for name, first, last in ((PROBE_DURATION, "0.0001", "100.0"), (OUTAGE_DURATION, "1.0", "3600.0")):
        assert {f"{name}_bucket({first})", f"{name}_bucket({last})", f"{name}_bucket(+Inf)"} <= found.keys()


def test_the_processes_of_a_node_add_up_and_one_that_was_killed_counts_in_gauges_no_more(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    one, two = member(), member()
    one.start()
    two.start()
    one.blacklist("a:1", "a:2")
    two.blacklist("b:1", "b:2", "b:3")
    assert shows(folder, BLACKLISTED, 5)
    assert shows(folder, BLACKLISTINGS, 5)
    limit = scraped(folder)[LIMIT]
    two.kill()
    assert scraped(folder)[BLACKLISTED] == 5
    one.blacklist("a:3")
    assert shows(folder, BLACKLISTED, 3), "what a dead process had on its blacklist is counted for ever"
    assert scraped(folder)[LIMIT] == limit / 2
    assert shows(folder, BLACKLISTINGS, 6), "a counter fell"


def test_what_dead_processes_have_left_is_gone_when_another_one_starts(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    dead, again = member(), member()
    dead.start()
    dead.blacklist("a:1")
    assert shows(folder, BLACKLISTED, 1)
    dead.kill()
    left = [*folder.glob("gauge_live*"), *folder.glob("*.lock")]
    again.start()
    assert scraped(folder)[BLACKLISTED] == 0
    assert len(left) == 2
    assert not any(file.exists() for file in left)
    again.blacklist("a:1")
    assert shows(folder, BLACKLISTED, 1)


def contained() -> tuple[str, ...]:
    """Has a command run in a PID namespace of its own, as in a container beside this one."""
    alone = ("unshare", "--pid", "--fork", "--kill-child")
    if shutil.which(alone[0]) is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace can be made here")
    return alone


def test_containers_that_share_a_folder_never_take_out_one_that_lives_whatever_its_pid(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    one, other, beside = member(contained()), member(contained()), member()
    assert one.do("os.getpid()") == other.do("os.getpid()") == 1
    for container in (one, other, beside):
        container.start()
    limit = scraped(folder)[LIMIT] / 3
    one.blacklist("a:1", "a:2")
    other.blacklist("b:1", "b:2", "b:3")
    beside.blacklist("c:1")
    assert shows(folder, BLACKLISTED, 6), "one process that lives hides another"
    one.kill()
    other.blacklist("b:4")
    assert shows(folder, BLACKLISTED, 5), "what a dead process had on its blacklist is counted for ever"
    assert scraped(folder)[LIMIT] == 2 * limit
    beside.blacklist("c:2")
    assert shows(folder, BLACKLISTED, 6), "a process that lives was taken out"


@pytest.mark.parametrize(
    "name", ["gauge_livesum_{}.db", "gauge_liveall_{}.db", "gauge_livesum_{}-0123-of-another-machine.db"]
)
def test_files_that_are_not_of_our_gauges_on_this_machine_are_left_alone(
    name: str, folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    """Of a process in another container, say, whose pid nobody has here."""
    dead = member()
    dead.kill()
    others = folder / name.format(dead.process.pid)
    shutil.copy("/dev/null", others)
    shutil.copy("/dev/null", folder / f"failed_session_probe_{dead.process.pid}-0123-of-another-machine.lock")
    member().start()
    assert others.exists()


def test_sglangs_own_gauges_stay_in_the_files_that_they_have(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    one = member()
    one.start()
    one.do("__import__('prometheus_client').Gauge('others', '', multiprocess_mode='livesum').set(3)")
    one.kill()
    member().start()
    assert scraped(folder)["others"] == 3
    assert (folder / f"gauge_livesum_{one.process.pid}.db").exists()


def test_where_nothing_can_be_locked_gauges_are_kept_under_the_pid_begin_at_zero_and_stay(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    """As on some network file systems."""
    dead, again = member(), member()
    for one in (dead, again):
        one.do("setattr(fcntl, 'lockf', lambda *_: raises(OSError(37, 'No locks available'))())")
    dead.start()
    dead.blacklist("a:1")
    assert shows(folder, BLACKLISTED, 1)
    dead.kill()
    left = folder / f"gauge_livesum_{dead.process.pid}.db"
    left.rename(folder / f"gauge_livesum_{again.process.pid}.db")  # pids come again
    again.start()
    assert scraped(folder)[BLACKLISTED] == 0
    again.blacklist("a:1")
    assert shows(folder, BLACKLISTED, 1)
    again.kill()
    member().start()
    assert scraped(folder)[BLACKLISTED] == 1


def test_a_forked_child_neither_counts_nor_keeps_its_dead_parent_in_the_sum(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    parent, other = member(), member()
    parent.start()
    other.start()
    parent.blacklist("a:1")
    assert shows(folder, BLACKLISTED, 1)
    child = parent.do("os.fork() or time.sleep(60)")
    try:
        parent.process.kill()
        parent.process.wait(10)
        other.blacklist("b:1", "b:2")
        assert shows(folder, BLACKLISTED, 2), (
            "what a dead process had on its blacklist is counted as long as a child lives"
        )
    finally:
        os.kill(child, signal.SIGKILL)


def test_processes_that_live_are_left_alone_whatever_their_files_are_called(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    strange = [folder / name for name in ("gauge_livesum_1.db", f"gauge_liveall_{os.getpid()}.db")]
    for file in strange:
        shutil.copy("/dev/null", file)
    member().start()
    assert all(file.exists() for file in strange)


def test_after_a_role_switch_the_gauges_are_those_of_the_newest_manager(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    one = member()
    for _ in range(3):
        one.start()
        limit = scraped(folder)[LIMIT]
        one.blacklist("a:1", "a:2")
        assert shows(folder, BLACKLISTED, 2)
        one.do("manager.teardown()")
        assert scraped(folder)[BLACKLISTED] == scraped(folder)[IN_FLIGHT] == scraped(folder)[LIMIT] == 0
    assert limit > 0
    assert scraped(folder)[BLACKLISTINGS] == 6


def test_an_exit_leaves_nothing_in_the_gauges(folder: pathlib.Path, member: Callable[..., Member]) -> None:
    one = member()
    one.start()
    one.blacklist("a:1")
    assert shows(folder, BLACKLISTED, 1)
    one.process.communicate(timeout=20)
    assert one.process.returncode == 0
    assert scraped(folder)[BLACKLISTED] == scraped(folder)[LIMIT] == 0


@pytest.mark.parametrize("when", ["before the first manager", "before the first process"])
def test_without_its_directory_sessions_recover_and_it_is_said_once(
    when: str, folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    if when == "before the first process":
        folder.rmdir()
    one = member(SGLANG_FAILED_SESSION_PROBE_SETTLE_S="0.05")
    if when == "before the first manager":
        one.do("__import__('prometheus_client').__name__")
        folder.rmdir()
    one.start(probe=0)
    one.blacklist("a:1", "a:2")
    assert wait_until(lambda: one.do("len(manager.failed_sessions)") == 0), "nobody recovers because of a metric"
    one.blacklist("a:3")
    assert wait_until(lambda: one.do("len(manager.failed_sessions)") == 0)
    assert one.log.read_text().count("cannot be counted, said once") == 1


def test_a_directory_that_goes_while_sessions_are_watched_stops_nothing(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    one = member(SGLANG_FAILED_SESSION_PROBE_SETTLE_S="0.05")
    one.start(probe=0)
    shutil.rmtree(folder)
    one.blacklist("a:1", "a:2")
    assert wait_until(lambda: one.do("len(manager.failed_sessions)") == 0), "nobody recovers because of a metric"
    assert "a fault of its own" not in one.log.read_text()


def test_nothing_is_imported_or_registered_before_a_prefill_manager_has_the_feature(
    folder: pathlib.Path, member: Callable[..., Member]
) -> None:
    """The launcher imports SGLang's modules before it knows where the metrics of its processes go."""
    imported = "'prometheus_client' in sys.modules"
    off, unset, on = member(**{ENABLE: "0"}), member(**{ENABLE: ""}), member(**{ENABLE: "1"})
    for one in (off, unset):
        one.start()
    on.start(role="decode")
    for one in (off, unset, on):
        assert not one.do(imported), "the metrics of the launcher vanish"
    assert list(folder.iterdir()) == []
    on.start()
    assert on.do(imported)
    assert scraped(folder)[LIMIT] > 0
