"""How is a decode node cut off, without a rule in anybody else's network?

All of it runs in a network namespace of this process's own: it is gone with the last process in it, the rules too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from collections.abc import Iterator, Sequence

from demo.processes import Failure, uninterrupted

MOONCAKE_PORTS = range(14900, 18000)
_CLONE_NEWNET = 0x40000000


def own_network() -> None:
    """Give this process, and those that it starts from now on, a loopback device of their own and nothing else.

    Raises Failure where that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        why = os.strerror(ctypes.get_errno())
        raise Failure(f"packets are rejected in a network namespace of our own, and there can be none: {why}; be root")
    try:
        _run("ip", "link", "set", "lo", "up")
        _run("iptables", "-L")
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failure(f"this needs ip and iptables (Debian: iproute2 iptables): {error}") from error


@contextlib.contextmanager
def cut_off(scheduler: int, dropped: bool = False, others: Sequence[int] = ()) -> Iterator[None]:
    """Reject or drop, while the block runs, what is sent to Mooncake's ports of the scheduler with this pid, and to the
    `others`.
    """
    ports = mooncake_ports(_run("ss", "-ltnpH"), scheduler)
    if not ports:
        raise Failure(f"process {scheduler} listens on none of Mooncake's ports")
    match = ["-i", "lo", "-p", "tcp", "-m", "multiport", "--dports", ",".join(map(str, [*ports, *others]))]
    rule = ["INPUT", *match, "-j", *(["DROP"] if dropped else ["REJECT", "--reject-with", "tcp-reset"])]
    with contextlib.ExitStack() as stack:
        with uninterrupted():
            _run("iptables", "-I", *rule)
            stack.callback(_run, "iptables", "-D", *rule)
        yield


def mooncake_ports(listening: str, pid: int) -> list[int]:
    """Mooncake's ports that a process listens on, of what `ss -ltnpH` has printed."""
    lines = [line for line in listening.splitlines() if re.search(rf"\bpid={pid},", line)]
    ports = {int(line.split()[3].rpartition(":")[2]) for line in lines}
    return sorted(ports.intersection(MOONCAKE_PORTS))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
