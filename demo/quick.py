"""What does `make demo-quick` do? It tells the story on two bare Mooncake engines, without SGLang or torch."""

from __future__ import annotations

import contextlib
import json
import pathlib
import select
import sys
from collections.abc import Iterator
from typing import Any

from tools import environment

from . import loopback, scenario
from .answers import Pending
from .processes import Failure, Process, uninterrupted
from .settings import SWITCH, node_variables
from .show import LOGS, show
from .timeline import Timeline

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
ANSWER_DEADLINE_S = 60.0


class Node:
    """A manager in a process of its own, which does as it is told."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def ask(self, *command: object) -> Any:
        """Send a command and give its answer; raises Failure if there is none. One thread at a time."""
        pipes = self.process.popen
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=pipes.stdin, flush=True)
        if not select.select([pipes.stdout], [], [], ANSWER_DEADLINE_S)[0]:
            raise Failure(f"{self.process.name} has not answered for {ANSWER_DEADLINE_S:.0f} s", self.process.log)
        answer = pipes.stdout.readline()
        if not answer:
            raise Failure(f"the {self.process.name} process has ended by itself", self.process.log)
        return json.loads(answer)


class EnginePair:
    """A prefill and a decode manager that know each other, as a Pair of the scenario."""

    def __init__(self, prefill: Node, decode: Node) -> None:
        self.log = prefill.process.log
        self._prefill, self._decode = prefill, decode
        self._session, self._there, _ = decode.ask("about")
        self._metrics_port = prefill.ask("about")[2]
        prefill.ask("register", self._session, self._there)
        self._sent = 0

    def request(self) -> Pending:
        """Send blocks and see whether decode has them."""
        return Pending(self._transfer)

    def wedged_request(self) -> Pending:
        """Stop decode and send blocks."""
        self._decode.process.stop(self._decode.process.popen.pid)
        return Pending(self._transfer)

    def continue_decode(self) -> None:
        """Let decode go on."""
        self._decode.process.go_on(self._decode.process.popen.pid)

    def recoveries(self) -> float | None:
        """The counter as prefill's /metrics has it."""
        return loopback.counter(self._metrics_port)

    def check(self) -> None:
        """Raise Failure if either process has ended."""
        self._prefill.process.check()
        self._decode.process.check()

    def _transfer(self) -> tuple[bool, str]:
        self._sent += 1
        why_not = self._prefill.ask("send", self._session, self._there, self._sent % 256)
        if why_not:
            return False, why_not
        arrived = self._decode.ask("bytes") == [self._sent % 256]
        return arrived, f"decode {'has' if arrived else 'does not have'} the bytes"


@contextlib.contextmanager
def running(python: pathlib.Path, feature: bool, logs: pathlib.Path) -> Iterator[EnginePair]:
    """Run a pair of managers; both are ready when the block begins. The logs go to the folder `logs`."""
    logs.mkdir(parents=True)
    program = pathlib.Path(__file__).with_name("engine_node.py")
    variables = {**node_variables(feature), "PYTHONPATH": str(CHECKOUT / "python")}
    with contextlib.ExitStack() as stack:
        nodes = []
        for role in ("prefill", "decode"):
            command = [str(python), str(program), role]
            with uninterrupted():
                process = stack.enter_context(Process(role, command, variables, logs / f"{role}.log", talks=True))
            nodes.append(Node(process))
        yield EnginePair(*nodes)


def tell(folder: pathlib.Path, timeline: Timeline) -> tuple[scenario.Outcome, scenario.Outcome]:
    """Play the scenario twice."""
    timeline.heading("Setting up: Mooncake, without SGLang or torch")
    python = environment.python("engines")
    timeline.event("python", str(python))

    def play(feature: bool) -> scenario.Outcome:
        timeline.heading(f"{'With' if feature else 'Without'} the feature: {SWITCH}={int(feature)} on prefill")
        with running(python, feature, folder / LOGS / ("with" if feature else "without")) as pair:
            timeline.event("managers", "a prefill and a decode manager are ready, each in a process of its own")
            return scenario.play(pair, feature, timeline)

    return play(True), play(False)


if __name__ == "__main__":
    sys.exit(show(tell))
