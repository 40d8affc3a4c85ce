"""How do the results look as plots?

Draws with matplotlib, which only this file needs: PNG files, one for each question.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench import tables

Row = dict[str, Any]
COLORS = {
    "ours": "#0b6e4f",
    "native 0.5.23": "#c8553d",
    "fixed 30 s": "#588b8b",
    "tight loop": "#888888",
    "backoff 30 to 300 s": "#c8553d",
}
DOTS_PER_INCH = 110


def draw(case: str, rows: list[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """The plots of a case, as files in the folder; none for a case that has no plots."""
    folder.mkdir(parents=True, exist_ok=True)
    return [plot(rows, folder) for plot in PLOTS.get(case, [])]


def style(contender: str) -> dict[str, Any]:
    return {"color": COLORS.get(contender), "linestyle": ":" if contender == "tight loop" else "-"}


def save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    figure.savefig(path, dpi=DOTS_PER_INCH, bbox_inches="tight")
    pyplot.close(figure)
    return path


def lag(rows: list[Row], folder: pathlib.Path) -> pathlib.Path:
    """Lag against outage, a panel for each fault, the medians as lines and all trials between their ends."""
    alone = [row for row in rows if not row["hung"] and row["trials"]]
    faults = [fault for fault in ("stopped", "dropped", "rejected") if fault in tables.distinct(alone, "fault")]
    figure, panels = pyplot.subplots(1, len(faults), figsize=(5 * len(faults), 4.2), sharey=True, squeeze=False)
    for panel, fault in zip(panels[0], faults, strict=True):
        for contender in tables.distinct(alone, "contender"):
            mine = [row for row in alone if row["contender"] == contender and is_shown_with(row, fault)]
            draw_lags(panel, sorted(mine, key=lambda row: row["outage_s"]), "outage_s", contender)
        panel.set(xscale="log", yscale="log", xlabel="outage, seconds", title=fault)
        outages = sorted({row["outage_s"] for row in alone if is_shown_with(row, fault)})
        panel.set_xticks(outages, [f"{outage_s:g}" for outage_s in outages])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("from the heal to the first served request, seconds")
    panels[0][0].legend(fontsize=8)
    figure.suptitle("Recovery lag: median, least and most of the trials; a triangle: over what was waited for")
    return save(figure, folder / "lag.png")


def is_shown_with(row: Row, fault: str) -> bool:
    """A pause is a short stop."""
    return row["fault"] == fault or (fault == "stopped" and row["fault"] == "paused")


def draw_lags(panel: Any, rows: list[Row], column: str, contender: str) -> None:
    """One contender's line, its spread, and triangles where the median is over the cap."""
    across = [row[column] for row in rows]
    trials = [tables.trials_of([row]) for row in rows]
    medians = [row["cap_s"] if row["median_s"] is None else row["median_s"] for row in rows]
    panel.plot(across, medians, marker="o", markersize=3, label=contender, **style(contender))
    panel.fill_between(across, list(map(min, trials)), list(map(max, trials)), color=COLORS.get(contender), alpha=0.15)
    over = [(x, row["cap_s"]) for x, row in zip(across, rows, strict=True) if row["median_s"] is None]
    if over:
        panel.plot(*zip(*over, strict=True), "^", color=COLORS.get(contender), markersize=8)


def lag_beside_hung(rows: list[Row], folder: pathlib.Path) -> pathlib.Path:
    """Lag against the number of hung peers, a panel for each outage that was tried with them."""
    outages = sorted({row["outage_s"] for row in rows if row["hung"] and row["trials"]})
    figure, panels = pyplot.subplots(
        1, max(1, len(outages)), figsize=(5 * max(1, len(outages)), 4.2), sharey=True, squeeze=False
    )
    for panel, outage_s in zip(panels[0], outages, strict=False):
        stopped = [row for row in rows if row["fault"] == "stopped" and row["outage_s"] == outage_s and row["trials"]]
        for contender in tables.distinct(stopped, "contender"):
            mine = [row for row in stopped if row["contender"] == contender]
            draw_lags(panel, sorted(mine, key=lambda row: row["hung"]), "hung", contender)
        panel.set_xscale("symlog", linthresh=8)
        numbers = sorted({row["hung"] for row in stopped})
        panel.set_xticks(numbers, list(map(str, numbers)))
        panel.set(yscale="log", xlabel="hung peers on the same blacklist", title=f"stopped for {outage_s:g} s")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("from the heal to the first served request, seconds")
    if outages:
        panels[0][0].legend(fontsize=8)
    return save(figure, folder / "lag_beside_hung_peers.png")


def lost(rows: list[Row], folder: pathlib.Path) -> pathlib.Path:
    """Failed requests of each contender, by fault."""
    faults = [fault for fault in tables.distinct(rows, "fault") if fault != "all"]
    contenders = tables.distinct(rows, "contender")
    figure, panel = pyplot.subplots(figsize=(9, 0.55 * len(faults) + 1.5))
    height = 0.8 / len(contenders)
    for number, contender in enumerate(contenders):
        by_fault = {row["fault"]: row for row in rows if row["contender"] == contender}
        failed = [sum(by_fault[fault][kind] for kind in ("refused", "lost", "unknown")) for fault in faults]
        places = [place + number * height for place in range(len(faults))]
        panel.barh(places, failed, height, label=contender, color=COLORS.get(contender))
    panel.set_yticks([place + 0.4 - height / 2 for place in range(len(faults))], faults, fontsize=7)
    panel.invert_yaxis()
    panel.set(xscale="symlog", xlabel="failed requests until the next fault of that node")
    panel.grid(axis="x", alpha=0.3)
    panel.legend(fontsize=8)
    return save(figure, folder / "lost.png")


def per_scenario(rows: list[Row]) -> tuple[Any, list[tuple[Any, str, list[Row]]]]:
    """A figure with a panel for each scenario, and with it the scenario's name and rows."""
    names = tables.distinct(rows, "scenario")
    figure, panels = pyplot.subplots((len(names) + 1) // 2, 2, figsize=(12, 3 * ((len(names) + 1) // 2)), squeeze=False)
    flat = list(itertools.chain(*panels))
    for panel in flat[len(names) :]:
        panel.axis("off")
    figure.subplots_adjust(hspace=0.45)
    return figure, [
        (panel, name, [row for row in rows if row["scenario"] == name])
        for panel, name in zip(flat, names, strict=False)
    ]


def fleet_probes(rows: list[Row], folder: pathlib.Path) -> pathlib.Path:
    """Probes that the busiest peer hears in each second."""
    figure, panels = per_scenario(rows)
    for panel, name, mine in panels:
        for row in mine:
            seconds = {int(second): probes for second, probes in row["per_second"].items()}
            across = range(max(seconds, default=0) + 2)
            heard = [seconds.get(second, 0) for second in across]
            panel.plot(across, heard, label=row["contender"], linewidth=1, **style(row["contender"]))
        panel.set_title(name, fontsize=9)
        panel.set_yscale("symlog", linthresh=1)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.set_xlabel("seconds", fontsize=8)
        panel.set_ylabel("probes in a second", fontsize=8)
    panels[0][0].legend(fontsize=8)
    figure.suptitle("What the busiest peer hears from all prefill ranks (simulated)", y=0.95)
    return save(figure, folder / "fleet_probes.png")


def fleet_lag(rows: list[Row], folder: pathlib.Path) -> pathlib.Path:
    """How many of the sessions were let in within so many seconds of the heal."""
    figure, panels = per_scenario(rows)
    for panel, name, mine in panels:
        for row in mine:
            lags = row["lags"]
            shares = [100 * (number + 1) / len(lags) for number in range(len(lags))]
            panel.step([max(lag, 0.01) for lag in lags], shares, label=row["contender"], **style(row["contender"]))
        panel.set_title(name, fontsize=9)
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
        panel.set_xlabel("seconds after the heal", fontsize=8)
        panel.set_ylabel("let in again, %", fontsize=8)
    panels[0][0].legend(fontsize=8)
    figure.suptitle("How late a healed peer is let in (simulated)", y=0.95)
    return save(figure, folder / "fleet_lag.png")


PLOTS: dict[str, list[Callable[[list[Row], pathlib.Path], pathlib.Path]]] = {
    "lag": [lag, lag_beside_hung],
    "lost": [lost],
    "fleet": [fleet_probes, fleet_lag],
}
