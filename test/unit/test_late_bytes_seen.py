"""Is it seen, in the kernel's tables of connections, that bytes may still land on a peer's memory?

The lines are the kernel's own, of connections on loopback; only what it has to send is changed.
"""

from __future__ import annotations

import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang.srt.disaggregation.mooncake.late_bytes import LateBytes
from virtual_prober import Clock

NOTHING_TO_SEND = "00000000:00000000 00:00000000 00000000"  # bytes to send and to read; timer; how often sent again
TABLES = ("tcp", "tcp6")
BLOCK = 65560


@pytest.fixture
def connect() -> Iterator[Callable[[str], socket.socket]]:
    """Makes a connection to an address of this machine."""
    opened: list[socket.socket] = []

    def connected_to(address: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        mapped = address.startswith("::ffff:")
        listener = socket.create_server((address, 0), family=family, dualstack_ipv6=mapped)
        client = socket.create_connection(listener.getsockname()[:2], timeout=5)
        opened.extend((listener, client))
        return client

    yield connected_to
    for one in opened:
        one.close()


class Kernel:
    """Tables of connections in a folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.other_ports: set[int] = set()

    def shows(
        self, connection: socket.socket, waiting: int = BLOCK, timer: int = 1, again: int = 5, closed: bool = False
    ) -> None:
        """The connection has so many bytes to send, and has sent again so often."""
        inode = os.fstat(connection.fileno()).st_ino
        for name in TABLES:
            header, *lines = pathlib.Path("/proc/self/net", name).read_text().splitlines(keepends=True)
            mine = [line for line in lines if line.split()[9] == str(inode)]
            text = header + "".join(mine).replace(
                NOTHING_TO_SEND, f"{waiting:08X}:00000000 {timer:02X}:000000C0 {again:08X}"
            )
            (self.folder / name).write_text(text.replace(f" {inode} ", " 0 ") if closed else text)

    def late_bytes(self) -> LateBytes:
        return LateBytes(lambda: self.other_ports, str(self.folder), self.clock)

    def may_land(self, session: str) -> bool:
        """As seen with a look of its own."""
        return self.late_bytes().may_land(session)


@pytest.fixture
def kernel(tmp_path: pathlib.Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.mark.parametrize(
    ("address", "session", "other"),
    [
        ("127.0.0.1", "127.0.0.1:7001", "127.0.0.2:7001"),
        ("::1", "[::1]:7001", "[::2]:7001"),
        ("::1", "[::1%lo]:7001", "127.0.0.1:7001"),
        ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]:7001", "[::1]:7001"),
    ],
)
def test_bytes_that_the_kernel_sends_again_are_seen_by_their_peers_address(
    kernel: Kernel, connect: Callable[[str], socket.socket], address: str, session: str, other: str
) -> None:
    kernel.shows(connect(address))
    assert kernel.may_land(session), "let in though bytes of the failed transfer would land"
    assert not kernel.may_land(other), "another host's peers stay out, too"


@pytest.mark.parametrize(
    "shown",
    [
        {"again": 0},  # sent, and not yet acknowledged
        {"timer": 4, "again": 0},  # the peer is stopped, and takes none
        {"waiting": 0},
        {"waiting": 24},  # Mooncake's request to read
        {"waiting": 25},  # the same on a connection that was closed
    ],
    ids=str,
)
def test_what_is_no_block_or_was_sent_once_is_no_sign(
    kernel: Kernel, connect: Callable[[str], socket.socket], shown: dict[str, Any]
) -> None:
    kernel.shows(connect("127.0.0.1"), **shown)
    assert not kernel.may_land("127.0.0.1:7001"), "a healthy peer stays out"


def test_bytes_on_a_connection_that_was_closed_are_seen(
    kernel: Kernel, connect: Callable[[str], socket.socket]
) -> None:
    """Mooncake closes those on which nothing has moved for 30 s."""
    kernel.shows(connect("127.0.0.1"), closed=True)
    assert kernel.may_land("127.0.0.1:7001"), "let in though bytes of the failed transfer would land"


def test_what_other_processes_send_is_no_sign(kernel: Kernel, connect: Callable[[str], socket.socket]) -> None:
    connection = connect("127.0.0.1")
    kernel.shows(connection)
    connection.close()
    assert not kernel.may_land("127.0.0.1:7001"), "a healthy peer stays out"


def test_messages_that_sglang_sends_are_no_sign(kernel: Kernel, connect: Callable[[str], socket.socket]) -> None:
    connection = connect("127.0.0.1")
    kernel.shows(connection)
    kernel.other_ports.add(connection.getpeername()[1])
    assert not kernel.may_land("127.0.0.1:7001"), "a healthy peer stays out"


def test_a_host_that_is_a_name_is_not_looked_up(kernel: Kernel, connect: Callable[[str], socket.socket]) -> None:
    kernel.shows(connect("127.0.0.1"))
    assert not kernel.may_land("localhost:7001")


def test_where_the_kernel_has_no_tables_nothing_is_seen(kernel: Kernel) -> None:
    assert not kernel.may_land("127.0.0.1:7001"), "on gVisor no peer would be let in"


def test_however_many_ask_the_tables_are_read_four_times_a_second(
    kernel: Kernel, connect: Callable[[str], socket.socket]
) -> None:
    late_bytes = kernel.late_bytes()
    assert not late_bytes.may_land("127.0.0.1:7001")
    kernel.shows(connect("127.0.0.1"))
    kernel.clock.now += 0.9 * LateBytes.LOOK_EVERY_S
    assert not late_bytes.may_land("127.0.0.1:7001"), "a look takes milliseconds of CPU"
    kernel.clock.now += 0.2 * LateBytes.LOOK_EVERY_S
    assert late_bytes.may_land("127.0.0.1:7001")


def test_where_a_look_takes_long_it_costs_two_percent_of_a_core(
    kernel: Kernel, connect: Callable[[str], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with tens of thousands of connections."""
    looks: list[str] = []

    def takes_long(late_bytes: LateBytes, table: str) -> dict[str, set[int]]:
        looks.append(table)
        kernel.clock.now += 0.1
        return {}

    monkeypatch.setattr(LateBytes, "_ports_in", takes_long)
    late_bytes = kernel.late_bytes()
    while kernel.clock.now < 60.0:
        assert not late_bytes.may_land("127.0.0.1:7001")
        kernel.clock.now += 0.01
    assert 10 <= len(looks) <= 12
