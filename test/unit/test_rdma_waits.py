"""Is it seen that a thread of this process waits for an RDMA connection to be made? Real threads; pipes as devices."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import socket
import threading
from collections.abc import Iterator

import pytest
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake import hung_call, rdma_waits
from sglang.srt.disaggregation.mooncake.rdma_waits import a_thread_waits

D = "decode:7001"
POLL = {"x86_64": 7, "aarch64": 73}  # of one descriptor, in ``line`` below
MORE_THAN_A_PIPE_HOLDS = 100_000


@pytest.fixture
def devices(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder whose files count as RDMA devices."""
    (tmp_path / "infiniband").mkdir()
    monkeypatch.setattr(rdma_waits, "DEVICE_FILES", f"{tmp_path}/infiniband/uverbs")
    return tmp_path / "infiniband"


@contextlib.contextmanager
def a_thread_that_writes_to(pipe: pathlib.Path) -> Iterator[None]:
    """It waits as long as the block lasts, because nobody reads."""
    os.mkfifo(pipe)
    read_end, write_end = os.open(pipe, os.O_RDWR), os.open(pipe, os.O_WRONLY)
    thread = threading.Thread(target=os.write, args=(write_end, bytes(MORE_THAN_A_PIPE_HOLDS)))
    thread.start()
    try:
        yield
    finally:
        left = MORE_THAN_A_PIPE_HOLDS
        while left:
            left -= len(os.read(read_end, left))
        thread.join()
        os.close(write_end)
        os.close(read_end)


def test_a_thread_is_seen_as_long_as_it_waits_in_the_driver(devices: pathlib.Path) -> None:
    assert a_thread_waits([]) is False
    with a_thread_that_writes_to(devices / "uverbs0"):
        assert wait_until(lambda: a_thread_waits([]) is True)
    assert a_thread_waits([]) is False


def test_a_thread_that_waits_for_anything_else_is_none(devices: pathlib.Path) -> None:
    with a_thread_that_writes_to(devices / "rdma_cm"):
        assert not wait_until(lambda: a_thread_waits([]) is not False, 0.2)


@contextlib.contextmanager
def a_thread_that_waits_for_a_reply() -> Iterator[str]:
    """As a thread of Mooncake's that shakes hands; gives the session that it waits for."""
    with socket.create_server(("127.0.0.1", 0)) as peer:
        host, port = peer.getsockname()
        connection = socket.create_connection((host, port))
        thread = threading.Thread(target=connection.recv, args=(1,))
        thread.start()
        try:
            yield f"{host}:{port}"
        finally:
            connection.shutdown(socket.SHUT_RDWR)
            thread.join()
            connection.close()


def test_a_thread_is_seen_that_waits_for_the_reply_of_a_peer_that_is_read() -> None:
    with a_thread_that_waits_for_a_reply() as session:
        assert wait_until(lambda: a_thread_waits([D, session]) is True)
        assert a_thread_waits([D]) is False, "what it waits for has nothing to do with the reads"
    assert a_thread_waits([D, session]) is False


def test_a_thread_that_waits_for_a_socket_of_another_kind_is_none() -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=ours.recv, args=(1,))
    thread.start()
    try:
        assert not wait_until(lambda: a_thread_waits([D]) is not False, 0.2)
    finally:
        theirs.close()
        thread.join()
        ours.close()


def test_a_thread_whose_memory_may_not_be_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """To know what a poll waits for, memory is read. A hardened container may forbid it, or the thread may be gone."""

    def bytes_at(path: str, *_: int) -> bytes:
        if path == "/proc/self/mem":
            raise PermissionError
        return line(POLL[platform.machine()], 1)

    monkeypatch.setattr(rdma_waits, "bytes_at", bytes_at)
    monkeypatch.setattr(hung_call, "bytes_at", bytes_at)
    assert a_thread_waits([D]) is False


def line(number: int, descriptor: int) -> bytes:
    return b"%d %#x 0x1 0x1 0x0 0x0 0x0 0x7f8c1dbaea10 0x7f8c1e328974\n" % (number, descriptor)


@pytest.mark.parametrize(
    ("machine", "number", "is_driver_call"),
    [
        ("x86_64", 1, True),  # write
        ("x86_64", 16, True),  # ioctl
        ("aarch64", 64, True),
        ("aarch64", 29, True),
        ("x86_64", 0, False),  # read: it waits for events
        ("x86_64", 64, False),
        ("aarch64", 16, False),
        ("aarch64", 63, False),  # read
    ],
)
def test_a_call_to_the_driver_is_known_by_its_number_on_each_machine(
    devices: pathlib.Path, monkeypatch: pytest.MonkeyPatch, machine: str, number: int, is_driver_call: bool
) -> None:
    with (devices / "uverbs1").open("w") as device:
        monkeypatch.setattr(rdma_waits, "bytes_at", lambda *_: line(number, device.fileno()))
        assert a_thread_waits([], machine) is is_driver_call


@pytest.mark.parametrize("text", [b"running\n", b"-1 0x7f8c1dbaea10 0x7f8c1e328974\n", b"", line(16, 999_999)])
def test_whatever_else_a_thread_does_is_no_call_to_the_driver(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(rdma_waits, "bytes_at", lambda *_: text)
    assert a_thread_waits([D], "x86_64") is False


def fails(*_: object) -> bytes:
    raise FileNotFoundError


@pytest.mark.parametrize(("name", "whose"), [("bytes_at", rdma_waits), ("listdir", os)])
def test_nothing_is_known_where_the_kernel_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, name: str, whose: object
) -> None:
    monkeypatch.setattr(whose, name, fails)
    assert a_thread_waits([]) is None


def test_nothing_is_known_on_a_machine_whose_calls_we_have_not_looked_up(devices: pathlib.Path) -> None:
    assert a_thread_waits([], "riscv64") is None
