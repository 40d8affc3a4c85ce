"""How does a command show a table or JSON, once or again and again?"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Container, Sequence
from typing import Optional

from sglang_failed_session_probe.printable import printable_repr

WATCH_S = 2.0
LEAST_S = 1.0
LONGEST_CELL = 200
RED, YELLOW = 31, 33


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watch",
        nargs="?",
        metavar="SECONDS",
        type=_seconds,
        const=WATCH_S,
        help=f"again every {WATCH_S:g} s, or that many",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table, a line each time")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST_S <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{printable_repr(text)} is not a number of seconds from {LEAST_S:g} to 86400")
    return seconds


def aligned(rows: Sequence[Sequence[str]], to_the_right: Container[int]) -> list[str]:
    """A line for each row, with aligned columns; the last cell of a row may have any length."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for *cells, last in rows:
        padded = [
            cell.rjust(width) if column in to_the_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=False))
        ]
        lines.append("  ".join([*padded, last]))
    return lines


def coloured(text: str, colour: Optional[int]) -> str:
    """The text in that colour, if standard output is a terminal and NO_COLOR is not set."""
    if not colour or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def show(lines: list[str], watching: bool) -> None:
    """Prints the lines; when watching with the time above them and, on a terminal, in place of those before."""
    if not watching:
        print("\n".join(lines))
        return
    lines = [time.strftime("%H:%M:%S"), *lines]
    if sys.stdout.isatty():  # moves to the top, overwrites what was there and erases the rest
        print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
    else:
        print("\n".join(lines) + "\n", flush=True)


def show_json(rows: list[dict[str, object]]) -> None:
    print(json.dumps(rows), flush=True)
