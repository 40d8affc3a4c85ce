"""Which Prometheus metrics tell what the failed-session probe does?

``prometheus_client`` chooses its storage when it is imported, and SGLang's launcher does so before that is settled.
So it is imported on first use only: in the prefill scheduler, when the first manager starts.
"""

from __future__ import annotations

import threading
from typing import Any, Optional


class LazyCounter:
    """A Prometheus counter without labels that is registered when it is first used. Any thread may use it."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._lock = threading.Lock()
        self._counter: Optional[Any] = None

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            if self._counter is None:
                from prometheus_client import Counter

                self._counter = Counter(self._name, self._documentation)
        return getattr(self._counter, name)


FAILED_SESSION_RECOVERIES = LazyCounter(
    "sglang:failed_session_recoveries_total", "Mooncake sessions let in again after a probe."
)
