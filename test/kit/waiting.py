"""How do tests wait for what happens in its own time?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], within_s: float = 5.0, every_s: float = 0.002) -> bool:
    """Looks every ``every_s`` seconds until the condition holds; False if it does not within ``within_s``."""
    deadline = time.monotonic() + within_s
    while not (holds := bool(condition())) and time.monotonic() < deadline:
        time.sleep(every_s)
    return holds
