"""Can bytes of a transfer that failed still land on a peer's memory, because the kernel sends them again?

Over TCP it sends what was not acknowledged again after 0.2, 0.4, 0.8, ... s, though the transfer has failed, and though
Mooncake has closed the connection (after 30 s) and uses a new one. So after the heal they land up to as long as the
fault has lasted, on memory that the next request may have by then. Where the kernel does not tell (gVisor), nothing is
seen.

The scheduler is busy in Python, so whoever gives up the interpreter may wait 5 ms to go on. So the kernel is asked for
all connections at once through netlink, as ``ss`` does (/proc/net/tcp would take a call for each 27 of them).
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP = 4, 20, 0x301
# In which a connection may have bytes to send: ESTABLISHED, FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING.
_STATES = 1 << 1 | 1 << 4 | 1 << 8 | 1 << 9 | 1 << 11
# A message of the kernel's: its header (nlmsghdr), and from where on it has (inet_diag_msg) the timer, how often bytes
# were sent again and both ports; the remote address; how many bytes there are to send, a user and the inode.
_HEADER = struct.Struct("=IHHII")
_TIMER, _ADDRESS, _TO_SEND = 18, 40, 76
_SENDS_AGAIN = 1
_KERNEL_REPLIES_WITHIN_S = 1


class LateBytes:
    """Looks at the kernel's connections. Any thread, no lock held.

    ``other_ports()`` are ports of peers to which something else than Mooncake's blocks is sent; ``connections(family)``
    gives the kernel's messages.
    """

    # What has waited for the kernel to send it again has done so for seconds. A look takes 1 ms of CPU with 200
    # connections, 23 ms with 9,000; with these pauses that is about 2 % of a core, however many peers are read.
    LOOK_EVERY_S, PAUSE_PER_CPU_S, LONGEST_PAUSE_S = 0.25, 50, 1.0
    # Mooncake asks to read with 24 bytes, and sends a block with 24 more than it has.
    _LEAST_BYTES = 65

    def __init__(
        self,
        other_ports: Callable[[], Collection[int]] = tuple,
        connections: Callable[[int], Iterator[bytes]] = lambda family: _connections(family),
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._other_ports = other_ports
        self._connections = connections
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[dict[bytes, set[int]], float]] = {}  # by family; until when

    def may_land(self, session: str) -> bool:
        """True if the kernel sends bytes to the peer's host again that this process has given it, or on a connection
        that was closed, whoever that was. Blocks for a look; raises nothing.

        Where the host is a name it is not looked up, and nothing is seen.
        """
        try:
            ip = ipaddress.ip_address(session.rpartition(":")[0].strip("[]").partition("%")[0])
        except ValueError:
            return False
        ports = self._look(socket.AF_INET if ip.version == 4 else socket.AF_INET6).get(ip.packed)
        return ports is not None and not ports <= set(self._other_ports())

    def _look(self, family: int) -> dict[bytes, set[int]]:
        """To which addresses and ports bytes are sent again; a moment ago, or now."""
        with self._lock:
            ports, until = self._seen.get(family, ({}, -math.inf))
            if self._clock() >= until:
                began = self._cpu_clock()
                ports = self._ports(family)
                took_s = self._cpu_clock() - began
                pause_s = min(max(self.LOOK_EVERY_S, self.PAUSE_PER_CPU_S * took_s), self.LONGEST_PAUSE_S)
                self._seen[family] = ports, self._clock() + pause_s
            return ports

    def _ports(self, family: int) -> dict[bytes, set[int]]:
        length = 4 if family == socket.AF_INET else 16
        found = []
        with contextlib.suppress(OSError):  # no netlink, or no descriptor left
            for message in self._connections(family):
                timer, again, port = struct.unpack_from("!BB2xH", message, _TIMER)
                if timer == _SENDS_AGAIN and again:
                    to_send, _, inode = struct.unpack_from("=III", message, _TO_SEND)
                    if to_send >= self._LEAST_BYTES:
                        found.append((message[_ADDRESS : _ADDRESS + length], port, inode))
        own = _own_sockets() if any(inode for _, _, inode in found) else set()
        ports: dict[bytes, set[int]] = {}
        for address, port, inode in found:
            if inode == 0 or inode in own:  # 0: it was closed
                ports.setdefault(address, set()).add(port)
        return ports


def _connections(family: int) -> Iterator[bytes]:
    """The kernel's message about each TCP connection of this network namespace. Raises OSError."""
    request = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, _STATES)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _KERNEL_REPLIES_WITHIN_S, 0))
        kernel.sendto(header + request, (0, 0))
        while True:
            reply, at = kernel.recv(1 << 16), 0
            while at < len(reply):
                length, kind, *_ = _HEADER.unpack_from(reply, at)
                if kind != _SOCK_DIAG_BY_FAMILY:  # the end, or an error
                    return
                yield reply[at : at + length]
                at += (length + 3) & ~3


def _own_sockets() -> set[int]:
    """The inodes of this process's sockets. ``os.readlink`` would give up the interpreter for each descriptor."""
    own = set()
    with contextlib.suppress(OSError):
        readlink = ctypes.PyDLL(None).readlink
        with open("/proc/self/status", "rb") as status:  # the name of a thread there may be cut within a character
            found = re.search(rb"^FDSize:\s*(\d+)", status.read(), re.MULTILINE)
        target = ctypes.create_string_buffer(64)
        for descriptor in range(int(found[1]) if found else 0):
            length = readlink(b"/proc/self/fd/%d" % descriptor, target, 64)
            if target.raw[: max(0, length)].startswith(b"socket:["):
                own.add(int(target.raw[len("socket:[") : length - 1]))
    return own
