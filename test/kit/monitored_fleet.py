"""A fleet of prefill nodes, each with a fault of its own, under a Prometheus in which a minute is a second."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator

from sglang_failed_session_probe import SWITCH

from kit import deployed
from kit.imposters import imposters
from kit.network import Network
from kit.node import Node
from kit.paths import PYTHONPATH
from kit.prometheus_server import PrometheusServer

SHUT_PORTS = (20001, 20000)  # handshake and data
METRICS_PORTS = range(9100, 9200)  # which no connection takes while a node is away
MANY, HUNG = 6, 4
SWITCHED_OFF = {SWITCH: "0"}
SETTINGS = {
    "hung": {"SGLANG_FAILED_SESSION_PROBE_CONCURRENCY": str(HUNG // 2)},  # so that as many hang as may
    "data_port_shut": {"SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "300"},  # not let in unverified before the end
    "flapping": dict.fromkeys(  # held for a second, however often it fails
        ("SGLANG_FAILED_SESSION_PROBE_INTERVAL_S", "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S"), "1"
    ),
}
BACK_S = 1.0  # how long a flapping session is well
OLD_MOONCAKE = "import mooncake.engine\ndel mooncake.engine.TransferEngine.send_probe\n"
PREFILL_NODES = ("well", "peer_stopped", "data_port_shut", "flapping", "many", "old_mooncake", "switched_off")


class Fleet:
    """The nodes, and the Prometheus that scrapes them: job ``prefill``, and ``hung`` for a node whose peers hang."""

    def __init__(self, nodes: dict[str, Node], instances: dict[str, str], prometheus: PrometheusServer) -> None:
        self.nodes, self.instances, self.prometheus = nodes, instances, prometheus
        self._out_at = 0.0

    def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire, with the names of the nodes."""
        names = {instance: name for name, instance in self.instances.items()}
        return {(alert, names[instance]) for alert, instance in self.prometheus.firing()}

    def flap(self) -> None:
        """A transfer of the flapping node fails again if its session has been back for a while."""
        flapping, now = self.nodes["flapping"], time.monotonic()
        if flapping.ask("blacklisted"):
            self._out_at = now
        elif now > self._out_at + BACK_S:
            flapping.ask("fail", [self.nodes["live"].session])


@contextlib.contextmanager
def fleet(
    network: Network, program: pathlib.Path, folder: pathlib.Path, rules: Callable[[str], str] = lambda text: text
) -> Iterator[Fleet]:
    """Starts the nodes, all well, and Prometheus with the rules after ``rules`` has had their text."""
    with contextlib.ExitStack() as stack:

        def start(name: str, role: str, ports: tuple[int, int] | None = None, **settings: str) -> Node:
            return stack.enter_context(Node(role, folder / name, network.path, ports, **settings))

        nodes = {name: start(name, "decode", None) for name in ("stopped", "live")}
        nodes["shut"] = start("shut", "decode", SHUT_PORTS)
        (folder / "sitecustomize.py").write_text(OLD_MOONCAKE)
        settings = {**SETTINGS, "old_mooncake": {"PYTHONPATH": f"{folder}:{PYTHONPATH}"}}
        for name in (*PREFILL_NODES, "hung"):
            nodes[name] = start(name, "prefill", **settings.get(name, {}))
        ports = zip((*PREFILL_NODES, "hung"), METRICS_PORTS, strict=False)
        instances = {name: f"127.0.0.1:{nodes[name].ask('serve_metrics', port)}" for name, port in ports}
        for prefill, decode in MEETINGS.items():
            nodes[prefill].register(nodes[decode])
            assert nodes[prefill].send_to(nodes[decode]) == ""
        files = []
        for file in (deployed.ALERTS, deployed.RECORDING):
            files.append(folder / file.name)
            files[-1].write_text(rules(file.read_text()))
        jobs = {"prefill": [instances[name] for name in PREFILL_NODES], "hung": [instances["hung"]]}
        yield Fleet(nodes, instances, stack.enter_context(PrometheusServer(program, folder, network.path, jobs, files)))


MEETINGS = {"peer_stopped": "stopped", "data_port_shut": "shut", "flapping": "live"}


@contextlib.contextmanager
def faults(fleet: Fleet, network: Network, folder: pathlib.Path) -> Iterator[None]:
    """Every node but ``well`` gets its fault; those of the network and of the stopped peer end with the block."""
    nodes = fleet.nodes
    nodes["switched_off"].kill()
    port = int(fleet.instances["switched_off"].rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        reborn = stack.enter_context(Node("prefill", folder / "switched_off", network.path, **SWITCHED_OFF))
        reborn.ask("serve_metrics", port)
        stack.enter_context(nodes["stopped"].stopped())
        stack.enter_context(network.rejected(nodes["shut"].data_port))
        hanging = stack.enter_context(imposters("silent", HUNG, network=network.path))
        nodes["hung"].ask("fail", hanging)
        nodes["many"].ask("fail", [f"127.0.0.1:{1 + port}" for port in range(MANY)])
        nodes["old_mooncake"].ask("fail", ["127.0.0.1:1"])
        assert "Failed to send" in nodes["data_port_shut"].send_to(nodes["shut"])
        assert "Failed to send" in nodes["peer_stopped"].send_to(nodes["stopped"])
        yield
