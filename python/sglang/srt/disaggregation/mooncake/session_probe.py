"""Does a peer answer, and can its memory be read? Asks through a Mooncake engine.

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
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Optional

from sglang.srt.disaggregation.mooncake import tent_probe
from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.session_states import Verdict
from sglang_failed_session_probe.printable import printable_repr

# Mooncake has four TCP connections to a peer, and each can be dead for itself.
READS_AT_A_TIME = 4
READ_BYTES = 8
FIRST_MOONCAKE_WITH_PROBE = "0.3.11"
FIRST_MOONCAKE_THAT_ANSWERS = "0.3.10.post2"
_LONG_QUEUE, _LONGEST_QUEUE = 8192, 65535  # blocks
# What Mooncake gives: nobody has answered, for whatever reason; and there is no such host.
NO_ANSWER, UNKNOWN_HOST = -102, -101
# What ``ask_and_listen`` gives beside the rc of a probe. A live peer, whether it answers or cuts short, takes 1 ms.
CUT_SHORT = -1000
_CUT_SHORT_WITHIN_S = 1.0


def mooncake_engine(engine: Any) -> Any:
    """Mooncake's own engine behind SGLang's wrapper; the object itself where there is no wrapper."""
    return getattr(engine, "engine", engine)


def has_send_probe(engine: Any) -> bool:
    """True if the installed Mooncake has ``send_probe`` (0.3.11 and later)."""
    return hasattr(mooncake_engine(engine), "send_probe")


def can_probe(engine: Any) -> bool:
    """True if Mooncake has ``send_probe`` and it does not end the process. On TENT the first call takes seconds."""
    return has_send_probe(engine) and not tent_probe.why_no_probe()


def mooncake_version() -> str:
    """Name and version of the wheel that ``import mooncake`` finds. Takes milliseconds; any thread."""
    with contextlib.suppress(Exception):  # only words for the log: nothing may depend on them
        spec = importlib.util.find_spec("mooncake")
        for package in (spec and spec.submodule_search_locations) or ():
            for installed in sorted(pathlib.Path(package).parent.glob("*mooncake*.dist-info")):
                name, version = installed.stem.rsplit("-", 1)  # what is in there may be unreadable
                return f"{name.replace('_', '-')} {version}"
    return "of unknown version"


def has_short_queue() -> bool:
    """True if a burst of more than 1,024 blocks overflows Mooncake's queue to a peer, as in 0.3.13 over TCP by default.

    Then it may forget to go on with those that wait, and fail every later transfer to that peer, for good.
    """
    # Mooncake takes its default of 1,024 for more than 65,535.
    longer = re.fullmatch("0*([0-9]{1,5})", os.environ.get("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", ""))
    is_long = longer is not None and _LONG_QUEUE <= int(longer[1]) <= _LONGEST_QUEUE
    return _is_told_to_use_tcp() and not is_long and re.search(r" 0\.3\.13(\.post1)?$", mooncake_version()) is not None


def is_over_rdma() -> bool:
    """True if this process has an RDMA device open and Mooncake was not told to use TCP. Reads a folder; hold no lock.

    Asked for RDMA, Mooncake takes TCP all the same where it finds no device. In doubt it is TCP, which is waited for.
    """
    return not _is_told_to_use_tcp() and any(file.startswith("/dev/infiniband/uverbs") for file in _open_files())


def _is_told_to_use_tcp() -> bool:
    return os.environ.get("MOONCAKE_PROTOCOL") == "tcp" or "MC_FORCE_TCP" in os.environ


def _open_files() -> Iterator[str]:
    with contextlib.suppress(OSError):  # no /proc
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # it has been closed meanwhile
                yield os.readlink(f"/proc/self/fd/{descriptor}")


def ask(engine: Any, session: str) -> int:
    """Sends one probe and returns its rc: 0 if the peer answered, -1 where the engine cannot probe.

    Blocks for up to a minute and longer; hold no lock. Whatever the engine raises is raised.
    """
    send_probe = getattr(engine, "send_probe", None) or getattr(mooncake_engine(engine), "send_probe", None)
    if send_probe is None or tent_probe.why_no_probe():
        return -1
    rc = send_probe(session)
    return rc if type(rc) is int else -1


def ask_and_listen(engine: Any, session: str) -> int:
    """As ``ask``, but gives CUT_SHORT if the peer takes connections and yet cuts probes short.

    A process that is gone takes no connection, and one that is stopped ends no probe.
    """
    began = time.monotonic()
    rc = ask(engine, session)
    if rc != NO_ANSWER or time.monotonic() - began > _CUT_SHORT_WITHIN_S or not _takes_connections(session):
        return rc
    began = time.monotonic()
    rc = ask(engine, session)  # it may have come back between the two
    return CUT_SHORT if rc == NO_ANSWER and time.monotonic() - began <= _CUT_SHORT_WITHIN_S else rc


def _takes_connections(session: str) -> bool:
    host, _, port = session.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CUT_SHORT_WITHIN_S).close()
    except OSError:
        return False
    return True


class Reads:
    """Four small reads of one peer's memory, begun together. Any one thread at a time."""

    # Four reads of a live peer end after 1 to 20 ms. One that still waits now waits for a connection to be free.
    LATE_S = 0.1

    def __init__(self, check_status: Callable[[int], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._check_status = check_status
        self._clock = clock
        self._begun_at = clock()
        self._pending: list[int] = []
        self._verdict: Optional[Verdict] = None
        self._late = False
        self.why = ""
        self.begun = True  # False while they are being begun
        self.unsure = False  # whether each has ended: the engine gave what it never gives

    @classmethod
    def decided(cls, verdict: Verdict, why: str = "") -> Reads:
        """Reads of which nothing is pending."""
        reads = cls(lambda batch: None)
        reads._verdict, reads.why = verdict, why
        return reads

    def add(self, batch: int) -> None:
        """One more was begun."""
        self._pending.append(batch)

    def waited(self) -> None:
        """One had to wait for a connection before it was begun."""
        self._late = True

    def failed(self, why: str) -> None:
        """One has failed, or could not be begun. The others go on until they end."""
        if self._verdict is None:
            self._verdict, self.why = Verdict.UNREADABLE, why

    def look(self) -> Optional[Verdict]:
        """What is known of them by now, None if that is not yet anything. Takes 1 us a read; hold no lock."""
        looked_at = self._clock()
        self._pending = [batch for batch in self._pending if not self._has_ended(batch)]
        in_time = looked_at - self._begun_at < self.LATE_S
        if self._verdict is None and not self._pending:
            # Late is what was seen pending then. What a busy interpreter has looked at late may have waited or not.
            prompt = Verdict.READABLE if in_time else Verdict.READABLE_UNSEEN
            self._verdict = Verdict.READABLE_LATE if self._late else prompt
        self._late |= not in_time
        return self._verdict

    def has_failed(self) -> bool:
        """True if one has failed, or could not be begun."""
        return self._verdict is Verdict.UNREADABLE

    def have_ended(self) -> bool:
        """True if none is pending: a batch that is must be looked at until it ends, or Mooncake keeps it for good."""
        return not self._pending

    def age_s(self) -> float:
        """Seconds since they were begun."""
        return self._clock() - self._begun_at

    def _has_ended(self, batch: int) -> bool:
        try:
            status = self._check_status(batch)
        except BaseException as error:  # an engine may raise anything
            self.unsure = True
            self.failed(f"reading its memory raised {printable_repr(error)}")
            return True
        if type(status) is int and status in (0, 1):
            return status == 1
        self.failed(f"reading its memory gave {printable_repr(status)}")
        self.unsure |= status not in (_FAILED, _TIMED_OUT)
        return bool(status != _TIMED_OUT)


_FAILED = -1
# Mooncake has given such a batch up and still holds it.
_TIMED_OUT = -2


class MemoryReader:
    """Reads a few bytes of a peer's registered memory into a scratch page of this process, which nobody looks at.

    ``registration(session)`` gives what the peer has registered, an entry of ``decode_kv_args_table`` or None;
    ``page_refused(why)`` is called once if Mooncake does not take the page. Any thread may use it.
    """

    _REGISTER_AGAIN_S = 10.0
    # To begin a read takes 0.1 ms, or as long as Mooncake before 0.3.13 connects: then one is enough for now.
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
        self._lock = threading.Lock()
        self._page: Optional[_Page] = None
        self._closed = False
        self._refused_at = -self._REGISTER_AGAIN_S
        self._refused_why = ""
        # Over RDMA one: there are no four connections, and while it is tried in vain transfers to others wait. Beside
        # four that failed they took 1 to 2.4 s, two devices a node, beside one 25 ms as always.
        self.reads_at_a_time = READS_AT_A_TIME

    def begin(self, session: str) -> Reads:
        """Begins small reads of a peer that has just answered a probe: a read of one that is stopped could hold up
        transfers to live ones for a minute.

        An engine that can only read synchronously has read when this returns. Blocks as long as that takes, or while
        Mooncake (before 0.3.13) connects; hold no lock.
        """
        mooncake = mooncake_engine(self._engine)
        begin_read = getattr(mooncake, "batch_transfer_async_read", None)
        check_status = getattr(mooncake, "transfer_check_status", None)
        read_now = getattr(mooncake, "transfer_sync_read", None)
        can_begin = begin_read is not None and check_status is not None
        address = self._address_of(session)
        if address is None or not (can_begin or read_now):
            return Reads.decided(Verdict.CANNOT_TELL)
        reads = Reads(check_status or (lambda batch: None))
        reads.begun = False
        scratch = self._scratch_for(reads)
        if scratch is None:
            return Reads.decided(Verdict.CANNOT_TELL, self._refused_why)
        if begin_read is None or check_status is None:
            assert read_now is not None
            done = _read_one_by_one(functools.partial(read_now, session, scratch, address, READ_BYTES))
            reads.begun, reads.unsure = True, done.look() is Verdict.UNREADABLE
            return done
        begin = functools.partial(begin_read, session, [scratch], [address], [READ_BYTES])
        goes_on = all(self._begin_one(reads, begin) for _ in range(self.reads_at_a_time))
        if goes_on and self.reads_at_a_time > 1:
            self._fail_until_one_waits(reads, begin)
        reads.begun = True
        return reads

    def _begin_one(self, reads: Reads, begin: Callable[[], Any]) -> bool:
        """Begins one more; False if that is not to be done again now."""
        began = self._clock()
        try:
            batch = begin()
        except BaseException as error:  # an engine may raise anything
            reads.unsure = True
            reads.failed(f"reading its memory raised {printable_repr(error)}")
            return False
        if type(batch) is not int or batch == 0:
            reads.unsure |= batch != 0
            reads.failed(
                "reading its memory was refused" if batch == 0 else f"reading its memory gave {printable_repr(batch)}"
            )
            return False
        reads.add(batch)
        if self._clock() >= began + self._BLOCKS_FROM_S:
            reads.waited()
            return False
        return True

    def _fail_until_one_waits(self, reads: Reads, begin: Callable[[], Any]) -> None:
        """Once each connection to a peer has failed in turn, Mooncake (0.3.13, 0.3.14) fails the next transfer unsent,
        and only then waits for a second and connects anew. That transfer is to be a read of ours: the peer may
        register at any moment, and its first request would be the one to fail.
        """
        for _ in range(self._MOST_FAILED_ON_PURPOSE):
            for pause_s in self._FAILS_WITHIN_S:
                if reads.look() is not None and reads.have_ended():
                    break
                time.sleep(pause_s)
            if not reads.has_failed() or not reads.have_ended() or not self._begin_one(reads, begin):
                return

    def close(self) -> None:
        """Begins no more reads, and takes the registration of the page back unless a read may still write there."""
        with self._lock:
            self._closed = True
            page, self._page = self._page, None
        if page is not None:
            page.leave(mooncake_engine(self._engine))

    def _address_of(self, session: str) -> Optional[int]:
        with contextlib.suppress(Exception):  # addresses of a kind that we do not know
            registration = self._registration(session)
            for name in ("dst_aux_ptrs", "dst_kv_ptrs"):
                addresses = getattr(registration, name, None)
                if addresses is not None and len(addresses) and int(addresses[0]) > 0:
                    return int(addresses[0])
        return None

    def _scratch_for(self, reads: Reads) -> Optional[int]:
        with self._lock:
            may_register = not self._closed and self._clock() >= self._refused_at + self._REGISTER_AGAIN_S
            if self._page is None and may_register:
                self._register_page()
            if self._page is None:
                return None
            self._page.add(reads)
            return self._page.address

    def _register_page(self) -> None:
        was_refused = bool(self._refused_why)
        mooncake = mooncake_engine(self._engine)
        try:
            self._page = _Page.left_at(mooncake)
            if self._page is not None:
                return
            page = _Page.spare.pop() if _Page.spare else _Page()
            rc = mooncake.register_memory(page.address, mmap.PAGESIZE)
            if rc == 0:
                self._page = page
                return
            _Page.spare.append(page)
            self._refused_why = f"Mooncake gave {printable_repr(rc)} when it was to register a page to read into"
        except BaseException as error:  # an engine may raise anything
            self._refused_why = f"Mooncake raised {printable_repr(error)} when it was to register a page to read into"
        self._refused_at = self._clock()
        if not was_refused:
            self._page_refused(self._refused_why)


def _read_one_by_one(read: Callable[[], Any]) -> Reads:
    """Reads four times; the first that fails ends it."""
    began = time.monotonic()
    for _ in range(READS_AT_A_TIME):
        try:
            rc = read()
        except BaseException as error:  # an engine may raise anything
            return Reads.decided(Verdict.UNREADABLE, f"reading its memory raised {printable_repr(error)}")
        if type(rc) is not int or rc != 0:
            return Reads.decided(Verdict.UNREADABLE, f"reading its memory gave {printable_repr(rc)}")
    late = time.monotonic() - began >= Reads.LATE_S
    return Reads.decided(Verdict.READABLE_LATE if late else Verdict.READABLE)


class _Page:
    """Memory that is registered at one engine to read into. It stays as long as the process, because what is taken
    for over may still write there; the next reader gets it.
    """

    spare: ClassVar[list[_Page]] = []
    # Still registered: their readers were closed, and reads may write there.
    _left: ClassVar[list[tuple[Any, _Page]]] = []

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._reads: list[Reads] = []  # those that have not ended, and some that have
        self._abandoned: list[Reads] = []  # those of earlier readers
        self._look_at = 16
        self._unsure = False

    @classmethod
    def left_at(cls, mooncake: Any) -> Optional[_Page]:
        """The page that an earlier reader has left registered at the engine."""
        for place, (engine, page) in enumerate(cls._left):
            if engine is mooncake:
                del cls._left[place]
                return page
        return None

    def add(self, reads: Reads) -> None:
        """Reads that will write here."""
        self._reads.append(reads)
        if len(self._reads) >= self._look_at:
            self._forget_ended()
            self._look_at = max(16, 2 * len(self._reads))

    def leave(self, mooncake: Any) -> None:
        """Has the engine forget the page, if no read may write here any more."""
        for reads in self._abandoned:  # which nobody else looks at
            reads.look()
        self._reads += self._abandoned
        self._forget_ended()
        self._abandoned, self._reads = self._reads, []
        with contextlib.suppress(BaseException):  # an engine may raise anything, and need not have the method
            if not self._abandoned and not self._unsure and mooncake.unregister_memory(self.address) == 0:
                self.spare.append(self)
                return
        self._left.append((mooncake, self))

    def _forget_ended(self) -> None:
        self._unsure |= any(reads.unsure for reads in self._reads)
        self._reads = [reads for reads in self._reads if not (reads.begun and reads.have_ended())]


class PendingReads:
    """Reads under way, and when each is looked at next: soon at first, then at growing gaps. Any thread."""

    _SOONEST_S, _SHARE_OF_AGE, _LATEST_S = 0.001, 0.1, 0.05
    # However many there are, looking takes a few hundredths of a core.
    _S_PER_READS = 0.0002
    # Those that nobody waits for any more are looked at so that Mooncake can let go of them.
    _UNWANTED_LATEST_S = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._looks: list[tuple[float, int, Call, Reads, bool]] = []
        self._ties = itertools.count()

    def add(self, call: Call, reads: Reads) -> None:
        """Reads that a call has begun. They are looked at at once."""
        with self._lock:
            heapq.heappush(self._looks, (0.0, next(self._ties), call, reads, False))

    def look(self, is_wanted: Callable[[Call], bool], most: int = 32) -> list[tuple[Call, Verdict, str]]:
        """Looks at ``most`` of those that are due; gives what is known now and was not before, with the reason."""
        now = self._clock()
        told: list[tuple[Call, Verdict, str]] = []
        with self._lock:
            due: list[tuple[float, int, Call, Reads, bool]] = []
            while self._looks and self._looks[0][0] <= now and len(due) < most:
                due.append(heapq.heappop(self._looks))
            for _, tie, call, reads, was_told in due:
                verdict = reads.look()
                if verdict is not None and not was_told:
                    told.append((call, verdict, reads.why))
                if not reads.have_ended():
                    gap_s = self._gap_s(reads, wanted=verdict is None and is_wanted(call))
                    heapq.heappush(self._looks, (now + gap_s, tie, call, reads, verdict is not None))
        return told

    def next_look_in(self) -> Optional[float]:
        """Seconds until some are to be looked at, None if there are none."""
        with self._lock:
            return max(0.0, self._looks[0][0] - self._clock()) if self._looks else None

    def _gap_s(self, reads: Reads, wanted: bool) -> float:
        latest_s = self._LATEST_S if wanted else self._UNWANTED_LATEST_S
        gap_s = min(max(self._SOONEST_S, self._SHARE_OF_AGE * reads.age_s()), latest_s)
        return max(gap_s, self._S_PER_READS * len(self._looks))
