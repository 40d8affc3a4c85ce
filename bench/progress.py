"""Where do the cases say how far they are?"""

from __future__ import annotations

import sys
import time

_began = time.monotonic()


def say(case: str, text: str) -> None:
    """A line on stderr, with the minutes and seconds since this process began."""
    minutes, seconds = divmod(int(time.monotonic() - _began), 60)
    for line in text.splitlines():
        print(f"{case:>8} {minutes:02d}:{seconds:02d}  {line}", file=sys.stderr, flush=True)
