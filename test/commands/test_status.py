"""What does `status` say of prefill nodes that are well, that have lost peers, or that cannot be read?"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from command import Terminal, interrupt, run, started
from kit.imposters import imposters
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sglang_failed_session_probe import status
from sglang_failed_session_probe.status import Node, _median, _node

OTHER_METRIC = "# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs 3.0\n"


class Prefill:
    """The metrics of a prefill node, as prometheus_client has them, on a page of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.recoveries = self._counter("recoveries")
        self.blacklistings = self._counter("blacklistings")
        self.drops = self._counter("drops")
        self.probes = self._counter("probes", "result")
        self.blacklisted = self._gauge("sglang:failed_sessions_blacklisted")
        self.in_flight = self._gauge("sglang:failed_session_probes_in_flight")
        self.limit = self._gauge("sglang:failed_session_probes_limit")
        self.limit.set(32)
        self.outages = Histogram(
            "sglang:failed_session_outage_duration_seconds", "", registry=self._registry, buckets=(1, 2, 4, 60)
        )

    def _counter(self, name: str, *labels: str) -> Counter:
        return Counter(f"sglang:failed_session_{name}_total", "", labels, registry=self._registry)

    def _gauge(self, name: str) -> Gauge:
        return Gauge(name, "", registry=self._registry)

    def page(self) -> str:
        return OTHER_METRIC + generate_latest(self._registry).decode()


def with_outage(result: str, blacklisted: int = 2, in_flight: int = 0) -> Callable[[], str]:
    """The page of a node where one more probe has ended with that result each time that somebody looks."""
    prefill = Prefill()
    prefill.probes.labels("unanswered").inc(7)  # long ago
    prefill.blacklisted.set(blacklisted)
    prefill.in_flight.set(in_flight)

    def page() -> str:
        if result:
            prefill.probes.labels(result).inc()
        return prefill.page()

    return page


@contextlib.contextmanager
def node(page: Callable[[], str] | str, code: int = 200) -> Iterator[str]:
    """Serves a page of metrics; gives its URL without the path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            self.send_response(code if found else 404)
            self.end_headers()
            if found:
                self.wfile.write((page if isinstance(page, str) else page()).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield f"http://{address}"


@contextlib.contextmanager
def running(server: socketserver.TCPServer) -> Iterator[str]:
    """``host:port`` of a server that serves meanwhile."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def urls(*nodes: str) -> list[str]:
    return [argument for url in nodes for argument in ("--url", url)]


def test_a_page_that_has_no_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_MOST_BYTES", 100_000)
    sent = 0

    class Endless(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            nonlocal sent
            with contextlib.suppress(OSError):
                self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while sent < 100_000_000:
                    sent += self.request.send(OTHER_METRIC.encode() * 1000)

    with running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Endless)) as address:
        said = status._read(f"http://{address}/metrics").stuck
    assert "it has more than" in said
    assert sent < 50_000_000, "a wrong port takes all memory of the node"


def test_a_row_a_node_with_its_figures() -> None:
    prefill = Prefill()
    prefill.recoveries.inc(12)
    prefill.blacklistings.inc(14)
    prefill.drops.inc(2)
    prefill.probes.labels("answered").inc(30)
    prefill.probes.labels("unanswered").inc(400)
    for seconds in (1.5, 1.5, 50):
        prefill.outages.observe(seconds)
    with node(prefill.page) as healthy, node(with_outage("unanswered", in_flight=3)) as troubled:
        status, output, errors = run("status", *urls(healthy, troubled))
    assert (status, errors) == (0, "")
    headings, first, second = output.splitlines()
    assert headings.split("  ")[0].strip() == "node"
    assert first.split() == [
        *(healthy.removeprefix("http://"), "0", "12", "14", "2", "0/32", "~1.8", "s", "of", "3"),
        *("30", "answered,", "400", "unanswered", "nothing", "is", "blacklisted"),
    ]
    assert second.split()[:6] == [troubled.removeprefix("http://"), "2", "0", "0", "0", "3/32"]
    assert second.endswith("2 blacklisted: they do not answer")


@pytest.mark.parametrize(
    ("result", "in_flight", "words"),
    [
        ("unanswered", 1, "2 blacklisted: they do not answer"),
        ("answered", 0, "2 blacklisted: they answer, let in once settled, verified and not held"),
        ("unverified", 0, "2 blacklisted: they answer and cannot be verified, look at the data path"),
        ("error", 0, "2 blacklisted: probes raise, see the log"),
        ("unavailable", 0, "2 blacklisted: cannot be probed, Mooncake is too old"),
        ("", 2, "2 blacklisted: probes hang: a stopped process or dropped packets"),
        ("", 32, "2 blacklisted: as many probes hang as may, hung peers take turns"),
        ("", 0, "2 blacklisted: no probe has ended, see sessions on that node"),
    ],
)
def test_the_last_column_says_why_sessions_stay_out_now_and_not_last_week(
    result: str, in_flight: int, words: str
) -> None:
    with node(with_outage(result, in_flight=in_flight)) as troubled:
        status, output, _ = run("status", *urls(troubled))
    assert status == 0
    assert output.rstrip().endswith(words)


@contextlib.contextmanager
def dead_node() -> Iterator[str]:
    """The URL of a port on which nobody listens, and nobody else can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


NATIVE = "# TYPE sglang:failed_session_recoveries_total counter\nsglang:failed_session_recoveries_total 4.0\n"
UNREADABLE = {
    "404": ("", 404, "HTTP 404: is this SGLang? Start it with --enable-metrics"),
    "an empty page": ("", 200, "no metrics of SGLang: is this its --port? Start it with --enable-metrics"),
    "no metrics of ours": (OTHER_METRIC, 200, "it is off or this is no prefill node: set SGLANG_ENABLE_FAILED"),
    "SGLang's own counter": (
        OTHER_METRIC + NATIVE,
        200,
        "counter, this probe is off or this is no prefill node: set SGLANG_",
    ),
    "NaN": (NATIVE + "sglang:failed_sessions_blacklisted NaN\n", 200, "is not a number"),
    "a broken page": ("<p>sglang:failed_session {what?</p>\n", 200, "no page of metrics"),
    "an error": ("", 503, "HTTP 503"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_node_that_cannot_be_read_gets_a_row_that_says_what_to_do(case: str) -> None:
    page, code, words = UNREADABLE[case]
    with node(page, code) as unreadable, node(Prefill().page) as healthy:
        status, output, errors = run("status", *urls(unreadable, healthy))
    assert (status, errors) == (1, ""), "a node that cannot be read must not look well to a script"
    _, first, second = output.splitlines()
    assert words in first
    assert second.endswith("nothing is blacklisted"), "one unreadable node hides another"


@contextlib.contextmanager
def banner(first_line: bytes) -> Iterator[str]:
    """``host:port`` of a server that is not asked before it says who it is, and says no more."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(first_line)
            self.request.recv(65536)

    with running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as address:
        yield address


@pytest.mark.parametrize(
    ("scheme", "first_line", "words"),
    [
        ("http", b"SSH-2.0-OpenSSH_9.2p1\r\n", "does not speak HTTP (SSH-2.0-OpenSSH_9.2p1): is this the right port?"),
        ("http", b"\x1b[31mred\x1b[2K\rgreen\n", r"does not speak HTTP (\x1b[31mred\x1b[2K green)"),
        ("http", b"HTTP/7 200 OK\r\n\r\n", "does not speak HTTP (HTTP/7)"),
        ("http", b"a" * 60_000 + b"\r\n", "does not speak HTTP (aaa"),
        ("https", b"HTTP/1.0 400 Bad Request\r\n\r\n", "does not speak HTTPS ("),
    ],
    ids=["SSH", "control characters", "another HTTP", "long", "HTTP for HTTPS"],
)
def test_another_service_on_that_port_is_not_taken_for_none(scheme: str, first_line: bytes, words: str) -> None:
    with banner(first_line) as other:
        status, output, errors = run("status", *urls(f"{scheme}://{other}"))
    assert (status, errors) == (1, "")
    _, row = output.splitlines()
    assert words in row
    assert row.isprintable()
    assert len(row) < 500


STRANGE = {
    "a line feed": 'sglang:failed_session_probes_total{result="a\\nb"} 3\n',
    "control characters": 'sglang:failed_session_probes_total{result="\x1b[31m\x7f\u202e"} 3\n',
    "a long label": f'sglang:failed_session_probes_total{{result="{"a" * 100_000}"}} 3\n',
    "many labels": "".join(f'sglang:failed_session_probes_total{{result="{n}"}} 3\n' for n in range(5000)),
    "numbers beyond counting": NATIVE.replace("4.0", "1e300") + "sglang:failed_session_drops_total -1e300\n",
    "a line separator": 'sglang:failed_session_probes_total{result="a\u2028b"} 3\n',
    "infinity": "sglang:failed_session_recoveries_total +Inf\n",
    "an outage beyond counting": 'sglang:failed_session_outage_duration_seconds_bucket{le="1e300"} 3\n'
    'sglang:failed_session_outage_duration_seconds_bucket{le="+Inf"} 4\n',
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_a_page_says_breaks_no_table(case: str) -> None:
    with node("sglang:failed_sessions_blacklisted 0\n" + STRANGE[case]) as strange, node(Prefill().page) as healthy:
        _, output, errors = run("status", *urls(strange, healthy))
        _, as_json, _ = run("status", "--json", *urls(strange, healthy))
    assert errors == ""
    lines = output.split("\n")
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 500
    assert "nothing is blacklisted" in lines[1]
    assert not re.search(r"\d{20}", output + as_json), "hundreds of digits"
    assert [len(json.loads(as_json)), as_json.count("\n")] == [2, 1]


@pytest.mark.parametrize("url", ["http://a b:1", "http://a:1/\x1b[31m", "http://" + "a" * 100_000 + ":x", "ftp://a"])
def test_a_url_that_is_none_is_said_in_one_line(url: str) -> None:
    status, _, errors = run("status", "--url", url)
    assert status == 2
    (line,) = errors.splitlines()
    assert "is not a URL" in line
    assert line.isprintable()
    assert len(line) < 1000


def test_dead_and_silent_nodes_hold_nobody_up() -> None:
    with (
        imposters("silent", 4) as silent,
        imposters("drip") as drip,
        node(Prefill().page) as healthy,
        dead_node() as dead,
    ):
        hung = [f"http://{session}" for session in (*silent, *drip)]
        began = time.monotonic()
        status, output, errors = run("status", *urls(dead, *hung, healthy), deadline_s=60)
        took_s = time.monotonic() - began
    assert (status, errors) == (1, "")
    _, dead_row, *hung_rows, last = output.splitlines()
    assert "no answer (Connection refused)" in dead_row
    assert ["no " in row for row in hung_rows] == [True] * 5
    assert last.endswith("nothing is blacklisted")
    assert took_s < 20, "nodes are read one after another, which takes 5 s each"


def test_scripts_get_json() -> None:
    with node(with_outage("answered")) as troubled, dead_node() as dead:
        status, output, _ = run("status", "--json", *urls(troubled, dead))
    assert status == 1
    first, second = json.loads(output)
    assert first["blacklisted"] == 2
    assert first["probes"] == {"answered": 2, "unanswered": 7}
    assert first["readable"]
    assert not second["readable"]
    assert second["blacklisted"] is None


def test_a_url_with_a_path_is_taken_as_it_is() -> None:
    with node(Prefill().page) as healthy:
        assert run("status", *urls(f"{healthy}/metrics"))[0] == 0
        assert run("status", *urls(f"{healthy}/"))[0] == 0
        assert "HTTP 404" in run("status", *urls(f"{healthy}/elsewhere"))[1]


def test_watching_a_pipe_gives_one_block_after_another_until_a_ctrl_c() -> None:
    with node(with_outage("unanswered")) as troubled:
        with started("status", "--watch", "1", *urls(troubled)) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            shown = [process.stdout.readline() for _ in range(8)]
            interrupt(process)
            assert process.stderr.read() == ""
        assert process.returncode == 130
    assert [line == "\n" for line in shown] == [False, False, False, True] * 2
    assert "2 blacklisted" in shown[2]


def test_watching_a_node_whose_page_never_ends_does_not_cost_the_sight_of_another() -> None:
    watch = ("status", "--watch", "1")
    with (
        imposters("drip") as [session],
        node(Prefill().page) as healthy,
        started(*watch, *urls(f"http://{session}", healthy)) as process,
    ):
        assert process.stdout is not None
        for _ in range(3):
            *_, endless, well, _ = [process.stdout.readline() for _ in range(5)]
            assert "no answer within 5 s" in endless
            assert well.endswith("nothing is blacklisted\n"), "a node that is well cannot be seen any more"


def test_watching_on_a_terminal_redraws_the_table_in_colour() -> None:
    with node(with_outage("unanswered")) as troubled, Terminal() as terminal:
        watch = ("status", "--watch", "1", *urls(troubled))
        with started(*watch, stdout=terminal.end_of_command, NO_COLOR="") as process:
            terminal.wait_for("\x1b[33m2 blacklisted", deadline_s=20)
            terminal.wait_for("\x1b[J\x1b[H", deadline_s=20)
            interrupt(process)


def test_no_color_is_respected() -> None:
    with node(with_outage("unanswered")) as troubled, Terminal() as terminal:
        with started("status", *urls(troubled), stdout=terminal.end_of_command, NO_COLOR="1") as process:
            terminal.wait_for("they do not answer", deadline_s=20)
            process.wait(10)
        assert "\x1b" not in terminal.shown


def test_a_restarted_node_is_told_by_its_new_figures() -> None:
    restarted = Prefill()
    restarted.blacklisted.set(1)
    restarted.probes.labels("unanswered").inc(7)
    pages = [restarted.page(), with_outage("answered")()]

    with node(pages.pop) as troubled:
        _, output, _ = run("status", *urls(troubled))
    assert output.rstrip().endswith("1 blacklisted: they do not answer")


MULTIPROCESS = """
import os, sys, tempfile
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
ours = "sglang:failed_session"
def work():
    Counter(f"{ours}_recoveries_total", "").inc(2)
    Counter(f"{ours}_probes_total", "", ["result"]).labels("answered").inc(5)
    Gauge(f"{ours}s_blacklisted", "", multiprocess_mode="livesum").set(1)
    Histogram(f"{ours}_outage_duration_seconds", "", buckets=(1, 3)).observe(2)
for _ in range(2):
    if (child := os.fork()) == 0:
        work()
        os._exit(0)
    os.waitpid(child, 0)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
sys.stdout.write(generate_latest(registry).decode())
"""


def test_the_page_of_several_processes_is_summed() -> None:
    page = subprocess.run([sys.executable, "-c", MULTIPROCESS], check=True, capture_output=True, text=True).stdout
    assert _node("", page) == Node(
        url="",
        readable=True,
        blacklisted=2,
        recoveries=4,
        probes={"answered": 10},
        outages=2,
        median_outage_s=2.0,
    )


@pytest.mark.parametrize(
    ("buckets", "median"),
    [
        ({}, None),
        ({1.0: 0, 2.0: 0, float("inf"): 0}, None),
        ({1.0: 4, 2.0: 4, float("inf"): 4}, 0.5),
        ({1.0: 0, 2.0: 4, float("inf"): 4}, 1.5),
        ({1.0: 1, 2.0: 1, 4.0: 5, float("inf"): 6}, 3.0),
        ({1.0: 0, 2.0: 0, float("inf"): 4}, 2.0),
        ({1.0: float("nan"), float("inf"): float("nan")}, None),
        ({1.0: float("nan"), float("inf"): 4}, None),
    ],
)
def test_the_typical_outage_is_read_off_the_histogram(buckets: dict[float, float], median: float | None) -> None:
    assert _median(buckets) == median
