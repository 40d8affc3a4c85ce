"""How are the servers on 127.0.0.1 talked to: is one ready, is a request served, what does /metrics say?"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import urllib.error
import urllib.request

from .processes import Failure
from .scenario import COUNTER

GENERATE_DEADLINE_S = 50.0
# Above Mooncake's own, below those that the kernel gives to clients; SGLang 0.5.12 wants port + 10000 to be one, too.
_PORTS = range(20000, 32000)
# Straight to 127.0.0.1, whatever http_proxy says.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nothing listens now, all different. Raises Failure if there are too few."""
    free: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise Failure(f"fewer than {count} free ports from {_PORTS.start} to {_PORTS.stop - 1}")


def is_healthy(port: int) -> bool:
    """Whether /health says that the server is ready; waits for it 5 s at most."""
    try:
        with _HTTP.open(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def counter(port: int) -> float | None:
    """COUNTER as /metrics has it, over all processes of the server; None if it is not there. Raises OSError."""
    values = [value for series, value in metrics(port).items() if series.partition("{")[0] == COUNTER]
    return sum(values) if values else None


def metrics(port: int) -> dict[str, float]:
    """All series of /metrics, each under its name and labels as they stand there. Raises OSError."""
    with _HTTP.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = re.findall(r"^([^#\s][^{\s]*(?:{.*})?) (\S+)$", page.read().decode(), re.MULTILINE)
    return {series: float(value) for series, value in lines}


def generate(port: int, body: dict[str, object]) -> tuple[bool, str]:
    """POST a request to a server; whether it was served, and the tokens or what the client is told. Raises OSError."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _HTTP.open(request, timeout=GENERATE_DEADLINE_S) as answer:
            result = json.load(answer)
    except urllib.error.HTTPError as error:
        return False, f"HTTP {error.code}: {_reason(error.read().decode(errors='replace'))}"
    reason = result["meta_info"]["finish_reason"]
    if reason["type"] == "abort":
        return False, f"HTTP 200, aborted: {_reason(reason['message'])}"
    return True, f"tokens {result['output_ids']}"


def _reason(text: str) -> str:
    """What the transfer failed of, without the ids of the request around it."""
    of_transfer = re.search(r"KVTransferError\([^)]*\): ([^\"}]*)", text)
    return of_transfer.group(1) if of_transfer else text
