"""What did each injected fault cost? `fault_table.py FILE` prints what tests wrote to FAULT_REPORT as a Markdown table.

FILE has one JSON object a line: fault, how, lost, served_after_s (null: never served).
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import statistics
import sys
from typing import Any

HEADER = """\
| fault | how injected | times | requests lost | served again after, median | worst |
| --- | --- | ---: | ---: | ---: | ---: |"""


def table(lines: list[str]) -> str:
    """One row for each kind of fault, in alphabetical order."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for line in lines:
        record = json.loads(line)
        kinds[record["fault"], record["how"]].append(record)
    return "\n".join([HEADER, *(row(fault, how, kinds[fault, how]) for fault, how in sorted(kinds))])


def row(fault: str, how: str, records: list[dict[str, Any]]) -> str:
    waits = [math.inf if record["served_after_s"] is None else record["served_after_s"] for record in records]
    lost = sum(record["lost"] for record in records)
    cells = [fault, how, str(len(records)), str(lost), seconds(statistics.median(waits)), seconds(max(waits))]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def seconds(duration_s: float) -> str:
    return "never" if math.isinf(duration_s) else f"{duration_s:.2f} s"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(pathlib.Path(sys.argv[1]).read_text().splitlines()))
