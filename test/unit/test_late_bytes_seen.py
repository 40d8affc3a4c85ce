"""Is it seen, among the kernel's connections, that bytes may still land on a peer's memory?

The messages are the kernel's own, of connections on loopback; only what it has to send is changed.
"""

from __future__ import annotations

import os
import pathlib
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang.srt.disaggregation.mooncake import late_bytes
from sglang.srt.disaggregation.mooncake.late_bytes import LateBytes
from virtual_prober import Clock

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
    """What it says of its connections."""

    def __init__(self) -> None:
        self.messages: dict[int, list[bytes]] = {}
        self.clock, self.cpu_clock = Clock(), Clock()
        self.look_takes = 0.0
        self.looks = 0
        self.other_ports: set[int] = set()
        self.fails = False

    def shows(
        self, connection: socket.socket, waiting: int = BLOCK, timer: int = 1, again: int = 5, closed: bool = False
    ) -> None:
        """The connection has so many bytes to send, and has sent again so often."""
        inode = os.fstat(connection.fileno()).st_ino
        for message in late_bytes._connections(connection.family):
            if struct.unpack_from("=I", message, 84)[0] == inode:
                changed = bytearray(message)
                struct.pack_into("=BB", changed, 18, timer, again)
                struct.pack_into("=III", changed, 76, waiting, 0, 0 if closed else inode)
                self.messages.setdefault(connection.family, []).append(bytes(changed))
                return
        pytest.fail("the kernel does not name the connection")

    def connections(self, family: int) -> Iterator[bytes]:
        self.looks += 1
        self.cpu_clock.now += self.look_takes
        if self.fails:
            raise PermissionError
        yield from self.messages.get(family, [])

    def late_bytes(self) -> LateBytes:
        return LateBytes(lambda: self.other_ports, self.connections, self.clock, self.cpu_clock)

    def may_land(self, session: str) -> bool:
        """As seen with a look of its own."""
        return self.late_bytes().may_land(session)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


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
        {"timer": 4},  # a peer of that host is stopped and takes none: the kernel asks whether it takes more
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


def test_bytes_are_seen_though_the_name_of_the_process_is_cut_within_a_character(
    kernel: Kernel, connect: Callable[[str], socket.socket]
) -> None:
    """The kernel keeps fifteen bytes of it."""
    comm = pathlib.Path(f"/proc/self/task/{os.getpid()}/comm")
    name = comm.read_bytes()
    kernel.shows(connect("127.0.0.1"))
    try:
        comm.write_bytes(b"sglang-pr\xc3")
        assert kernel.may_land("127.0.0.1:7001")
    finally:
        comm.write_bytes(name)


def test_messages_that_sglang_sends_are_no_sign(kernel: Kernel, connect: Callable[[str], socket.socket]) -> None:
    connection = connect("127.0.0.1")
    kernel.shows(connection)
    kernel.other_ports.add(connection.getpeername()[1])
    assert not kernel.may_land("127.0.0.1:7001"), "a healthy peer stays out"


def test_a_host_that_is_a_name_is_not_looked_up(kernel: Kernel, connect: Callable[[str], socket.socket]) -> None:
    kernel.shows(connect("127.0.0.1"))
    assert not kernel.may_land("localhost:7001")


def test_where_the_kernel_does_not_tell_nothing_is_seen(
    kernel: Kernel, connect: Callable[[str], socket.socket]
) -> None:
    kernel.shows(connect("127.0.0.1"))
    kernel.fails = True
    assert not kernel.may_land("127.0.0.1:7001"), "on gVisor no peer would be let in"


def test_however_many_ask_the_kernel_is_asked_four_times_a_second(
    kernel: Kernel, connect: Callable[[str], socket.socket]
) -> None:
    late = kernel.late_bytes()
    assert not late.may_land("127.0.0.1:7001")
    kernel.shows(connect("127.0.0.1"))
    kernel.clock.now += 0.9 * LateBytes.LOOK_EVERY_S
    assert not late.may_land("127.0.0.1:7001"), "a look takes milliseconds of CPU"
    kernel.clock.now += 0.2 * LateBytes.LOOK_EVERY_S
    assert late.may_land("127.0.0.1:7001")


@pytest.mark.parametrize(("takes_s", "looks"), [(0.01, 120), (0.5, 60)])
def test_where_a_look_takes_long_there_are_fewer_but_one_a_second(kernel: Kernel, takes_s: float, looks: int) -> None:
    """As with tens of thousands of connections: 2 % of a core, if that is not too seldom."""
    kernel.look_takes = takes_s
    late = kernel.late_bytes()
    while kernel.clock.now < 60.0:
        assert not late.may_land("127.0.0.1:7001")
        kernel.clock.now += 0.01
    assert kernel.looks == pytest.approx(looks, abs=0.05 * looks)


def test_all_connections_of_this_process_are_its_own_and_no_others(connect: Callable[[str], socket.socket]) -> None:
    mine = [connect("127.0.0.1") for _ in range(20)]
    inodes = {os.fstat(connection.fileno()).st_ino for connection in mine}
    assert inodes <= late_bytes._own_sockets()
    for connection in mine:
        connection.close()
    assert not inodes & late_bytes._own_sockets()


def test_the_kernel_names_each_of_many_connections(connect: Callable[[str], socket.socket]) -> None:
    """It takes several replies."""
    inodes = {os.fstat(connect("127.0.0.1").fileno()).st_ino for _ in range(400)}
    named = {struct.unpack_from("=I", message, 84)[0] for message in late_bytes._connections(socket.AF_INET)}
    assert inodes <= named


def test_a_look_in_a_busy_process_gives_up_the_interpreter_a_few_times(
    connect: Callable[[str], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it may wait 5 ms for the scheduler's own work, and workers wait for the look."""
    for _ in range(200):
        connect("127.0.0.1")
    calls = []

    class Counted(socket.socket):
        def recv(self, *arguments: Any) -> bytes:
            calls.append(1)
            return super().recv(*arguments)

    monkeypatch.setattr(late_bytes.socket, "socket", Counted)
    assert len(list(late_bytes._connections(socket.AF_INET))) >= 200
    assert len(calls) <= 10, "a call for each few connections"
