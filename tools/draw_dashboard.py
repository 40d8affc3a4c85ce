"""What does the dashboard show of a fleet with faults? Draws docs/plots/dashboard.png; this is not Grafana's rendering.

    $(python3 tools/environment.py bench) tools/draw_dashboard.py [FILE]

Real prefill nodes get a fault each, a real Prometheus scrapes them, and every query of
deploy/grafana/failed-sessions.json is drawn with matplotlib. Needs root, for a network namespace. Two minutes.
"""

from __future__ import annotations

import math
import pathlib
import sys
import tempfile
import time
from typing import Any

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT / folder) for folder in ("test", "python")]

import matplotlib  # noqa: E402
import prometheus  # noqa: E402
from kit import deployed  # noqa: E402
from kit.monitored_fleet import Fleet, faults, fleet  # noqa: E402
from kit.network import Network  # noqa: E402
from kit.waiting import wait_until  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

WELL_S, FAULTY_S, HEALED_S = 10, 40, 30
STEP_S = 0.5
COLUMNS = 24  # of Grafana's grid


class Picture:
    """The series that a panel's queries gave, drawn where Grafana puts the panel."""

    def __init__(self, all_nodes: Fleet, began: float) -> None:
        self._prometheus = all_nodes.prometheus
        self._names = {instance: name for name, instance in all_nodes.instances.items()}
        self._began, self._ended = began, time.time()

    def draw(self, file: pathlib.Path) -> None:
        """Draws all panels."""
        panels = deployed.dashboard()["panels"]
        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
        figure = pyplot.figure(figsize=(16, rows * 0.42), layout="constrained")
        grid = figure.add_gridspec(rows, COLUMNS)
        seconds = round(self._ended - self._began)
        queries = iter(deployed.queries(rate_interval="4s", time_range=f"{seconds}s"))
        for panel in panels:
            place = panel["gridPos"]
            axes = figure.add_subplot(grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]])
            axes.set_title(panel["title"], fontsize=10, loc="left")
            self._draw_panel(axes, panel, [next(queries) for _ in panel["targets"]])
        figure.savefig(file, dpi=80)

    def _draw_panel(self, axes: Any, panel: Any, queries: list[deployed.Query]) -> None:
        if panel["type"] == "stat":
            texts = [self._stat(query, panel["fieldConfig"]["defaults"]["decimals"]) for query in queries]
            axes.text(0.5, 0.45, "     ".join(texts), ha="center", va="center", fontsize=20)
            axes.set_axis_off()
        elif panel["type"] == "table":
            self._table(axes, queries)
        elif panel["type"] == "heatmap":
            self._heatmap(axes, queries[0])
        elif panel["type"] == "state-timeline":
            self._states(axes, queries[0])
        else:
            for query in queries:
                for label, times, values in self._series(query):
                    axes.plot(times, values, ".-", markersize=3, linewidth=1, label=label)
            axes.set_ylabel({"s": "seconds", "reqps": "per second"}.get(panel["fieldConfig"]["defaults"]["unit"], ""))
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=6, loc="upper left")
            axes.set_xlim(0, self._ended - self._began)

    def _stat(self, query: deployed.Query, decimals: int) -> str:
        (series,) = self._prometheus.query(query.promql)
        unit = " s" if query.legend else ""
        return f"{query.legend} {float(series['value'][1]):.{decimals}f}{unit}".strip()

    def _series(self, query: deployed.Query) -> list[tuple[str, list[float], list[float]]]:
        found = []
        for series in self._prometheus.query_range(query.promql, self._began, self._ended, STEP_S):
            points = [(moment - self._began, float(value)) for moment, value in series["values"]]
            points = [point for point in points if not math.isnan(point[1])]
            found.append((self._label(query, series["metric"]), [x for x, _ in points], [y for _, y in points]))
        return found

    def _label(self, query: deployed.Query, labels: dict[str, str]) -> str:
        text = query.legend
        for name, value in labels.items():
            text = text.replace(f"{{{{{name}}}}}", self._names.get(value, value))
        return text

    def _table(self, axes: Any, queries: list[deployed.Query]) -> None:
        columns = []
        for query in queries:
            series = self._prometheus.query(query.promql)
            columns.append({self._names[each["metric"]["instance"]]: float(each["value"][1]) for each in series})
        nodes = sorted(columns[0], key=lambda node: -columns[0][node])
        cells = [[node, *(f"{column.get(node, 0):.0f}" for column in columns)] for node in nodes]
        titles = ["prefill node", "put on the blacklist", "let in again", "blacklisted now"]
        axes.table(cells, colLabels=titles, loc="center", cellLoc="left").scale(1, 1.3)
        axes.set_axis_off()

    def _heatmap(self, axes: Any, query: deployed.Query) -> None:
        series = sorted(self._series(query), key=lambda each: float(each[0].replace("+Inf", "inf")))
        below = [0.0] * len(series[0][2])
        rows = []
        for _, _, values in series:  # each bucket counts those below it too
            rows.append([max(0.0, value - less) for value, less in zip(values, below, strict=True)])
            below = values
        axes.pcolormesh(series[0][1], range(len(rows)), rows, cmap="Oranges", shading="nearest")
        axes.set_yticks(range(len(rows)), [label for label, _, _ in series], fontsize=6)
        axes.set_ylabel("no longer than, seconds")
        axes.set_xlim(0, self._ended - self._began)

    def _states(self, axes: Any, query: deployed.Query) -> None:
        lines = sorted(self._series(query), key=lambda each: each[0].rsplit(" ", 1))
        names = sorted({label.rpartition(" ")[0] for label, _, _ in lines})
        for label, times, _ in lines:
            name, _, state = label.rpartition(" ")
            colour = {"pending": "gold", "firing": "firebrick"}[state]
            axes.plot(times, [names.index(name)] * len(times), "s", color=colour, markersize=3)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_xlim(0, self._ended - self._began)
        axes.set_xlabel("seconds; a minute of an alert is a second here")


def main(file: pathlib.Path) -> None:
    """Plays the faults and draws."""
    programs = prometheus.folder()
    with tempfile.TemporaryDirectory() as name, Network() as network:
        folder = pathlib.Path(name)
        with fleet(network, programs / "prometheus", folder, deployed.sixty_times_as_fast) as all_nodes:
            began = time.time()
            wait_until(lambda: False, WELL_S)
            with faults(all_nodes, network, folder):
                wait_until(all_nodes.flap, FAULTY_S, every_s=0.25)
            wait_until(lambda: False, HEALED_S)
            Picture(all_nodes, began).draw(file)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else CHECKOUT / "docs" / "plots" / "dashboard.png"))
