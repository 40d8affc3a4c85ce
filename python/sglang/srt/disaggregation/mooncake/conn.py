"""MooncakeKVManager: how does it start, run and stop the daemon thread that probes blacklisted sessions?

Beside SGLang this file runs at the end of SGLang's own ``conn`` and changes its class in place. Alone it is the
smallest manager that sends blocks over a Mooncake engine, blacklists and recovers.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import inspect
import os
import queue
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

# Under names that SGLang's module has not, because it is the same module.
from sglang.srt.disaggregation.mooncake import failed_sessions as _blacklist
from sglang.srt.disaggregation.mooncake import hung_call as _hung_call
from sglang.srt.disaggregation.mooncake import late_bytes as _late_bytes
from sglang.srt.disaggregation.mooncake import probe_workers as _probe_workers
from sglang.srt.disaggregation.mooncake import session_probe as _session_probe
from sglang.srt.disaggregation.mooncake import session_states as _session_states
from sglang.srt.disaggregation.mooncake import session_watch as _session_watch
from sglang.srt.disaggregation.mooncake import tent_probe as _tent_probe
from sglang.srt.environ import FailedSessionProbeSettings
from sglang.srt.observability import failed_session_file as _session_file
from sglang.srt.observability import failed_session_log as _session_log
from sglang.srt.observability import failed_session_metrics as _session_metrics
from sglang_failed_session_probe.harmless_logger import logger as _probe_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Optional

    from sglang_failed_session_probe.patch import Patch


if "FAILED_SESSION_RECOVERIES" not in globals():  # from 0.5.13 on SGLang has its own
    FAILED_SESSION_RECOVERIES = _session_metrics.RECOVERIES

_PROBE_THREAD = "MooncakeFailedSessionProbe"
_WORKER_THREAD = "MooncakeSessionWorker"
# A stop first waits so long for calls that are about to return (a live peer answers in 0.5 ms), then ends those that
# hang (all together take 12 ms) until it has taken so long.
_STOP_GRACE_S = 0.1
_STOP_WITHIN_S = 0.35
# Where many are blacklisted, answers that come within so long are taken in together: each round costs 0.1 ms.
_TOGETHER_S = 0.01
_TOGETHER_S_PER_SESSION = 0.0001
# So many answers at most are handed over in one hold of session_lock, so that it takes microseconds.
_ANSWERS_AT_A_TIME = 32
# What a prefill manager must have, and of which kind.
_NEEDED = {"engine": object, "failed_sessions": set, "session_failures": dict}
_PAUSE_AFTER_FAULT_S = 1.0
# Longer waits overflow in the interpreter.
_LONGEST_WAIT_S = 3600.0
# How often ``run_pass`` looks whether more may be probed.
_LOOK_AGAIN_S = 0.1


class _ProbeShutdown(threading.Event):
    """The event that stops the loop. The loop waits for its inbox alone, so ``set`` puts a message there."""

    _inbox: queue.SimpleQueue[Any]

    def set(self) -> None:
        super().set()
        self._inbox.put(None)


class _FailedSessionProber:
    """Makes the calls that the watch over one prefill manager's sessions wants, and tells it the answers."""

    # Learnt in this process: reading a peer's memory proves nothing on its transport.
    reads_prove_nothing = False

    def __init__(self, manager: Any, settings: FailedSessionProbeSettings) -> None:
        """Takes over what is on the manager's blacklist. The caller holds ``session_lock``."""
        if self.reads_prove_nothing or _tent_probe.is_on():
            settings = dataclasses.replace(settings, verify=False)
        self._settings = settings
        self._engine = manager.engine
        self._lock = manager.session_lock
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._can_probe = _session_probe.can_probe(manager.engine)
        self._log = _session_log.FailedSessionLog(self._can_probe)
        self._late_bytes = _late_bytes.LateBytes(lambda: _other_ports(manager))
        self._reader = _session_probe.MemoryReader(
            manager.engine, lambda session: _registrations(manager).get(session), self._log.page_refused
        )
        self._pending = _session_probe.PendingReads()
        self._thread: Optional[threading.Thread] = None
        self._file = _session_file.SessionsFile(_rank(manager), self._can_probe)
        self.metrics = _session_metrics.FailedSessionMetrics()
        self._fault_said = False
        # The manager's event itself becomes a _ProbeShutdown: somebody may hold it already and set it later.
        shutdown: Any = getattr(manager, "_failed_session_probe_shutdown", None) or threading.Event()
        shutdown._inbox, shutdown.__class__ = self._inbox, _ProbeShutdown
        self.shutdown: threading.Event = shutdown
        self.watch = _session_watch.SessionWatch(
            settings,
            manager.failed_sessions,
            wake=functools.partial(self._inbox.put, None),
            on_removed=lambda session: manager.session_failures.pop(session, None),
            registrations=lambda: _registrations(manager),
            transfer_timeout_s=_session_probe.transfer_timeout_s(),
        )
        _probers.add(self)
        _register_hooks()

    def run(self) -> None:
        """The body of the daemon thread; returns when ``shutdown`` is set."""
        self._thread = threading.current_thread()
        if _session_probe.is_over_rdma():
            self.watch.rules.over_rdma = True
            self._reader.reads_at_a_time = 1
            self._pending.over_rdma = True
        workers = _probe_workers.Workers(_WORKER_THREAD, self._make, self._inbox)
        _session_file.remove_dead()
        _probe_logger.info("Starting failed-session probe loop (interval=%.1fs)", self._settings.interval_s)
        while not self.shutdown.is_set():
            try:
                _, wait_s = self._start_due(workers)
                workers.release_idle(keep=0 if wait_s is None else self._settings.concurrency)
                if wait_s is None:
                    self._log.sum_up(at_once=True)  # it may be long until there is more to say
                waits_s = (wait_s, self._pending.next_look_in(), self._file.write_if_due(self.watch))
                self._hand_over(self._inbox, min((wait for wait in waits_s if wait is not None), default=None))
            except Exception as fault:
                self._say_fault(fault)
                self.shutdown.wait(_PAUSE_AFTER_FAULT_S)
                with contextlib.suppress(Exception), self._lock:
                    self.watch.calls_lost()
        self._wind_up()
        workers.close()
        try:
            self._report()
            self._log.sum_up(at_once=True)
        except Exception as fault:
            self._say_fault(fault)
        self.metrics.stop()
        self._file.remove()
        still_read, mooncake = self._is_reading(), _session_probe.mooncake_engine(self._engine)
        users = (other for other in list(_probers) if _session_probe.mooncake_engine(other._engine) is mooncake)
        if still_read or not any(other._is_reading() for other in users):  # else the last of them closes it
            self._reader.close(still_read)

    def _is_reading(self) -> bool:
        """True if a read of it may still write to the page. Any thread."""
        return self._pending.next_look_in() is not None or any(call.read for call in list(self.watch.places))

    def _wind_up(self) -> None:
        """Takes in the calls and reads that are about to return, and ends the other calls."""
        began = time.monotonic()
        while (waited_s := time.monotonic() - began) < _STOP_WITHIN_S:
            in_grace = waited_s < _STOP_GRACE_S
            if not self.watch.in_flight() and not (in_grace and self._pending.next_look_in() is not None):
                break
            with contextlib.suppress(Exception):
                if not in_grace:
                    _end_calls(list(self.watch.places))
                self._hand_over(self._inbox, 0.01)

    def _say_fault(self, fault: Exception) -> None:
        if not self._fault_said:
            self._fault_said = True
            _probe_logger.error(
                "Failed-session probe: a fault of its own, said once; SGLang is not affected", exc_info=fault
            )

    def stop(self) -> None:
        """Makes no more calls and ends those under way, within 0.5 s. Any thread, no lock held."""
        self.shutdown.set()
        if self._thread is not None:
            self._thread.join(timeout=_STOP_WITHIN_S + 0.1)

    def stop_at_exit(self) -> None:
        """As ``stop``, and keeps a call that cannot be ended from aborting the process."""
        try:
            self.stop()
        finally:  # a signal handler may raise in it
            if self.watch.in_flight():
                _hold_threads_that_terminate()

    def run_pass(self) -> None:
        """Probes side by side what is due now; returns when all calls are back. Any thread, no lock held."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        workers = _probe_workers.Workers(_WORKER_THREAD, self._make, answers)
        due_by, out = time.monotonic(), 0
        left = 2 * len(self.watch.sessions)  # a probe and reads for each; what falls due later is left to the loop
        while True:
            started = self._start_due(workers, due_by)[0] if left > 0 else 0
            out, left = out + started, left - started
            waits = left > 0 and self.watch.waits_for_allowance() and not self.shutdown.is_set()
            if not out and not waits:
                break
            out -= self._hand_over(answers, _LOOK_AGAIN_S)
        reads_until = time.monotonic() + _session_states.READ_HANGS_S
        while (look_s := self._pending.next_look_in()) is not None and time.monotonic() < reads_until:
            self._hand_over(answers, look_s)
        self._report()
        workers.close()

    def _start_due(self, workers: _probe_workers.Workers, due_by: float = float("inf")) -> tuple[int, Optional[float]]:
        """Makes the calls that are due and ends those whose places are wanted. Returns how many were made, and the
        seconds until more are due, None while nothing is blacklisted.
        """
        with self._lock:
            stopped = self.shutdown.is_set()
            calls = [] if stopped else self.watch.take_due(due_by)
            to_end = [] if stopped else self.watch.to_end()
            not_connected = [] if stopped else self.watch.to_end_if_connecting()
            wait_s = self.watch.next_due_in()
        _end_calls(to_end)
        _end_calls(not_connected, only_connecting=True)
        workers.start(calls)
        self._report()
        return len(calls), wait_s

    def _make(self, call: Any) -> _probe_workers.Answer:
        """Probes the peer and, if the call says so, begins to read its memory. Runs on a worker thread; may raise
        anything.
        """
        too_soon = call.read and self._bytes_may_land(call.session)  # before the probe: reads follow an answer at once
        if self.shutdown.is_set():  # by now: to ask the kernel may take long
            return _probe_workers.Answer(call)
        began = time.monotonic()
        probe = _session_probe.probe_and_listen if call.listen and self._can_probe else _session_probe.probe
        rc = probe(self._engine, call.session)
        took_s = time.monotonic() - began
        call.answered = rc == 0
        is_read = call.read and call.answered and not self.shutdown.is_set()  # nobody would look at its reads
        reads = self._begin_reads(call.session, too_soon) if is_read else None
        return _probe_workers.Answer(call, rc, took_s, reads)

    def _bytes_may_land(self, session: str) -> bool:
        """Over TCP: may bytes of a failed transfer still land? Runs on a worker thread; raises nothing."""
        settles = self._settings.settle_s > 0 and not self.watch.rules.over_rdma
        try:
            return settles and self._late_bytes.may_land(session)
        except Exception as fault:  # the probe is made all the same
            self._say_fault(fault)
            return False

    def _begin_reads(self, session: str, too_soon: bool) -> _session_probe.Reads:
        """Begins to read a peer that has answered. Runs on a worker thread; raises nothing."""
        try:
            return self._reader.begin(session, too_soon)
        except Exception as fault:  # ours, because what the engine raises is caught there: the answer counts
            self._say_fault(fault)
            return _session_probe.Reads.decided(_session_states.Verdict.CANNOT_TELL, "a fault of the probe itself")

    def _hand_over(self, answers: queue.SimpleQueue[Any], wait_s: Optional[float]) -> int:
        """Waits for answers, ``wait_s`` at most, and tells the watch of them and of reads that ended. Returns how many
        answers there were.
        """
        received = _received(answers, wait_s, min(_TOGETHER_S, _TOGETHER_S_PER_SESSION * len(self.watch.sessions)))
        fault = None
        with self._lock:
            for answer in received:
                try:
                    self._tell_answer(answer)
                except Exception as raised:  # the other answers count all the same
                    fault = raised
                    self.watch.lost(answer.call)
        for answer in received:
            if answer.reads is not None:  # only now: another thread may look at once
                self._pending.add(answer.call, answer.reads)
        shown = self._pending.look(self.watch.waits_for, most=_ANSWERS_AT_A_TIME)
        for call, verdict, reads in shown:
            with self._lock:  # for one at a time: over RDMA each may look through all registrations
                try:
                    self.watch.read(call, verdict, reads.why, reads.held_up())
                except Exception as raised:
                    fault = raised
                    self.watch.lost(call)
        if fault is not None:
            self._say_fault(fault)
        for answer in received:
            if answer.error is not None:
                self._log.probe_raised(answer.call.session, answer.error)
        unreadable = _session_states.Verdict.UNREADABLE
        ended = [("unverified" if verdict is unreadable else "answered", None) for _, verdict, *_ in shown]
        made = [answer for answer in received if answer.rc is not None or answer.error is not None]  # others: at a stop
        self.metrics.probed([*map(self._counted, made), *ended])
        return len(received)

    def _tell_answer(self, answer: _probe_workers.Answer) -> None:
        """Tells the watch of one answer. The caller holds ``session_lock``."""
        was_quick = answer.took_s < _session_probe.REFUSED_WITHIN_S
        self.watch.answered(
            answer.call,
            answered=answer.rc == 0,
            refused=answer.error is None and was_quick and not answer.call.ended,
            cuts_short=answer.rc == _session_probe.CUT_SHORT,
            reading=answer.reads is not None,
            said=self._in_words(answer),
        )

    def _in_words(self, answer: _probe_workers.Answer) -> str:
        """How one probe ended, for the command ``sessions``."""
        if answer.error is not None:
            return "raised, see the log"
        if answer.rc == 0:
            return "answered"
        if answer.rc == _session_probe.CUT_SHORT:
            return "cut short"
        if answer.call.not_connected:
            return f"no connection within {answer.took_s:.1f} s"
        if answer.call.ended:
            return f"hung, ended after {answer.took_s:.1f} s"
        if answer.rc != _session_probe.NO_ANSWER:
            return "host not known" if answer.rc == _session_probe.UNKNOWN_HOST else f"failed (rc {answer.rc})"
        return (
            "refused" if answer.took_s < _session_probe.REFUSED_WITHIN_S else f"no answer within {answer.took_s:.1f} s"
        )

    def _counted(self, answer: _probe_workers.Answer) -> tuple[str, Optional[float]]:
        """The metric's label for a probe, and the seconds that it took, None if they do not count."""
        if answer.error is not None:
            return "error", None
        if not self._can_probe:
            return "unavailable", None
        return "answered" if answer.rc == 0 else "unanswered", answer.took_s

    def _report(self) -> None:
        """Logs and counts what happened since the last time. No lock held."""
        while True:
            try:
                event, session, details = self.watch.events.popleft()
            except IndexError:  # another thread may have taken the last one
                break
            if event is _session_watch.Event.RECOVERED:
                _count_recoveries(1)
            elif event is _session_watch.Event.VERIFICATION_OFF:
                type(self).reads_prove_nothing = True
            self.metrics.heard(event, details)
            self._log.heard(event, session, details)
        self.metrics.show(len(self.watch.sessions), self.watch.in_flight())
        self._log.stuck(self.watch.in_flight(), self.watch.places.most)
        self._log.sum_up()


# Those of managers that are alive, and those with a thread in a call.
_probers: weakref.WeakSet[_FailedSessionProber] = weakref.WeakSet()


def _stop_probers() -> None:
    probers = list(_probers)
    try:  # they stop side by side
        for prober in probers:
            prober.shutdown.set()
    finally:  # a signal handler may raise in it
        for prober in probers:
            prober.stop_at_exit()


def _free_locks() -> None:
    """Makes session_lock anew in a forked child: a thread that held it during the fork does not exist there."""
    for prober in list(_probers):
        if hasattr(prober._lock, "_at_fork_reinit"):
            prober._lock._at_fork_reinit()


@functools.cache  # once in a process: a fork hook cannot be unregistered
def _register_hooks() -> None:
    atexit.register(_stop_probers)
    os.register_at_fork(after_in_child=_free_locks)


def _hold_threads_that_terminate() -> None:
    """Lets a thread that returns from Mooncake while the interpreter shuts down sleep until the process is gone.

    The interpreter (before 3.14) ends such a thread, which C++ answers with ``std::terminate`` and an abort. Only for a
    call that could not be ended, because a genuine ``std::terminate`` would hang, too.
    """
    with contextlib.suppress(Exception):
        pause = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p)
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate.argtypes, set_terminate.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_terminate(pause)


def _registrations(manager: Any) -> Any:
    """What peers have registered, by session: a new object with each registration."""
    return getattr(manager, "decode_kv_args_table", {})


def _other_ports(manager: Any) -> set[Any]:
    """The ports of decode nodes to which no blocks go: for SGLang's messages, and for handshakes."""
    registrations = dict(_registrations(manager))
    message_ports = {getattr(registration, "dst_port", None) for registration in registrations.values()}
    sessions = filter(_session_watch.is_session_id, registrations)
    return message_ports | {int(session.rpartition(":")[2]) for session in sessions}


def _rank(manager: Any) -> str:
    """The manager's rank as SGLang writes it in the title of the process; empty where it is not known."""
    ranks = {"DP": "system_dp_rank", "PP": "pp_rank", "TP": "engine_rank"}
    found = {word: getattr(getattr(manager, "kv_args", None), name, None) for word, name in ranks.items()}
    return " ".join(f"{word}{rank}" for word, rank in found.items() if type(rank) is int)


def _end_calls(calls: list[Any], only_connecting: bool = False) -> None:
    """Ends those of the calls that hang and can be ended. No lock held."""
    for call in calls:
        thread = call.thread
        if thread and _hung_call.end_call(
            thread,
            call.session,
            lambda: call.thread == thread,  # noqa: B023
            only_connecting,
        ):
            call.ended, call.not_connected = True, only_connecting


def _received(answers: queue.SimpleQueue[Any], wait_s: Optional[float], together_s: float = 0.0) -> list[Any]:
    """The answers that come within ``wait_s`` (None: however long that takes) and ``together_s`` after the first one.

    There may be none: a message can be one that only wakes the thread.
    """
    messages: list[Any] = []
    try:
        messages.append(answers.get(timeout=None if wait_s is None else min(wait_s, _LONGEST_WAIT_S)))
        if together_s and answers.empty():
            time.sleep(together_s)
        while len(messages) < _ANSWERS_AT_A_TIME:
            messages.append(answers.get_nowait())
    except queue.Empty:
        pass
    return [message for message in messages if message is not None]


def _count_recoveries(number: int) -> None:
    with _session_metrics.harmless():
        FAILED_SESSION_RECOVERIES.inc(number)


class _FailureCount(int):
    """An int compared with ``is``: a failure or registration replaces it, so that a pass sees whether there was one."""


def _run_bare_pass(manager: Any) -> None:
    """One pass over an object with ``engine``, a plain set ``failed_sessions``, ``session_failures`` and
    ``session_lock``: probes every session once, side by side, and takes those that answered off the blacklist.
    """
    failures = manager.session_failures
    with manager.session_lock:
        counts = dict.fromkeys(filter(_session_watch.is_session_id, manager.failed_sessions))
        for session in counts.keys() & failures.keys():
            counts[session] = failures[session] = _FailureCount(failures[session])
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    workers = _probe_workers.Workers(
        _WORKER_THREAD,
        lambda call: _probe_workers.Answer(call, _session_probe.probe(manager.engine, call.session)),
        answers,
    )
    to_probe = _session_watch.SessionWatch(FailedSessionProbeSettings(verify=False), counts)
    shutdown = getattr(manager, "_failed_session_probe_shutdown", None) or threading.Event()
    while len(to_probe.sessions) and (to_probe.in_flight() or not shutdown.is_set()):
        if not shutdown.is_set():
            workers.start(to_probe.take_due())
            _end_calls(to_probe.to_end())
        for answer in _received(answers, None if shutdown.is_set() else to_probe.next_due_in()):
            session = answer.call.session
            to_probe.lost(answer.call)
            to_probe.sessions.discard(session)
            if answer.error is not None:
                _probe_logger.warning("Probing session %s raised %s", session, answer.error)
            with manager.session_lock:
                is_same = failures.get(session) is counts[session]
                back = answer.rc == 0 and session in manager.failed_sessions and is_same
                if back:
                    manager.failed_sessions.discard(session)
                    failures.pop(session, None)
            if back:
                _probe_logger.info("Session %s recovered via probe; un-blacklisted", session)
                _count_recoveries(1)
    workers.close()


# What MooncakeKVManager gets, beside SGLang and alone.


def _failed_session_probe_loop(self: Any) -> None:
    """Body of the thread ``MooncakeFailedSessionProbe``: returns once ``_failed_session_probe_shutdown`` is set."""
    _prober_of(self).run()


def _run_one_probe_pass(self: Any) -> None:
    """Probes, side by side, the blacklisted sessions that are due; returns when all probes are back.

    Works on any object with ``engine``, ``failed_sessions`` (a plain set will do), ``session_failures`` and
    ``session_lock``, which must not be held. Blocks as long as the slowest probe, a minute for a stopped peer.
    """
    if isinstance(self.failed_sessions, _blacklist.FailedSessions):
        _prober_of(self).run_pass()
    else:
        _run_bare_pass(self)


def _prober_of(manager: Any) -> _FailedSessionProber:
    """The manager's prober. The first call makes it and replaces the blacklist by one that tells of its changes."""
    _session_probe.can_probe(manager.engine)  # takes seconds where TENT is on, so not under the lock
    with manager.session_lock:
        prober = getattr(manager, "_failed_session_prober", None)
        if prober is None:
            prober = _FailedSessionProber(manager, FailedSessionProbeSettings.from_environment())
            manager.failed_sessions = prober.watch.sessions
            manager._failed_session_prober = prober
            manager._failed_session_probe_shutdown = prober.shutdown
        return prober


def _start_failed_session_probe(manager: Any, settings: FailedSessionProbeSettings, sglang_version: str) -> None:
    """Starts the daemon thread of a prefill manager. Where SGLang has started its native one, that runs our loop."""
    native = hasattr(manager, "_failed_session_probe_shutdown")
    mooncake = _session_probe.mooncake_version()
    prober = _prober_of(manager)
    _probe_logger.info(
        "Failed-session probe is active: SGLang %s, Mooncake %s, %s", sglang_version, mooncake, str(settings)
    )
    if not _session_probe.has_send_probe(manager.engine):
        _probe_logger.warning(
            "Mooncake %s cannot probe, so a blacklisted session stays out until it registers again; "
            "install Mooncake %s or later",
            mooncake,
            _session_probe.FIRST_MOONCAKE_WITH_PROBE,
        )
    elif _tent_probe.is_on():
        _tent_probe.warn(mooncake)
    if not native:
        thread = threading.Thread(target=manager._failed_session_probe_loop, name=_PROBE_THREAD, daemon=True)
        try:
            thread.start()
        except Exception:
            with manager.session_lock:  # nobody would read what our set records
                manager.failed_sessions = set(manager.failed_sessions)
            raise
        getattr(manager, "_worker_threads", []).append(thread)  # which teardown() joins
    prober.metrics.start(prober.watch.places.most)
    _count_recoveries(0)


def _with_failed_session_probe(init: Callable[..., None], patch: Optional[Patch]) -> Callable[..., None]:
    """The constructor of MooncakeKVManager, with the settings checked before it and the probe started after it.

    Where the manager lacks what the probe needs, the patch is given up and nothing is started. ``patch`` is None where
    there is no SGLang.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(self, *args, **kwargs)
        arguments.apply_defaults()
        role = arguments.arguments["disaggregation_mode"]
        prefill = getattr(role, "value", role) == "prefill"
        # A decode manager whose role may be switched stops at its start, too, and not at the switch.
        if prefill or getattr(self, "supports_role_switch", False):
            settings = FailedSessionProbeSettings.from_environment()
        init(self, *args, **kwargs)
        if not prefill or not settings.enabled or (patch and not patch.active):
            return
        try:
            missing = _missing_of(self)
            if missing and patch:
                patch.give_up(missing)
            else:
                _start_failed_session_probe(self, settings, patch.sglang_version() if patch else "not there")
        except Exception:
            _probe_logger.error("Failed-session probe: it could not start; SGLang is not affected", exc_info=True)

    return __init__


def _missing_of(manager: Any) -> str:
    """What a prefill manager lacks for the probe, empty if nothing. ``session_lock`` must not be held."""
    for name in ("session_lock", *_NEEDED):
        if not hasattr(manager, name):
            return f"MooncakeKVManager.{name}"
    if not hasattr(type(manager.session_lock), "__exit__"):  # a wrapped lock will do
        return f"lock MooncakeKVManager.session_lock (it is a {type(manager.session_lock).__name__})"
    with manager.session_lock:
        for name, kind in _NEEDED.items():
            if not isinstance(getattr(manager, name), kind):
                found = type(getattr(manager, name)).__name__
                return f"{kind.__name__} MooncakeKVManager.{name} (it is a {found})"
        # The attribute and the argument of getrefcount refer to the set, and other code only while it holds the lock.
        # Code that kept another reference would go on using the plain set, and refuse or serve by it for ever.
        is_ours = isinstance(manager.failed_sessions, _blacklist.FailedSessions)
        if not is_ours and sys.getrefcount(manager.failed_sessions) > 2:
            return "MooncakeKVManager.failed_sessions without a second name"
    return ""


def patch_failed_session_probe(patch: Patch, sglang: dict[str, Any]) -> None:
    """Gives SGLang's ``MooncakeKVManager`` the probe, in place. Runs in the thread that imports SGLang's module."""
    manager = sglang["MooncakeKVManager"]
    if "disaggregation_mode" not in inspect.signature(manager.__init__).parameters:
        patch.give_up("MooncakeKVManager.__init__(..., disaggregation_mode, ...)")
        return
    native_loop = vars(manager).get("_failed_session_probe_loop")

    def loop(self: Any) -> None:
        missing = _missing_of(self)
        if missing and native_loop:  # SGLang's native thread may run before our constructor has checked
            patch.give_up(missing)
            native_loop(self)
        else:
            _failed_session_probe_loop(self)

    loop.__doc__ = _failed_session_probe_loop.__doc__
    patch.replace(manager, "_failed_session_probe_loop", loop)
    patch.replace(manager, "_run_one_probe_pass", _run_one_probe_pass)
    patch.replace(manager, "__init__", _with_failed_session_probe(manager.__init__, patch))


if "MooncakeKVManager" not in globals():
    from sglang.srt.disaggregation.mooncake.standalone_manager import KVTransferError, MooncakeKVManager, PeerMemory

    __all__ = ["KVTransferError", "MooncakeKVManager", "PeerMemory"]
    MooncakeKVManager._failed_session_probe_loop = _failed_session_probe_loop  # type: ignore[attr-defined]
    MooncakeKVManager._run_one_probe_pass = _run_one_probe_pass  # type: ignore[attr-defined]
    MooncakeKVManager.__init__ = _with_failed_session_probe(  # type: ignore[method-assign]
        MooncakeKVManager.__init__, patch=None
    )
