"""Do the rules and the dashboard tell the truth of real prefill nodes, scraped by a real Prometheus?

A minute of a rule is a second here. Every node has a fault of its own, all of them at once.
"""

from __future__ import annotations

import pathlib

import pytest
from kit import deployed
from kit.monitored_fleet import MANY, PREFILL_NODES, Fleet, faults, fleet
from kit.network import Network
from kit.waiting import wait_until

LONG = "FailedSessionsBlacklistedLong"
TRUTH = {
    (LONG, "peer_stopped"),
    (LONG, "data_port_shut"),
    ("FailedSessionsAnswerButCannotBeVerified", "data_port_shut"),
    ("FailedSessionsFlapping", "flapping"),
    (LONG, "many"),
    ("FailedSessionsManyOnOneNode", "many"),
    (LONG, "old_mooncake"),
    ("FailedSessionProbeUnavailable", "old_mooncake"),
    (LONG, "hung"),
    ("FailedSessionProbesAtTheirLimit", "hung"),
    ("FailedSessionProbeGone", "switched_off"),
}
HEALED = {"peer_stopped", "data_port_shut"}


@pytest.mark.slow
@pytest.mark.timeout(500, func_only=True)
def test_each_alert_fires_for_the_node_that_has_the_fault_and_for_no_other(
    programs: pathlib.Path, network: Network, tmp_path: pathlib.Path
) -> None:
    with fleet(network, programs / "prometheus", tmp_path, deployed.sixty_times_as_fast) as all_nodes:
        prometheus = all_nodes.prometheus
        well = "sglang:failed_sessions_blacklisted == 0"
        assert wait_until(lambda: len(prometheus.query(well)) == len(all_nodes.instances), 20, every_s=0.25)
        assert all_nodes.firing() == set()

        seen: set[tuple[str, str]] = set()

        def all_fire() -> bool:
            seen.update(all_nodes.firing())
            return all_nodes.firing() == TRUTH

        with faults(all_nodes, network, tmp_path):
            # It takes half a minute; a stall of a second or two is minutes for the rules, and most begin anew.
            all_fired = wait_until(lambda: all_nodes.flap() or all_fire(), 180, every_s=0.25)
            assert seen <= TRUTH, f"an on-call is told what is not so: {seen - TRUTH}"
            assert all_fired, f"an on-call is not told: {TRUTH - all_nodes.firing()}"
            check_rules(all_nodes)
            check_dashboard(all_nodes)

        healed = wait_until(lambda: not any(node in HEALED for _, node in all_nodes.firing()), 120, every_s=0.25)
        assert healed, f"an on-call looks for what is over: {all_nodes.firing()}"
        assert (LONG, "many") in all_nodes.firing(), "what was not healed must go on firing"


def check_rules(all_nodes: Fleet) -> None:
    for rule in all_nodes.prometheus.rules():
        assert rule["health"] == "ok", f"{rule['name']}: {rule['lastError']}"
        if rule["type"] == "recording":
            assert all_nodes.prometheus.series(rule["name"]), f"{rule['name']} records nothing"
    as_shipped = deployed.ALERTS.read_text().split("expr: |\n")[1:]
    assert len(as_shipped) == len(deployed.alert_names())
    for text in as_shipped:
        all_nodes.prometheus.query(text.split("for:")[0].split("labels:")[0])


def check_dashboard(all_nodes: Fleet) -> None:
    """Every query has an answer for the fleet, and those of one node are of that node."""
    prometheus = all_nodes.prometheus
    for query in deployed.queries():
        assert prometheus.series(query.promql), f"the panel {query.panel!r} is empty: {query.promql}"
    many = all_nodes.instances["many"]
    for query in deployed.queries(job="prefill", instance=many):
        series = prometheus.query(query.promql)
        nodes = {one["metric"]["instance"] for one in series if "instance" in one["metric"]}
        assert nodes <= {many}, f"the panel {query.panel!r} shows another node than was chosen"

    def value(panel: str, **chosen: str) -> float:
        query = next(query for query in deployed.queries(**chosen) if query.panel == panel)
        (series,) = prometheus.series(query.promql)
        return float(series["value"][1])

    assert value("Blacklisted now", job="prefill", instance=many) == MANY
    assert value("Blacklisted now", instance=all_nodes.instances["well"]) == 0
    assert value("Let in again", instance=all_nodes.instances["flapping"]) >= 3
    assert value("Put on the blacklist", instance=all_nodes.instances["peer_stopped"]) == pytest.approx(1, abs=0.5)
    (by_result,) = (query for query in deployed.queries(rate_interval="30s") if query.panel == "Probes by result")
    results = {series["metric"]["result"] for series in prometheus.query(f"({by_result.promql}) > 0")}
    assert {"answered", "unanswered", "unverified", "unavailable"} <= results
    top = [query for query in deployed.queries() if query.panel == "Prefill nodes with the most blacklistings"]
    nodes = {series["metric"]["instance"] for series in prometheus.query(top[0].promql)}
    assert nodes >= {all_nodes.instances[name] for name in PREFILL_NODES if name != "switched_off"}
