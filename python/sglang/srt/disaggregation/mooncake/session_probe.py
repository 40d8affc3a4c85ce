"""Does a peer answer, and can its memory be read? Asks through a Mooncake engine, on threads of its own.

A probe can hang for a minute and cannot be cancelled, so it runs on a daemon thread that nobody waits for.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import mmap
import os
import pathlib
import queue
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Optional

from sglang.srt.disaggregation.mooncake.failed_sessions import Verdict

LANES = 4  # Mooncake has four TCP lanes a peer, and each can be dead for itself
READS_IN_A_ROW = LANES
READ_BYTES = 8
# Four reads of a live peer take a millisecond, or some tens while the threads of a busy process take turns.
LATE_S = 0.1
# A read that waits for a lane's cooldown takes the rest of a second, any other some milliseconds.
_WAITED_S = 0.25
FIRST_MOONCAKE_WITH_PROBE = "0.3.11"
FIRST_MOONCAKE_THAT_ANSWERS = "0.3.10.post2"
_NO_ANSWER = -102
# What ``ask_and_listen`` gives beside the rc of a probe. A live peer, whether it answers or cuts short, takes 1 ms.
CUT_SHORT = -1000
_CUT_SHORT_WITHIN_S = 1.0
# Sixteen refused probes take 0.7 ms one after another. What has not begun by then gets a thread of its own.
MOST_RETURN_WITHIN_S = 0.002
# At an exit: how long threads that come back from the engine may take, which on a machine with much else to do wait for
# a processor and for the interpreter; how long where it cannot be seen who comes back and who hangs; and the CPU time
# after which a thread that was not seen to wait for the interpreter spins: to come back takes less than 1 ms.
_COME_BACK_WITHIN_S = 3.0
_UNSEEN_WITHIN_S = 0.3
_SPINS_FROM_S = 0.005
# As a switch interval while a thread is parked: nobody else gets the interpreter by waiting for it meanwhile.
_KEEP_INTERPRETER_S = 0.1
_FUTEX = ("202", "98")  # its number on x86-64 and on ARM
_PAUSE = ("34", "73")  # pause(2), and ppoll(2), by which ARM has it
_SYSTEM_CALL_BYTES = (0, 2, 4)  # the kernel goes on after the instruction or, to repeat it, before it
_LARGEST_SIGNAL_FRAME = 1 << 16
_DLADDR_SYMBOL = 1  # RTLD_DL_SYMENT


def mooncake_engine(engine: Any) -> Any:
    """Mooncake's own engine behind SGLang's wrapper; the object itself where there is no wrapper."""
    return getattr(engine, "engine", engine)


def can_probe(engine: Any) -> bool:
    """True if the installed Mooncake has ``send_probe`` (0.3.11 and later)."""
    return hasattr(mooncake_engine(engine), "send_probe")


def mooncake_version() -> str:
    """Name and version of the wheel that ``import mooncake`` finds. Takes milliseconds; any thread."""
    with contextlib.suppress(Exception):  # only words for the log: nothing may depend on them
        spec = importlib.util.find_spec("mooncake")
        for package in (spec and spec.submodule_search_locations) or ():
            for metadata in sorted(pathlib.Path(package).parent.glob("mooncake*.dist-info")):
                distribution = importlib.metadata.Distribution.at(metadata)
                return f"{distribution.metadata['Name']} {distribution.version}"
    return "of unknown version"


def thread_limit_of_pod() -> Optional[int]:
    """How many threads the kernel lets this container have; None for no limit that is known. Any thread."""
    for file in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            return int(pathlib.Path(file).read_text())
    return None


def ask(engine: Any, session: str) -> int:
    """Sends one probe and returns its rc: 0 if the peer answered, -1 where the engine has no ``send_probe``.

    Blocks for up to a minute and longer; hold no lock. Whatever the engine raises is raised.
    """
    send_probe = getattr(engine, "send_probe", None) or getattr(mooncake_engine(engine), "send_probe", None)
    if send_probe is None:
        return -1
    rc = send_probe(session)
    return rc if type(rc) is int else -1


def ask_and_listen(engine: Any, session: str) -> int:
    """As ``ask``, but gives CUT_SHORT if the peer takes connections and yet cuts probes short.

    A process that is gone takes no connection, and one that is stopped ends no probe.
    """
    began = time.monotonic()
    rc = ask(engine, session)
    if rc != _NO_ANSWER or time.monotonic() - began > _CUT_SHORT_WITHIN_S or not _takes_connections(session):
        return rc
    began = time.monotonic()
    rc = ask(engine, session)  # it may have come back between the two
    return CUT_SHORT if rc == _NO_ANSWER and time.monotonic() - began <= _CUT_SHORT_WITHIN_S else rc


def _takes_connections(session: str) -> bool:
    host, _, port = session.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CUT_SHORT_WITHIN_S).close()
    except OSError:
        return False
    return True


class MemoryReader:
    """Reads a few bytes of a peer's registered memory into a scratch page of this process, which nobody looks at.

    ``registration(session)`` gives what the peer has registered, an entry of ``decode_kv_args_table`` or None. Any
    thread may use it.
    """

    def __init__(self, engine: Any, registration: Callable[[str], Any]) -> None:
        self._engine = engine
        self._registration = registration
        self._scratch: Optional[int] = None
        self._scratch_lock = threading.Lock()

    def verify(self, session: str, was_gone: bool = False) -> tuple[Verdict, str]:
        """Probes the session once more and reads its memory until four reads in a row succeed.

        The first read that fails ends it, because Mooncake lets a second of cooldown follow, which the next read
        would spend spinning; with ``was_gone`` no lane is left half used then. Gives the verdict and, for an unreadable
        peer, the reason in words. Blocks for up to a minute and longer; hold no lock. What ``send_probe`` raises is
        raised.
        """
        # A transfer to a stopped peer can hold up transfers to live ones, so never read without a fresh answer.
        if ask(self._engine, session) != 0:
            return Verdict.UNANSWERED, ""
        transfer = getattr(mooncake_engine(self._engine), "transfer_sync_read", None)
        address = self._address_of(session)
        scratch = self._scratch_address()
        if transfer is None or address is None or scratch is None:
            return Verdict.CANNOT_TELL, ""
        read = functools.partial(transfer, session, scratch, address, READ_BYTES)
        first_began = time.monotonic()
        for _ in range(READS_IN_A_ROW):
            began = time.monotonic()
            why = _failure_of(read)
            if why:
                if was_gone and time.monotonic() - began < _WAITED_S:
                    _use_up_lanes(read)
                return Verdict.UNREADABLE, why
        late = time.monotonic() - first_began >= LATE_S
        return Verdict.READABLE_LATE if late else Verdict.READABLE, ""

    def _address_of(self, session: str) -> Optional[int]:
        with contextlib.suppress(Exception):  # addresses of a kind that we do not know
            registration = self._registration(session)
            for name in ("dst_aux_ptrs", "dst_kv_ptrs"):
                addresses = getattr(registration, name, None)
                if addresses is not None and len(addresses) and int(addresses[0]) > 0:
                    return int(addresses[0])
        return None

    def _scratch_address(self) -> Optional[int]:
        with self._scratch_lock:
            if self._scratch is None:
                self._scratch = self._register_page()
            return self._scratch or None

    def _register_page(self) -> int:
        try:
            page = mmap.mmap(-1, mmap.PAGESIZE)
            _kept_pages.append(page)
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            return address if mooncake_engine(self._engine).register_memory(address, mmap.PAGESIZE) == 0 else 0
        except Exception:
            return 0  # an engine that takes no memory of this kind: the answered handshake decides


def _failure_of(read: Callable[[], Any]) -> str:
    """Reads once; gives what went wrong in words, empty if nothing."""
    try:
        rc = read()
    except BaseException as error:  # an engine may raise anything
        return f"reading its memory raised {error!r}"
    return "" if type(rc) is int and rc == 0 else f"reading its memory gave {rc!r}"


def _use_up_lanes(read: Callable[[], Any]) -> None:
    """Goes on with a read that has failed until no lane of Mooncake's is half used.

    A read that the peer refuses costs a lane. With all four lost, the next transfer fails at once, even if the peer
    has registered since, and only that has the lanes connected anew: so this failure must be a read's. How many were
    lost before is known only once a read has waited for a lane: it was the first on fresh ones.
    """
    left, has_waited = LANES, False
    while left:
        began = time.monotonic()
        if not _failure_of(read):
            return
        waited = time.monotonic() - began >= _WAITED_S
        if waited and has_waited:
            return  # every read is slow here
        left, has_waited = (LANES, True) if waited else (left - 1, has_waited)


_kept_pages: list[mmap.mmap] = []  # as long as the process: a read that is stuck may still write there


class Workers:
    """Daemon threads that run jobs: those that return at once one after another on one thread, because to wake a thread
    costs as much as a refused probe, all others side by side. Start jobs from one thread only.
    """

    def __init__(self, name: str) -> None:
        prepare_for_exit()
        self._name = name
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: collections.deque[Any] = collections.deque()  # for a thread that is through with its job
        self._none_waits = threading.Event()
        self._idle = 0
        self._idle_lock = threading.Lock()
        self._closed = False

    def start(self, job: Callable[[Any], Any], subjects: Iterable[Any], results: queue.SimpleQueue[Any]) -> None:
        """Runs ``job(subject)`` for each and puts (subject, result, None) or (subject, None, what was raised) into
        ``results``. Returns when each has a thread, MOST_RETURN_WITHIN_S later at most; a single one has it at once.
        """
        self._waiting.extend((job, subject, results) for subject in subjects)
        self._none_waits.clear()
        self._start_next()
        if self._waiting:
            self._none_waits.wait(MOST_RETURN_WITHIN_S)
        while self._waiting:
            self._start_next()

    def _start_next(self) -> None:
        """Gives what waits longest an idle thread, or a new one."""
        work = self._next_waiting()
        if work is None:
            return
        if not self._take_idle(1):
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except Exception as error:  # the process has no thread or no memory left
                _, subject, results = work
                results.put((subject, None, error))
                return
        self._jobs.put(work)

    def _next_waiting(self) -> Any:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def release_idle(self, keep: int = 0) -> None:
        """Ends the threads that have nothing to do, but for so many."""
        for _ in range(self._take_idle(self._idle - keep)):
            self._jobs.put(None)

    def _take_idle(self, number: int) -> int:
        """Counts on so many idle threads, or on as many as there are; gives how many."""
        with self._idle_lock:
            taken = max(0, min(number, self._idle))
            self._idle -= taken
            return taken

    def close(self) -> None:
        """Ends every thread as soon as it has nothing to do. Start no job after this."""
        self._closed = True
        self._jobs.put(None)

    def _work(self) -> None:
        thread = threading.get_native_id()
        work = self._jobs.get()
        while work is not None:
            job, subject, results = work
            _in_engine.add(thread)
            if _exiting.is_set():
                _in_engine.discard(thread)
                return
            try:
                outcome: tuple[Any, Any, Optional[BaseException]] = (subject, job(subject), None)
            except BaseException as error:  # whatever an engine raises, the next session goes on
                outcome = (subject, None, error)
            _in_engine.discard(thread)
            work = self._next_waiting()
            if work is None:
                with self._idle_lock:
                    self._idle += 1  # first: who hears the result may count on this thread
            results.put(outcome)
            del job, subject, results, outcome
            if work is None:
                self._none_waits.set()
                work = self._jobs.get()
        if self._closed:
            self._jobs.put(None)  # for the next


# A thread that returns from Mooncake while the interpreter shuts down is ended by it, and that aborts the process. A
# call that hangs cannot be cancelled, so at an exit such threads are parked where they are: by a signal whose handler
# is pause() of the C library, which needs no interpreter and never returns. Only threads that the kernel says to be
# outside the interpreter: one that waits for it, on a futex in its memory, will have it, and is waited for. Between the
# look and the signal a thread may come back and begin to wait for the interpreter. Parked there it would block all
# others for ever, so what the signal has interrupted is compared with what was seen, and such a thread goes on.

_in_engine: set[int] = set()  # threads at a job, by the kernel's ids
_exiting = threading.Event()


@functools.cache
def prepare_for_exit() -> None:
    """Has threads that hang in the engine parked at the interpreter's exit, after all that is registered later."""
    atexit.register(_park_threads_in_engine)
    os.register_at_fork(after_in_child=_in_engine.clear)  # the threads are not in the child


def _park_threads_in_engine() -> None:
    """Runs at the interpreter's exit, in the main thread; takes some milliseconds, 3 s if threads come back late."""
    _exiting.set()
    libc = ctypes.PyDLL(None)  # its calls keep the interpreter
    signals = _signals_to_park_and_go_on(libc)
    if signals is None:
        return
    interpreter = _memory_of_interpreter(libc)
    began, interval_s = time.monotonic(), sys.getswitchinterval()
    seen: dict[int, list[_ThreadState]] = {}
    while _in_engine and time.monotonic() < began + _COME_BACK_WITHIN_S:
        try:
            time.sleep(0.002)  # who has returned from the engine and waits for the interpreter may have it now
            sys.setswitchinterval(_KEEP_INTERPRETER_S)
            for thread in list(_in_engine):
                states = seen.setdefault(thread, [])
                state = _state_of(thread, libc)
                if _is_inside(states, state, interpreter):
                    states.clear()
                    _park(thread, state, libc, *signals)
                elif not state.call and time.monotonic() > began + _UNSEEN_WITHIN_S:
                    _in_engine.discard(thread)  # it cannot be seen what it does
        except BaseException:  # a signal handler that raises must not leave threads behind
            continue
        finally:
            sys.setswitchinterval(interval_s)


class _ThreadState(NamedTuple):
    """What the kernel says of a thread."""

    call: str = ""  # the number of the system call that it waits in, "running" if in none, empty if that is not known
    argument: int = 0  # the first one
    stack: int = 0  # its stack pointer, and the instruction where it goes on
    instruction: int = 0
    cpu_s: float = 0.0  # that it has used


def _state_of(thread: int, libc: ctypes.PyDLL) -> _ThreadState:
    """Keeps the interpreter: nothing may come between the look at a thread and what is done about it."""
    text = ctypes.create_string_buffer(256)
    file = libc.open(f"/proc/self/task/{thread}/syscall".encode(), os.O_RDONLY)
    libc.read(file, text, len(text) - 1)
    libc.close(file)
    words = text.value.decode().split()
    try:
        cpu_s = time.clock_gettime(~thread << 3 | 6)  # as clock_getcpuclockid(3) does, for a thread
        if len(words) < 4:
            return _ThreadState(words[0] if words else "", cpu_s=cpu_s)
        return _ThreadState(words[0], int(words[1], 16), int(words[-2], 16), int(words[-1], 16), cpu_s)
    except (OSError, ValueError):  # it is gone
        return _ThreadState()


def _is_inside(states: list[_ThreadState], state: _ThreadState, interpreter: range) -> bool:
    """True if a thread is in the engine beyond doubt, by this look at it and those before, which it joins."""
    if not state.call or (state.call in _FUTEX and (not interpreter or state.argument in interpreter)):
        states.clear()
        return False
    states.append(state)
    waits = state.call != "running" and len(states) > 1 and states[-2][:4] == state[:4]  # all but the CPU time
    return waits or state.cpu_s - states[0].cpu_s >= _SPINS_FROM_S


def _park(thread: int, state: _ThreadState, libc: ctypes.PyDLL, park: int, go_on: int) -> None:
    """Parks a thread that was seen in the engine; if it has come back since, it goes on."""
    sent = ended = False
    was_there: Optional[bool] = None
    while True:
        try:
            if not sent:
                sent = True
                libc.tgkill(os.getpid(), thread, park)
            if was_there is None:
                was_there = _was_interrupted_there(thread, state, libc)
            if was_there:
                _in_engine.discard(thread)
            elif not ended:
                ended = True
                libc.tgkill(os.getpid(), thread, go_on)
            return
        except BaseException:  # a signal handler that raises: what is done is done, the rest must be
            continue


def _was_interrupted_there(thread: int, state: _ThreadState, libc: ctypes.PyDLL) -> bool:
    """True if a thread that was sent the signal was still where it was seen. Returns when it is parked.

    The kernel keeps the stack pointer and the instruction that it has interrupted, side by side on x86-64 and ARM, on
    the thread's stack. Of one that was running neither is known: to come back it takes 10 us of the seconds it spins.
    """
    deadline = time.monotonic() + 1.0
    while (parked := _state_of(thread, libc)).call not in _PAUSE or parked.stack == state.stack:
        if not parked.call or time.monotonic() > deadline:
            return True  # it is gone, or gets no processor: nothing to be done about it
        libc.usleep(20)
    if state.call == "running":
        return True
    if not 0 < state.stack - parked.stack <= _LARGEST_SIGNAL_FRAME:
        return False
    frame = ctypes.string_at(parked.stack, state.stack - parked.stack)
    return any(struct.pack("QQ", state.stack, state.instruction - back) in frame for back in _SYSTEM_CALL_BYTES)


def _memory_of_interpreter(libc: ctypes.PyDLL) -> range:
    """The addresses of the interpreter's state, with the lock that its threads take turns by; empty if not known."""
    with contextlib.suppress(Exception):
        state = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
        names, symbol = (ctypes.c_void_p * 4)(), ctypes.POINTER(ctypes.c_uint64)()
        if libc.dladdr1(ctypes.c_void_p(state), names, ctypes.byref(symbol), _DLADDR_SYMBOL):
            return range(state, state + symbol[2])  # the third word of an ELF symbol is its size
    return range(0)


def _signals_to_park_and_go_on(libc: ctypes.PyDLL) -> Optional[tuple[int, int]]:
    """Two real-time signals that nothing else in this process handles: one that parks a thread, and one that ends that.

    None if there are no two.
    """
    unused = []
    for number in range(signal.SIGRTMAX - 3, signal.SIGRTMIN, -1):
        action = ctypes.create_string_buffer(512)  # larger than any struct sigaction, which begins with the handler
        if libc.sigaction(number, None, action) == 0 and not ctypes.c_void_p.from_buffer(action).value:
            unused.append(number)
    if len(unused) < 2:
        return None
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    for number, handler in zip(unused, (libc.pause, libc.getpid), strict=False):  # getpid: any that does nothing
        libc.signal(number, ctypes.cast(handler, ctypes.c_void_p))
    return unused[0], unused[1]
