"""How does a demo look to the person who watches it? A timeline, a live status line while it waits, a closing table."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

_BOLD, _GREEN, _RED, _DIM, _PLAIN = "\033[1m", "\033[32m", "\033[31m", "\033[2m", "\033[0m"
_REDRAW_S = 0.1


class Timeline:
    """Prints what happens, each line with the seconds since the beginning. A Report of the scenario.

    Colours and the status line are for terminals; elsewhere the same lines come plain.
    """

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._coloured = self._live and "NO_COLOR" not in os.environ
        self._started = time.monotonic()
        self._drawn = 0.0

    def heading(self, text: str) -> None:
        """Begin a part of the story."""
        self._line(f"\n{self._in(_BOLD, text)}")

    def event(self, who: str, what: str) -> None:
        """Print a line of the timeline."""
        colour = _RED if "FAILED" in what or "SIGSTOP" in what else _GREEN if "served" in what else ""
        self._line(f"{self._in(_DIM, f'{self._passed():7.1f} s')}  {who:<10}  {self._in(colour, what)}")

    def status(self, what: str) -> None:
        """Say what is being waited for, in one line that the next line replaces."""
        if self._live and time.monotonic() - self._drawn > _REDRAW_S:
            self._drawn = time.monotonic()
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\033[K" + self._in(_DIM, f"{self._passed():7.1f} s  ... {what}"[:width]))
            self._stream.flush()

    def table(self, on: Mapping[str, str], off: Mapping[str, str]) -> None:
        """Print the cells of both outcomes side by side, under one label each."""
        rows = [["", "with the feature", "without"], *([label, on[label], off[label]] for label in on)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        self._line("\n" + self._in(_BOLD, lines[0]))
        for line in ("  ".join("-" * width for width in widths), *lines[1:]):
            self._line(line)

    def verdict(self, problems: Sequence[str]) -> None:
        """Print what was not seen, or that all of it was."""
        for problem in problems:
            self._line(self._in(_RED, problem))
        if not problems:
            self._line("\n" + self._in(_GREEN, f"All of it was seen, in {self._passed():.0f} s."))

    def note(self, text: str) -> None:
        """Print lines that are not part of the story."""
        self._line(f"\n{text}")

    def _passed(self) -> float:
        return time.monotonic() - self._started

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._coloured and colour else text

    def _line(self, text: str) -> None:
        print(("\r\033[K" if self._live else "") + text, file=self._stream, flush=True)
