"""What becomes of the clients of some routers when a decode node behind them is cut off, or killed?"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping

from demo.processes import Failure
from demo.scenario import Report
from demo.servers import Server

from . import stock_router
from .clients import Clients
from .cut import cut_off
from .grid import DECODES, FLAGS, Cell, Trial
from .tally import Tally, tally

BEFORE_S = 3.0
GENERATE = '"POST /generate HTTP/1.1"'  # in the log of a server, once for each that it has answered


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a trial has shown of one of its cells. `attempts`: so many requests the router sent to prefill."""

    cell: Cell
    how: str
    fault_s: float | None
    watch_s: float
    attempts: int
    tally: Tally


def play(
    trial: Trial,
    prefills: Mapping[Cell, Server],
    decodes: Mapping[str, Server],
    router: Callable[[str], pathlib.Path],
    logs: pathlib.Path,
    report: Report,
) -> list[Seen]:
    """Play a trial; `router` gives the python that has a version of it. Raises Failure if the clients fail before."""
    with contextlib.ExitStack() as stack:
        routers: dict[Cell, stock_router.Router] = {}
        for number, cell in enumerate(trial.cells):
            behind = {name: decodes[name] for name in DECODES[: cell.decodes]}
            log = logs / f"router-{number}.log"
            routers[cell] = stack.enter_context(
                stock_router.running(router(cell.version), FLAGS[cell.flags], prefills[cell], behind, log)
            )
        stock_router.wait_until_ready(routers.values(), report)
        traffic = {cell: Clients(each.port, cell.streaming, cell.per_s) for cell, each in routers.items()}
        attempts = {cell: _attempts(prefills[cell]) for cell in trial.cells}
        for each in traffic.values():
            each.begin()
        watch = _Watch(traffic, prefills, report)
        watch.wait(BEFORE_S, "before the fault")
        if lost := [each.said for clients in traffic.values() for each in clients.requests() if not each.served]:
            raise Failure(f"a request failed before the fault: {lost[0]}", logs / "router-0.log")
        began = time.monotonic()
        if trial.fault_s is None:
            _lose(decodes[DECODES[0]], trial.how, stack)
            healed = began
            report.event(DECODES[0], f"{trial.how}, for good")
        else:
            report.event(DECODES[0], f"for {trial.fault_s:g} s what is sent to its Mooncake ports is {trial.how}")
            with cut_off(decodes[DECODES[0]].scheduler(), trial.how == "dropped"):
                watch.wait(trial.fault_s, f"{DECODES[0]} is cut off")
            healed = time.monotonic()
            report.event(DECODES[0], "can be reached again")
        watch.wait(trial.watch_s, "after it")
        ended = time.monotonic()
        for each in traffic.values():
            each.stop()
        for each in traffic.values():
            each.wait()
        seen = [
            Seen(
                cell,
                trial.how,
                trial.fault_s,
                trial.watch_s,
                _attempts(prefills[cell]) - attempts[cell],
                tally(clients.requests(), healed, ended, DECODES[0]),
            )
            for cell, clients in traffic.items()
        ]
    for one in seen:
        report.event("clients", f"{one.cell}: {one.tally}")
    return seen


def _lose(decode: Server, how: str, stack: contextlib.ExitStack) -> None:
    if how == "killed":
        decode.process.kill()
    else:
        stack.enter_context(cut_off(decode.scheduler(), dropped=True, others=[decode.port, decode.bootstrap]))


class _Watch:
    """Waits, with a line that says how the clients fare."""

    def __init__(self, traffic: Mapping[Cell, Clients], prefills: Mapping[Cell, Server], report: Report) -> None:
        self._traffic, self._prefills, self._report = traffic, prefills, report

    def wait(self, seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for prefill in self._prefills.values():
                prefill.process.check()
            self._report.status(f"{what}, {left:.0f} s; {'; '.join(map(_fare, self._traffic.items()))}")
            time.sleep(min(0.1, left))


def _fare(each: tuple[Cell, Clients]) -> str:
    """How the clients of a cell fare, short enough for two of them in the status line."""
    cell, clients = each
    seen = clients.requests()
    failed = sum(not one.served for one in seen)
    return f"{cell.flags if cell.patch else 'no patch'}: {failed}/{len(seen)} failed, {clients.on_their_way()} wait"


def _attempts(prefill: Server) -> int:
    return prefill.process.log.read_text(errors="replace").count(GENERATE)
