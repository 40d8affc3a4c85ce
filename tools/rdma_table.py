"""What did faults over RDMA cost? `rdma_table.py PAGE FILE` writes the table that ends PAGE.

FILE has one JSON object a line: what a trial of test/rdma has seen.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import sys
from typing import Any

CONTENDERS = ["this patch", "the limit: reads by hand", "release 0.1.0", "one answer every 30 s"]
HEADER = f"""\
| fault | devices, sessions | `MC_TRANSFER_TIMEOUT` | {" | ".join(CONTENDERS)} |
| --- | --- | ---: | {" | ".join("---" for _ in CONTENDERS)} |"""


def table(lines: list[str]) -> str:
    """One row for each kind of fault, in the order in which they were played."""
    kinds: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for line in lines:
        trial = json.loads(line)
        kind = (trial["fault"], trial["devices"], len(trial["sessions"]), trial["timeout_s"])
        kinds.setdefault(kind, {}).setdefault(trial["contender"], []).append(trial["sessions"])
    return "\n".join([HEADER, *(row(kind, seen) for kind, seen in kinds.items())])


def row(kind: tuple[Any, ...], seen: dict[str, list[Any]]) -> str:
    fault, devices, sessions, timeout_s = kind
    cells = [fault, f"{devices}, {sessions}", f"{timeout_s}", *(cell(seen.get(name, [])) for name in CONTENDERS)]
    return f"| {' | '.join(cells)} |"


def cell(trials: list[Any]) -> str:
    """The median and the worst wait of all sessions, and the requests lost during the fault and after it."""
    if not trials:
        return ""
    sessions = [session for trial in trials for session in trial]
    waits = [math.inf if each["served_after_s"] is None else each["served_after_s"] for each in sessions]
    waited = seconds(statistics.median(waits)) + (f", worst {seconds(max(waits))}" if len(waits) > 1 else "")
    lost = [sum(each[name] for each in sessions) for name in ("lost_before_heal", "lost_after_heal")]
    return f"{waited}; {lost[0]} + {lost[1]}"


def seconds(duration_s: float) -> str:
    return "not served" if math.isinf(duration_s) else f"{duration_s:.1f} s"


def write(page: pathlib.Path, lines: list[str]) -> None:
    """Put the table in the place of the one that the page has."""
    page.write_text(page.read_text().partition(HEADER.partition("\n")[0])[0] + table(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    page, seen = map(pathlib.Path, sys.argv[1:])
    if not seen.exists():
        sys.exit(f"{page} is left as it is: no fault was played")
    write(page, seen.read_text().splitlines())
