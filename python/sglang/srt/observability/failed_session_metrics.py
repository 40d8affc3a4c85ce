"""Which Prometheus metrics tell what the failed-session probe does?

``prometheus_client`` chooses its storage when it is imported, which in SGLang's launcher would be too early. So it is
imported on first use only: in the prefill scheduler, when the first manager starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pathlib
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from sglang.srt.disaggregation.mooncake.session_watch import Event
from sglang_failed_session_probe.harmless_logger import logger

RESULTS = ("answered", "unanswered", "error", "unavailable", "unverified")
# A live peer answers in 0.2 ms; a probe that cannot connect ends after 0.3 or 5 s, one that hangs after 60 s.
_PROBE_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_OUTAGE_SECONDS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class _LazyMetric:
    """A Prometheus metric that is registered when it is first used, once in a process. Any thread may use it."""

    _lock = threading.Lock()

    def __init__(self, kind: str, *arguments: str, **options: Any) -> None:
        self._kind, self._arguments, self._options = kind, arguments, options
        self._metric: Optional[Any] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.register(), name)

    def register(self) -> Any:
        """Registers the metric with Prometheus, unless it is; returns Prometheus's own object."""
        if self._metric is None:
            with self._lock:
                if self._metric is None:
                    import prometheus_client

                    make = _with_file_of_its_own if self._kind == "Gauge" else getattr(prometheus_client, self._kind)
                    self._metric = make(*self._arguments, **self._options)
        return self._metric


def _gauge(name: str, documentation: str) -> _LazyMetric:
    return _LazyMetric("Gauge", name, documentation, multiprocess_mode="livesum")


_counter = functools.partial(_LazyMetric, "Counter")
_histogram = functools.partial(_LazyMetric, "Histogram")

RECOVERIES = _counter("sglang:failed_session_recoveries_total", "Mooncake sessions let in again after a probe.")
_UNPROVEN = _counter(
    "sglang:failed_session_unproven_recoveries_total",
    "Mooncake sessions let in again without proof that transfers work.",
)
_PROBES = _counter("sglang:failed_session_probes_total", "Probes and verifications that ended.", labelnames=("result",))
_PROBE_DURATION = _histogram(
    "sglang:failed_session_probe_duration_seconds", "How long a probe took to return.", buckets=_PROBE_SECONDS
)
_OUTAGE_DURATION = _histogram(
    "sglang:failed_session_outage_duration_seconds", "From blacklisted to let in again.", buckets=_OUTAGE_SECONDS
)
_BLACKLISTED = _gauge("sglang:failed_sessions_blacklisted", "Mooncake sessions on the blacklist.")
_IN_FLIGHT = _gauge("sglang:failed_session_probes_in_flight", "Probes under way, those that hang included.")
_LIMIT = _gauge("sglang:failed_session_probes_limit", "Probes in flight from which on hung peers take turns.")
_COUNTED = {
    Event.BLACKLISTED: _counter("sglang:failed_session_blacklistings_total", "Mooncake sessions put on the blacklist."),
    Event.HELD: _counter(
        "sglang:failed_session_relapses_total", "Mooncake sessions that failed soon after they were let in."
    ),
    Event.DROPPED: _counter(
        "sglang:failed_session_drops_total", "Blacklisted Mooncake sessions forgotten: nobody asked for them."
    ),
}
_FROM_THE_START = (*_COUNTED.values(), _UNPROVEN, _PROBE_DURATION, _OUTAGE_DURATION, _BLACKLISTED, _IN_FLIGHT)

_fault_said = threading.Event()


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """For each use of a metric: one that fails (PROMETHEUS_MULTIPROC_DIR is gone) is logged once and stops nothing."""
    try:
        yield
    except Exception:
        if not _fault_said.is_set():
            _fault_said.set()
            logger.error(
                "Failed-session probe: a metric cannot be counted, said once; sessions recover all the same",
                exc_info=True,
            )


class FailedSessionMetrics:
    """What one manager tells Prometheus. Raises nothing. Any thread, ``session_lock`` not held."""

    def __init__(self) -> None:
        self._shown: dict[_LazyMetric, int] = {}  # this manager's share of a gauge
        self._shown_lock = threading.Lock()
        self._dead_may_be_left = False

    def start(self, most_stuck: int) -> None:
        """Registers every metric, so that each can be scraped from the start."""
        for metric in _FROM_THE_START:
            with harmless():
                metric.register()
        for result in RESULTS:
            with harmless():
                _PROBES.labels(result)
        self._show(_LIMIT, most_stuck)
        with harmless():
            _forget_dead_processes()

    def stop(self) -> None:
        """Takes the manager, which is torn down, out of the gauges."""
        for gauge in (_BLACKLISTED, _IN_FLIGHT, _LIMIT):
            self._show(gauge, 0)

    def probed(self, ended: Sequence[tuple[str, Optional[float]]]) -> None:
        """Counts probes and verifications, each with one of RESULTS and, for a probe that returned, its duration."""
        with harmless():
            for result, number in Counter(result for result, _ in ended).items():
                _PROBES.labels(result).inc(number)
            for _, took_s in ended:
                if took_s is not None:
                    _PROBE_DURATION.observe(took_s)

    def heard(self, event: Event, details: dict[str, Any]) -> None:
        """Counts an event of the blacklist, but no recoveries: ``conn`` does that, which has SGLang's counter."""
        with harmless():
            if event is Event.BLACKLISTED:
                self._dead_may_be_left = True
            if event in _COUNTED:
                _COUNTED[event].inc()
            elif event is Event.RECOVERED:
                _OUTAGE_DURATION.observe(details["outage_s"])
                if details["unverified"]:
                    _UNPROVEN.inc()

    def show(self, blacklisted: int, in_flight: int) -> None:
        """Sets the gauges. Costs next to nothing if nothing has changed."""
        self._show(_BLACKLISTED, blacklisted)
        self._show(_IN_FLIGHT, in_flight)
        if self._dead_may_be_left:
            self._dead_may_be_left = False
            with harmless():
                _forget_dead_processes()

    def _show(self, gauge: _LazyMetric, value: int) -> None:
        with harmless(), self._shown_lock:
            change = value - self._shown.get(gauge, 0)
            if change:
                gauge.inc(change)  # it is shared with other managers of this process
                self._shown[gauge] = value


# A scrape sums the gauges of all processes. Those of dead ones must be removed; prometheus_client does not do so. It
# names the files after the pid, which means nothing in another container that shares the folder. So the files of our
# gauges have names of their own, and each process holds a lock as long as it lives.

_LOCK = "failed_session_probe_{}.lock"


def _with_file_of_its_own(*arguments: Any, **options: Any) -> Any:
    """Makes a gauge whose file has a name of our own. The caller holds the lock of all metrics."""
    from prometheus_client import Gauge, values

    usual = values.ValueClass
    if usual is not values.MutexValue:
        values.ValueClass = _our_values()
    try:
        made = Gauge(*arguments, **options)
    finally:
        values.ValueClass = usual
    made.set(0)  # where the name is the pid, a dead process may have left a file
    return made


@functools.cache
def _our_values() -> Any:
    from prometheus_client import values

    return values.MultiProcessValue(lambda: _claimed(os.getpid())[0])  # type: ignore[no-untyped-call]


@functools.cache  # until a fork
def _claimed(pid: int) -> tuple[str, object]:
    """The name in place of the pid for the files of our gauges, and the lock that shows that this process lives.

    Where no lock can be had, the name is the pid, and nobody deletes the files.
    """
    try:
        name = f"{pid}-{secrets.token_hex(8)}-{_boot()}"
        path = pathlib.Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], _LOCK.format(name))
        lock = path.with_suffix(".new").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(lock.name, path)  # only now, so that nobody finds it without the lock
    except (OSError, KeyError):
        return str(pid), None
    return name, lock


def _boot() -> str:
    """The boot id of this machine: locks of another machine that shares the folder may not work here."""
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _forget_dead_processes() -> None:
    """Removes the gauges of dead processes of this machine."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    own, lock = _claimed(os.getpid())
    if not folder or lock is None:
        return
    from prometheus_client.multiprocess import mark_process_dead

    for path in pathlib.Path(folder).glob(_LOCK.format(f"*-{_boot()}")):
        name = path.stem.removeprefix(_LOCK.partition("{")[0])
        if name == own:  # to open and close it would release the lock
            continue
        with contextlib.suppress(OSError), path.open("r+") as other:  # the process lives, or somebody else was first
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mark_process_dead(name)  # type: ignore[no-untyped-call]
            path.unlink()
