"""How did a request end, and how is it waited for while something else goes on?"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from .processes import Failure


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a request ended: served or not, what the client was told, and after how many seconds."""

    served: bool
    text: str
    seconds: float = 0.0


class Pending:
    """A request that is on its way on a daemon thread of its own; `work` gives served and text."""

    def __init__(self, work: Callable[[], tuple[bool, str]]) -> None:
        self._answer: Answer | None = None
        self._failure: Failure | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], tuple[bool, str]]) -> None:
        started = time.monotonic()
        try:
            served, text = work()
        except Failure as failure:
            self._failure = failure
            return
        except Exception as error:
            served, text = False, f"{type(error).__name__}: {error}"
        self._answer = Answer(served, text, time.monotonic() - started)

    def wait(self, seconds: float) -> Answer | None:
        """The answer, or None if there is none within `seconds`. Raises what `work` raised if that is a Failure."""
        self._thread.join(seconds)
        if self._failure:
            raise self._failure
        return self._answer
