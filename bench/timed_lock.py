"""How long is session_lock held? A lock that notes it."""

from __future__ import annotations

import threading
import time


class TimedLock:
    """A lock that counts the time of the thread that holds it, not what others took meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = 0
        self._held_ns = self._longest_ns = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._began = time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        held_ns = time.thread_time_ns() - self._began
        self._held_ns += held_ns
        self._longest_ns = max(self._longest_ns, held_ns)
        self._lock.release()

    def take(self) -> dict[str, float]:
        """Microseconds it was held since the last time, all holds and the longest."""
        with self._lock:
            taken = {"held_us": self._held_ns / 1000, "longest_us": self._longest_ns / 1000}
            self._held_ns = self._longest_ns = 0
        return taken
