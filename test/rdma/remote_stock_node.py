"""How do tests drive stock managers of SGLang in two machines with RDMA?"""

from __future__ import annotations

import pathlib
from typing import Any

from kit.stock_node import PROGRAM, StockNode
from machines import Machine

# To import SGLang takes a quarter of a minute on real processors.
IMPORT_S = 900.0


class RemoteStockNode(StockNode):
    """A StockNode in a machine. `stop`, `resume` and `exit` are not for it."""

    def __init__(self, machine: Machine, python: pathlib.Path, role: str, **settings: str) -> None:
        self.role = role
        self._machine = machine
        self._log = pathlib.Path(f"/run/{role}.jsonl")
        variables = {"HOME": "/run", **settings}
        self._starting = machine.begin("start", role, [str(python), str(PROGRAM), role, str(self._log)], variables)

    def ask(self, command: str, deadline_s: float = 120.0, **arguments: Any) -> dict[str, Any]:
        """As there. Raises AssertionError if the process has ended or does not answer, RuntimeError if it failed."""
        self._starting.result(IMPORT_S)
        answer: dict[str, Any] = self._machine.do("ask", self.role, {"do": command, **arguments}, deadline_s=deadline_s)
        if "error" in answer:
            raise RuntimeError(f"{self.role}: {answer['error']}")
        return answer

    def said(self) -> str:
        """What Mooncake and SGLang have printed."""
        return str(self._machine.do("log", self.role))

    def _read_log(self) -> str:
        return str(self._machine.do("run", f"cat {self._log}"))

    def __exit__(self, *error: object) -> None:
        self._machine.do("end", self.role)
