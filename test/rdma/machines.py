"""Machines with emulated RDMA devices: how are they started, cut off from each other, and ended?"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, Optional

from guest import SUBNETS
from image import Image, environment, image
from kit import processes

HERE = pathlib.Path(__file__).resolve().parent

Direction = Literal["to", "back", "both"]  # towards the decode node, from it, or both
HANDSHAKE, RDMA = "handshake", ("rdma0", "rdma1")
BOOT_S = 180.0  # 20 s on an idle machine
QEMU = "qemu-system-x86_64 -accel tcg,thread=multi -cpu max -m 2048 -nodefaults -display none -serial stdio -no-reboot"
KERNEL_WORDS = "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0"
GUEST_FILES = ("guest.py", "guest_node.py")


class Cable(NamedTuple):
    """One end of a cable between two machines, a descriptor."""

    end: int
    is_for_handshakes: bool


class Lines:
    """JSON lines to and from one end of a socket pair."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.descriptor = self._theirs.fileno()  # for the machine's process to inherit

    def inherited(self) -> None:
        """The machine has the other end now. With the machine it ends, and then nobody waits in vain."""
        self._theirs.close()

    def send(self, message: dict[str, Any]) -> None:
        self._ours.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> Iterator[dict[str, Any]]:
        """Gives what comes until the machine has ended."""
        with self._ours, contextlib.suppress(OSError), self._ours.makefile() as lines:
            yield from map(json.loads, lines)


class Machine:
    """One of them, number 1, 2 or 3.

    ``cables`` are descriptors: of the network for handshakes, and of that for RDMA, which all devices of all machines
    share, so that each reaches each, as Mooncake expects. ``folder`` is this machine's, and seen in the new one too.
    """

    def __init__(self, number: int, parts: Image, devices: int, cables: list[Cable], folder: pathlib.Path) -> None:
        self.number = number
        self._folder = folder
        self._agent, self._monitor = Lines(), Lines()
        self._ids = itertools.count(1)
        self._is_up: Future[Any] = Future()
        self._waiting: dict[int, Future[Any]] = {0: self._is_up}
        self._replies: list[Future[Any]] = []
        self._console = folder / f"console-{number}"
        program = f"{sys.executable} {folder / GUEST_FILES[0]} {number} {parts.preload} {devices}"
        boot = ["-kernel", str(parts.kernel), "-initrd", str(parts.initrd), "-append", f"{KERNEL_WORDS} -- {program}"]
        with self._console.open("w") as console:
            self._process = processes.start(
                [*QEMU.split(), *self._hardware(devices, cables).split(), *boot],
                pass_fds=[self._agent.descriptor, self._monitor.descriptor, *(cable.end for cable in cables)],
                stdout=console,
                stderr=console,
            )
        for lines, read in ((self._agent, self._read_agent), (self._monitor, self._read_monitor)):
            lines.inherited()
            threading.Thread(target=read, daemon=True).start()

    def _hardware(self, devices: int, cables: list[Cable]) -> str:
        options = [
            "-device virtio-serial -device virtserialport,chardev=agent,name=agent",
            f"-chardev socket,id=agent,fd={self._agent.descriptor}",
            "-mon chardev=monitor,mode=control",
            f"-chardev socket,id=monitor,fd={self._monitor.descriptor}",
            "-virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        ]
        for place, cable in enumerate(cables):  # what comes out of one goes on through the others, and to the cards
            hub = 0 if cable.is_for_handshakes else 1
            options.append(f"-netdev socket,id=out{place},fd={cable.end}")
            options.append(f"-netdev hubport,id=in{place},hubid={hub},netdev=out{place}")
        for place, network in enumerate([HANDSHAKE, *RDMA[:devices]]):
            options.append(f"-netdev hubport,id={network},hubid={min(place, 1)}")
            options += [
                f"-device virtio-net-pci,netdev={network},id={network}-card,mac={self._mac(place)},romfile=",
                f"-chardev null,id={network}-nowhere",
            ]
        return " ".join(options)

    def _mac(self, place: int) -> str:
        return f"52:54:00:00:{place:02}:{self.number:02}"

    def remember(self, other: Machine, devices: int) -> None:
        """From now on it knows the addresses of another machine's RDMA devices, as it would that of a router."""
        places = range(1, devices + 1)
        for place, through in itertools.product(places, places):
            address = f"{SUBNETS[place]}.{other.number} lladdr {other._mac(place)}"
            self.do("run", f"ip neighbour replace {address} dev eth{through} nud permanent")

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

    def file(self, name: str) -> str:
        """The path, in the machine, of one of GUEST_FILES."""
        return str(self._folder / name)

    @contextlib.contextmanager
    def unplugged(self, *networks: str) -> Iterator[None]:
        """Cables are out on this side meanwhile, which this machine's kernel sees."""
        with contextlib.ExitStack() as plug_in:
            for network in networks:
                plug_in.callback(self._execute, "set_link", name=f"{network}-card", up=True)
                self._execute("set_link", name=f"{network}-card", up=False)
            yield

    def drop(self, network: str, queue: Literal["tx", "rx", "all"]) -> None:
        """From now on packets vanish that this machine sends (``rx``: QEMU's network receives them), or that it is sent
        (``tx``), without its kernel noticing.
        """
        self._execute(
            "object-add",
            **{"qom-type": "filter-redirector", "id": f"drop-{network}", "netdev": network},
            queue=queue,
            outdev=f"{network}-nowhere",
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
        return self._console.read_text(errors="replace")[-3000:]

    def _read_agent(self) -> None:
        for message in self._agent.receive():
            future = self._waiting.pop(message["id"])
            if "error" in message:
                future.set_exception(AssertionError(f"machine {self.number}: {message['error']}"))
            else:
                future.set_result(message["value"])
        for future in (*self._waiting.values(), *self._replies):
            future.set_exception(AssertionError(f"machine {self.number} has ended:\n{self.said()}"))

    def _read_monitor(self) -> None:
        for message in self._monitor.receive():
            if "error" in message:
                self._replies.pop(0).set_exception(AssertionError(f"machine {self.number}: {message['error']}"))
            elif "return" in message:
                self._replies.pop(0).set_result(message["return"])

    def end(self) -> None:
        processes.end(self._process)


class Pair:
    """A prefill's and a decode's machine, and perhaps another decode's, with networks between them."""

    def __init__(self, devices: int, prefill: Machine, decode: Machine, other_decode: Optional[Machine] = None) -> None:
        self.prefill, self.decode, self.other_decode = prefill, decode, other_decode
        self.rdma = RDMA[:devices]

    def remember_addresses(self) -> None:
        """From now on no machine has to look for the address of another's RDMA device."""
        machines = [machine for machine in (self.prefill, self.decode, self.other_decode) if machine]
        for machine, other in itertools.permutations(machines, 2):
            machine.remember(other, len(self.rdma))

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
def pair(devices: int = 1, another: bool = False) -> Iterator[Pair]:
    """Starts two machines with so many RDMA devices each, or three, and ends them. Only one such pair runs at a time.

    Raises `environment.CannotMake` with the reason where there can be none.
    """
    parts = image()
    with contextlib.ExitStack() as running:
        running.enter_context(environment.locked("rdma-machines"))
        folder = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory(prefix="rdma-")))
        for name in GUEST_FILES:  # as they are now, whatever is edited meanwhile
            shutil.copy(HERE / name, folder)
        # All cables end in the first machine.
        ends: dict[int, list[Cable]] = {number: [] for number in range(1, 4 if another else 3)}
        for number, for_handshakes in itertools.product(list(ends)[1:], (True, False)):
            for machine, end in zip((1, number), socket.socketpair(), strict=True):
                ends[machine].append(Cable(end.detach(), for_handshakes))
        machines: list[Machine] = []
        try:
            for number, cables in ends.items():
                machines.append(Machine(number, parts, devices, cables, folder))
                running.callback(machines[-1].end)
        finally:
            for cable in itertools.chain(*ends.values()):
                os.close(cable.end)
        began = time.monotonic()
        for machine in machines:
            machine.wait_until_up()
        booted_s = time.monotonic() - began
        environment.say(f"{len(machines)} machines with {devices} RDMA device(s) are up after {booted_s:.0f} s")
        yield Pair(devices, *machines)
