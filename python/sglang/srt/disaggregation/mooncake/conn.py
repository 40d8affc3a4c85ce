"""MooncakeKVManager: how does it start, run and stop the daemon thread that asks blacklisted sessions?

Beside SGLang this file runs at the end of SGLang's own ``conn`` and changes its class in place. Alone it is the
smallest manager that sends blocks over a Mooncake engine, blacklists and recovers.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import inspect
import logging
import os
import queue
import sys
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING

# Under names that SGLang's module has not, because it is the same module.
from sglang.srt.disaggregation.mooncake import failed_sessions as _blacklist
from sglang.srt.disaggregation.mooncake import session_probe as _session_probe
from sglang.srt.environ import FailedSessionProbeSettings
from sglang.srt.observability import failed_session_log as _session_log
from sglang.srt.observability import failed_session_metrics as _session_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Optional, Protocol

    class _Patch(Protocol):
        """What puts this file into SGLang, as far as it is used here."""

        active: bool

        def replace(self, owner: Any, name: str, value: object) -> None: ...
        def give_up(self, missing: str) -> None: ...
        def sglang_version(self) -> str: ...


_probe_logger = logging.getLogger(__name__)

if "FAILED_SESSION_RECOVERIES" not in globals():  # from 0.5.13 on SGLang has its own
    FAILED_SESSION_RECOVERIES = _session_metrics.RECOVERIES

_PROBE_THREAD = "MooncakeFailedSessionProbe"
_WORKER_THREAD = "MooncakeSessionWorker"
# At a stop, how long probes that are about to return are waited for (a live peer takes 0.5 ms).
_STOP_GRACE_S = 0.2
# Answers handed over in one hold of session_lock, which is to take microseconds.
_ANSWERS_AT_A_TIME = 32
# Threads that may hang in probes, as a share of those that the pod may have: eight ranks take half of them at most.
_SHARE_OF_THREADS = 1 / 16
_LEAST_STUCK_LIMIT = 64
# The longest round is for two hundred blacklisted; with fewer it is shorter.
_ROUND_S_PER_SESSION = 0.0005
# What a prefill manager must have, and of which kind.
_NEEDED = {"engine": object, "failed_sessions": set, "session_failures": dict}
# After a fault of our own.
_PAUSE_AFTER_FAULT_S = 1.0
# Longer waits overflow in the interpreter.
_LONGEST_WAIT_S = 3600.0
# How a verification is counted: its peer has answered, unless it has this verdict.
_RESULT_OF_VERDICT = {
    _blacklist.Verdict.UNREADABLE: "unverified",
    _blacklist.Verdict.UNANSWERED: "unanswered",
}


class _ProbeShutdown(threading.Event):
    """The event that stops the loop. The loop waits for its inbox alone, so setting it puts a line there."""

    _inbox: queue.SimpleQueue[Any]

    @classmethod
    def of(cls, event: threading.Event, inbox: queue.SimpleQueue[Any]) -> _ProbeShutdown:
        """Makes the event itself one of these, because somebody may hold it already and set it later."""
        event._inbox = inbox  # type: ignore[attr-defined]
        event.__class__ = cls
        assert isinstance(event, _ProbeShutdown)
        return event

    def set(self) -> None:
        """Stops the loop. Any thread."""
        super().set()
        self._inbox.put(None)


class _FailedSessionProber:
    """Carries questions from the blacklist of one prefill manager to the peers, and their answers back."""

    # Learnt in this process: reading a peer's memory proves nothing on its transport.
    reads_prove_nothing = False

    def __init__(self, manager: Any, settings: FailedSessionProbeSettings, stuck_limit: int) -> None:
        """Takes over what is on the manager's blacklist. The caller holds ``session_lock``."""
        if self.reads_prove_nothing:
            settings = dataclasses.replace(settings, verify=False)
        self._settings = settings
        self._engine = manager.engine
        self._lock = manager.session_lock
        # The loop may hold it at the moment of a fork, and is not in the child, which would wait for it for ever.
        if hasattr(self._lock, "_at_fork_reinit"):
            os.register_at_fork(after_in_child=self._lock._at_fork_reinit)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = _session_probe.MemoryReader(manager.engine, lambda session: _registration(manager, session))
        self._thread: Optional[threading.Thread] = None
        self._can_probe = _session_probe.can_probe(manager.engine)
        self._log = _session_log.FailedSessionLog(self._can_probe)
        self.metrics = _session_metrics.FailedSessionMetrics()
        self._fault_said = False
        self.shutdown = _ProbeShutdown.of(
            getattr(manager, "_failed_session_probe_shutdown", None) or threading.Event(), self._inbox
        )
        self.sessions = _blacklist.FailedSessions(
            settings,
            manager.failed_sessions,
            wake=functools.partial(self._inbox.put, None),
            on_removed=lambda session: manager.session_failures.pop(session, None),
            registration=lambda session: _registration(manager, session),
            stuck_limit=stuck_limit,
            transfer_timeout_s=_transfer_timeout_s(),
        )

    def run(self) -> None:
        """The body of the daemon thread; returns when ``shutdown`` is set."""
        self._thread = threading.current_thread()
        _session_probe.prepare_for_exit()  # before: what is registered last runs first
        atexit.register(self.stop)
        workers = _session_probe.Workers(_WORKER_THREAD)
        _probe_logger.info("Starting failed-session probe loop (interval=%.1fs)", self._settings.interval_s)
        while not self.shutdown.is_set():
            try:
                _, wait_s = self._start_due(workers, self._inbox)
                workers.release_idle(keep=0 if wait_s is None else self._settings.concurrency)
                if wait_s is None:
                    self._log.sum_up(at_once=True)  # it may be long until there is more to say
                elif wait_s > 0.0:  # else more is due than one round lines up
                    wait_s = max(wait_s, min(_blacklist.LONGEST_ROUND_S, _ROUND_S_PER_SESSION * len(self.sessions)))
                self._hand_over(self._inbox, wait_s)
            except Exception as fault:
                self._say_fault(fault)
                self.shutdown.wait(_PAUSE_AFTER_FAULT_S)
        deadline = time.monotonic() + _STOP_GRACE_S
        while self.sessions.in_flight() and (left_s := deadline - time.monotonic()) > 0:
            self._hand_over(self._inbox, left_s)
        self._report()
        workers.close()
        self._log.sum_up(at_once=True)
        self.metrics.stop()
        atexit.unregister(self.stop)

    def _say_fault(self, fault: Exception) -> None:
        if not self._fault_said:
            self._fault_said = True
            _probe_logger.error(
                "Failed-session probe: a fault of its own, said once; SGLang is not affected", exc_info=fault
            )

    def stop(self) -> None:
        """Starts no more probes and waits for those about to return, 0.5 s at most. Any thread, no lock held."""
        self.shutdown.set()
        if self._thread is not None:
            self._thread.join(timeout=0.5)

    def run_pass(self) -> None:
        """Asks side by side what is due now; returns when all have answered. Any thread, no lock held."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        workers = _session_probe.Workers(_WORKER_THREAD)
        due_by, out = time.monotonic(), 0
        left = 2 * len(self.sessions)  # a probe and a verification each: what falls due meanwhile is the loop's
        while True:
            started = self._start_due(workers, answers, due_by)[0] if left > 0 else 0
            out, left = out + started, left - started
            waits = left > 0 and self.sessions.waits_for_allowance() and not self.shutdown.is_set()
            if not out and not waits:
                break
            # STUCK_AFTER_S: the next in line may have a place then.
            out -= self._hand_over(answers, _blacklist.LONGEST_ROUND_S if waits else _blacklist.STUCK_AFTER_S)
        workers.close()

    def _start_due(
        self, workers: _session_probe.Workers, answers: queue.SimpleQueue[Any], due_by: float = float("inf")
    ) -> tuple[int, Optional[float]]:
        """Starts what is due. Gives how many, and the seconds until more is, None while nothing is blacklisted."""
        with self._lock:
            questions = [] if self.shutdown.is_set() else self.sessions.take_due(due_by)
            wait_s = self.sessions.next_due_in()
        workers.start(self._look, questions, answers)
        self._report()
        return len(questions), wait_s

    def _look(self, question: _blacklist.Question) -> tuple[Any, float]:
        """Asks the peer, or verifies it; gives what came of it and the seconds it took. Runs on a worker thread."""
        began = time.monotonic()
        if question.verify:
            outcome: Any = self._reader.verify(question.session, question.was_gone)
        elif question.listen and self._can_probe:
            outcome = _session_probe.ask_and_listen(self._engine, question.session)
        else:
            outcome = _session_probe.ask(self._engine, question.session)
        return outcome, time.monotonic() - began

    def _hand_over(self, answers: queue.SimpleQueue[Any], wait_s: Optional[float]) -> int:
        """Waits for answers, ``wait_s`` at most, and gives them to the blacklist. Gives how many there were."""
        received = _received(answers, wait_s)
        fault = None
        with self._lock:
            for question, result, error in received:
                try:
                    if question.verify:
                        verdict, why = (_blacklist.Verdict.UNANSWERED, "") if error is not None else result[0]
                        self.sessions.verified(question, verdict, why)
                    else:
                        rc = None if error is not None else result[0]
                        self.sessions.answered(question, rc == 0, cut_short=rc == _session_probe.CUT_SHORT)
                except Exception as raised:  # the other answers count all the same
                    fault = raised
                    self.sessions.lost(question)
        if fault is not None:
            self._say_fault(fault)
        self.metrics.probed([self._ended(*answer) for answer in received])
        return len(received)

    def _ended(
        self, question: _blacklist.Question, result: Any, error: Optional[BaseException]
    ) -> tuple[str, Optional[float]]:
        """How an answer is counted, and the seconds that a probe took. Says what was raised."""
        if error is not None:
            self._log.probe_raised(question.session, error)
            return "error", None
        if not self._can_probe:
            return "unavailable", None
        outcome, took_s = result
        if question.verify:
            return _RESULT_OF_VERDICT.get(outcome[0], "answered"), None
        return "answered" if outcome == 0 else "unanswered", took_s

    def _report(self) -> None:
        """Logs and counts what happened since the last time. No lock held."""
        while True:
            try:
                event, session, details = self.sessions.events.popleft()
            except IndexError:  # another thread may report too
                break
            if event is _blacklist.Event.RECOVERED:
                _count_recoveries(1)
            elif event is _blacklist.Event.VERIFICATION_OFF:
                type(self).reads_prove_nothing = True
            self.metrics.heard(event, details)
            self._log.heard(event, session, details)
        self.metrics.show(len(self.sessions), self.sessions.in_flight())
        self._log.stuck(self.sessions.stuck(), self.sessions.most_stuck())
        self._log.sum_up()


def _registration(manager: Any, session: Any) -> Any:
    """What the peer of a session has registered: another object after each registration, None if nothing is known."""
    return getattr(manager, "decode_kv_args_table", {}).get(session)


def _most_stuck_probes() -> int:
    """How many threads may hang in probes: few in a pod that may have few, where several ranks share them."""
    pod_limit = _session_probe.thread_limit_of_pod()
    if pod_limit is None:
        return _blacklist.STUCK_LIMIT
    return max(_LEAST_STUCK_LIMIT, min(_blacklist.STUCK_LIMIT, int(pod_limit * _SHARE_OF_THREADS)))


def _received(answers: queue.SimpleQueue[Any], wait_s: Optional[float]) -> list[Any]:
    """What comes within ``wait_s`` seconds (None: until something comes), without the lines that only wake."""
    lines: list[Any] = []
    try:
        lines.append(answers.get(timeout=None if wait_s is None else min(wait_s, _LONGEST_WAIT_S)))
        while len(lines) < _ANSWERS_AT_A_TIME:
            lines.append(answers.get_nowait())
    except queue.Empty:
        pass
    return [line for line in lines if line is not None]


def _transfer_timeout_s() -> float:
    """How long Mooncake lets a transfer take; its default where the variable is not a number, as Mooncake does."""
    try:
        return float(os.environ.get("MC_TRANSFER_TIMEOUT", ""))
    except ValueError:
        return _blacklist.TRANSFER_TIMEOUT_S


def _count_recoveries(number: int) -> None:
    with _session_metrics.harmless():
        FAILED_SESSION_RECOVERIES.inc(number)


class _FailureCount(int):
    """A count of failures that can be told from an equal one: a failure or registration puts another in its place."""


def _run_bare_pass(manager: Any) -> None:
    """One pass over an object with ``engine``, a plain set ``failed_sessions``, ``session_failures`` and
    ``session_lock``: asks every session once, side by side, and takes those that answered off the blacklist.
    """
    failures = manager.session_failures
    with manager.session_lock:
        counts = dict.fromkeys(filter(_blacklist.is_session_id, manager.failed_sessions))
        for session in counts.keys() & failures.keys():
            counts[session] = failures[session] = _FailureCount(failures[session])
    unasked = _blacklist.FailedSessions(FailedSessionProbeSettings(), counts)
    workers = _session_probe.Workers(_WORKER_THREAD)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    shutdown = getattr(manager, "_failed_session_probe_shutdown", None) or threading.Event()
    while len(unasked) and (unasked.in_flight() or not shutdown.is_set()):
        questions = [] if shutdown.is_set() else unasked.take_due()
        workers.start(lambda asked: _session_probe.ask(manager.engine, asked.session), questions, answers)
        for question, rc, error in _received(answers, unasked.next_due_in()):
            session = question.session
            unasked.answered(question, False)
            unasked.discard(session)
            if error is not None:
                _probe_logger.warning("Probing session %s raised %r", session, error)
            with manager.session_lock:
                back = rc == 0 and session in manager.failed_sessions and failures.get(session) is counts[session]
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
    """Asks, side by side, the blacklisted sessions that are due; returns when they have answered.

    Works on any object with ``engine``, ``failed_sessions`` (a plain set will do), ``session_failures`` and
    ``session_lock``, which must not be held. Blocks as long as the slowest answer, a minute for a stopped peer.
    """
    if isinstance(self.failed_sessions, _blacklist.FailedSessions):
        _prober_of(self).run_pass()
    else:
        _run_bare_pass(self)


def _prober_of(manager: Any) -> _FailedSessionProber:
    """The manager's prober. The first call swaps the blacklist, whatever SGLang's threads do meanwhile."""
    stuck_limit = _most_stuck_probes()
    with manager.session_lock:
        prober = getattr(manager, "_failed_session_prober", None)
        if prober is None:
            prober = _FailedSessionProber(manager, FailedSessionProbeSettings.from_environment(), stuck_limit)
            manager.failed_sessions = prober.sessions
            manager._failed_session_prober = prober
            manager._failed_session_probe_shutdown = prober.shutdown
        return prober


def _start_failed_session_probe(manager: Any, settings: FailedSessionProbeSettings, sglang_version: str) -> None:
    """Starts the daemon thread of a prefill manager, unless a native one was started, which runs our loop too."""
    native = hasattr(manager, "_failed_session_probe_shutdown")
    mooncake = _session_probe.mooncake_version()
    prober = _prober_of(manager)
    _probe_logger.info("Failed-session probe is active: SGLang %s, Mooncake %s, %s", sglang_version, mooncake, settings)
    if not _session_probe.can_probe(manager.engine):
        _probe_logger.warning(
            "Mooncake %s cannot probe, so a blacklisted session stays out until it registers again; "
            "install Mooncake %s or later",
            mooncake,
            _session_probe.FIRST_MOONCAKE_WITH_PROBE,
        )
    if not native:
        thread = threading.Thread(target=manager._failed_session_probe_loop, name=_PROBE_THREAD, daemon=True)
        try:
            thread.start()
        except Exception:
            _give_blacklist_back(manager)
            raise
        getattr(manager, "_worker_threads", []).append(thread)  # which teardown() joins
    prober.metrics.start(prober.sessions.most_stuck())
    _count_recoveries(0)


def _give_blacklist_back(manager: Any) -> None:
    """Makes the blacklist a plain set again: one that hears its changes would keep them for nobody."""
    with manager.session_lock:
        manager.failed_sessions = set(manager.failed_sessions)


def _with_failed_session_probe(init: Callable[..., None], patch: Optional[_Patch]) -> Callable[..., None]:
    """The constructor of MooncakeKVManager with the settings checked before it and the probe started after it.

    Where the manager lacks what the probe needs, the patch is given up and nothing started. Alone there is no patch.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(self, *args, **kwargs)
        arguments.apply_defaults()
        role = arguments.arguments["disaggregation_mode"]
        prefill = getattr(role, "value", role) == "prefill"
        # A decode manager that may become prefill later must not fail then.
        if prefill or getattr(self, "supports_role_switch", False):
            settings = FailedSessionProbeSettings.from_environment()
        init(self, *args, **kwargs)
        if not prefill or not settings.enabled or (patch and not patch.active):
            return
        missing = _missing_of(self)
        if missing and patch:
            patch.give_up(missing)
            return
        try:
            _start_failed_session_probe(self, settings, patch.sglang_version() if patch else "not there")
        except Exception:
            _probe_logger.exception("Failed-session probe: it could not start; SGLang is not affected")

    return __init__


def _missing_of(manager: Any) -> str:
    """What a prefill manager lacks for the probe, in words; empty if nothing. ``session_lock`` must not be held."""
    for name in ("session_lock", *_NEEDED):
        if not hasattr(manager, name):
            return f"MooncakeKVManager.{name}"
    if not hasattr(type(manager.session_lock), "__exit__"):  # a lock that somebody has wrapped is as good
        return f"lock MooncakeKVManager.session_lock (it is a {type(manager.session_lock).__name__})"
    with manager.session_lock:
        for name, kind in _NEEDED.items():
            if not isinstance(getattr(manager, name), kind):
                found = type(getattr(manager, name)).__name__
                return f"{kind.__name__} MooncakeKVManager.{name} (it is a {found})"
        # Its attribute and the argument refer to it; others do so only under the lock. Who held the plain set for good
        # would not see what ours hears, and would refuse or serve by it for ever.
        is_ours = isinstance(manager.failed_sessions, _blacklist.FailedSessions)
        if not is_ours and sys.getrefcount(manager.failed_sessions) > 2:
            return "MooncakeKVManager.failed_sessions without a second name"
    return ""


def patch_failed_session_probe(patch: _Patch, sglang: dict[str, Any]) -> None:
    """Gives SGLang's ``MooncakeKVManager`` the probe, in place. Runs in the thread that imports SGLang's module."""
    manager = sglang["MooncakeKVManager"]
    if "disaggregation_mode" not in inspect.signature(manager.__init__).parameters:
        patch.give_up("MooncakeKVManager.__init__(..., disaggregation_mode, ...)")
        return
    native_loop = vars(manager).get("_failed_session_probe_loop")

    def loop(self: Any) -> None:
        missing = _missing_of(self)
        if missing and native_loop:  # the native thread is here before the constructor has looked
            patch.give_up(missing)
            native_loop(self)
        else:
            _failed_session_probe_loop(self)

    loop.__doc__ = _failed_session_probe_loop.__doc__
    patch.replace(manager, "_failed_session_probe_loop", loop)
    patch.replace(manager, "_run_one_probe_pass", _run_one_probe_pass)
    patch.replace(manager, "__init__", _with_failed_session_probe(manager.__init__, patch))


if "MooncakeKVManager" not in globals():

    class KVTransferError(Exception):
        """Blocks were not sent; the message says why."""

    @dataclasses.dataclass(frozen=True)
    class PeerMemory:
        """What a decode process registers with a prefill process: the addresses of its memory."""

        dst_kv_ptrs: list[int]
        dst_aux_ptrs: list[int] = dataclasses.field(default_factory=list)

    class MooncakeKVManager:
        """Sends blocks of memory over a Mooncake engine, blacklists sessions and lets them in again.

        ``SGLANG_HOST_IP`` (127.0.0.1) and ``MOONCAKE_PROTOCOL`` (rdma) choose the address and the transport.
        """

        _failed_session_probe_loop = _failed_session_probe_loop
        _run_one_probe_pass = _run_one_probe_pass

        def __init__(
            self, args: Any, disaggregation_mode: Any, server_args: Any = None, is_mla_backend: bool = False
        ) -> None:
            """Registers ``args.kv_data_ptrs`` and ``aux_data_ptrs`` (``kv_data_lens``, ``aux_data_lens`` bytes).

            ``disaggregation_mode`` is "prefill" or "decode". Raises ValueError for a wrong setting and RuntimeError
            if Mooncake does not start or does not take the memory.
            """
            self.kv_args = args
            self.disaggregation_mode = disaggregation_mode
            self._worker_threads: list[threading.Thread] = []
            self.decode_kv_args_table: dict[str, PeerMemory] = {}
            self.init_engine()
            self.register_buffer_to_engine()
            if getattr(disaggregation_mode, "value", disaggregation_mode) == "prefill":
                self.session_failures: dict[str, int] = defaultdict(int)
                self.failed_sessions: set[str] = set()
                self.session_lock = threading.Lock()

        def init_engine(self) -> None:
            """Starts the Mooncake engine of this manager."""
            from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import MooncakeTransferEngine

            self.engine = MooncakeTransferEngine(os.environ.get("SGLANG_HOST_IP", "127.0.0.1"))

        def register_buffer_to_engine(self) -> None:
            """Registers the memory with the engine; raises RuntimeError if it is not taken."""
            rc = self.engine.batch_register(*self._regions())
            if rc != 0:
                raise RuntimeError(f"Mooncake did not register the memory (rc {rc}).")

        def _regions(self) -> tuple[list[int], list[int]]:
            args = self.kv_args
            return [*args.kv_data_ptrs, *args.aux_data_ptrs], [*args.kv_data_lens, *args.aux_data_lens]

        def get_session_id(self) -> str:
            """``host:port`` under which this manager's memory is reached."""
            return self.engine.get_session_id()

        def register_decode(self, session_id: str, memory: PeerMemory) -> None:
            """A decode process (again) tells its memory, which takes it off the blacklist. Any thread."""
            with self.session_lock:
                self.failed_sessions.discard(session_id)
                self.session_failures.pop(session_id, None)
                self.decode_kv_args_table[session_id] = memory

        def send_blocks(self, session_id: str, blocks: list[tuple[int, int, int]]) -> None:
            """Writes blocks (address here, address there, bytes) to a decode process and waits until they are there.

            Raises KVTransferError if the session is blacklisted, and if the transfer fails, which blacklists it.
            Any thread.
            """
            with self.session_lock:
                if session_id in self.failed_sessions:
                    raise KVTransferError(
                        f"Decode instance could be dead, remote mooncake session {session_id} is not alive"
                    )
            sources, destinations, lengths = (list(column) for column in zip(*blocks, strict=True))
            rc = self.engine.batch_transfer_sync(session_id, sources, destinations, lengths)
            if rc != 0:
                with self.session_lock:
                    self.session_failures[session_id] += 1
                    self.failed_sessions.add(session_id)
                raise KVTransferError(f"Failed to send {len(blocks)} blocks to {session_id} (rc {rc})")

        def teardown(self) -> None:
            """Stops the threads and takes the registration of the memory back."""
            if hasattr(self, "_failed_session_probe_shutdown"):
                self._failed_session_probe_shutdown.set()
            for thread in self._worker_threads:
                thread.join(timeout=3.0)
            self.engine.batch_deregister(self._regions()[0])

    MooncakeKVManager.__init__ = _with_failed_session_probe(  # type: ignore[method-assign]
        MooncakeKVManager.__init__, patch=None
    )
