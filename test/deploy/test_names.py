"""Does what deploy/ names exist: metrics, lines of the log?"""

from __future__ import annotations

import re

import pytest
from kit import deployed

PYTHON = deployed.CHECKOUT / "python"


def test_every_metric_in_a_rule_or_in_the_dashboard_is_one_of_ours() -> None:
    ours = (PYTHON / "sglang" / "srt" / "observability" / "failed_session_metrics.py").read_text()
    unknown = {name for name in deployed.metrics_used() if f'"{name}"' not in ours}
    assert not unknown, f"an operator looks at what nobody counts: {sorted(unknown)}"


@pytest.mark.parametrize("line", deployed.lines_to_grep_for())
def test_a_line_that_an_alert_says_to_grep_for_is_written_by_somebody(line: str) -> None:
    sources = "\n".join(path.read_text() for path in PYTHON.rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)  # a string over several lines
    assert line in said, f"who greps for {line!r} finds nothing"


def test_the_dashboard_asks_only_the_data_source_that_was_chosen() -> None:
    dashboard = deployed.dashboard()
    sources = {str(panel["datasource"]["uid"]) for panel in dashboard["panels"]}
    sources |= {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert sources == {"${datasource}"}


def test_every_query_of_the_dashboard_is_of_the_job_and_the_nodes_that_were_chosen() -> None:
    for panel in deployed.dashboard()["panels"]:
        for target in panel["targets"]:
            selectors = re.findall(r"\{[^{}]*\}", target["expr"])
            assert all('job=~"$job"' in each and 'instance=~"$instance"' in each for each in selectors), target["expr"]
            assert selectors, target["expr"]
