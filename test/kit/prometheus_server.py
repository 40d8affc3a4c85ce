"""How does a test run a real Prometheus in its network namespace, and ask it?"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.parse
from typing import Any

from kit import processes

CLONE_NEWNET = 0x40000000
PORT = 9090  # in a network namespace of the test's own
CONFIGURATION = """
global: {{scrape_interval: {interval}, evaluation_interval: {interval}}}
rule_files: {rules}
scrape_configs: {targets}
"""
# prometheus_client 0.22 and later gives a Prometheus before 3.0 the names with an underscore.
COLON = {
    "source_labels": ["__name__"],
    "regex": "sglang_(failed_session.*)",
    "target_label": "__name__",
    "replacement": "sglang:$1",
}


class PrometheusServer:
    """A Prometheus that scrapes ``jobs``: targets by the name of their job. Ends when its ``with`` block is left."""

    def __init__(
        self,
        program: pathlib.Path,
        folder: pathlib.Path,
        network: str,
        jobs: dict[str, list[str]],
        rules: list[pathlib.Path],
        interval: str = "250ms",
    ) -> None:
        targets = [
            {"job_name": job, "static_configs": [{"targets": where}], "metric_relabel_configs": [COLON]}
            for job, where in jobs.items()
        ]
        configuration = folder / "prometheus.yml"
        configuration.write_text(
            CONFIGURATION.format(
                interval=interval, rules=json.dumps([str(path) for path in rules]), targets=json.dumps(targets)
            )
        )
        self._network = network
        self._log = folder / "prometheus.log"
        with self._log.open("w") as log:
            self._process = processes.start(
                [
                    str(program),
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={folder / 'storage'}",
                    f"--web.listen-address=127.0.0.1:{PORT}",
                ],
                network,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_ready(time.monotonic() + 20)
        except BaseException:
            processes.end(self._process)
            raise

    def _wait_until_ready(self, deadline: float) -> None:
        while True:
            with contextlib.suppress(OSError):
                if self._get("/-/ready")[0] == 200:
                    return
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def query(self, promql: str) -> list[Any]:
        """What the query gives at this moment: a list of series with ``metric`` and ``value``."""
        return self._api("query", query=promql)["result"]

    def series(self, promql: str) -> list[Any]:
        """As ``query``, but waits until there is an answer: a node has no series while a scrape of it has failed."""
        deadline = time.monotonic() + 20
        while not (found := self.query(promql)) and time.monotonic() < deadline:
            time.sleep(0.25)
        return found

    def query_range(self, promql: str, start: float, end: float, step: float) -> list[Any]:
        """What the query gives over a time: a list of series with ``metric`` and ``values``."""
        return self._api("query_range", query=promql, start=start, end=end, step=step)["result"]

    def rules(self) -> list[Any]:
        """All rules, with ``name``, ``type``, ``query``, ``health`` and ``lastError``."""
        return [rule for group in self._api("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire: their names and instances."""
        labels = [alert["labels"] for alert in self._api("alerts")["alerts"] if alert["state"] == "firing"]
        return {(alert["alertname"], alert["instance"]) for alert in labels}

    def _api(self, what: str, **parameters: Any) -> Any:
        status, text = self._get(f"/api/v1/{what}?{urllib.parse.urlencode(parameters)}")
        assert status == 200, f"{parameters.get('query', what)}\n{text}"
        return json.loads(text)["data"]

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=20)
        connection.sock = connected_in(self._network)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def __enter__(self) -> PrometheusServer:
        return self

    def __exit__(self, *_: object) -> None:
        processes.end(self._process)


def connected_in(network: str) -> socket.socket:
    """A connection to Prometheus in the network namespace: made by a thread that enters it, good for all."""
    made: list[socket.socket | OSError] = []

    def connect() -> None:
        try:
            namespace = os.open(network, os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(namespace)
            made.append(socket.create_connection(("127.0.0.1", PORT), timeout=20))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
    (connection,) = made
    if isinstance(connection, OSError):
        raise connection
    return connection
