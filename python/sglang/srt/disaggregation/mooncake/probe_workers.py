"""On which threads are probes made, and what do they return?"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Optional

from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.session_probe import Reads


@dataclasses.dataclass(slots=True)
class Answer:
    """How a call ended."""

    call: Call
    rc: Optional[int] = None  # of the probe, None if it raised
    took_s: float = 0.0
    reads: Optional[Reads] = None  # begun because the peer answered
    error: Optional[BaseException] = None


class Workers:
    """Daemon threads that make calls: those that return at once one after another on one thread, because to wake a
    thread costs as much as a refused probe, all others side by side. Start calls from one thread only.
    """

    # Sixteen refused probes take 0.7 ms one after another. A call that still waits by then gets a thread of its own.
    MOST_RETURN_WITHIN_S = 0.002

    def __init__(self, name: str, make: Callable[[Call], Answer], answers: queue.SimpleQueue[Any]) -> None:
        """``make(call)`` runs on the threads, and may raise anything; ``answers`` gets what it returns."""
        self._name = name
        self._make = make
        self._answers = answers
        self._handed_out: queue.SimpleQueue[Optional[Answer]] = queue.SimpleQueue()
        self._waiting: collections.deque[Answer] = collections.deque()  # each thread takes its next call from here
        self._none_waits = threading.Event()
        self._idle = 0
        self._idle_lock = threading.Lock()
        self._closed = False
        self._threads: set[threading.Thread] = set()

    def start(self, calls: Iterable[Call]) -> None:
        """Makes each call. Returns when each has a thread, after MOST_RETURN_WITHIN_S at most; a single one gets it at
        once.
        """
        self._waiting.extend([Answer(call) for call in calls])  # here, because on a thread no memory may be left
        self._none_waits.clear()
        self._start_next()
        if self._waiting:
            self._none_waits.wait(self.MOST_RETURN_WITHIN_S)
        while self._waiting:
            self._start_next()

    def _start_next(self) -> None:
        """Gives the call that has waited longest an idle thread, or a new one."""
        answer = self._next_waiting()
        if answer is None:
            return
        if not self._take_idle(1):
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except Exception as error:  # the process has no thread or no memory left
                answer.error = error
                self._answers.put(answer)
                return
        self._handed_out.put(answer)

    def _next_waiting(self) -> Optional[Answer]:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def release_idle(self, keep: int = 0) -> None:
        """Ends all idle threads but ``keep``."""
        for _ in range(self._take_idle(self._idle - keep)):
            self._handed_out.put(None)

    def _take_idle(self, number: int) -> int:
        """Reserves so many idle threads, or as many as there are; returns how many."""
        with self._idle_lock:
            taken = max(0, min(number, self._idle))
            self._idle -= taken
            return taken

    def close(self) -> None:
        """Ends every thread when it is idle, and waits up to 0.05 s for that. Start no call after this."""
        self._closed = True
        self._handed_out.put(None)
        until = time.monotonic() + 0.05
        for thread in list(self._threads):
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        self._threads.add(threading.current_thread())
        thread = threading.get_native_id()
        answer = self._handed_out.get()
        while answer is not None:
            answer.call.thread = thread
            try:
                made = self._make(answer.call)
            except BaseException as error:  # whatever an engine raises, the next session goes on
                made, answer.error = answer, error
            answer.call.thread = 0
            answer = self._next_waiting()
            if answer is None:
                with self._idle_lock:
                    self._idle += 1  # before the answer, so that whoever gets that can use this thread
            self._answers.put(made)
            del made
            if answer is None:
                self._none_waits.set()
                answer = self._handed_out.get()
        if self._closed:
            self._handed_out.put(None)  # ends the next thread
        self._threads.discard(threading.current_thread())
