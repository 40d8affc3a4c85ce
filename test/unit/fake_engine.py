"""What does a Mooncake engine look like to us, if it is a Python object whose peers do what a test tells them?"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any

REFUSED = -102


class Engine:
    """A Mooncake engine. What its peers do is an rc, or a function that gives one."""

    def __init__(self, *, probe: Any = 0, read: Any = 0, transfer: Any = 0) -> None:
        self.probe: dict[str, Any] = collections.defaultdict(lambda: probe)
        self.read: Any = read
        self.transfer: Any = transfer
        self.asked: list[str] = []
        self.reads: list[tuple[Any, ...]] = []
        self.asked_something = threading.Event()
        self.goes_on = threading.Event()  # what `hang` waits for
        self.manager: Any = None
        self.asked_under_lock: list[str] = []

    def hang(self) -> int:
        """The probe of a stopped peer: it returns when the test is through."""
        self.goes_on.wait(30)
        return REFUSED

    def send_probe(self, session: str) -> Any:
        self._look_at_the_lock("send_probe")
        self.asked.append(session)
        self.asked_something.set()
        return result_of(self.probe[session])

    def transfer_sync_read(self, *read: Any) -> Any:
        self._look_at_the_lock("transfer_sync_read")
        self.reads.append(read)
        return result_of(self.read)

    def batch_transfer_sync(self, *transfer: Any) -> Any:
        self._look_at_the_lock("batch_transfer_sync")
        return result_of(self.transfer)

    def register_memory(self, address: int, length: int) -> int:
        self._look_at_the_lock("register_memory")
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
