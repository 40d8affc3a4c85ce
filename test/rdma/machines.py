"""Two machines with emulated RDMA devices: how are they started, cut off from each other, and ended?"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "faults"))

import processes  # noqa: E402
from image import Image, environment, image  # noqa: E402

Direction = Literal["to", "back", "both"]  # towards the decode node, from it, or both
HANDSHAKE, RDMA = "net0", ("net1", "net2")
BOOT_S = 180.0  # 20 s on an idle machine
QEMU = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-display", "none", "-no-reboot"]


class Lines:
    """JSON lines to and from one end of a socket pair. Whatever waits for an answer has a deadline."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        self.descriptor = theirs.detach()  # for the machine's process to inherit
        self._file = self._ours.makefile("r")

    def send(self, message: dict[str, Any]) -> None:
        self._ours.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> Iterator[dict[str, Any]]:
        """Gives what comes until the machine has ended."""
        with contextlib.suppress(OSError, ValueError):
            yield from map(json.loads, self._file)

    def close(self) -> None:
        os.close(self.descriptor)
        self._ours.shutdown(socket.SHUT_RDWR)
        self._ours.close()


class Machine:
    """One of the two, number 1 or 2. ``cables`` are descriptors, a network each."""

    def __init__(self, number: int, parts: Image, devices: int, cables: list[int], folder: pathlib.Path) -> None:
        self.number = number
        self._agent, self._monitor = Lines(), Lines()
        self._ids = itertools.count(1)
        self._is_up: Future[Any] = Future()
        self._waiting: dict[int, Future[Any]] = {0: self._is_up}
        self._replies: list[Future[Any]] = []
        self._plugged_in = set(range(devices + 1))
        self.console = folder / f"console-{number}"
        python = [sys.executable, str(HERE / "guest.py"), str(number), str(parts.preload), str(devices)]
        inherited = [self._agent.descriptor, self._monitor.descriptor, *cables]
        with self.console.open("w") as console:
            self._process = processes.start(
                [*QEMU, *self._hardware(cables), *self._boot(parts, python)],
                pass_fds=inherited,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        threading.Thread(target=self._read_agent, daemon=True).start()
        threading.Thread(target=self._read_monitor, daemon=True).start()

    def _hardware(self, cables: list[int]) -> list[str]:
        options = [
            *(
                "-nodefaults",
                "-m",
                os.environ.get("RDMA_MEMORY", "2048"),
                "-device",
                "virtio-serial",
                "-serial",
                "stdio",
            ),
            *("-chardev", f"socket,id=agent,fd={self._agent.descriptor}"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
            *("-chardev", f"socket,id=monitor,fd={self._monitor.descriptor}", "-mon", "chardev=monitor,mode=control"),
            *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        ]
        for place, cable in enumerate(cables):
            card = (
                f"virtio-net-pci,netdev=net{place},id=card{place},mac=52:54:00:00:{place:02}:{self.number:02},romfile="
            )
            options += [
                "-chardev",
                f"null,id=nowhere-net{place}",
                "-netdev",
                f"socket,id=net{place},fd={cable}",
                "-device",
                card,
            ]
        return options

    def _boot(self, parts: Image, program: list[str]) -> list[str]:
        words = "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0 --"
        return ["-kernel", str(parts.kernel), "-initrd", str(parts.initrd), "-append", " ".join([words, *program])]

    def wait_until_up(self) -> None:
        """Waits until it takes commands."""
        self._result(self._is_up, BOOT_S)
        self._execute("qmp_capabilities")

    def do(self, what: str, *arguments: Any, deadline_s: float = 60) -> Any:
        """Calls a method of `guest.Guest` in the machine. Any thread."""
        return self._result(self.begin(what, *arguments), deadline_s)

    def begin(self, what: str, *arguments: Any) -> Future[Any]:
        """As ``do``, but does not wait for the answer."""
        future: Future[Any] = Future()
        number = next(self._ids)
        self._waiting[number] = future
        self._agent.send({"id": number, "what": what, "with": arguments})
        return future

    def plug(self, network: str, plugged_in: bool) -> None:
        """Puts the cable of a network in or out on this side, which this machine's kernel sees."""
        self._execute("set_link", name=network.replace("net", "card"), up=plugged_in)

    @contextlib.contextmanager
    def unplugged(self, *networks: str) -> Iterator[None]:
        """Cables are out on this side meanwhile."""
        try:
            for network in networks:
                self.plug(network, False)
            yield
        finally:
            for network in networks:
                self.plug(network, True)

    def drop(self, network: str, queue: Literal["tx", "rx", "all"]) -> None:
        """From now on packets vanish that this machine sends (``rx``: QEMU's network receives them), or that it is sent
        (``tx``), without its kernel noticing.
        """
        self._execute(
            "object-add",
            **{"qom-type": "filter-redirector", "id": f"drop-{network}", "netdev": network},
            queue=queue,
            outdev=f"nowhere-{network}",
        )

    def deliver(self, network: str) -> None:
        """Ends ``drop``."""
        self._execute("object-del", id=f"drop-{network}")

    def _execute(self, command: str, **arguments: Any) -> Any:
        future: Future[Any] = Future()
        self._replies.append(future)
        self._monitor.send({"execute": command, "arguments": arguments})
        return self._result(future, 30)

    def _result(self, future: Future[Any], deadline_s: float) -> Any:
        try:
            return future.result(deadline_s)
        except TimeoutError:
            raise AssertionError(f"machine {self.number}: no answer for {deadline_s} s\n{self.said()}") from None

    def said(self) -> str:
        """The end of what its kernel and its first program have printed."""
        return self.console.read_text(errors="replace")[-3000:]

    def _read_agent(self) -> None:
        for message in self._agent.receive():
            future = self._waiting.pop(message["id"])
            if "error" in message:
                future.set_exception(AssertionError(f"machine {self.number}: {message['error']}"))
            else:
                future.set_result(message["value"])

    def _read_monitor(self) -> None:
        for message in self._monitor.receive():
            if "error" in message:
                self._replies.pop(0).set_exception(AssertionError(f"machine {self.number}: {message['error']}"))
            elif "return" in message:
                self._replies.pop(0).set_result(message["return"])

    def end(self) -> None:
        processes.end(self._process)
        self._agent.close()
        self._monitor.close()


class Pair:
    """A prefill's and a decode's machine, with networks between them."""

    def __init__(self, prefill: Machine, decode: Machine, devices: int) -> None:
        self.prefill, self.decode = prefill, decode
        self.rdma = RDMA[:devices]

    @contextlib.contextmanager
    def dropped(self, *networks: str, direction: Direction = "both") -> Iterator[None]:
        """Packets of these networks vanish meanwhile; no machine notices that by its port."""
        queue: Literal["tx", "rx", "all"] = {"to": "tx", "back": "rx", "both": "all"}[direction]  # type: ignore[assignment]
        with contextlib.ExitStack() as heal:
            for network in networks:
                self.decode.drop(network, queue)
                heal.callback(self.decode.deliver, network)
            yield


@contextlib.contextmanager
def pair(devices: int = 1) -> Iterator[Pair]:
    """Starts two machines with so many RDMA devices each, and ends them. Only one such pair runs at a time.

    Raises `environment.CannotMake` with the reason where there can be none.
    """
    parts = image()
    with contextlib.ExitStack() as running:
        running.enter_context(environment.locked("rdma-machines"))
        folder = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory(prefix="rdma-")))
        cables = [[end.detach() for end in socket.socketpair()] for _ in range(devices + 1)]
        machines = []
        try:
            for side in (0, 1):
                ends = [cable[side] for cable in cables]
                machines.append(Machine(side + 1, parts, devices, ends, folder))
                running.callback(machines[-1].end)
        finally:
            for end in itertools.chain(*cables):
                os.close(end)
        began = time.monotonic()
        for machine in machines:
            machine.wait_until_up()
        environment.say(f"two machines with {devices} RDMA device(s) are up after {time.monotonic() - began:.0f} s")
        yield Pair(*machines, devices)
