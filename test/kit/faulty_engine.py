"""How does a test make a node's own Mooncake engine misbehave, call by call?"""

from __future__ import annotations

import threading
import time
from typing import Any


class Cut(BaseException):
    """What no `except Exception` catches."""


RAISED: dict[str, type[BaseException]] = {
    "RuntimeError": RuntimeError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
    "GeneratorExit": GeneratorExit,
    "Cut": Cut,
}


class FaultyEngine:
    """Mooncake's engine, of which some calls misbehave, for one session or for all. Counts calls. Any thread.

    ``transfer_check_status`` has the session whose read it asks about.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._faults: dict[tuple[str, str | None], tuple[str, Any]] = {}
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._read_from: dict[int, str] = {}  # session by batch; Mooncake gives numbers out anew
        self._lock = threading.Lock()
        self._never = threading.Event()

    def misbehave(self, call: str, how: str, value: Any = None, session: str | None = None) -> None:
        """`how`: "gives" (the value), "raises" (the name of an error), "hangs", "lacks" (no such call), "works", or "is
        slow" (works, and returns so many seconds later).

        A read never ends whose `transfer_check_status` "gives" 0.
        """
        with self._lock:
            self._faults[call, session] = (how, value)

    def calls(self, call: str) -> dict[str, list[int]]:
        """For each session how often the call was begun and how often it came back, whatever it gave."""
        with self._lock:
            return {session: list(counts) for (name, session), counts in self._counts.items() if name == call}

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._engine, name)
        if self._faults.get((name, None), ("works", None))[0] == "lacks":
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            session = self._session_of(name, arguments)
            self._count(name, session, 0)
            try:
                how, value = self._faults.get((name, session)) or self._faults.get((name, None), ("works", None))
                if how == "hangs":
                    self._never.wait()
                if how == "raises":
                    raise RAISED[value]("a fault of the test")
                result = value if how == "gives" else work(*arguments)
                if how == "is slow":
                    time.sleep(value)
                if name == "batch_transfer_async_read" and type(result) is int:
                    self._read_from[result] = session
                return result
            finally:
                self._count(name, session, 1)

        return call

    def _session_of(self, name: str, arguments: tuple[Any, ...]) -> str:
        first = arguments[0] if arguments else ""
        if name == "transfer_check_status":
            return self._read_from.get(first, "")
        return first if isinstance(first, str) else ""

    def _count(self, name: str, session: str, which: int) -> None:
        with self._lock:
            self._counts.setdefault((name, session), [0, 0])[which] += 1


def faulty_engine_of(manager: Any) -> FaultyEngine:
    """The manager's engine as one that can misbehave; from the first time on the manager itself uses it."""
    if not isinstance(manager.engine.engine, FaultyEngine):
        manager.engine.engine = FaultyEngine(manager.engine.engine)
    engine = manager.engine.engine
    assert isinstance(engine, FaultyEngine)
    return engine
