"""How do real prefill and decode servers of SGLang run on a CPU, with Mooncake over TCP on loopback?"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from . import loopback
from .answers import Pending
from .processes import Failure, Process, uninterrupted
from .scenario import Report
from .settings import node_variables

READY_DEADLINE_S = 300.0
# After this long the decode server has told prefill where the request's blocks go, on a slow machine too; nothing
# outside shows when.
HANDOVER_S = 4.0
STUBS = pathlib.Path(__file__).resolve().parent.parent / "tools" / "cpu_stubs"


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that is ready, and its ports on 127.0.0.1; decode uses no bootstrap port."""

    process: Process
    port: int
    bootstrap: int

    def scheduler(self) -> int:
        """The pid of its scheduler, which Mooncake runs in. Raises Failure if it has ended."""
        return self.process.member("sglang::scheduler")


class ServerPair:
    """A prefill and a decode server that are ready, as a Pair of the scenario."""

    def __init__(self, prefill: Server, decode: Server) -> None:
        self.log = prefill.process.log
        self._prefill, self._decode = prefill, decode
        self._scheduler = decode.scheduler()

    def request(self) -> Pending:
        """Send a request to both servers, as a router does."""
        return Pending(lambda: self._through_both(self._body()))

    def wedged_request(self) -> Pending:
        """Send a request to decode, stop the scheduler there once it waits for its blocks, then send it to prefill."""
        body = self._body()
        Pending(lambda: loopback.generate(self._decode.port, body))
        time.sleep(HANDOVER_S)
        self._decode.process.stop(self._scheduler)
        return Pending(lambda: loopback.generate(self._prefill.port, body))

    def continue_decode(self) -> None:
        """Let the decode scheduler go on."""
        self._decode.process.go_on(self._scheduler)

    def recoveries(self) -> float | None:
        """The counter as prefill's /metrics has it, over all of its processes; None if it is not there."""
        return loopback.counter(self._prefill.port)

    def metrics(self) -> dict[str, float]:
        """All series of prefill's /metrics. Raises OSError."""
        return loopback.metrics(self._prefill.port)

    def check(self) -> None:
        """Raise Failure if either server has ended."""
        self._prefill.process.check()
        self._decode.process.check()

    def _through_both(self, body: dict[str, object]) -> tuple[bool, str]:
        decode = Pending(lambda: loopback.generate(self._decode.port, body))
        served, text = loopback.generate(self._prefill.port, body)
        if not served:
            return False, text
        answer = decode.wait(loopback.GENERATE_DEADLINE_S)
        return (answer.served, answer.text) if answer else (False, "decode does not answer")

    def _body(self) -> dict[str, object]:
        return {
            "input_ids": [5, 6, 7, 8, 9, 10],
            "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self._prefill.bootstrap,
            "bootstrap_room": random.getrandbits(62),
        }


@contextlib.contextmanager
def running(
    python: pathlib.Path, release: str, feature: bool, model: pathlib.Path, logs: pathlib.Path, report: Report
) -> Iterator[ServerPair]:
    """Run a pair of SGLang `release` with the python that has it; both are ready when the block begins.

    SWITCH is 1 or 0 on prefill, by `feature`. The servers' logs go to the folder `logs`.
    Raises Failure if one does not get ready in READY_DEADLINE_S.
    """
    with fleet(python, release, {"prefill": feature}, ["decode"], model, logs, report) as servers:
        yield ServerPair(servers["prefill"], servers["decode"])


@contextlib.contextmanager
def fleet(
    python: pathlib.Path,
    release: str,
    prefills: Mapping[str, bool],
    decodes: Sequence[str],
    model: pathlib.Path,
    logs: pathlib.Path,
    report: Report,
) -> Iterator[dict[str, Server]]:
    """Run servers of the names given, `prefills` with the feature or without it, as `running` does a pair."""
    logs.mkdir(parents=True, exist_ok=True)
    names = [*prefills, *decodes]
    ports = loopback.free_ports(3 * len(names))
    with contextlib.ExitStack() as stack:
        # Not in `logs`: the names of Unix sockets must stay short.
        temporary = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-")))
        servers = {}
        for name in names:
            port, bootstrap, group = ports.pop(), ports.pop(), ports.pop()
            role = "prefill" if name in prefills else "decode"
            command = [str(python), *_arguments(name, role, release, port, bootstrap, group, model)]
            variables = _variables(temporary, prefills.get(name))
            with uninterrupted():
                process = stack.enter_context(Process(name, command, variables, logs / f"{name}.log"))
            servers[name] = Server(process, port, bootstrap)
        _wait_until_ready(servers, report)
        yield servers


def _arguments(
    name: str, role: str, release: str, port: int, bootstrap: int, group: int, model: pathlib.Path
) -> list[str]:
    options = {
        "model-path": str(model),
        "device": "cpu",
        "attention-backend": "torch_native",
        "sampling-backend": "pytorch",
        "grammar-backend": "none",
        "host": "127.0.0.1",
        "port": str(port),
        "nccl-port": str(group),
        "max-total-tokens": "4096",
        "max-running-requests": "16",
        "disaggregation-mode": role,
        "disaggregation-transfer-backend": "mooncake",
        "disaggregation-bootstrap-port": str(bootstrap),
    }
    switches = ["skip-server-warmup", "skip-tokenizer-init", "disable-radix-cache", "disable-overlap-schedule"]
    if role == "prefill":
        switches.append("enable-metrics")
    elif _numbers(release) >= (0, 5, 20):
        options["disaggregation-decode-retraction-backup"] = "cpu_tensor"  # the default needs CUDA
    if _numbers(release) >= (0, 5, 20):
        options["weight-version"] = name  # stands in each answer, which so says who gave it
        switches.append("sleep-on-idle")  # else each scheduler takes a core, be there something to do or not
    pairs = [word for name, value in options.items() for word in (f"--{name}", value)]
    return ["-m", "sglang.launch_server", *pairs, *(f"--{name}" for name in switches)]


def _numbers(release: str) -> tuple[int, ...]:
    """0.5.12.post1 is (0, 5, 12)."""
    return tuple(int(part) for part in release.split(".")[:3] if part.isdigit())


def _variables(temporary: pathlib.Path, feature: bool | None) -> dict[str, str]:
    return {
        **node_variables(feature),
        "PYTHONPATH": str(STUBS),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
    }


def _wait_until_ready(servers: Mapping[str, Server], report: Report) -> None:
    started = time.monotonic()
    waiting = dict(servers)
    while waiting:
        for name, server in list(waiting.items()):
            server.process.check()
            if loopback.is_healthy(server.port):
                del waiting[name]
        passed = time.monotonic() - started
        if waiting and passed > READY_DEADLINE_S:
            late = next(iter(waiting.values())).process
            raise Failure(f"the {late.name} server is not ready after {READY_DEADLINE_S:.0f} s", late.log)
        report.status(f"waiting for {' and '.join(waiting)} to be ready: {passed:.0f} s")
        time.sleep(0.25)
