"""What have clients lost behind the router? `router_table.py [PAGE] FILE` prints it as a Markdown table.

FILE has one JSON object a line: what `python -m router` has seen of a cell. The table of PAGE, between its markers, is
written anew.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

BEGIN, END = "<!-- make router: the table -->\n", "<!-- the end of the table -->\n"
HEADER = """\
| fault | decode nodes, requests | router, flags | failed | last failure after the heal | slowest answer | \
longest wait for an error | sent to prefill for each request | serves again after the heal |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def table(lines: list[str]) -> str:
    """One row for each cell, those without the patch first, then by fault, those of a killed node last."""
    return "\n".join([HEADER, *map(row, sorted(map(json.loads, lines), key=_order))])


def row(seen: dict[str, Any]) -> str:
    cell, tally, for_good = seen["cell"], seen["tally"], seen["fault_s"] is None
    often = "" if cell["per_s"] == 2 else f", {cell['per_s']:g} a second"
    cells = [
        seen["how"] if for_good else f"{seen['fault_s']:g} s{', dropped' if seen['how'] == 'dropped' else ''}",
        f"{cell['decodes']}, {'streaming' if cell['streaming'] else 'plain'}{often}",
        f"{cell['version']}, {cell['flags']}{'' if cell['patch'] else ', **without the patch**'}",
        f"{tally['failed']} of {tally['requests']}",
        last_failure(tally["last_failure_s"], tally["over"], seen["watch_s"], for_good),
        f"{tally['slowest_served_s']:.1f} s",
        f"{tally['slowest_failed_s']:.1f} s" if tally["failed"] else "-",
        f"{seen['attempts'] / tally['requests']:.1f}",
        "-" if for_good else "not seen" if tally["again_s"] is None else f"{tally['again_s']:.1f} s",
    ]
    return f"| {' | '.join(cells)} |"


def last_failure(after_s: float | None, over: bool, watch_s: float, for_good: bool) -> str:
    if not over:
        return f"not over after {watch_s:g} s"
    if after_s is None:
        return "-"
    return f"{after_s:.1f} s{' (after it)' if for_good else ''}"


def _order(seen: dict[str, Any]) -> tuple[Any, ...]:
    cell = seen["cell"]
    fault = (seen["fault_s"] is None, seen["fault_s"] or 0)
    return (cell["patch"], cell["version"] != "0.3.2", *fault, seen["how"], cell["streaming"], cell["decodes"])


def write(page: pathlib.Path, lines: list[str]) -> None:
    """Put the table in the place of the one that the page has."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(lines)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    *pages, seen = map(pathlib.Path, sys.argv[1:])
    if not seen.exists():
        sys.exit("nothing was played")
    for page in pages:
        write(page, seen.read_text().splitlines())
    print(table(seen.read_text().splitlines()))
