"""What do the tests in this folder share: a pair of nodes with a network between them, and a report of the faults?"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import signal
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit.network import Network
from kit.network_fixture import network  # noqa: F401
from kit.node import Node

DECODE_PORTS = (20001, 20000)  # handshake and data, in a network namespace of the test's own


@pytest.fixture
def pair(network: Network, tmp_path: pathlib.Path) -> Iterator[tuple[Node, Node]]:
    """A prefill and a decode node in that network that have met. The decode node can be restarted on its ports."""
    with (
        Node("prefill", tmp_path / "prefill", network.path) as prefill,
        Node("decode", tmp_path / "decode", network.path, DECODE_PORTS) as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""  # first contact with a stopped peer takes Mooncake a minute
        yield prefill, decode


@pytest.fixture
def record_fault() -> Callable[..., None]:
    """Appends what a fault cost to the file that FAULT_REPORT names, for tools/fault_table.py; without it, nothing.

    ``lost`` counts requests whose transfer failed after the failure that blacklisted the session.
    """

    def record_fault(fault: str, how: str, *, lost: int, served_after_s: float | None) -> None:
        if report := os.environ.get("FAULT_REPORT"):
            line = json.dumps({"fault": fault, "how": how, "lost": lost, "served_after_s": served_after_s}) + "\n"
            with open(report, "a") as file:  # one write, so that processes side by side do not mix their lines
                file.write(line)

    return record_fault


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how the exits went, all that were played in several processes."""
    exits = collections.defaultdict(list)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            told = dict(report.user_properties)
            if "exit" in told:
                exits[told["exit"] + ", whose shutdown lasts 1 s" * told["slow"]].append(told)
    for way, played in sorted(exits.items()):
        seconds = [told["seconds"] for told in played]
        aborts = sum(told["status"] == -signal.SIGABRT for told in played)
        stop_s = max(told["stopped_s"] for told in played)
        times = (
            f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s, the probe's part {stop_s:.2f} s"
        )
        terminalreporter.write_line(f"{way}: {len(played)} exits, {aborts} aborts, {times}")
