"""How do tests break the network between a node and its peers, and heal it?"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Literal

from kit import processes

Direction = Literal["to", "back", "both"]  # towards a port, from it, or both
# The relay's own connections carry this mark, so that they are not redirected to itself.
RELAY_MARK = 7
# When a process is gone, so are its connections: Mooncake does not take a port that has one in TIME_WAIT.
PORTS_ARE_FREE_AT_ONCE = "cd /proc/sys/net/ipv4 && echo 0 > tcp_max_tw_buckets && echo 1 > tcp_fin_timeout"


class Network:
    """A network namespace without a name: it is gone when its last process is.

    Faults are context managers and last as long as their block; ``heal`` ends them all at once.
    """

    def __init__(self) -> None:
        self._holder = processes.start(
            ["unshare", "--net", "sh", "-c", f"ip link set lo up && {PORTS_ARE_FREE_AT_ONCE} && echo up && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n"
        self.path = f"/proc/{self._holder.pid}/ns/net"
        self._rules: list[list[str]] = []

    @property
    def pid(self) -> int:
        """The process that holds the namespace."""
        return self._holder.pid

    def listening_ports(self, pid: int) -> list[int]:
        """The ports that a process listens on."""
        lines = self._run("ss", "-ltnpH").splitlines()
        return [int(line.split()[3].rpartition(":")[2]) for line in lines if f"pid={pid}," in line]

    def sends_again_in(self, port: int) -> dict[int, float]:
        """The connections to a port that have to send more than a request again, by local port: in how many seconds."""
        found = {}
        for line in self._run("cat", "/proc/self/net/tcp").splitlines()[1:]:
            _, local, remote, _, to_send, timer, *_ = line.split()
            kind, _, hundredths = timer.partition(":")
            is_block = int(to_send.partition(":")[0], 16) > 64
            if int(remote.rpartition(":")[2], 16) == port and kind == "01" and is_block:
                found[int(local.rpartition(":")[2], 16)] = int(hundredths, 16) / 100
        return found

    def dropped(self, *ports: int, direction: Direction = "to") -> contextlib.AbstractContextManager[None]:
        """Packets vanish."""
        return self._closed(ports, ["DROP"], direction)

    def rejected(self, *ports: int, direction: Direction = "to") -> contextlib.AbstractContextManager[None]:
        """Packets are answered with a reset."""
        return self._closed(ports, RESET, direction)

    def cut(self, *ports: int, direction: Direction = "both") -> contextlib.AbstractContextManager[None]:
        """Connections are made, and then their packets vanish; so do those of connections there were before."""
        return self._closed(ports, ["DROP"], direction, only_after_connect=True)

    def reset(self, *ports: int, direction: Direction = "to") -> contextlib.AbstractContextManager[None]:
        """Connections are made, and reset by their first packet; so are those that there were before."""
        return self._closed(ports, RESET, direction, only_after_connect=True)

    def closed(self, port: int, target: str) -> contextlib.AbstractContextManager[None]:
        """``rejected`` or ``dropped``, by the name of iptables' target."""
        return self.rejected(port) if target == "REJECT" else self.dropped(port)

    @contextlib.contextmanager
    def delayed(self, port: int, seconds: float) -> Iterator[None]:
        """Connections made from now on get what the port answers that much later; they are cut at the end."""
        with processes.running(processes.kit_program("relay", port, seconds), self.path) as relay_port:
            unmarked = ["-m", "mark", "!", "--mark", str(RELAY_MARK)]
            to_relay = ["-p", "tcp", "--dport", str(port), *unmarked, "-j", "REDIRECT", "--to-ports", relay_port]
            with self._rules_in_force([["nat", "OUTPUT", *to_relay]]):
                yield

    def connects_like_linux_before_6_5(self) -> None:
        """What asks for a connection is sent again after 1, 3 and 7 s; newer kernels do so each second at first."""
        with contextlib.suppress(subprocess.CalledProcessError):  # an old kernel does not know the setting
            self._run("sysctl", "-qw", "net.ipv4.tcp_syn_linear_timeouts=0")

    def heal(self) -> None:
        """Ends every fault that is in force."""
        while self._rules:
            self._iptables("-D", self._rules.pop())

    def _closed(
        self, ports: tuple[int, ...], target: list[str], direction: Direction, only_after_connect: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        sides = {"to": ["--dports"], "back": ["--sports"], "both": ["--dports", "--sports"]}[direction]
        packets = ["--tcp-flags", "SYN", "NONE"] if only_after_connect else []
        matches = [["-p", "tcp", *packets, "-m", "multiport", side, ",".join(map(str, ports))] for side in sides]
        return self._rules_in_force([["filter", "INPUT", *match, "-j", *target] for match in matches])

    @contextlib.contextmanager
    def _rules_in_force(self, rules: list[list[str]]) -> Iterator[None]:
        for rule in rules:
            self._iptables("-I", rule)
            self._rules.append(rule)
        try:
            yield
        finally:
            for rule in rules:
                if rule in self._rules:  # not healed meanwhile
                    self._rules.remove(rule)
                    self._iptables("-D", rule)

    def _iptables(self, action: str, rule: list[str]) -> None:
        table, chain, *match = rule
        self._run("iptables", "--wait", "-t", table, action, chain, *match)

    def _run(self, *command: str) -> str:
        return processes.run(list(command), self.path)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        processes.end(self._holder)


RESET = ["REJECT", "--reject-with", "tcp-reset"]


def why_no_network() -> str:
    """Why a network namespace cannot be had here; empty if it can."""
    if os.geteuid() != 0:
        return "it needs root for a network namespace"
    missing = [tool for tool in ("setpriv", "unshare", "nsenter", "ip", "ss", "iptables") if shutil.which(tool) is None]
    return f"it needs {', '.join(missing)}" if missing else ""
