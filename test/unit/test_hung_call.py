"""Is a thread that waits in the kernel for a peer got out of there, and is nobody else's socket ever touched?

On real sockets of this process, and threads that wait as Mooncake's calls do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import resource
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit.fake_engine import raises
from kit.managers import full_peer
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake import hung_call
from sglang.srt.disaggregation.mooncake.hung_call import end_call, wait_of

ENDS_WITHIN_S = 1.0  # one that could not be ended waits for 30 s


def yes() -> bool:
    return True


def no() -> bool:
    return False


class Waiting:
    """A thread that waits in the kernel as one in a call into Mooncake does, and what came of that."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait = wait
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.result: Any = None
        self._thread.start()
        self.id = self._thread.native_id or 0

    def waits_in(self, *calls: str) -> bool:
        """Whether it gets to wait in one of these system calls."""

        def is_there() -> bool:
            wait = wait_of(self.id)
            return wait is not None and wait.call in calls

        return wait_until(is_there)

    def came_back(self, within_s: float = ENDS_WITHIN_S) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self.result = self._wait()
        except OSError as error:
            self.result = error


class Peer:
    """A peer that takes connections. What it is sent it does not read."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.port = self.listener.getsockname()[1]
        self.session = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._host = host
        self._ends: list[socket.socket] = []

    def connect(self) -> socket.socket:
        """A connection to it."""
        connection = socket.create_connection((self._host, self.port))
        self._ends += [connection, self.listener.accept()[0]]
        return connection

    def far_end_of(self, connection: socket.socket) -> socket.socket:
        return self._ends[self._ends.index(connection) + 1]

    def close(self) -> None:
        for end in [self.listener, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # else who waits there goes on waiting
            end.close()


@pytest.fixture
def new_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(host: str = "127.0.0.1") -> Peer:
        peers.append(Peer(host))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def peer(new_peer: Callable[..., Peer]) -> Peer:
    return new_peer()


def is_untouched(peer: Peer, connection: socket.socket) -> bool:
    """True if bytes still go both ways."""
    far = peer.far_end_of(connection)
    with contextlib.suppress(OSError):
        connection.sendall(b"there")
        far.sendall(b"back")
        return far.recv(5) == b"there" and connection.recv(4) == b"back"
    return False


# What hangs is ended.


def test_a_thread_that_waits_for_a_reply_is_got_out_of_there(peer: Peer) -> None:
    connection = peer.connect()
    waiting = Waiting(lambda: connection.recv(1))
    assert waiting.waits_in("recvfrom")
    assert end_call(waiting.id, peer.session, yes)
    assert waiting.came_back(), "a hung probe keeps its place for a minute"
    assert waiting.result == b""


def test_a_thread_that_reads_a_socket_like_a_file_is_got_out_of_there(peer: Peer) -> None:
    connection = peer.connect()
    waiting = Waiting(lambda: os.read(connection.fileno(), 1))
    assert waiting.waits_in("read")
    assert end_call(waiting.id, peer.session, yes)
    assert waiting.came_back()


def test_a_thread_that_waits_for_a_message_is_got_out_of_there(peer: Peer) -> None:
    connection = peer.connect()
    waiting = Waiting(lambda: connection.recvmsg(1))
    assert waiting.waits_in("recvmsg")
    assert end_call(waiting.id, peer.session, yes)
    assert waiting.came_back()


def test_a_thread_that_polls_one_descriptor_is_got_out_of_there(peer: Peer) -> None:
    connection = peer.connect()
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    waiting = Waiting(lambda: poll.poll(30_000))
    assert waiting.waits_in("poll", "ppoll")
    assert end_call(waiting.id, peer.session, yes)
    assert waiting.came_back()


@pytest.mark.parametrize(
    ("timeout_s", "call"), [(None, ("connect",)), (30.0, ("poll", "ppoll"))], ids=["connect", "poll"]
)
@pytest.mark.parametrize("only_connecting", [False, True])
def test_a_thread_that_waits_to_be_connected_is_got_out_of_there(
    timeout_s: float | None, call: tuple[str, ...], only_connecting: bool
) -> None:
    with full_peer() as (host, port):
        waiting = Waiting(lambda: socket.create_connection((host, port), timeout=timeout_s))
        assert waiting.waits_in(*call)
        assert end_call(waiting.id, f"{host}:{port}", yes, only_connecting)
        assert waiting.came_back()
        assert isinstance(waiting.result, OSError)


def test_one_that_is_connected_is_left_alone_where_only_those_that_connect_are_to_be_ended(peer: Peer) -> None:
    """A stopped peer's kernel takes the connection, and the probe is answered the moment the peer goes on."""
    connection = peer.connect()
    waiting = Waiting(lambda: connection.recv(1))
    assert waiting.waits_in("recvfrom")
    assert not end_call(waiting.id, peer.session, yes, only_connecting=True)
    peer.far_end_of(connection).sendall(b"!")
    assert waiting.came_back()
    assert waiting.result == b"!"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_a_peer_is_known_by_its_address_however_it_is_written(host: str, new_peer: Callable[..., Peer]) -> None:
    try:
        peer = new_peer(host)
    except OSError:
        pytest.skip(f"no {host} here")
    ways = {
        "::1": [f"[::1]:{peer.port}", f"[0:0:0:0:0:0:0:1]:{peer.port}", f"ip6-localhost:{peer.port}"],
        "127.0.0.1": [f"127.0.0.1:{peer.port}", f"[::ffff:127.0.0.1]:{peer.port}", f"localhost:{peer.port}"],
    }
    for session in ways[host]:
        connection = peer.connect()
        waiting = Waiting(lambda connection=connection: connection.recv(1))
        assert waiting.waits_in("recvfrom")
        assert end_call(waiting.id, session, yes), session
        assert waiting.came_back()


# What is not the call that is meant is never touched.


def test_a_call_that_is_no_longer_the_one_that_is_meant_is_left_alone(peer: Peer) -> None:
    """The thread is back in the same system call at the same place, on the next call to the same peer."""
    connection = peer.connect()
    waiting = Waiting(lambda: connection.recv(1))
    assert waiting.waits_in("recvfrom")
    assert not end_call(waiting.id, peer.session, no)
    peer.far_end_of(connection).sendall(b"x")
    assert waiting.came_back()
    assert waiting.result == b"x"
    assert is_untouched(peer, connection)


@pytest.mark.parametrize("session", ["127.0.0.1:{other_port}", "127.0.0.2:{port}", "[::1]:{port}"])
def test_a_connection_to_somebody_else_is_left_alone(session: str, peer: Peer) -> None:
    connection = peer.connect()
    waiting = Waiting(lambda: connection.recv(1))
    assert waiting.waits_in("recvfrom")
    assert not end_call(waiting.id, session.format(port=peer.port, other_port=peer.port % 65535 + 1), yes)
    peer.far_end_of(connection).sendall(b"x")
    assert waiting.came_back()
    assert is_untouched(peer, connection)


def test_a_pipe_is_left_alone(peer: Peer) -> None:
    read_end, write_end = os.pipe()
    waiting = Waiting(lambda: os.read(read_end, 1))
    assert waiting.waits_in("read")
    assert not end_call(waiting.id, peer.session, yes)
    os.write(write_end, b"x")
    assert waiting.came_back()
    assert waiting.result == b"x"
    os.close(read_end)
    os.close(write_end)


def test_a_socket_that_leads_to_no_network_is_left_alone(peer: Peer) -> None:
    one, other = socket.socketpair()
    with one, other:
        waiting = Waiting(lambda: one.recv(1))
        assert waiting.waits_in("recvfrom")
        assert not end_call(waiting.id, peer.session, yes)
        other.sendall(b"x")
        assert waiting.came_back()
        assert waiting.result == b"x"


def test_a_thread_that_waits_for_several_descriptors_or_for_none_is_left_alone(peer: Peer) -> None:
    connections = [peer.connect(), peer.connect()]
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    many, none = Waiting(lambda: poll.poll(30_000)), threading.Event()
    idle = Waiting(none.wait)
    assert not wait_until(lambda: wait_of(many.id) or wait_of(idle.id), within_s=0.2)
    assert not end_call(many.id, peer.session, yes)
    assert not end_call(idle.id, peer.session, yes)
    peer.far_end_of(connections[0]).sendall(b"x")
    none.set()
    assert many.came_back()
    assert idle.came_back()


class NumberIsReused:
    """A thread in a call whose peer replies, and whose descriptor is closed and given to another, just in time."""

    def __init__(self, peer: Peer, other: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connection = peer.connect()
        self.number = self.connection.fileno()
        self.others = other.connect()
        self.waiting = Waiting(lambda: self.connection.recv(1))
        assert self.waiting.waits_in("recvfrom")
        self._far_end = peer.far_end_of(self.connection)
        self._dup = os.dup
        self.copies = 0
        self._monkeypatch = monkeypatch

    def before_the_copy(self, happens: Callable[[], None]) -> None:
        def dup(descriptor: int) -> int:
            assert descriptor == self.number
            self.copies += 1
            happens()
            return self._dup(descriptor)

        self._monkeypatch.setattr(os, "dup", dup)

    def the_call_returns_and_the_number_is_anothers(self) -> None:
        self._far_end.sendall(b"x")
        assert self.waiting.came_back()
        self.connection.close()
        os.dup2(self.others.fileno(), self.number)


@pytest.fixture
def reuse(
    new_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Peer, Peer], NumberIsReused]]:
    stories: list[NumberIsReused] = []

    def make(peer: Peer, other: Peer) -> NumberIsReused:
        stories.append(NumberIsReused(peer, other, monkeypatch))
        return stories[-1]

    yield make
    for story in stories:
        with contextlib.suppress(OSError):
            os.close(story.number)


@pytest.mark.parametrize("same_peer", [False, True])
def test_a_number_that_is_given_to_another_socket_between_the_look_and_the_copy_is_left_alone(
    same_peer: bool, new_peer: Callable[..., Peer], reuse: Callable[[Peer, Peer], NumberIsReused]
) -> None:
    peer = new_peer()
    other = peer if same_peer else new_peer()
    story = reuse(peer, other)
    story.before_the_copy(story.the_call_returns_and_the_number_is_anothers)
    assert not end_call(story.waiting.id, peer.session, yes)
    assert story.copies == 1
    assert is_untouched(other, story.others), "a transfer, or a client's connection, is cut"


def test_a_number_that_is_anothers_is_left_alone_though_the_thread_waits_in_the_same_place_again(
    new_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another's while the copy is made, and when the thread is looked at again it is its own once more."""
    peer, other = new_peer(), new_peer()
    connection, others = peer.connect(), other.connect()
    number, dup = connection.fileno(), os.dup
    waiting = Waiting(lambda: connection.recv(1))
    assert waiting.waits_in("recvfrom")

    def copies_anothers(descriptor: int) -> int:
        assert descriptor == number
        return dup(others.fileno())

    monkeypatch.setattr(os, "dup", copies_anothers)
    assert not end_call(waiting.id, peer.session, yes)
    assert is_untouched(other, others)
    peer.far_end_of(connection).sendall(b"x")
    assert waiting.came_back()


def test_a_number_that_is_closed_before_the_copy_is_left_alone(
    peer: Peer, new_peer: Callable[..., Peer], reuse: Callable[[Peer, Peer], NumberIsReused]
) -> None:
    story = reuse(peer, new_peer())

    def returns_and_closes() -> None:
        story.the_call_returns_and_the_number_is_anothers()
        os.close(story.number)

    story.before_the_copy(returns_and_closes)
    assert not end_call(story.waiting.id, peer.session, yes)
    assert story.copies == 1


# Where the kernel does not tell, or the process is at its limit.


def replace_what_the_kernel_tells(by: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``by()`` gives the file that is read in place of the one that says where a thread waits, or raises."""
    open_file, open_descriptor = open, os.open

    def path(name: str) -> Any:
        return by() if name.endswith("/syscall") else name

    monkeypatch.setattr(os, "open", lambda name, *how: open_descriptor(path(name), *how))
    monkeypatch.setattr(
        hung_call, "open", lambda name, *how, **more: open_file(path(name), *how, **more), raising=False
    )


@pytest.mark.parametrize(
    "missing",
    [
        FileNotFoundError(errno.ENOENT, "no such file"),  # gVisor
        PermissionError(errno.EPERM, "not permitted"),
        ProcessLookupError(errno.ESRCH, "no such process"),
    ],
    ids=repr,
)
def test_where_the_kernel_does_not_tell_nothing_is_ended_and_nothing_breaks(
    missing: OSError, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = peer.connect()
    waiting = Waiting(lambda: connection.recv(1))
    assert waiting.waits_in("recvfrom")
    replace_what_the_kernel_tells(raises(missing), monkeypatch)
    assert wait_of(waiting.id) is None
    assert not end_call(waiting.id, peer.session, yes)
    peer.far_end_of(connection).sendall(b"x")
    assert waiting.came_back()


def test_a_thread_that_has_ended_is_no_call_to_end(peer: Peer) -> None:
    over = Waiting(lambda: None)
    assert over.came_back()
    assert not end_call(over.id, peer.session, yes)


def test_without_a_descriptor_left_nothing_is_ended_and_nothing_breaks(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = peer.connect()
    waiting = Waiting(lambda: connection.recv(1))
    assert waiting.waits_in("recvfrom")
    with monkeypatch.context() as at_its_limit:
        none_left = OSError(errno.EMFILE, "too many open files")
        at_its_limit.setattr(os, "dup", lambda _: raises(none_left)())
        assert not end_call(waiting.id, peer.session, yes)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert not end_call(waiting.id, peer.session, yes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert end_call(waiting.id, peer.session, yes), "it can be ended later"
    assert waiting.came_back()


def test_no_descriptor_is_left_behind_whether_a_call_is_ended_or_not(peer: Peer, new_peer: Callable[..., Peer]) -> None:
    read_end, write_end = os.pipe()
    connections = [peer.connect() for _ in range(3)]
    stranger = new_peer().connect()
    waiting = [Waiting(lambda connection=connection: connection.recv(1)) for connection in [*connections, stranger]]
    in_pipe = Waiting(lambda: os.read(read_end, 1))
    assert all(one.waits_in("recvfrom") for one in waiting)
    assert in_pipe.waits_in("read")
    before = len(os.listdir("/proc/self/fd"))
    ended = [end_call(one.id, peer.session, yes) for one in [*waiting, in_pipe]]
    ended += [end_call(waiting[-1].id, peer.session, no) for _ in range(20)]
    assert ended == [True] * 3 + [False] * 22
    assert len(os.listdir("/proc/self/fd")) == before
    os.write(write_end, b"x")
    assert in_pipe.came_back()
    os.close(read_end)
    os.close(write_end)


# What the kernel's line says, on either machine.

# linux/include/uapi/asm-generic/unistd.h (ARM has these, and no poll); linux/arch/x86/entry/syscalls/syscall_64.tbl.
NUMBERS = [
    ("aarch64", 63, "read"),
    ("aarch64", 203, "connect"),
    ("aarch64", 207, "recvfrom"),
    ("aarch64", 212, "recvmsg"),
    ("x86_64", 0, "read"),
    ("x86_64", 42, "connect"),
    ("x86_64", 45, "recvfrom"),
    ("x86_64", 47, "recvmsg"),
]
POLLS = [("aarch64", 73, "ppoll"), ("x86_64", 7, "poll"), ("x86_64", 271, "ppoll")]


def line(number: int, first: int, second: int) -> str:
    return f"{number} {first:#x} {second:#x} 0x1 0x0 0x0 0x0 0x7f8c1dbaea10 0x7f8c1e328974\n"


@pytest.mark.parametrize(("machine", "number", "call"), NUMBERS)
def test_a_call_that_waits_for_a_descriptor_is_known_by_its_number_on_each_machine(
    machine: str, number: int, call: str
) -> None:
    wait = hung_call._wait_in(line(number, 42, 0x7F8C1DED3AD0), machine)
    assert wait == (call, "0x7f8c1dbaea10", "0x7f8c1e328974", 42)


@pytest.mark.parametrize(("machine", "number", "call"), POLLS)
def test_a_poll_of_one_descriptor_is_known_on_each_machine_and_one_of_several_is_not(
    machine: str, number: int, call: str
) -> None:
    class PollDescriptor(ctypes.Structure):
        _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))

    asked = PollDescriptor(43, 1, 0)
    wait = hung_call._wait_in(line(number, ctypes.addressof(asked), 1), machine)
    assert wait == (call, "0x7f8c1dbaea10", "0x7f8c1e328974", 43)
    assert hung_call._wait_in(line(number, ctypes.addressof(asked), 2), machine) is None


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        ("x86_64", "running\n"),
        ("aarch64", "running\n"),
        ("x86_64", "-1 0x7f8c1dbaea10 0x7f8c1e328974\n"),  # it waits in no system call
        ("x86_64", ""),
        ("x86_64", line(202, 42, 0)),  # futex; on ARM accept
        ("aarch64", line(98, 42, 0)),  # futex
        ("aarch64", line(202, 42, 0)),  # accept: a server's own
        ("aarch64", line(7, 42, 1)),  # poll on x86-64, fsetxattr here
        ("aarch64", line(45, 42, 1)),  # recvfrom on x86-64, truncate here
        ("x86_64", line(203, 42, 1)),  # connect on ARM, sched_setaffinity here
        ("x86_64", line(63, 42, 1)),  # read on ARM, uname here
        ("riscv64", line(63, 42, 1)),  # a machine that we have not looked at
    ],
)
def test_whatever_else_a_thread_does_is_no_wait_for_a_peer(machine: str, text: str) -> None:
    assert hung_call._wait_in(text, machine) is None


def test_a_poll_whose_memory_is_gone_is_no_wait_for_a_peer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread and its stack may go between the two looks into /proc."""
    syscall = tmp_path / "syscall"
    syscall.write_text(line(73, 0x10, 1))
    replace_what_the_kernel_tells(lambda: syscall, monkeypatch)
    assert wait_of(1, "aarch64") is None
