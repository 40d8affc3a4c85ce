"""What does a Mooncake engine look like to us, if it is a Python object whose peers do what a test tells them?"""

from __future__ import annotations

import collections
import itertools
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.disaggregation.mooncake.session_probe import NO_ANSWER as REFUSED

PENDING = "pending"


class Engine:
    """A Mooncake engine. What its peers do is an rc, or a function that gives one.

    ``read`` is what becomes of a read, be it 0, PENDING, or anything else. A synchronous one that is pending hangs.
    """

    def __init__(
        self, *, probe: Any = 0, read: Any = 0, transfer: Any = 0, reads_are: Iterable[str] = ("async", "sync")
    ) -> None:
        self.probe: dict[str, Any] = collections.defaultdict(lambda: probe)
        self.read: Any = read
        self.transfer: Any = transfer
        self.registers: Any = 0
        self.asked: list[str] = []
        self.reads: list[tuple[Any, ...]] = []
        self.registered: list[tuple[int, int]] = []
        self.deregistered: list[int] = []
        self.batches: set[int] = set()  # begun and not yet seen to have ended: Mooncake keeps each of them
        self.looked_at_too_often: list[int] = []  # after their end: Mooncake has let go of them
        self.asked_something = threading.Event()
        self.goes_on = threading.Event()  # what `hang` waits for
        self.manager: Any = None
        self.asked_under_lock: list[str] = []
        self._ids = itertools.count(1)
        if "async" not in reads_are:
            self.batch_transfer_async_read = self.transfer_check_status = None
        if "sync" not in reads_are:
            self.transfer_sync_read = None

    def hang(self) -> int:
        """The probe of a stopped peer: it returns when the test is through. Nothing can end it."""
        self.goes_on.wait(30)
        return REFUSED

    def send_probe(self, session: str) -> Any:
        self._look_at_the_lock("send_probe")
        self.asked.append(session)
        self.asked_something.set()
        return result_of(self.probe[session])

    def batch_transfer_async_read(self, session: str, local: Any, remote: Any, lengths: Any) -> Any:
        self._look_at_the_lock("batch_transfer_async_read")
        self.reads += zip(itertools.repeat(session), local, remote, lengths, strict=False)
        batch = next(self._ids)
        self.batches.add(batch)
        return batch

    def transfer_check_status(self, batch: int) -> Any:
        self._look_at_the_lock("transfer_check_status")
        if batch not in self.batches:
            self.looked_at_too_often.append(batch)
        read = result_of(self.read)
        status = 1 if read == 0 and type(read) is int else 0 if read is PENDING else read
        if status in (1, -1):
            self.batches.discard(batch)
        return status

    def transfer_sync_read(self, *read: Any) -> Any:
        self._look_at_the_lock("transfer_sync_read")
        self.reads.append(read)
        rc = result_of(self.read)
        return self.hang() if rc is PENDING else rc

    def batch_transfer_sync(self, *transfer: Any) -> Any:
        self._look_at_the_lock("batch_transfer_sync")
        return result_of(self.transfer)

    def register_memory(self, address: int, length: int) -> Any:
        self._look_at_the_lock("register_memory")
        self.registered.append((address, length))
        return result_of(self.registers)

    def unregister_memory(self, address: int) -> int:
        self._look_at_the_lock("unregister_memory")
        self.deregistered.append(address)
        return 0

    def batch_register(self, addresses: list[int], lengths: list[int]) -> int:
        return 0

    def batch_deregister(self, addresses: list[int]) -> int:
        return 0

    def _look_at_the_lock(self, call: str) -> None:
        lock = getattr(self.manager, "session_lock", None)
        if lock is not None:
            if lock.acquire(timeout=1):
                lock.release()
            else:
                self.asked_under_lock.append(call)


def result_of(behaviour: Any) -> Any:
    return behaviour() if callable(behaviour) else behaviour


def raises(error: BaseException) -> Callable[[], int]:
    def behaviour() -> int:
        raise error

    return behaviour


def waits_for_a_reply_of(session: str) -> Callable[[], int]:
    """A probe as Mooncake sends it: it connects, and waits in the kernel for what the peer says."""

    def behaviour() -> int:
        host, _, port = session.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port))) as connection:
                return 0 if connection.recv(1) else REFUSED
        except OSError:
            return REFUSED

    return behaviour
