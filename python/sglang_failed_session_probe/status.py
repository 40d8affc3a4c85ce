"""What do the metrics of the prefill nodes say: how many sessions are blacklisted, and why do they not come back?"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import http.client
import math
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Optional

from sglang_failed_session_probe import SWITCH, table
from sglang_failed_session_probe.printable import printable, printable_repr

DEFAULT_URL = "http://127.0.0.1:30000/metrics"
DEADLINE_S = 5.0
# One that does not answer is probed within 0.55 s (hundreds: seldomer), so two readings this far apart show it.
APART_S = 1.0
_MOST_BYTES = 64 << 20  # a page of SGLang's has less than one MB

_OURS = "sglang:failed_session"
_PROBES = f"{_OURS}_probes_total"
_OUTAGE = f"{_OURS}_outage_duration_seconds"
_SWITCH_ON = f"set {SWITCH}=1 there, and ask `sglang-failed-session-probe doctor`"
_BEYOND_COUNTING = 1e15


@dataclasses.dataclass
class Node:
    """One prefill node's metrics, None for those that its page does not have. Counts are since it started."""

    url: str
    readable: bool = False
    blacklisted: Optional[int] = None
    recoveries: Optional[int] = None
    blacklistings: Optional[int] = None
    drops: Optional[int] = None
    in_flight: Optional[int] = None
    limit: Optional[int] = None
    probes: dict[str, int] = dataclasses.field(default_factory=dict)
    outages: Optional[int] = None
    median_outage_s: Optional[float] = None
    stuck: str = ""  # its state in words, with what to do about it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", action="append", type=_url, help=f"a prefill node's metrics, may be repeated (default {DEFAULT_URL})"
    )
    table.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Shows the table; 1 if the metrics of any node could not be read. With ``--watch`` until a KeyboardInterrupt."""
    pages = _Pages(arguments.url or [DEFAULT_URL])
    before, nodes = None, pages.read()
    if any(node.blacklisted for node in nodes):
        time.sleep(APART_S)
        before, nodes = nodes, pages.read()
    while True:
        _explain(nodes, before)
        _show(nodes, arguments.json, watching=bool(arguments.watch))
        if not arguments.watch:
            return 0 if all(node.readable for node in nodes) else 1
        time.sleep(arguments.watch)
        before, nodes = nodes, pages.read()


# Reading.


class _Pages:
    """The nodes' pages, read side by side. A page that never ends occupies one thread, however often it is read."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=len(urls))
        self._readings: dict[int, concurrent.futures.Future[Node]] = {}

    def read(self) -> list[Node]:
        """The nodes' metrics now. Takes little more than DEADLINE_S at most."""
        for place, url in enumerate(self._urls):
            if place not in self._readings or self._readings[place].done():
                self._readings[place] = self._pool.submit(_read, url)
        concurrent.futures.wait(self._readings.values(), timeout=DEADLINE_S + 0.5)
        readings = zip(self._urls, self._readings.values(), strict=True)
        return [reading.result() if reading.done() else _silent(url) for url, reading in readings]


def _silent(url: str) -> Node:
    return Node(url, stuck=f"no answer within {DEADLINE_S:g} s: is the node up, is this the right port?")


def _read(url: str) -> Node:
    try:
        return _node(url, _page(url))
    except urllib.error.HTTPError as error:
        todo = "? Start it with --enable-metrics" if error.code == 404 else "'s /metrics?"
        return Node(url, stuck=f"HTTP {error.code}: is this SGLang{todo}")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return _silent(url)
        why = _in_words(getattr(reason, "strerror", None) or reason)
        hung_up = isinstance(reason, http.client.RemoteDisconnected)
        if isinstance(reason, (http.client.HTTPException, ssl.SSLError)) and not hung_up:
            protocol = url.partition(":")[0].upper()
            return Node(url, stuck=f"what answers there does not speak {protocol} ({why}): is this the right port?")
        return Node(url, stuck=f"no answer ({why}): is the node up, is this the right port?")
    except Exception as error:  # the parser raises all kinds
        return Node(url, stuck=f"no page of metrics ({_in_words(error)}): is this SGLang's /metrics?")


def _in_words(reason: object) -> str:
    return printable(" ".join(str(reason).split()), table.LONGEST_CELL) or type(reason).__name__


def _page(url: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=DEADLINE_S) as response:
        page = response.read(_MOST_BYTES + 1)
    if len(page) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES >> 20} MB")
    return str(page.decode())


def _node(url: str, page: str) -> Node:
    """The metrics of a page. Raises whatever the parser does if it is no such page."""
    from prometheus_client.parser import text_string_to_metric_families

    ours = "".join(line + "\n" for line in page.split("\n") if _OURS in line)
    totals: dict[str, float] = collections.defaultdict(float)
    probes: dict[str, float] = collections.defaultdict(float)
    buckets: dict[float, float] = collections.defaultdict(float)
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            totals[sample.name] += sample.value
            if sample.name == _PROBES:
                probes[sample.labels.get("result", "")] += sample.value
            elif sample.name == f"{_OUTAGE}_bucket":
                bound = float(sample.labels["le"])
                if bound < _BEYOND_COUNTING or bound == math.inf:
                    buckets[bound] += sample.value

    def number(name: str) -> Optional[int]:
        return _whole(totals.get(f"{_OURS}{name}"))

    node = Node(
        url,
        blacklisted=number("s_blacklisted"),
        recoveries=number("_recoveries_total"),
        blacklistings=number("_blacklistings_total"),
        drops=number("_drops_total"),
        in_flight=number("_probes_in_flight"),
        limit=number("_probes_limit"),
        probes={result: _whole(value) or 0 for result, value in sorted(probes.items())},
        outages=_whole(totals.get(f"{_OUTAGE}_count")),
        median_outage_s=_median(buckets),
    )
    node.readable = node.blacklisted is not None
    if not node.readable:
        node.stuck = _what_is_missing(page, totals)
    return node


def _what_is_missing(page: str, totals: dict[str, float]) -> str:
    if f"{_OURS}s_blacklisted" in totals:
        return f"{_OURS}s_blacklisted is not a number of sessions: its metrics are broken"
    if totals:
        return f"only SGLang's own counter, this probe is off or this is no prefill node: {_SWITCH_ON}"
    if "sglang:" in page:
        return f"no metrics of this probe, it is off or this is no prefill node: {_SWITCH_ON}"
    return "no metrics of SGLang: is this its --port? Start it with --enable-metrics"


def _whole(value: Optional[float]) -> Optional[int]:
    return round(value) if value is not None and abs(value) < _BEYOND_COUNTING else None


def _median(buckets: dict[float, float]) -> Optional[float]:
    """An estimate from cumulative buckets; the last bound if it lies beyond that. None if they are empty."""
    half = buckets.get(math.inf, 0.0) / 2
    if not 0 < half < math.inf or any(map(math.isnan, buckets.values())):
        return None
    lower, below = 0.0, 0.0
    for bound in sorted(buckets):
        if buckets[bound] >= half:
            share = (half - below) / (buckets[bound] - below)
            return lower if bound == math.inf else lower + share * (bound - lower)
        lower, below = bound, buckets[bound]
    return None


# Telling.


def _explain(nodes: list[Node], before: Optional[list[Node]]) -> None:
    for place, node in enumerate(nodes):
        if node.readable:
            node.stuck = _stuck(node, _results_since(node, before[place] if before else None))


def _results_since(node: Node, before: Optional[Node]) -> dict[str, int]:
    """How probes ended since the last reading; since the node's start if there was none, or it has restarted since."""
    earlier = before.probes if before else {}
    if any(node.probes.get(result, 0) < count for result, count in earlier.items()):
        earlier = {}
    return {result: count - earlier.get(result, 0) for result, count in node.probes.items()}


def _stuck(node: Node, ended: dict[str, int]) -> str:
    if not node.blacklisted:
        return "nothing is blacklisted"
    reasons = [words for result, words in _RESULTS.items() if ended.get(result)]
    if ended.get("unverified") and _RESULTS["answered"] in reasons:
        reasons.remove(_RESULTS["answered"])
    if node.in_flight and node.limit and node.in_flight >= node.limit:
        reasons.append("as many probes hang as may, hung peers take turns")
    elif not reasons and node.in_flight:
        reasons.append("probes hang: a stopped process or dropped packets")
    return f"{node.blacklisted} blacklisted: {'; '.join(reasons) or 'no probe has ended, see sessions on that node'}"


_RESULTS = {
    "unanswered": "they do not answer",
    "unverified": "they answer and cannot be verified, look at the data path",
    "answered": "they answer, let in once settled, verified and not held",
    "error": "probes raise, see the log",
    "unavailable": "cannot be probed, Mooncake is too old",
}


def _show(nodes: list[Node], as_json: bool, watching: bool) -> None:
    if as_json:
        table.show_json([dataclasses.asdict(node) for node in nodes])
    else:
        table.show(table.aligned([_HEADINGS, *map(_row, nodes)], to_the_right=range(1, 7)), watching)


_COUNTS = ("blacklisted", "recoveries", "blacklistings", "drops")
_HEADINGS = ("node", *_COUNTS, "in flight", "median outage", "probes", "state")


def _row(node: Node) -> tuple[str, ...]:
    def number(value: Optional[int]) -> str:
        return "-" if value is None else str(value)

    outage = f"~{node.median_outage_s:.1f} s of {node.outages}" if node.median_outage_s is not None else "-"
    probes = ", ".join(f"{count} {result}" for result, count in node.probes.items() if count) or "-"
    return (
        printable(node.url.removeprefix("http://").removesuffix("/metrics"), table.LONGEST_CELL),
        *(number(getattr(node, count)) for count in _COUNTS),
        f"{number(node.in_flight)}/{number(node.limit)}",
        outage,
        printable(probes, table.LONGEST_CELL),
        table.coloured(node.stuck, table.YELLOW if node.blacklisted else None if node.readable else table.RED),
    )


# Arguments.


def _url(text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(text)
        is_web = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        good = is_web and text.isprintable() and " " not in text
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{printable_repr(text)} is not a URL as in http://prefill:30000")
    return text if parts.path.strip("/") else urllib.parse.urlunsplit(parts._replace(path="/metrics"))
