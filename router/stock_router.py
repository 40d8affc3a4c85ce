"""How does the stock router run before some of the servers?"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from demo import loopback
from demo.processes import Failure, Process, uninterrupted
from demo.scenario import Report
from demo.servers import Server

from . import clients

READY_DEADLINE_S = 90.0


@dataclasses.dataclass(frozen=True)
class Router:
    """A router that runs, where it answers, and the decode nodes behind it."""

    process: Process
    port: int
    decodes: frozenset[str]


@contextlib.contextmanager
def running(
    python: pathlib.Path, flags: Sequence[str], prefill: Server, decodes: Mapping[str, Server], log: pathlib.Path
) -> Iterator[Router]:
    """Run the router that `python` has, with these flags. See wait_until_ready()."""
    port, metrics = loopback.free_ports(2)
    command = [str(python), *arguments(flags, prefill, decodes.values(), port, metrics)]
    variables = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with contextlib.ExitStack() as stack:
        with uninterrupted():
            process = stack.enter_context(Process("router", command, variables, log))
        yield Router(process, port, frozenset(decodes))


def arguments(flags: Sequence[str], prefill: Server, decodes: Iterable[Server], port: int, metrics: int) -> list[str]:
    """What the python is called with."""
    where = ["--prefill", f"http://127.0.0.1:{prefill.port}", str(prefill.bootstrap)]
    for decode in decodes:
        where += ["--decode", f"http://127.0.0.1:{decode.port}"]
    own = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics), "--policy", "round_robin"]
    return ["-m", "sglang_router.launch_router", "--pd-disaggregation", *where, *own, *flags]


def wait_until_ready(routers: Iterable[Router], report: Report) -> None:
    """Wait until each decode node has served behind each router, which says sooner than that that it is healthy.

    Raises Failure if that takes more than READY_DEADLINE_S.
    """
    started = time.monotonic()
    for router in routers:
        missing = set(router.decodes)
        while missing:
            router.process.check()
            missing.discard(clients.ask(router.port, streaming=False).decode)
            passed = time.monotonic() - started
            if passed > READY_DEADLINE_S:
                why = f"behind the router {', '.join(missing)} did not serve in {READY_DEADLINE_S:.0f} s"
                raise Failure(why, router.process.log)
            report.status(f"waiting for the routers to find their servers: {passed:.0f} s")
            time.sleep(0.1)
