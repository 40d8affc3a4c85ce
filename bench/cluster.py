"""Where do contenders stand side by side? A Cluster: decode nodes and a prefill node of each contender, one network."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator

from kit.imposters import imposters
from kit.network import Network

from bench.contenders import CONTENDERS, DECODE, Contender, ForkServers, Manager

HOST = "127.0.0.1"
FIRST_PORT = 20000
REQUEST_DEADLINE_S = 45.0
REFUSED = "is not alive"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a request has ended at its prefill: served, refused, lost (its transfer failed) or unknown, and when."""

    how: str
    at: float
    why: str = ""

    @classmethod
    def of(cls, outcome: dict[str, str | float]) -> Ended:
        """From what a manager says of a request."""
        why = str(outcome["reason"])
        if outcome["status"] == "Success":
            how = "served"
        elif REFUSED in why:
            how = "refused"
        else:
            how = "lost" if "Failed to send" in why else "unknown"
        return cls(how, float(outcome["at"]), why)


class Decode:
    """A decode node, and what can go wrong with it."""

    def __init__(self, manager: Manager, network: Network, ports: tuple[int, int]) -> None:
        self.manager = manager
        self.session = manager.session
        self._network = network
        self._handshake_port = int(manager.session.rpartition(":")[2])
        (self._data_port,) = set(ports) - {self._handshake_port}

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The process is stopped."""
        try:
            self.manager.stop()
            yield
        finally:
            self.manager.resume()

    def dropped(self) -> contextlib.AbstractContextManager[None]:
        """Packets to its session vanish. Requests still reach the node."""
        return self._network.dropped(self._handshake_port, self._data_port)

    def rejected(self) -> contextlib.AbstractContextManager[None]:
        """Packets to its session are answered with a reset. Requests still reach the node."""
        return self._network.rejected(self._handshake_port, self._data_port)

    def data_rejected(self) -> contextlib.AbstractContextManager[None]:
        """It answers the handshake, and cannot be transferred to."""
        return self._network.rejected(self._data_port)


class Cluster:
    """Decode nodes, and a prefill node of each contender. All have met; nothing has happened yet."""

    def __init__(self, fork_servers: ForkServers, decodes: int = 1, contenders: list[Contender] = CONTENDERS) -> None:
        with contextlib.ExitStack() as started:
            self._network = started.enter_context(Network())
            self.decodes = [self._decode(started, fork_servers, number) for number in range(decodes)]
            self.prefills = {
                contender.name: started.enter_context(Manager(fork_servers, contender, "prefill", self._network.path))
                for contender in contenders
            }
            for prefill in self.prefills.values():
                for decode in self.decodes:
                    first = request(prefill, decode)
                    assert first.how == "served", f"{prefill.name} has not served the first request: {first}"
            self._started = started.pop_all()

    def _decode(self, started: contextlib.ExitStack, fork_servers: ForkServers, number: int) -> Decode:
        ports = FIRST_PORT + 2 * number, FIRST_PORT + 2 * number + 1
        between = {"MC_MIN_RPC_PORT": str(ports[0]), "MC_MAX_RPC_PORT": str(ports[1])}
        manager = Manager(fork_servers, DECODE, "decode", self._network.path, **between)
        return Decode(started.enter_context(manager), self._network, ports)

    def blacklist(self, *sessions: str) -> None:
        """Every prefill node blacklists the sessions as after failed transfers."""
        for prefill in self.prefills.values():
            prefill.ask("blacklist_all", sessions=sessions)

    @contextlib.contextmanager
    def hung_peers(self, number: int) -> Iterator[None]:
        """So many peers whose handshake hangs are on every prefill node's blacklist."""
        if not number:
            yield
            return
        with imposters("silent", number, network=self._network.path) as sessions:
            self.blacklist(*sessions)
            yield

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._started.close()


def new_room() -> int:
    """A number for a new request."""
    return random.randint(1, 2**62)


def start_request(prefill: Manager, decode: Decode, room: int) -> None:
    """Have both ends play a request. Returns at once, even if decode is stopped.

    Prefill takes it first: SGLang forgets that decode has handed over its pages if both happen at the same moment.
    """
    prefill.ask("take", room=room)
    decode.manager.tell("hand_over", room=room, bootstrap=prefill.bootstrap)


def request(prefill: Manager, decode: Decode) -> Ended:
    """Play a request, the only one of that prefill node, to its end."""
    room = new_room()
    start_request(prefill, decode, room)
    outcomes = prefill.ask("outcomes", wait_s=REQUEST_DEADLINE_S)["ended"]
    outcome = next((outcome for outcome in outcomes if outcome["room"] == room), None)
    return Ended.of(outcome) if outcome else Ended("unknown", time.monotonic(), "it has not ended")
