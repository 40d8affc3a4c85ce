"""Can bytes of a transfer that failed still land on a peer's memory, because the kernel sends them again?

Over TCP it sends what was not acknowledged again after 0.2, 0.4, 0.8, ... s, though the transfer has failed, and though
Mooncake has closed the connection (after 30 s) and uses a new one. So after the heal they land up to as long as the
fault has lasted, on memory that the next request may have by then. Where the kernel does not tell (gVisor), nothing is
seen.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

# A connection that has sent bytes again since any were acknowledged (timer 1, and how often): remote address and port,
# bytes to send, inode. An inode of 0 means that it was closed.
_SENT_AGAIN = re.compile(
    rb" ((?:[0-9A-F]{8}){1,4}):([0-9A-F]{4}) [0-9A-F]{2} ([0-9A-F]{8}):[0-9A-F]{8}"
    rb" 01:[0-9A-F]{8} (?!0{8})[0-9A-F]{8} +\d+ +\d+ (\d+) "
)


class LateBytes:
    """Looks in the kernel's tables of connections. Any thread, no lock held.

    ``other_ports()`` are ports of peers to which something else than Mooncake sends.
    """

    # What has waited for the kernel to send it again has done so for seconds. A look takes 5 to 40 ms, nearly all of it
    # in the kernel, so with these pauses 2 % of a core at most, however many peers are read.
    LOOK_EVERY_S, PAUSE_PER_LOOK = 0.25, 50
    # Mooncake asks to read with 24 bytes, and sends a block with 24 more than it has.
    _LEAST_BYTES = 65

    def __init__(
        self,
        other_ports: Callable[[], Collection[int]] = tuple,
        tables: str = "/proc/self/net",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._other_ports = other_ports
        self._tables = tables
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}  # by name of the table

    def may_land(self, session: str) -> bool:
        """True if the kernel sends bytes to the peer's host again that this process has given it, or on a connection
        that was closed, whoever that was. Blocks for a look.

        Where the host is a name it is not looked up, and nothing is seen.
        """
        try:
            ip = ipaddress.ip_address(session.rpartition(":")[0].strip("[]").partition("%")[0])
        except ValueError:
            return False
        ports = self._look("tcp" if ip.version == 4 else "tcp6").get(_in_table(ip.packed))
        return ports is not None and not ports <= set(self._other_ports())

    def _look(self, table: str) -> dict[str, set[int]]:
        """To which addresses, as the kernel writes them, and ports bytes are sent again; a moment ago, or now."""
        with self._lock:
            seen = self._seen.get(table)
            began = self._clock()
            if seen is None or began >= seen.until:
                ports = self._ports_in(table)
                now = self._clock()
                seen = self._seen[table] = _Seen(
                    ports, now + max(self.LOOK_EVERY_S, self.PAUSE_PER_LOOK * (now - began))
                )
            return seen.ports

    def _ports_in(self, table: str) -> dict[str, set[int]]:
        found = []
        with contextlib.suppress(OSError), open(f"{self._tables}/{table}", "rb") as lines:
            # Nearly all lines have no timer that sends again.
            matches = (_SENT_AGAIN.search(line) for line in lines if b" 01:" in line)
            found = [match.groups() for match in matches if match]
        ports: dict[str, set[int]] = {}
        own = _own_sockets() if found else set()
        for address, port, waiting, inode in found:
            if int(waiting, 16) >= self._LEAST_BYTES and int(inode) in own:
                ports.setdefault(address.decode(), set()).add(int(port, 16))
        return ports


class _Seen(NamedTuple):
    ports: dict[str, set[int]]
    until: float  # then it is time to look again


def _own_sockets() -> set[int]:
    """The inodes of this process's sockets, and 0 for those that are closed."""
    own = {0}
    with contextlib.suppress(OSError):  # no descriptor left
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                target = os.readlink(f"/proc/self/fd/{descriptor}")
                if target.startswith("socket:["):
                    own.add(int(target[len("socket:[") : -1]))
    return own


def _in_table(packed: bytes) -> str:
    """An address as the kernel writes it: words of four bytes, in the byte order of the machine."""
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
