"""What is in deploy/: the rule files, the queries of the dashboard, and the names of metrics that they use?"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from kit.paths import CHECKOUT

DEPLOY = CHECKOUT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
RECORDING = DEPLOY / "prometheus" / "recording.yml"
RULE_TESTS = sorted((DEPLOY / "prometheus" / "tests").glob("*.yml"))
DASHBOARD = DEPLOY / "grafana" / "failed-sessions.json"


@dataclasses.dataclass(frozen=True)
class Query:
    """One query of a panel, with Grafana's variables filled in."""

    panel: str
    kind: str
    legend: str
    promql: str


def dashboard() -> Any:
    """The dashboard, as JSON."""
    return json.loads(DASHBOARD.read_text())


def queries(job: str = ".*", instance: str = ".*", rate_interval: str = "5s", time_range: str = "5m") -> list[Query]:
    """All queries of the dashboard, in its order."""
    values = {"$job": job, "$instance": instance, "$__rate_interval": rate_interval, "$__range": time_range}
    found = []
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            promql = target["expr"]
            for variable, value in values.items():
                promql = promql.replace(variable, value)
            found.append(Query(panel["title"], panel["type"], target["legendFormat"], promql))
    return found


def sixty_times_as_fast(rules: str) -> str:
    """The text of a rule file in which every minute is a second and every hour a minute."""
    faster = {"m": "s", "h": "m"}
    return re.sub(r"(?<=[\[ ])(\d+)([mh])(?=[])\n ])", lambda found: found[1] + faster[found[2]], rules)


def alert_names() -> list[str]:
    """The names of all alerts."""
    return re.findall(r"- alert: (\w+)", ALERTS.read_text())


def lines_to_grep_for() -> list[str]:
    """What the descriptions of the alerts say to look for in a log."""
    text = "".join(line for line in ALERTS.read_text().splitlines(keepends=True) if not line.lstrip().startswith("#"))
    return sorted(set(re.findall(r"`([^`]+)`", text)))


def metrics_used() -> set[str]:
    """The names of SGLang's metrics in deploy/, a histogram's series by the histogram's name."""
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    names = {name for path in files for name in re.findall(r"sglang:\w+", path.read_text())}
    return {re.sub(r"_seconds_(bucket|sum|count)$", "_seconds", name) for name in names}
