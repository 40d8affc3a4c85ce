"""Does a peer answer, and can its memory be read? Finds out through a Mooncake engine.

What blocks here runs on a worker thread; a probe of a stopped peer can hang for a minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import heapq
import importlib.util
import itertools
import mmap
import os
import pathlib
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, Optional

from sglang.srt.disaggregation.mooncake import rdma_waits, tent_probe
from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.session_states import TRANSFER_TIMEOUT_S, Verdict
from sglang_failed_session_probe import mooncake_wheels
from sglang_failed_session_probe.mooncake_wheels import FIRST_MOONCAKE_THAT_ANSWERS as FIRST_MOONCAKE_THAT_ANSWERS
from sglang_failed_session_probe.mooncake_wheels import FIRST_MOONCAKE_WITH_PROBE as FIRST_MOONCAKE_WITH_PROBE
from sglang_failed_session_probe.printable import printable_repr

# Mooncake has four TCP connections to a peer, and any of them can be dead while the others work.
READS_AT_A_TIME = 4
READ_BYTES = 8
# Mooncake's rc of a probe that nobody answered, for whatever reason, and of one to a host that is not known.
NO_ANSWER, UNKNOWN_HOST = -102, -101
# What ``probe_and_listen`` returns beside them.
CUT_SHORT = -1000
# A probe that is answered, refused or cut short comes back in a millisecond or less.
REFUSED_WITHIN_S = 1.0
# All reads write to this page, and nobody looks at it. It is never freed: a read that seems to be over may still write
# there.
_page = mmap.mmap(-1, mmap.PAGESIZE)
_PAGE = ctypes.addressof(ctypes.c_char.from_buffer(_page))
_page_is_registered_with: dict[int, Callable[[], Any]] = {}  # by its id; gives the engine, None if that is gone
_page_stays_with: set[int] = set()  # by its id, because of reads that were pending when a manager was stopped
_page_lock = threading.Lock()


def mooncake_engine(engine: Any) -> Any:
    """Mooncake's own engine behind SGLang's wrapper; the object itself where there is no wrapper."""
    return getattr(engine, "engine", engine)


def has_send_probe(engine: Any) -> bool:
    """True if the installed Mooncake has ``send_probe``."""
    return hasattr(mooncake_engine(engine), "send_probe")


def can_probe(engine: Any) -> bool:
    """True if the installed Mooncake can probe without a crash. Where TENT is on, the first call takes seconds."""
    return has_send_probe(engine) and not tent_probe.why_no_probe()


def mooncake_version() -> str:
    """Name and version of the wheel that ``import mooncake`` finds. Takes milliseconds; any thread."""
    with contextlib.suppress(Exception):  # only words for the log: nothing may depend on them
        spec = importlib.util.find_spec("mooncake")
        for package in (spec and spec.submodule_search_locations) or ():
            for wheel in mooncake_wheels.wheels_beside(pathlib.Path(package)):
                return str(wheel)
    return "of unknown version"


def has_short_queue() -> bool:
    """True if a burst of more than 1,024 blocks overflows Mooncake's queue to a peer, as in 0.3.13 over TCP by default.

    Then it may never go on with the transfers that wait, and fail every later one to that peer.
    """
    # For more than the longest, Mooncake takes its default of 1,024.
    longer = re.fullmatch("0*([0-9]{1,5})", os.environ.get(mooncake_wheels.QUEUE_VARIABLE, ""))
    is_long = longer is not None and 8192 <= int(longer[1]) <= mooncake_wheels.LONGEST_QUEUE
    return _is_told_to_use_tcp() and not is_long and bool(mooncake_wheels.SHORT_QUEUE.search(mooncake_version()))


def transfer_timeout_s() -> float:
    """How long Mooncake lets a transfer take; where the variable is no number its default, as Mooncake does."""
    try:
        return float(os.environ.get("MC_TRANSFER_TIMEOUT", ""))
    except ValueError:
        return TRANSFER_TIMEOUT_S


def is_over_rdma() -> bool:
    """True if this process has an RDMA device open and Mooncake was not told to use TCP. Reads a folder; hold no lock.

    Mooncake falls back to TCP where it finds no device. In doubt the answer is TCP, whose rules are the more patient.
    """
    return not _is_told_to_use_tcp() and any(file.startswith(rdma_waits.DEVICE_FILES) for file in _open_files())


def _is_told_to_use_tcp() -> bool:
    return os.environ.get("MOONCAKE_PROTOCOL") == "tcp" or "MC_FORCE_TCP" in os.environ


def _open_files() -> Iterator[str]:
    with contextlib.suppress(OSError):  # no /proc
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # it has been closed meanwhile
                yield os.readlink(f"/proc/self/fd/{descriptor}")


def probe(engine: Any, session: str) -> int:
    """Sends one probe and returns its rc: 0 if the peer answered, -1 where the engine cannot probe.

    Blocks for up to a minute and longer; hold no lock. Whatever the engine raises is raised.
    """
    send_probe = getattr(engine, "send_probe", None) or getattr(mooncake_engine(engine), "send_probe", None)
    if send_probe is None or tent_probe.why_no_probe():
        return -1
    rc = send_probe(session)
    return rc if type(rc) is int else -1


def probe_and_listen(engine: Any, session: str) -> int:
    """As ``probe``, but returns CUT_SHORT if the peer accepts connections and closes them without an answer.

    To a process that is gone nothing connects, and one that is stopped leaves the probe hanging.
    """
    began = time.monotonic()
    rc = probe(engine, session)
    if rc != NO_ANSWER or time.monotonic() - began > REFUSED_WITHIN_S or not _takes_connections(session):
        return rc
    began = time.monotonic()
    rc = probe(engine, session)  # the process may have started just before the connection
    return CUT_SHORT if rc == NO_ANSWER and time.monotonic() - began <= REFUSED_WITHIN_S else rc


def _takes_connections(session: str) -> bool:
    host, _, port = session.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REFUSED_WITHIN_S).close()
    except OSError:
        return False
    return True


class Reads:
    """Small reads of one peer's memory, begun together. Any one thread at a time."""

    # Reads of a live peer end after 1 to 20 ms. One that is pending for longer waits for a free connection.
    LATE_S = 0.1

    def __init__(self, check_status: Callable[[int], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._check_status = check_status
        self._clock = clock
        self._begun_at = clock()
        self._pending: list[int] = []
        self.verdict: Optional[Verdict] = None
        self._late = False
        self.why = ""
        self.too_soon = False  # when they were begun, bytes of a failed transfer could still land
        self.samples = self.held_up_in = 0  # over RDMA: how often it was looked whether a thread waits, and one did

    @classmethod
    def decided(cls, verdict: Verdict, why: str = "") -> Reads:
        """Reads of which none is pending."""
        reads = cls(lambda batch: None)
        reads.verdict, reads.why = verdict, why
        return reads

    def add(self, batch: int, waited: bool = False) -> None:
        """One more was begun; ``waited`` if Mooncake first had to wait for a connection."""
        self._pending.append(batch)
        self._late |= waited

    def failed(self, why: str) -> None:
        """One has failed, or could not be begun. The others go on until they end."""
        if self.verdict is None:
            self.verdict, self.why = Verdict.UNREADABLE, why

    def look(self) -> Optional[Verdict]:
        """The verdict, None as long as there is none. Takes 1 us a read; hold no lock."""
        looked_at = self._clock()
        self._pending = [batch for batch in self._pending if not self._has_ended(batch)]
        in_time = looked_at - self._begun_at < self.LATE_S
        if self.verdict is None and not self._pending:
            # Reads seen pending after LATE_S are late; where the first look came after it, nobody knows.
            prompt = Verdict.READABLE if in_time else Verdict.READABLE_UNSEEN
            self.verdict = Verdict.READABLE_LATE if self._late else prompt
        if self.too_soon and self.verdict in (Verdict.READABLE, Verdict.READABLE_LATE, Verdict.READABLE_UNSEEN):
            self.verdict, self.why = Verdict.READABLE_TOO_SOON, "bytes of a failed transfer may still land"
        self._late |= not in_time
        return self.verdict

    def have_ended(self) -> bool:
        """True if none is pending. Mooncake frees a batch only when a look finds it ended, so look until then."""
        return not self._pending

    def held_up(self) -> float:
        """The share of their time for which transfers to others may have had to wait; 1 where it is not known."""
        return self.held_up_in / self.samples if self.samples else 1.0

    def age_s(self) -> float:
        """Seconds since they were begun."""
        return self._clock() - self._begun_at

    def _has_ended(self, batch: int) -> bool:
        timed_out = -2  # Mooncake still holds such a batch
        status, why = _returned(lambda: self._check_status(batch))
        if type(status) is int and status in (0, 1):
            return status == 1
        self.failed(why)
        return type(status) is not int or status != timed_out


def _returned(read: Callable[[], Any]) -> tuple[Any, str]:
    """What a call of the engine returned, None if it raised, and that in words."""
    try:
        returned = read()
    except BaseException as error:  # an engine may raise anything
        return None, f"reading its memory raised {printable_repr(error)}"
    return returned, f"reading its memory gave {printable_repr(returned)}"


class MemoryReader:
    """Reads a few bytes of a peer's registered memory into a page of this process.

    ``registration(session)`` gives what the peer has registered, an entry of ``decode_kv_args_table`` or None;
    ``page_refused(why)`` is called once if Mooncake does not take the page. Any thread may use it.
    """

    _REGISTER_AGAIN_S = 10.0
    # To begin a read takes 0.1 ms. Mooncake before 0.3.13 may connect first: after such a wait, no more are begun.
    _BLOCKS_FROM_S = 0.5
    # A read that a peer rejects has failed after 0.5 ms, one that waits for a connection after up to 1 s.
    _FAILS_WITHIN_S = (0.0005, 0.001, 0.003)
    _MOST_FAILED_ON_PURPOSE = 2 * READS_AT_A_TIME

    def __init__(
        self,
        engine: Any,
        registration: Callable[[str], Any],
        page_refused: Callable[[str], object] = lambda why: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._registration = registration
        self._page_refused = page_refused
        self._clock = clock
        self._refused_at = -self._REGISTER_AGAIN_S
        self._refused_why = ""
        # One over RDMA, which has no four connections and where transfers to others wait for reads that fail: 1 to 2.4
        # s beside four of them, with two devices a node, and the usual 25 ms beside one.
        self.reads_at_a_time = READS_AT_A_TIME

    def begin(self, session: str, too_soon: bool = False) -> Reads:
        """Begins small reads of a peer that has just answered a probe: a read of one that is stopped could hold up
        transfers to live ones for a minute. With ``too_soon`` they let nobody in.

        An engine that can only read synchronously has read when this returns. Blocks as long as that takes, or while
        Mooncake (before 0.3.13) connects; hold no lock.
        """
        mooncake = mooncake_engine(self._engine)
        begin_read: Any = getattr(mooncake, "batch_transfer_async_read", None)
        check_status: Any = getattr(mooncake, "transfer_check_status", None)
        read_now: Any = getattr(mooncake, "transfer_sync_read", None)
        can_begin = begin_read is not None and check_status is not None
        address = self._address_of(session)
        if address is None or not (can_begin or read_now):
            return Reads.decided(Verdict.CANNOT_TELL)
        if not self._has_page():
            return Reads.decided(Verdict.CANNOT_TELL, self._refused_why)
        if not can_begin:
            reads = _read_one_by_one(functools.partial(read_now, session, _PAGE, address, READ_BYTES))
            reads.too_soon = too_soon
            return reads
        reads = Reads(check_status)
        reads.too_soon = too_soon
        begin = functools.partial(begin_read, session, [_PAGE], [address], [READ_BYTES])
        goes_on = all(self._begin_one(reads, begin) for _ in range(self.reads_at_a_time))
        if goes_on and self.reads_at_a_time > 1:
            self._fail_until_one_waits(reads, begin)
        return reads

    def _begin_one(self, reads: Reads, begin: Callable[[], Any]) -> bool:
        """Begins one more read; False if no others are to be begun after it now."""
        began = self._clock()
        batch, why = _returned(begin)
        if type(batch) is not int or batch == 0:
            reads.failed("reading its memory was refused" if batch == 0 else why)
            return False
        waited = self._clock() >= began + self._BLOCKS_FROM_S
        reads.add(batch, waited)
        return not waited

    def _fail_until_one_waits(self, reads: Reads, begin: Callable[[], Any]) -> None:
        """Fails reads on purpose until Mooncake reconnects, so that no request is the one to fail.

        Once each connection to a peer has failed in turn, Mooncake (0.3.13, 0.3.14) fails the next transfer unsent, and
        only then waits for a second and connects anew. The peer may register at any moment, and without these reads its
        first request would be that transfer.
        """
        for _ in range(self._MOST_FAILED_ON_PURPOSE):
            for pause_s in self._FAILS_WITHIN_S:
                if reads.look() is not None and reads.have_ended():
                    break
                time.sleep(pause_s)
            have_failed = reads.verdict is Verdict.UNREADABLE and reads.have_ended()
            if not have_failed or not self._begin_one(reads, begin):
                return

    def close(self, still_read: bool) -> None:
        """Deregisters the page, so that a stopped manager leaves nothing with the engine; whoever reads after that
        registers it again. Not if reads of this one are pending (``still_read``), and then never. Raises nothing.
        """
        mooncake = mooncake_engine(self._engine)
        if still_read:
            _page_stays_with.add(id(mooncake))
        if id(mooncake) in _page_stays_with or not _page_lock.acquire(blocking=False):  # it is registered just now
            return
        with contextlib.suppress(BaseException):  # an engine may raise anything, or lack the method
            if _is_registered_with(mooncake) and mooncake.unregister_memory(_PAGE) == 0:
                del _page_is_registered_with[id(mooncake)]
        _page_lock.release()

    def _address_of(self, session: str) -> Optional[int]:
        with contextlib.suppress(Exception):  # addresses of a kind that we do not know
            registration = self._registration(session)
            for name in ("dst_aux_ptrs", "dst_kv_ptrs"):
                addresses = getattr(registration, name, None)
                if addresses is not None and len(addresses) and int(addresses[0]) > 0:
                    return int(addresses[0])
        return None

    def _has_page(self) -> bool:
        """True if the page is registered with the engine; registers it if that is due."""
        mooncake = mooncake_engine(self._engine)
        with _page_lock:
            if _is_registered_with(mooncake):
                return True
            if self._clock() < self._refused_at + self._REGISTER_AGAIN_S:
                return False
            was_refused = bool(self._refused_why)
            try:
                rc = mooncake.register_memory(_PAGE, mmap.PAGESIZE)
                if rc == 0:
                    _page_stays_with.discard(id(mooncake))  # of an engine that is gone
                    _page_is_registered_with[id(mooncake)] = _reference_to(mooncake)
                    return True
                what = f"gave {printable_repr(rc)}"
            except BaseException as error:  # an engine may raise anything
                what = f"raised {printable_repr(error)}"
            self._refused_why = f"Mooncake {what} when it was to register a page to read into"
            self._refused_at = self._clock()
        if not was_refused:
            self._page_refused(self._refused_why)
        return False


def _is_registered_with(mooncake: Any) -> bool:
    engine = _page_is_registered_with.get(id(mooncake))
    return engine is not None and engine() is mooncake


def _reference_to(engine: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(engine)
    except TypeError:  # of a kind that cannot be referred to weakly
        return lambda: engine


def _read_one_by_one(read: Callable[[], Any]) -> Reads:
    """Reads four times; the first that fails ends it."""
    began = time.monotonic()
    for _ in range(READS_AT_A_TIME):
        rc, why = _returned(read)
        if type(rc) is not int or rc != 0:
            return Reads.decided(Verdict.UNREADABLE, why)
    late = time.monotonic() - began >= Reads.LATE_S
    return Reads.decided(Verdict.READABLE_LATE if late else Verdict.READABLE)


class PendingReads:
    """Reads under way, and when each is looked at next: soon at first, then at growing gaps. Any thread."""

    _SOONEST_S, _SHARE_OF_AGE, _LATEST_S = 0.001, 0.1, 0.05
    # However many there are, looking takes a few hundredths of a core.
    _S_PER_READS = 0.0002
    # Reads that nobody waits for any more are looked at all the same, so that Mooncake frees them.
    _UNWANTED_LATEST_S = 10.0
    # Over RDMA a read of a peer that cannot be reached takes 10 s, so that is twenty looks at what the threads do. One
    # costs 20 to 30 us a thread: with 300 threads that is 2 % of a core while a read is pending.
    _SAMPLE_EVERY_S = 0.5

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        a_thread_waits: Callable[[Collection[str]], Optional[bool]] = lambda peers: rdma_waits.a_thread_waits(peers),
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._looks: list[tuple[float, int, Call, Reads, bool]] = []
        self._ties = itertools.count()
        self._a_thread_waits = a_thread_waits
        self._sample_at = 0.0
        self.over_rdma = False

    def add(self, call: Call, reads: Reads) -> None:
        """Takes over the reads that a call has begun; the first look is due at once."""
        with self._lock:
            heapq.heappush(self._looks, (0.0, next(self._ties), call, reads, False))

    def look(self, is_wanted: Callable[[Call], bool], most: int = 32) -> list[tuple[Call, Verdict, Reads]]:
        """Looks at ``most`` of the reads that are due; returns those that have a verdict now."""
        now = self._clock()
        told: list[tuple[Call, Verdict, Reads]] = []
        with self._lock:
            if self.over_rdma and self._looks and now >= self._sample_at:
                self._sample(now)
            due: list[tuple[float, int, Call, Reads, bool]] = []
            while self._looks and self._looks[0][0] <= now and len(due) < most:
                due.append(heapq.heappop(self._looks))
            for _, tie, call, reads, was_told in due:
                verdict = reads.look()
                if verdict is not None and not was_told:
                    told.append((call, verdict, reads))
                if not reads.have_ended():
                    gap_s = self._gap_s(reads, wanted=verdict is None and is_wanted(call))
                    heapq.heappush(self._looks, (now + gap_s, tie, call, reads, verdict is not None))
        return told

    def _sample(self, now: float) -> None:
        self._sample_at = now + self._SAMPLE_EVERY_S
        waits = self._a_thread_waits({call.session for _, _, call, _, _ in self._looks})
        for _, _, _, reads, _ in self._looks if waits is not None else ():
            reads.samples += 1
            reads.held_up_in += bool(waits)

    def next_look_in(self) -> Optional[float]:
        """Seconds until the next look is due, None if nothing is pending."""
        with self._lock:
            return max(0.0, self._looks[0][0] - self._clock()) if self._looks else None

    def _gap_s(self, reads: Reads, wanted: bool) -> float:
        latest_s = self._LATEST_S if wanted else self._UNWANTED_LATEST_S
        gap_s = min(max(self._SOONEST_S, self._SHARE_OF_AGE * reads.age_s()), latest_s)
        return max(gap_s, self._S_PER_READS * len(self._looks))
