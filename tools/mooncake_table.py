"""Which versions of Mooncake recover together? `mooncake_table.py PAGE FILE` writes the table that ends PAGE.

FILE has one JSON object a line, what test/mooncake_versions has seen of a pair.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

HEADER = """\
| prefill | decode | a request | decode stopped | both ports shut | who registers | data port shut | what prefill logs |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
# As an operator greps for them.
PHRASES = (
    "cannot probe",
    "stays out until it registers again",
    "takes connections but cuts every probe short",
    "recovered via probe",
)


def row(seen: dict[str, Any]) -> str:
    said = "\n".join(seen["said_at_start"] + seen["said"])
    cells = [
        seen["prefill"],
        seen["decode"],
        seen["request"] if seen["request"] in ("served", "fails") else f"**{seen['request']}**",
        after(seen["while_stopped"], seen["let_in_after_stop_s"], seen["request_after_stop"]),
        after(seen["while_rejected"], seen["let_in_after_s"], seen["request_after"]),
        seen["request_with_registration"],
        seen["while_data_port_is_shut"]
        and f"{seen['while_data_port_is_shut']}, {seen['request_after_shut_data_port']}",
        "; ".join(f"`{phrase}`" for phrase in PHRASES if phrase in said),
    ]
    return f"| {' | '.join(cell or '-' for cell in cells)} |"


def after(during: str | None, let_in_after_s: float | None, then: str | None) -> str:
    """What became of the request during a fault, when the session was let in after it, and of the next request."""
    if during == "success":
        return f"**not noticed**, {then}"
    if during != "fails":
        return during or ""
    return f"fails, {f'{let_in_after_s:.1f} s, {then}' if let_in_after_s is not None else '**stays out**'}"


def by_version(seen: dict[str, Any]) -> list[list[int]]:
    return [[int(number) for number in re.findall(r"\d+", seen[side])] for side in ("prefill", "decode")]


def write(page: pathlib.Path, lines: list[str]) -> None:
    """Put a row for each pair into the table, the newest versions first."""
    prose = page.read_text().partition(HEADER)[0]
    pairs = sorted((json.loads(line) for line in lines), key=by_version, reverse=True)
    page.write_text("\n".join([prose + HEADER, *map(row, pairs), ""]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    page, seen = map(pathlib.Path, sys.argv[1:])
    if not seen.exists():
        sys.exit(f"{page} is left as it is: no pair was played, it takes network namespaces (run it as root)")
    write(page, seen.read_text().splitlines())
