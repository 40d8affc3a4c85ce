"""How does a prefill process end while its probes are in flight? This process holds a manager and ends as it is told.

    exiting_prefill.py PLAN

PLAN is a Plan in JSON. The process tells on stdout, a line of JSON each, when its probes are in flight, when it begins
to end and, from its last exit handler, how long the others took and which signals it then has handlers for. A line on
stdin, or a signal if that is the way out, is the word to end.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import types
from typing import Any

BYTES = 4096
CORE_FILE_BYTES = 1 << 16  # the beginning of one is enough to tell that there was one


@dataclasses.dataclass
class Plan:
    """What the process does. By the defaults it makes a manager that blacklists nobody, and ends."""

    way: str = "end of program"
    role: str = "prefill"  # empty: no manager; the patch is put in and taken out instead
    sessions: list[str] = dataclasses.field(default_factory=list)  # these fail ...
    failing: bool = False  # ... again and again, so that all of them are probed all the time
    busy: int = 0  # threads that work in Python all the time, as there are in a prefill process under load
    address: int = 0  # of the memory they register, if they do
    in_flight: int = 0  # so many probes, or synchronous reads, are to be in the engine before it ends
    reads: int = 0  # so many peers' reads are to be pending before it ends
    lacks: list[str] = dataclasses.field(default_factory=list)  # calls that this Mooncake has not
    told_by_the_kernel: bool = True  # where a thread waits; else, as under gVisor, no call can be ended
    teardown: bool = False  # manager.teardown() comes first
    finalization_s: float = 0.0  # an object whose __del__ takes that long is left to the interpreter


class SlowToDelete:
    """Makes the interpreter's shutdown last."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __del__(self, sleep: Any = time.sleep) -> None:
        sleep(self._seconds)


def in_the_engine() -> int:
    """How many threads are in a probe or a synchronous read."""
    return sum(is_in_the_engine(frame) for frame in sys._current_frames().values())


def is_in_the_engine(frame: types.FrameType | None) -> bool:
    """True if the frame is beneath one of the functions of session_probe.py that make these calls."""
    while frame is not None:
        if frame.f_code.co_name in ("probe", "_read_one_by_one"):
            return True
        frame = frame.f_back
    return False


def pending_reads(manager: Any) -> int:
    """Of how many peers reads are pending."""
    prober = getattr(manager, "_failed_session_prober", None)
    return len(prober._pending._looks) if prober else 0


def handlers() -> dict[str, Any]:
    """The signals that this process handles: by the kernel, a mask, and by Python, a list."""
    with open("/proc/self/status") as status:
        mask = next(line.split()[1] for line in status if line.startswith("SigCgt:"))
    in_python = [int(number) for number in signal.valid_signals() if callable(signal.getsignal(number))]
    return {"kernel": mask, "python": in_python}


def make_manager(role: str, lacks: list[str]) -> Any:
    """A standing-alone manager with some memory, whose engine lacks these calls."""
    from kit.faulty_engine import faulty_engine_of
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    memory = (ctypes.c_char * BYTES)()
    address = ctypes.addressof(memory)
    manager = MooncakeKVManager(
        types.SimpleNamespace(
            kv_data_ptrs=[address], kv_data_lens=[BYTES], aux_data_ptrs=[], aux_data_lens=[], memory=memory
        ),
        role,
    )
    for call in lacks:
        faulty_engine_of(manager).misbehave(call, "lacks")
    return manager


def fail(manager: Any, sessions: list[str]) -> None:
    """Blacklists the sessions, as transfers that fail do."""
    for session in sessions:
        with manager.session_lock:
            manager.session_failures[session] += 1
            manager.failed_sessions.add(session)


def keep_failing(manager: Any, sessions: list[str]) -> None:
    """What the transfer workers of a prefill under load do, up to the end."""
    while True:
        fail(manager, sessions)
        time.sleep(0.002)


def keep_busy() -> None:
    """What a thread that works in Python does to the others: they get the interpreter late."""
    while True:
        pass


def start_probes(manager: Any, plan: Plan) -> None:
    """Returns once as many calls as planned are in the engine."""
    from sglang.srt.disaggregation.mooncake.conn import PeerMemory

    for session in plan.sessions if plan.address else []:
        manager.register_decode(session, PeerMemory([plan.address]))
    fail(manager, plan.sessions)
    for _ in range(plan.busy):
        threading.Thread(target=keep_busy, daemon=True).start()
    if plan.failing:
        threading.Thread(target=keep_failing, args=(manager, plan.sessions), daemon=True).start()
    deadline = time.monotonic() + 20
    while (there := in_the_engine()) < plan.in_flight or pending_reads(manager) < plan.reads:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{there} calls are in the engine, not {plan.in_flight}, or no reads are pending")
        time.sleep(0.001)


class Process:
    """This process: what it says, and how it ends."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._answers = os.dup(1)
        os.dup2(2, 1)  # Mooncake prints
        self._ending = False
        self._began_at = time.monotonic()
        atexit.register(self._say_ended)  # registered first, so it runs last
        if plan.way in ("SIGTERM", "SIGTERM twice"):
            signal.signal(signal.SIGTERM, self._on_sigterm)
        elif plan.way == "SIGQUIT":
            signal.signal(signal.SIGQUIT, self._on_sigquit)
        self.manager = self._make()

    def _make(self) -> Any:
        if self.plan.role:
            if not self.plan.told_by_the_kernel:
                from sglang.srt.disaggregation.mooncake import hung_call

                hung_call.wait_of = lambda thread: None
            return make_manager(self.plan.role, self.plan.lacks)
        import sglang_failed_session_probe

        sglang_failed_session_probe.activate()
        sglang_failed_session_probe.deactivate()
        return None

    def run(self) -> None:
        """Comes to the point at which probes are in flight, awaits the word, and ends."""
        if self.plan.sessions:
            start_probes(self.manager, self.plan)
        self._say(in_flight=in_the_engine(), reads=pending_reads(self.manager), handlers=handlers())
        while not select.select([sys.stdin], [], [], 0.01)[0]:  # as an event loop, where a signal is heard at once
            pass
        self._begin_to_end()
        if self.plan.way == "sys.exit":
            sys.exit(3)
        elif self.plan.way == "exception":
            raise RuntimeError("the scheduler's event loop is broken")
        elif self.plan.way == "os._exit":
            os._exit(5)

    # As SGLang's processes do: the one that serves ends itself on SIGTERM by SystemExit, and on SIGQUIT, which a
    # scheduler sends it after an exception, by SIGKILL. A scheduler leaves SIGTERM to the kernel.

    def _on_sigterm(self, *_: object) -> None:
        if not self._ending:
            self._begin_to_end()
        sys.exit(0)

    def _on_sigquit(self, *_: object) -> None:
        self._begin_to_end()
        os.kill(os.getpid(), signal.SIGKILL)

    def _begin_to_end(self) -> None:
        self._ending = True
        self._began_at = time.monotonic()
        if self.plan.teardown:
            self.manager.teardown()
        threads = [thread.name for thread in threading.enumerate()]
        teardown_s = time.monotonic() - self._began_at
        self._say(teardown_s=teardown_s, threads=threads, in_flight=in_the_engine())

    def _say_ended(self) -> None:
        self._say(stopped_s=time.monotonic() - self._began_at, handlers=handlers())

    def _say(self, **values: Any) -> None:
        os.write(self._answers, json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    faulthandler.enable()  # as SGLang's schedulers do
    resource.setrlimit(resource.RLIMIT_CORE, (CORE_FILE_BYTES, CORE_FILE_BYTES))
    process = Process(Plan(**json.loads(sys.argv[1])))
    # In a module of its own, because this one's names outlive the interpreter while a thread runs a function of it.
    sys.modules["left_behind"] = left_behind = types.ModuleType("left_behind")
    left_behind.slow = SlowToDelete(process.plan.finalization_s)  # type: ignore[attr-defined]
    process.run()
