"""How is a call into the engine ended that hangs in the kernel, waiting for a peer?

The kernel tells in which system call a thread waits, and for which descriptor. A copy of that descriptor refers to the
same socket even if the number is reused, and shutting the copy down ends the wait: the probe is then unanswered, as if
the peer had closed the connection.

1. We read the descriptor's number. 2. The call returns, and the number is given to another socket. 3. We copy the other
socket. So after the copy the thread must still wait in the same call at the same place, and a socket that is connected
must be connected to the peer. Where the kernel does not tell (gVisor), nothing is ended.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import socket
import struct
from collections.abc import Callable, Collection
from typing import NamedTuple, Optional

# The system calls in which Mooncake waits for a peer, by machine and number. These have the descriptor as their first
# argument: connect, read, recvfrom, recvmsg.
WAIT_FOR_DESCRIPTOR = {
    "x86_64": {42: "connect", 0: "read", 45: "recvfrom", 47: "recvmsg"},
    "aarch64": {203: "connect", 63: "read", 207: "recvfrom", 212: "recvmsg"},
}
# These have a struct pollfd* and the number of them. On ARM there is only ppoll.
WAIT_IN_POLL = {"x86_64": {7: "poll", 271: "ppoll"}, "aarch64": {73: "ppoll"}}
_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Wait(NamedTuple):
    """The system call that a thread waits in, its place in the program, and the descriptor that it waits for."""

    call: str
    stack_pointer: str
    instruction: str
    descriptor: int


def end_call(thread: int, session: str, is_in_call: Callable[[], bool], only_connecting: bool = False) -> bool:
    """Ends the wait of a thread of this process (the kernel's id) for a session's peer; True if that was done.

    ``is_in_call()`` is True as long as the thread makes the call that is to be ended; with ``only_connecting`` a
    connection that is made already is left alone. Does not block, raises nothing; any thread, no lock held.
    """
    wait = wait_of(thread)
    connection = wait and _copy_of(wait.descriptor)
    if not connection:
        return False
    with connection:
        try:
            if wait_of(thread) != wait or not is_in_call() or not _may_be_of(connection, session):
                return False
            if only_connecting and not _is_connecting(connection):
                return False
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
    return True


def waits_for_one_of(line: str, sessions: Collection[str], machine: str) -> bool:
    """True if a line of ``/proc/self/task/*/syscall`` tells of a wait for the peer of one of these sessions."""
    wait = _wait_in(line, machine)
    connection = wait and _copy_of(wait.descriptor)
    if not connection:
        return False
    with connection, contextlib.suppress(OSError):  # not connected
        if connection.family in _TCP_FAMILIES:
            port = connection.getpeername()[1]
            return any(_may_be_of(connection, session) for session in sessions if session.endswith(f":{port}"))
    return False


def _copy_of(descriptor: int) -> Optional[socket.socket]:
    """A copy that is the caller's to close; None if the descriptor is no socket."""
    try:
        copy = os.dup(descriptor)
    except (OSError, OverflowError):  # it is closed, or the process has no descriptor left
        return None
    try:
        return socket.socket(fileno=copy)
    except OSError:  # no socket
        os.close(copy)
        return None


def wait_of(thread: int, machine: str = platform.machine()) -> Optional[Wait]:
    """Where a thread of this process waits for a peer; None if it does not wait, or the kernel does not tell."""
    try:
        line = bytes_at(f"/proc/self/task/{thread}/syscall", 0, 256).decode()
    except OSError:  # the thread has ended, or there is no such file
        return None
    return _wait_in(line, machine)


def _wait_in(line: str, machine: str) -> Optional[Wait]:
    words = line.split()
    if len(words) < 9:  # "running", or waiting in no system call
        return None
    *_, stack_pointer, instruction = words
    with contextlib.suppress(OSError, ValueError, struct.error):  # its memory is gone, or may not be read
        number, first, second = int(words[0]), int(words[1], 16), int(words[2], 16)
        if name := WAIT_FOR_DESCRIPTOR.get(machine, {}).get(number):
            return Wait(name, stack_pointer, instruction, first)
        if (name := WAIT_IN_POLL.get(machine, {}).get(number)) and second == 1:
            (descriptor,) = struct.unpack("i", bytes_at("/proc/self/mem", first, 4))
            return Wait(name, stack_pointer, instruction, descriptor)
    return None


def bytes_at(path: str, offset: int, number: int) -> bytes:
    """So many bytes of a file, or fewer. A file object would cost six times as much, some hundred times a second."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, number, offset)
    finally:
        os.close(file)


def _is_connecting(connection: socket.socket) -> bool:
    syn_sent = 2
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == syn_sent


def _may_be_of(connection: socket.socket, session: str) -> bool:
    """False if the socket is no TCP connection, or one to another address than the session's peer."""
    if connection.family not in _TCP_FAMILIES or connection.type != socket.SOCK_STREAM:
        return False
    try:
        peer = connection.getpeername()
    except OSError:  # not connected yet
        return not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    host, _, port = session.rpartition(":")
    if peer[1] != int(port):
        return False
    if peer[0] == host:
        return True
    with contextlib.suppress(ValueError):  # the host is a name, whose address is not looked up here
        return _plain(host.strip("[]")) == _plain(peer[0])
    return True


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip
