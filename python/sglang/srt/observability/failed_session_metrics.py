"""Which Prometheus metrics tell what the failed-session probe does?

``prometheus_client`` chooses its storage when it is imported, and SGLang's launcher does so before that is settled.
So it is imported on first use only: in the prefill scheduler, when the first manager starts.
"""

from __future__ import annotations

import functools
from typing import Any


class LazyCounter:
    """A Prometheus counter without labels that is registered when it is first used. Any thread may use it."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation

    @functools.cached_property
    def _counter(self) -> Any:
        from prometheus_client import Counter

        return Counter(self._name, self._documentation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._counter, name)


FAILED_SESSION_RECOVERIES = LazyCounter(
    "sglang:failed_session_recoveries_total", "Mooncake sessions let in again after a probe."
)
