"""How do the results of a case read as tables?

Rows are what the cases give: dicts with plain values. Tables are Markdown with columns in line, to be read as they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, Optional

Row = dict[str, Any]
FAULTS = ["paused", "stopped", "dropped", "rejected"]
NOT_IN_TABLE = ("lags", "per_second")


def of(case: str, rows: list[Row]) -> str:
    """All tables of a case."""
    return TABLES[case](rows)


def table(header: list[str], lines: Iterable[list[Any]]) -> str:
    """A Markdown table. Numbers are to the right, None is a dash."""
    cells = [header, *([in_cell(value) for value in line] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    is_text = [not all(starts_as_number(line[column]) for line in cells[1:]) for column in range(len(header))]
    rule = [("-" * width if text else "-" * (width - 1) + ":") for width, text in zip(widths, is_text, strict=True)]
    padded = [
        [
            value.ljust(width) if text else value.rjust(width)
            for value, width, text in zip(line, widths, is_text, strict=True)
        ]
        for line in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def in_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return " to ".join(map(in_cell, value)) if isinstance(value, list) else str(value)


def starts_as_number(cell: str) -> bool:
    return cell.lstrip(">-")[:1].isdigit() or cell in ("", "-")


def distinct(rows: list[Row], *names: str) -> list[Any]:
    """The values of these columns in the order they come in: tuples, of one name the values themselves."""
    values = (tuple(row[name] for name in names) for row in rows)
    return [value if len(names) > 1 else value[0] for value in dict.fromkeys(values)]


def plain(rows: list[Row]) -> str:
    """All rows as they are."""
    names = [name for name in rows[0] if name not in NOT_IN_TABLE]
    return table(names, ([row[name] for name in names] for row in rows))


def lag(rows: list[Row]) -> str:
    """Per cell what each contender took, and over all cells."""
    contenders = distinct(rows, "contender")
    by_place = {(row["fault"], row["outage_s"], row["hung"], row["contender"]): row for row in rows}
    places = sorted(distinct(rows, "hung", "fault", "outage_s"), key=lambda it: (it[0], FAULTS.index(it[1]), it[2]))
    cells = (
        [fault, outage_s, hung, *(lag_in_cell(by_place.get((fault, outage_s, hung, name))) for name in contenders)]
        for hung, fault, outage_s in places
    )
    return "\n\n".join(
        [
            "Seconds from the heal to the first request that was served: median (worst) of the trials of a cell.",
            table(["fault", "outage s", "hung peers", *contenders], cells),
            "All trials of all cells. A trial over its cap counts as the cap.",
            lag_in_sum(rows),
            "Requests that were lost on the way to the first that was served.",
            table(["contender", "lost"], ([name, sum_of(rows, "lost", contender=name)] for name in contenders)),
            f"Trials that broke and do not count: {sum_of(rows, 'broken_trials', contender='ours')}.",
        ]
    )


def lag_in_cell(row: Optional[Row]) -> str:
    """median (worst), with > before what is over the cap."""
    if row is None or not row["trials"]:
        return "-"
    median, worst = (
        f">{row['cap_s']:g}" if value is None else f"{value:.2f}" for value in (row["median_s"], row["worst_s"])
    )
    return f"{median} ({worst})"


def lag_in_sum(rows: list[Row]) -> str:
    """Median, p90 and worst of all trials, without and with hung peers, and how many times ours that is."""
    lines = []
    for beside, hung in (("none", False), ("8 and 64", True)):
        medians: dict[str, float] = {}
        for name in distinct(rows, "contender"):
            trials = sorted(trials_of([row for row in rows if row["contender"] == name and bool(row["hung"]) == hung]))
            if trials:
                medians[name] = statistics.median(trials)
                ratio = medians[name] / medians["ours"] if medians.get("ours") else None
                spread = [quantile(trials, 0.9), quantile(trials, 0.99), trials[-1]]
                lines.append(
                    [
                        name,
                        beside,
                        len(trials),
                        *(f"{value:.2f}" for value in (medians[name], *spread)),
                        f"{ratio:.1f}" if ratio else None,
                    ]
                )
    return table(
        ["contender", "hung peers", "trials", "median s", "p90 s", "p99 s", "worst s", "median, times ours"], lines
    )


def trials_of(rows: list[Row]) -> list[float]:
    """The lags of all trials; one over its cap is the cap."""
    return [row["cap_s"] if seconds is None else seconds for row in rows for seconds in row["trials"]]


def quantile(ordered: list[float], share: float) -> float:
    """The least value that this share of them does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def sum_of(rows: list[Row], column: str, **where: Any) -> Any:
    return sum(row[column] for row in rows if all(row[name] == value for name, value in where.items()))


def fleet(rows: list[Row]) -> str:
    """All rows, and what their columns mean."""
    return "\n\n".join(
        [
            "Simulated. peak_per_s: probes that the busiest decode rank hears in a second; probes_each: that a decode "
            "rank hears in all;\nlag: from the heal to the re-admission; last_s: from the last heal to the last "
            "re-admission; never: not let in\nat the end; kept_out_s: how long a prefill rank keeps a decode rank out "
            "that is well.",
            plain(rows),
        ]
    )


def lost(rows: list[Row]) -> str:
    """Failed requests by fault and by kind, and the longest time without service."""
    contenders = distinct(rows, "contender")
    by_place = {(row["fault"], row["contender"]): row for row in rows}
    faults = distinct(rows, "fault")

    def lines(value: Callable[[Row], Any]) -> Iterable[list[Any]]:
        return ([fault, *(value(by_place[fault, name]) for name in contenders)] for fault in faults)

    kinds = ["sent", "served", "refused", "lost", "unknown", "failed_after"]
    return "\n\n".join(
        [
            "Failed requests, from the beginning of a fault to the next of that node: refused + lost (+ unknown).",
            table(["fault", *contenders], lines(failed_in_cell)),
            "Of these, failed although the fault was over when they were sent.",
            table(["fault", *contenders], lines(lambda row: row["failed_after"])),
            "Longest time without a served request after a fault was over, seconds.",
            table(["fault", *contenders], lines(lambda row: f"{row['no_service_s']:.2f}")),
            "All requests of the run.",
            table(
                ["contender", *kinds], ([name, *(by_place["all", name][kind] for kind in kinds)] for name in contenders)
            ),
        ]
    )


def failed_in_cell(row: Row) -> str:
    unknown = f" + {row['unknown']}" if row["unknown"] else ""
    return f"{row['refused']} + {row['lost']}{unknown}"


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "lag": lag,
    "lost": lost,
    "hot-path": plain,
    "chunks": plain,
    "watching": plain,
    "fleet": fleet,
}
